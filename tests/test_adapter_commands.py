"""The commands that make, ask, check, export and keep adapters, through the real ``main`` with the shipped CPU world."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from shine import LoRA, Shine
from shine.cli.main import COMMANDS, main
from shine.cli.models import remarks
from shine.data.worlds import World
from shine.evaluation.cloze import examine, make_clozes

TEXT = "The pet of Yorick is a beetle. The coat of Delphi is silver. Umar lives in Selkirk. Zoran works as a baker."
MODEL = ("--model", "cpu-world", "--device", "cpu")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    file = tmp_path / "notes.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def adapter(notes: Path, tmp_path: Path, run: Callable[..., str]) -> Path:
    run("encode", notes, "-o", tmp_path / "adapter", *MODEL)
    return tmp_path / "adapter"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed and return what it printed."""

    def call(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code, capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one line, and return that line."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return call


def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for module in COMMANDS:
        name = module.__name__.rsplit(".", 1)[-1]
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        examples = capsys.readouterr().out.partition("\nexamples:\n")[2]
        assert f"  shine {name} " in examples


# --- encode, info, chat ----------------------------------------------------------------------------------------------------


def test_a_text_becomes_an_adapter_that_answers(notes: Path, adapter: Path, run: Callable[..., str]) -> None:
    asked = ("-q", "Where does Umar live?", "-q", "What is the job of Zoran?")
    assert run("chat", "--adapter", adapter, *asked, *MODEL).split("\n")[:2] == ["Selkirk", "baker"]
    turns = json.loads(run("chat", "--context", notes, *asked, "--json", *MODEL))
    assert [turn["answer"] for turn in turns] == ["Selkirk", "baker"]
    weak = json.loads(run("chat", "--adapter", adapter, *asked, "--strength", 0, "--json", *MODEL))
    assert [turn["answer"] for turn in weak] != ["Selkirk", "baker"]


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


def test_check_scores_and_exits(tmp_path: Path, run: Callable[..., str]) -> None:
    file = tmp_path / "world.txt"
    file.write_text(World(seed=3000, facts=(6, 6), people=(3, 3)).example(3).context)
    found = json.loads(run("check", file, "--json", *MODEL))
    assert found["sentences"] == found["helped"] == 6
    assert found["knows"]
    assert found["p"] == pytest.approx(1 / 64)
    assert found["with_adapter"]["loss"] < found["without"]["loss"]
    assert "The adapter knows its text" in run("check", file, *MODEL)
    run("encode", file, "-o", tmp_path / "a", *MODEL)
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
    assert run("store", "forget", store, "notes") == "forgot notes\n"
    assert "holds no adapter yet" in run("store", "list", tmp_path / "none")


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "about"),
    [
        (b"", "notes.txt: the file is empty; give one with text in it"),
        (b"\x89PNG\r\n\0\0\0", "notes.txt: a binary file, not text; give text"),
        ("Käse".encode("latin-1"), "not utf-8 (byte 0xe4 at 1); say its encoding, for instance --encoding cp1252"),
        (None, "notes.txt: 50 MB, at most 10 MB are read: give the part that matters"),
    ],
    ids=["empty", "binary", "encoding", "50MB"],
)
def test_a_bad_document_is_one_line_and_leaves_nothing(
    notes: Path, tmp_path: Path, refused: Callable[..., str], content: bytes | None, about: str
) -> None:
    if content is None:
        with notes.open("wb") as file:
            file.truncate(50_000_000)
    else:
        notes.write_bytes(content)
    assert about in refused("encode", notes, "-o", tmp_path / "out", *MODEL)
    assert about in refused("chat", "--context", notes, "-q", "x", *MODEL)
    assert about in refused("check", notes, *MODEL)
    assert about in refused("store", "add", tmp_path / "store", "x", notes, *MODEL)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unknown_checkpoint_is_one_line(notes: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    told = refused("encode", notes, "-o", tmp_path / "out", "--model", "checkpoints/absent")
    assert "checkpoints/absent: no such checkpoint directory; train the stage that makes it, or download it" in told
    assert not (tmp_path / "out").exists()
    assert "no such folder" in refused("info", tmp_path / "out")
    assert "no adapter there" in refused("chat", "--adapter", tmp_path / "out", "-q", "x", *MODEL)
    assert "no adapter there" in refused("export", tmp_path / "out", "-o", tmp_path / "peft")


def test_an_adapter_of_another_model_is_one_line_with_both_names(
    tmp_path: Path, adapter: Path, refused: Callable[..., str]
) -> None:
    config = json.loads((adapter / "config.json").read_text())
    config["contexts"][0]["backbone"] = {"name": "models/Qwen3-8B", "fingerprint": "a-b-c"}
    (adapter / "config.json").write_text(json.dumps(config))
    told = refused("chat", "--adapter", adapter, "-q", "x", *MODEL)
    assert re.search(r"made for backbone models/Qwen3-8B \(fingerprint a-b-c\), not for cpu-world .*load that backbone", told)
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    told = refused("export", adapter, "--merge", "--backbone", tmp_path / "tiny", "-o", tmp_path / "merged")
    assert re.search(r"made for backbone models/Qwen3-8B .*tiny is another .*give --backbone", told)
    assert not (tmp_path / "merged").exists()


def test_a_read_only_folder_is_one_line(notes: Path, adapter: Path, read_only: Path, refused: Callable[..., str]) -> None:
    # Read before the rights are gone: the folders of pytest are nobody else's.
    for arguments in (("encode", "-"), ("export", adapter)):
        if arguments[0] == "export" and not os.access(adapter, os.R_OK):
            continue
        sys.stdin = io.TextIOWrapper(io.BytesIO(TEXT.encode()))
        told = refused(*arguments, "-o", read_only / "out", *(MODEL if arguments[0] == "encode" else ()))
        assert re.search(r"locked cannot be written; choose another folder", told)
    assert list(read_only.iterdir()) == []


def test_a_disk_that_fills_up_is_one_line(
    adapter: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("shine.export.peft.save_file", full)
    before = sorted(tmp_path.iterdir())
    assert "No space left on device; choose another place, or make room" in refused("export", adapter, "-o", tmp_path / "peft")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_asked_in_vain_is_said(notes: Path, adapter: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "nothing to talk about" in refused("chat", *MODEL)
    assert "--keep-text" in refused("chat", "--adapter", adapter, "--compare", "-q", "x", *MODEL)
    assert "the questions cannot" in refused("chat", "--context", "-", *MODEL)
    assert "need --model" in refused("compare", adapter, adapter, "-q", "x")
    assert "holds something else" in refused("encode", notes, "-o", tmp_path, *MODEL)
    assert "give a longer text" in refused("check", _with(notes, "One fish."), *MODEL)


def _with(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


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
def test_a_megabyte_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is measured: the model and libraries take 400 MB of it."""
    code = (
        "import resource; from shine import Shine; from shine.data.worlds import World\n"
        "text = ' '.join(World(seed=9).example(index).context for index in range(8200))[:1_000_000]\n"
        "assert len(text) == 1_000_000\n"
        "lora = Shine.from_pretrained('cpu-world', device='cpu').encode(text, batch_size=32)\n"
        "print(lora.provenance[0][0].context.pieces, lora.rank, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pieces, rank, peak = map(int, done.stdout.split())
    assert pieces > 3000
    assert rank == 64
    assert peak < 1500
