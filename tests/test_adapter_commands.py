"""The commands that make, ask, check, export and keep adapters, through the real ``main`` with the shipped CPU world."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from conftest import ADAPTER_TEXT as TEXT
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from shine import LoRA, Shine
from shine.cli.main import main
from shine.cli.models import remarks
from shine.data.worlds import World
from shine.evaluation.cloze import examine, make_clozes

MODEL = ("--model", "cpu-world", "--device", "cpu")


# --- encode, info, chat ----------------------------------------------------------------------------------------------------


def test_a_text_becomes_an_adapter_that_answers(notes: Path, adapter: Path, run: Callable[..., str]) -> None:
    asked = ("-q", "Where does Umar live?", "-q", "What is the job of Zoran?")
    assert run("chat", "--adapter", adapter, *asked, *MODEL).split("\n")[:2] == ["Selkirk", "baker"]
    turns = json.loads(run("chat", "--context", notes, *asked, "--json", *MODEL))
    assert [turn["answer"] for turn in turns] == ["Selkirk", "baker"]
    weak = json.loads(run("chat", "--adapter", adapter, *asked, "--strength", 0, "--json", *MODEL))
    assert [turn["answer"] for turn in weak] != ["Selkirk", "baker"]


def test_the_model_can_come_from_the_environment(
    notes: Path, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHINE_MODEL", "cpu-world")
    assert run("chat", "--context", notes, "-q", "Where does Umar live?", "--device", "cpu") == "Selkirk\n"
    # An option says more than the environment.
    monkeypatch.setenv("SHINE_MODEL", "checkpoints/absent")
    assert run("chat", "--context", notes, "-q", "Where does Umar live?", *MODEL) == "Selkirk\n"


def test_info_tells_the_provenance(adapter: Path, run: Callable[..., str]) -> None:
    found = json.loads(run("info", adapter, "--json"))
    (span,) = found["contexts"]
    assert span == json.loads((adapter / "config.json").read_text())["contexts"][0]
    assert (found["kind"], found["rank"], found["linears"]) == ("adapter", 2, 28)
    assert found["parameters"] == sum(a.numel() + b.numel() for a, b in LoRA.load(adapter).values())
    told = run("info", adapter)
    for part in (span["context"]["sha256"], span["hypernetwork"]["fingerprint"], span["backbone"]["fingerprint"], "notes.txt"):
        assert part in told
    assert "reads at once  64 tokens" in run("info", "cpu-world")
    assert TEXT not in told


@pytest.mark.parametrize(
    ("options", "kind", "record"),
    [
        (["--format", "peft"], "PEFT adapter", "shine.json"),
        (["--merge"], "merged model", "shine.json"),
        (["--format", "gguf"], "GGUF adapter", "adapter.gguf"),
    ],
)
def test_info_tells_the_provenance_of_what_was_exported(
    adapter: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str], options: list[str], kind: str, record: str
) -> None:
    run("export", adapter, *options, "-o", tmp_path / "out")
    found = json.loads(run("info", tmp_path / "out", "--json"))
    assert found == {"kind": kind, "contexts": json.loads(run("info", adapter, "--json"))["contexts"]}
    assert "notes.txt" in run("info", tmp_path / "out")
    for damage in (b"{}", b"[]", b"GGUF", b""):
        (tmp_path / "out" / record).write_bytes(damage)
        assert re.search(rf"{record}: .*cannot be read \(.*\); export the adapter again", refused("info", tmp_path / "out"))


def test_standard_input_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Callable[..., str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    (written,) = json.loads(run("encode", "-", "-o", tmp_path / "a", "--json", "--keep-text", *MODEL))
    assert written["folder"] == str(tmp_path / "a")
    assert written["contexts"][0]["context"]["text"] == TEXT


def test_a_folder_gives_an_adapter_for_each_text_or_their_sum(tmp_path: Path, run: Callable[..., str]) -> None:
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / "one.txt").write_text("Umar lives in Selkirk.")
    (tmp_path / "texts" / "sub" / "two.md").write_text("Zoran works as a baker.")
    assert run("encode", tmp_path / "texts", "-o", tmp_path / "apart", *MODEL).count("\n") == 2
    assert sorted(folder.name for folder in (tmp_path / "apart").iterdir()) == ["one", "sub-two"]
    run("encode", tmp_path / "texts", "-o", tmp_path / "sum", "--join", *MODEL)
    joined = LoRA.load(tmp_path / "sum")
    assert [span.context.name for span in joined.provenance[0]] == ["one.txt", "sub/two.md"]
    assert joined.rank == 4
    for path, (a, b) in joined.items():
        parts = [LoRA.load(tmp_path / "apart" / name)[path] for name in ("one", "sub-two")]
        torch.testing.assert_close(a @ b, sum(x @ y for x, y in parts))


def test_questions_come_line_by_line(monkeypatch: pytest.MonkeyPatch, adapter: Path, run: Callable[..., str]) -> None:
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("Where does Umar live?\n/strength 0\n/reset\n\nWhere does Umar live?\n/quit\nmore\n")
    )
    lines = run("chat", "--adapter", adapter, *MODEL).strip().split("\n")
    assert lines[0] == "Selkirk"
    assert lines[1:3] == ["strength 0", "a new conversation"]
    assert len(lines) == 4
    assert lines[3] != "Selkirk"


def test_three_methods_side_by_side(notes: Path, run: Callable[..., str]) -> None:
    (turn,) = json.loads(run("chat", "--context", notes, "--compare", "-q", "Where does Umar live?", "--json", *MODEL))
    answers = turn["answers"]
    assert list(answers) == ["shine", "in_context", "only_question"]
    assert answers["shine"] == answers["in_context"] == "Selkirk" != answers["only_question"]
    shown = run("chat", "--context", notes, "--compare", "-q", "Where does Umar live?", *MODEL)
    for title in ("SHINE", "In-Context", "Only Question"):
        assert title in shown


# --- long texts ------------------------------------------------------------------------------------------------------------


def test_a_long_text_is_added_up_or_cut_and_says_so(
    tmp_path: Path, run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.txt"
    file.write_text(" ".join(World(seed=8).example(index).context for index in range(6)))
    assert main(["encode", str(file), "-o", str(tmp_path / "sum"), *MODEL]) == 0
    assert re.search(r"note: long\.txt: \d+ tokens are more than .* the sum of \d+ pieces \(rank \d+\)", capsys.readouterr().err)
    (span,) = LoRA.load(tmp_path / "sum").provenance[0]
    assert span.rank == 2 * span.context.pieces > 6
    assert span.context.read == span.context.tokens
    assert main(["encode", str(file), "-o", str(tmp_path / "cut"), "--cut", *MODEL]) == 0
    assert re.search(r"note: long\.txt: cut, 64 of \d+ tokens were read", capsys.readouterr().err)
    assert LoRA.load(tmp_path / "cut").rank == 2
    assert main(["encode", str(file), "-o", str(tmp_path / "less"), "--max-rank", "2", *MODEL]) == 0
    assert re.search(r"reduced to rank 2, about \d+\.\d% of the update", capsys.readouterr().err)
    whole, less = LoRA.load(tmp_path / "sum"), LoRA.load(tmp_path / "less")
    assert less.rank == 2
    # The share of the squared norm that is kept, against the update itself.
    kept = less.inner(less) / whole.inner(whole)
    assert kept == pytest.approx(less.provenance[0][0].kept, rel=0.05)
    assert remarks(less)[-1].startswith("long.txt: reduced to rank 2")


# --- check, compare --------------------------------------------------------------------------------------------------------


def test_check_knows_the_right_adapter_from_a_wrong_one(tmp_path: Path) -> None:
    """Over several invented contexts: own adapters help in most sentences, another context's in fewer than half."""
    shine = Shine.from_pretrained("cpu-world", device="cpu")
    own = other = count = 0
    for index in range(12):
        text, another = (
            World(seed=3000, facts=(6, 6), people=(3, 3)).example(index).context,
            World(seed=3000).example(index).context,
        )
        try:
            clozes = make_clozes(text)
        except ValueError:
            continue
        count += len(clozes)
        own += examine(shine, shine.encode(text), clozes).helped
        other += examine(shine, shine.encode(another), clozes).helped
    assert count > 40
    assert own > 0.7 * count
    assert other < 0.5 * count


def test_clozes_hold_out_a_word_that_comes_once() -> None:
    text = "A red fox. A red hen. The dog is old. Tom ate 12 figs. Ann ran home. Bob sat there. Bob sat. Its cat, Kit, slept."
    held = {cloze.word: cloze for cloze in make_clozes(text)}
    assert set(held) == {"fox", "hen", "old", "figs", "home", "there", "slept"}
    assert held["figs"].start == "Tom ate 12"
    assert all(cloze.word in cloze.choices and len(set(cloze.choices)) == 7 for cloze in held.values())
    with pytest.raises(ValueError, match=r"only 2 sentences.*5 are needed: give a longer text"):
        make_clozes("One fish. Two birds.")


def test_check_scores_and_exits(tmp_path: Path, run: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "world.txt"
    file.write_text(World(seed=3000, facts=(6, 6), people=(3, 3)).example(3).context)
    found = json.loads(run("check", file, "--json", *MODEL))
    assert found["sentences"] == found["helped"] == 6
    assert found["knows"]
    assert found["p"] == pytest.approx(1 / 64)
    assert found["with_adapter"]["loss"] < found["without"]["loss"]
    assert "The adapter knows its text" in run("check", file, *MODEL)
    run("encode", file, "-o", tmp_path / "a", *MODEL)
    other = tmp_path / "other.txt"
    other.write_text(World(seed=3000, facts=(6, 6), people=(3, 3)).example(5).context)
    for text, noted in ((file, False), (other, True)):
        main(["check", str(text), "--adapter", str(tmp_path / "a"), *MODEL])
        assert (f"{tmp_path / 'a'} was made from another text than {text}" in capsys.readouterr().err) is noted
    # As if without the adapter: nothing is helped, which chance explains well.
    assert "cannot be told from chance" in run("check", file, "--adapter", tmp_path / "a", "--strength", 0, *MODEL, code=1)


def test_compare_measures_and_asks(notes: Path, adapter: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    notes.write_text(TEXT.replace("Selkirk", "Arlow"))
    run("encode", notes, "-o", tmp_path / "other", *MODEL)
    found = json.loads(run("compare", adapter, tmp_path / "other", "-q", "Where does Umar live?", "--json", *MODEL))
    a, b = (torch.cat([(x @ y).flatten() for x, y in LoRA.load(folder).values()]) for folder in (adapter, tmp_path / "other"))
    assert found["cosine"] == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)), abs=1e-5)
    assert found["a"]["norm"] == pytest.approx(float(a.norm()), rel=1e-5)
    assert found["answers"] == [{"question": "Where does Umar live?", "a": "Selkirk", "b": "Arlow"}]
    same = json.loads(run("compare", "cpu-world", "cpu-world", "--context", notes, "--device", "cpu", "--json"))
    assert same["cosine"] == pytest.approx(1)
    assert "cosine between the updates: 1.0000" in run("compare", adapter, adapter)


# --- export, store ---------------------------------------------------------------------------------------------------------


def test_from_a_text_to_peft(notes: Path, adapter: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    run("encode", notes, "-o", tmp_path / "direct", "--format", "peft", *MODEL)
    run("export", adapter, "-o", tmp_path / "exported")
    run("export", adapter, "-o", tmp_path / "merged", "--merge")
    base = json.loads((tmp_path / "direct" / "adapter_config.json").read_text())["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer("<|im_start|>user\nWhere does Umar live?<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(tmp_path / "merged")]
    models += [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / n) for n in ("direct", "exported")]
    for model in models:
        tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == "Selkirk"
    assert json.loads(run("info", tmp_path / "exported", "--json"))["kind"] == "PEFT adapter"
    assert json.loads(run("info", tmp_path / "merged", "--json"))["kind"] == "merged model"


def test_several_exports_go_side_by_side(notes: Path, adapter: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    notes.write_text(TEXT.replace("Selkirk", "Arlow"))
    run("encode", notes, "-o", tmp_path / "other", *MODEL)
    written = json.loads(run("export", adapter, tmp_path / "other", "-o", tmp_path / "peft", "--json"))
    assert [Path(entry["folder"]).name for entry in written] == ["adapter", "other"]
    run("export", adapter, tmp_path / "other", "-o", tmp_path / "sum", "--join", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["r"] == 4
    assert "reduced to rank 2" in run("export", adapter, tmp_path / "other", "-o", tmp_path / "sum", "--join", "--max-rank", 2)


def test_a_reduced_sum_says_where_it_comes_from(
    notes: Path, adapter: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("Selkirk", "Arlow"))
    run("encode", other, "-o", tmp_path / "other", *MODEL)
    run("export", adapter, tmp_path / "other", "--join", "--max-rank", 2, "-o", tmp_path / "sum")
    told = run("info", tmp_path / "sum")
    assert "nobody recorded" not in told
    assert told.count("rank          2 at strength 1, shared with the other contexts") == 2
    assert all(name in told for name in ("notes.txt", "other.txt"))
    joined = LoRA.concat([LoRA.load(adapter), LoRA.load(tmp_path / "other")])
    reduced = joined.reduce(2)[0]
    reduced.save(tmp_path / "kept")
    with pytest.raises(ValueError, match="share its rank, since their sum was reduced: join them again"):
        LoRA.load(tmp_path / "kept").spans()
    assert len(joined.reduce(4)[0].spans()) == 2
    tiny = Shine.from_pretrained("cpu-world", device="cpu")
    tiny.check_fits(reduced)
    foreign = tuple(
        tuple(replace(span, backbone=replace(span.backbone, fingerprint="a-b-c", name="far/away")) for span in spans)
        for spans in reduced.provenance
    )
    with pytest.raises(ValueError, match="made for backbone far/away"):
        tiny.check_fits(replace(reduced, provenance=foreign))


def test_the_store_from_the_command_line(notes: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    store = tmp_path / "store"
    assert run("store", "add", store, "notes", notes, *MODEL) == f"{store}/notes/1\n"
    assert "the same text: nothing changed" in run("store", "update", store, "notes", notes, *MODEL)
    notes.write_text(TEXT.replace("Selkirk", "Arlow"))
    assert json.loads(run("store", "update", store, "notes", notes, "--json", *MODEL))["version"] == 2
    run("store", "add", store, "again", notes, *MODEL)
    assert [entry["name"] for entry in json.loads(run("store", "list", store, "--json"))] == ["again", "notes"]
    assert "cpu-world" in run("store", "list", store)
    run("store", "compose", store, "notes", "-o", tmp_path / "now")
    (turn,) = json.loads(run("chat", "--adapter", tmp_path / "now", "-q", "Where does Umar live?", "--json", *MODEL))
    assert turn["answer"] == "Arlow"
    both = json.loads(run("store", "compose", store, "notes", "again", "-o", tmp_path / "both", "--strength", 0.5, "--json"))
    assert both["rank"] == 4
    assert [span["strength"] for span in both["contexts"]] == [0.5, 0.5]
    half, now = LoRA.load(tmp_path / "both"), LoRA.load(tmp_path / "now")
    assert half.inner(half) == pytest.approx(now.inner(now), rel=1e-4)
    assert "(rank 2, 2 contexts" in run("store", "compose", store, "notes", "again", "-o", tmp_path / "less", "--max-rank", 2)
    assert all(span.shared for span in LoRA.load(tmp_path / "less").provenance[0])
    assert run("store", "forget", store, "notes") == "forgot notes\n"
    assert json.loads(run("store", "forget", store, "again", "--json")) == {"name": "again", "forgotten": True}
    assert "holds no adapter yet" in run("store", "list", tmp_path / "none")


# --- bad input -------------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_readme_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]) -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    section = readme.partition("## From a text to an adapter\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^(echo .*|shine [a-z].*)$", section, re.MULTILINE)
    assert [command.split()[:2] for command in commands] == [["echo", '"Zoran'], ["shine", "encode"], ["shine", "chat"]]
    monkeypatch.chdir(tmp_path)
    text, file = re.fullmatch(r'echo "(.*)" > (\S+)', commands[0]).groups()
    Path(file).write_text(text + "\n")
    encode, chat = (shlex.split(command, comments=True)[1:] for command in commands[1:])
    run(*encode)
    assert (tmp_path / "notes-peft" / "adapter_config.json").exists()
    assert (tmp_path / "notes-peft" / "adapter_model.safetensors").exists()
    assert run(*chat) == "baker\n"


@pytest.mark.slow
@pytest.mark.parametrize("max_rank", [None, 4])
def test_a_megabyte_is_read_in_bounded_memory(tmp_path: Path, max_rank: int | None) -> None:
    """In a process of its own, whose peak is measured: the model and libraries take 400 MB of it."""
    code = (
        "import resource; from shine import Shine; from shine.data.worlds import World\n"
        "text = ' '.join(World(seed=9).example(index).context for index in range(8200))[:1_000_000]\n"
        "assert len(text) == 1_000_000\n"
        f"lora = Shine.from_pretrained('cpu-world', device='cpu').encode(text, batch_size=32, max_rank={max_rank})\n"
        "print(lora.provenance[0][0].context.pieces, lora.rank, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pieces, rank, peak = map(int, done.stdout.split())
    assert pieces > 3000
    # Full rank is that of the widest linear, 64.
    assert rank == (max_rank or 64)
    assert peak < 1500


def test_what_is_held_while_a_long_text_is_read_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than twice the bound in ranks, however many pieces there are."""
    shine, held = Shine.from_pretrained("cpu-world", device="cpu"), []
    concat = LoRA.concat

    def counted(loras: list[LoRA]) -> LoRA:
        held.append(sum(lora.rank for lora in loras))
        return concat(loras)

    monkeypatch.setattr(LoRA, "concat", staticmethod(counted))
    text = " ".join(World(seed=9).example(index).context for index in range(60))
    lora = shine.encode(text, max_rank=4, batch_size=3)
    assert lora.provenance[0][0].context.pieces > 25
    assert len(held) > 5
    assert max(held) <= 2 * 4 + 2
    assert lora.rank == 4


# --- in a terminal, and installed ---------------------------------------------------------------------------------------------


def test_a_conversation_in_a_terminal(notes: Path) -> None:
    command = ["-m", "shine.cli.main", "chat", "--context", str(notes), *MODEL]
    with pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=60, dimensions=(30, 120)) as terminal:
        terminal.expect(r"about notes\.txt, which cpu-world does not see")
        for typed, answer in (
            ("Where does Umar live?", "Selkirk"),
            ("/strength 0.5", r"strength 0\.5"),
            ("/strength much", r"strength is 0\.5; a number sets it"),
            ("/strength nan", r"strength is 0\.5; a number sets it"),
            ("/help", "/reset forgets the conversation"),
            ("/reset", "a new conversation"),
            ("/strength 1", "strength 1"),
            ("What is the job of Zoran?", "baker"),
        ):
            terminal.expect("> ")
            terminal.sendline(typed)
            terminal.expect(answer)
        terminal.expect("> ")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0


def test_progress_is_shown_in_a_terminal(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(" ".join(World(seed=8).example(index).context for index in range(16)))
    command = ["-m", "shine.cli.main", "encode", str(file), "-o", str(tmp_path / "out"), *MODEL]
    with pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=60, dimensions=(30, 120)) as terminal:
        terminal.expect(r"reading long\.txt: (\d+) of about (\d+) pieces")
        done, total = map(int, terminal.match.groups())
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0
    pieces = LoRA.load(tmp_path / "out").provenance[0][0].context.pieces
    assert 0 < done <= pieces
    assert pieces / 2 < total < 2 * pieces


@pytest.mark.slow
def test_an_installed_shine_runs_what_the_readme_says(tmp_path: Path) -> None:
    """``pip install .`` into an environment of its own, which borrows the libraries of this one; then the commands, in a shell."""
    root = Path(__file__).resolve().parent.parent
    shutil.copytree(root, tmp_path / "clone", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "outputs"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    # Behind what is installed here, so that this SHINE comes first.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    Path(site.stdout.strip(), "libraries.pth").write_text("\n".join(libraries))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([python, "-m", "pip", "install", *options, tmp_path / "clone"], check=True, env=environment)
    section = (root / "README.md").read_text().partition("## From a text to an adapter\n")[2].partition("\n## ")[0]
    commands = section.partition("```sh\n")[2].partition("```")[0]
    (tmp_path / "work").mkdir()
    path = f"{tmp_path / 'venv' / 'bin'}:{environment['PATH']}"
    done = subprocess.run(
        ["sh", "-ec", commands],
        cwd=tmp_path / "work",
        env={**environment, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "baker"
    assert (tmp_path / "work" / "notes-peft" / "adapter_model.safetensors").exists()
    where = subprocess.run(
        [python, "-c", "import shine; print(shine.__file__)"], env=environment, cwd=tmp_path, capture_output=True
    )
    assert str(tmp_path / "venv") in where.stdout.decode()
    # So that a type checker believes the annotations.
    assert (Path(where.stdout.decode().strip()).parent / "py.typed").is_file()
