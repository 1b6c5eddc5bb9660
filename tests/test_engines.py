"""What vLLM and SGLang take, and a loopback server that behaves as their sources say, with a real model behind it."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from engine_server import EngineServer, engine_server
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from shine import LoRA, Shine
from shine.cli.main import main
from shine.export.engines import ENGINES
from shine.export.peft import write_peft
from shine.export.server import Served, Server, name_for

TEXT = "Umar lives in Selkirk. Zoran works as a baker. The coat of Delphi is silver."
QUESTION = "What is the job of Zoran?"
MODEL = ("--model", "cpu-world", "--device", "cpu")
KINDS = ("vllm", "sglang")


@pytest.fixture(scope="module")
def shine() -> Shine:
    return Shine.from_pretrained("cpu-world", device="cpu")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text(TEXT)
    return tmp_path / "notes.txt"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[EngineServer]:
    with engine_server(request.param) as running:
        yield running


def at(server: EngineServer) -> tuple[str, ...]:
    return ("--engine", server.kind, "--server", server.address)


# --- the rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "needed"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (321, 512), (512, 512)])
def test_vllm_is_to_be_started_with_a_rank_that_it_knows(rank: int, needed: int) -> None:
    start = ENGINES["vllm"].check("a", rank=rank, modules=["q_proj"], base="B")
    assert start == f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve B --enable-lora --max-lora-rank {needed}"


def test_sglang_is_to_be_told_the_rank_and_the_modules() -> None:
    start = ENGINES["sglang"].check("a", rank=20, modules=["v_proj", "q_proj"], base="B")
    assert start.endswith("--model-path B --enable-lora --max-lora-rank 20 --lora-target-modules q_proj v_proj")


@pytest.mark.parametrize(
    ("engine", "options", "about"),
    [
        ("vllm", {"rank": 513}, "rank 513 is more than the largest it can be set to, 512: reduce it, --max-rank 512"),
        ("vllm", {"rank": 17, "server_rank": 16}, "more than the server's 16: start it with --max-lora-rank 32, or reduce"),
        ("sglang", {"rank": 17, "server_rank": 16}, "more than the server's 16: start it with --max-lora-rank 17, or reduce"),
        ("sglang", {"name": "a:b"}, "'a:b' cannot be a name"),
        ("vllm", {"name": "a/b"}, "'a/b' cannot be a name"),
        ("vllm", {"modules": ["q_proj", "router"]}, "adapts no linear called router"),
        ("vllm", {"rank": 600, "name": ""}, "'' cannot be a name: .*; rank 600"),
    ],
)
def test_what_an_engine_refuses_is_refused_with_the_remedy(engine: str, options: dict[str, object], about: str) -> None:
    values = {"name": "a", "rank": 8, "modules": ["q_proj"], "base": "B", **options}
    with pytest.raises(ValueError, match=about):
        ENGINES[engine].check(values.pop("name"), **values)  # type: ignore[arg-type]


def change_config(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "about"),
    [
        (lambda f: change_config(f, use_dora=True), "it is DoRA"),
        (lambda f: change_config(f, modules_to_save=["lm_head"]), "trains whole modules"),
        (lambda f: change_config(f, rank_pattern={"q_proj": 4}), "has several ranks"),
        (lambda f: change_config(f, peft_type="IA3"), "of type IA3, not LORA"),
        (lambda f: change_config(f, bias="all"), "changes biases"),
        (lambda f: change_config(f, lora_alpha=None), "has no lora_alpha"),
        (lambda f: change_config(f, r=4), "is not of rank 4"),
        (lambda f: change_config(f, r="2"), "names no rank"),
        (lambda f: change_tensors(f, lambda t: t.update({"odd": torch.zeros(2, 2)})), "cannot read a tensor called odd"),
        (lambda f: change_tensors(f, lambda t: t.pop(FIRST)), f"has no counterpart {FIRST}"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "no PEFT adapter that can be read"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "no PEFT adapter that can be read"),
    ],
)
@pytest.mark.parametrize("engine", KINDS)
def test_a_folder_is_checked_as_it_lies_there(
    shine: Shine, tmp_path: Path, refused: Callable[..., str], damage: Callable[[Path], object], about: str, engine: str
) -> None:
    folder = write_peft(shine.encode(TEXT), tmp_path / "notes", backbone="cpu-world")
    ENGINES[engine].check_folder(folder)
    damage(folder)
    told = refused("export", folder, "--check", engine)
    assert about in told
    assert str(folder) in told
    assert re.search("load it with PEFT itself, or merge it|write (it again|one|it) with `shine export`", told)


def test_what_peft_itself_wrote_passes(tmp_path: Path, shine: Shine) -> None:
    """PEFT's own configuration of a LoRA, with all the keys that it writes."""
    folder = write_peft(shine.encode(TEXT), tmp_path / "notes", backbone="cpu-world")
    LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(folder)
    for engine in ENGINES.values():
        engine.check_folder(folder)


def test_export_checks_before_it_writes(notes: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    run("encode", notes, "-o", tmp_path / "a", *MODEL)
    told = refused("export", tmp_path / "a", "--check", "sglang", "--server-rank", 1, "-o", tmp_path / "p")
    assert "rank 2 is more than the server's 1: start it with --max-lora-rank 2" in told
    assert "cannot be a name" in refused("export", tmp_path / "a", "--check", "vllm", "-o", tmp_path / "two words")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "notes.txt"]
    (written,) = json.loads(run("export", tmp_path / "a", "--check", "vllm", "-o", tmp_path / "p", "--json"))
    assert written["start"].endswith("--enable-lora --max-lora-rank 8")
    # A path that an engine may know already is not written again.
    assert "needs a new name and path" in refused("export", tmp_path / "a", "--check", "vllm", "-o", tmp_path / "p")
    told = run("export", tmp_path / "a", tmp_path / "p", "--check", "sglang")
    assert told.count("SGLang takes it") == 2
    assert "nowhere to write" in refused("export", tmp_path / "a")
    assert "leave --merge" in refused("export", tmp_path / "a", "--check", "vllm", "--merge", "-o", tmp_path / "m")


def test_other_weights_have_another_name(shine: Shine) -> None:
    one, two = shine.encode(TEXT), shine.encode(TEXT.replace("baker", "tailor"))
    assert name_for("my notes", one) == name_for("my notes", LoRA(one.weights))
    assert name_for("my notes", one).startswith("my-notes-")
    assert len({name_for("n", lora) for lora in (one, two, one.scale(0.5))}) == 3
    assert name_for("…", one).startswith("adapter-")


# --- registered, asked, taken away ---------------------------------------------------------------------------------------------


def test_from_a_text_to_an_answer_of_the_server(server: EngineServer, notes: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """The server's answer is transformers' and PEFT's, from the folder that was written."""
    done = json.loads(run("serve-adapter", "register", notes, *at(server), "-o", tmp_path / "served", *MODEL, "--json"))
    name = done["name"]
    assert (tmp_path / "served" / name / "adapter_config.json").exists()
    assert server.adapters == {name: str(tmp_path / "served" / name)} == {name: done["folder"]}
    asked = ("-q", QUESTION, "-q", "Where does Umar live?")
    assert run("serve-adapter", "ask", name, *at(server), *asked) == "baker\nSelkirk\n"
    assert f"{name}  (adapter of cpu-world, {done['folder']})" in run("serve-adapter", "list", *at(server))
    body = server.requests[-1][1]
    assert body["model"] == (name if server.kind == "vllm" else f"cpu-world:{name}")
    # The second turn says what came before, in plain ChatML, and is greedy.
    start = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\nbaker<|im_end|>\n<|im_start|>user\nWhere"
    assert body["prompt"].startswith(start)
    assert (body["temperature"], body["add_special_tokens"]) == (0.0, False)
    gone = json.loads(run("serve-adapter", "unregister", name, *at(server), "--json"))
    assert gone == {"name": name, "server": server.address, "registered": False}
    assert server.adapters == {}
    assert [model["name"] for model in json.loads(run("serve-adapter", "list", *at(server), "--json"))] == ["cpu-world"]


def test_an_adapter_from_disk_and_a_folder_seen_elsewhere(
    server: EngineServer, notes: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    run("encode", notes, "-o", tmp_path / "a", *MODEL)
    (tmp_path / "mounted").symlink_to(tmp_path / "served")
    options = ("-o", tmp_path / "served", "--mounted-as", tmp_path / "mounted", "--name", "notes-1", "--strength", 0)
    assert run("serve-adapter", "register", "--adapter", tmp_path / "a", *at(server), *options) == "notes-1\n"
    assert server.adapters["notes-1"] == str(tmp_path / "mounted" / "notes-1")
    run("serve-adapter", "register", "--adapter", tmp_path / "a", *at(server), "-o", tmp_path / "served", "--max-rank", 1)
    (reduced,) = [folder for folder in (tmp_path / "served").iterdir() if folder.name != "notes-1"]
    assert json.loads((reduced / "adapter_config.json").read_text())["r"] == 1
    weak = run("serve-adapter", "ask", "notes-1", *at(server), "-q", QUESTION)
    assert weak.strip() == server.generate(None, server.requests[-1][1]["prompt"], 256).strip() != "baker"


def test_a_server_that_was_started_again_is_given_the_same_folder(
    server: EngineServer, notes: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    command = ("serve-adapter", "register", notes, *at(server), "-o", tmp_path / "served", *MODEL)
    name = run(*command).strip()
    written = (tmp_path / "served" / name / "adapter_model.safetensors").stat().st_mtime_ns
    server.adapters.clear()
    assert run(*command).strip() == name
    assert server.adapters == {name: str(tmp_path / "served" / name)}
    assert (tmp_path / "served" / name / "adapter_model.safetensors").stat().st_mtime_ns == written
    # Other weights never take the place of what an engine may still hold.
    server.adapters.clear()
    assert "needs a new name and path" in refused(*command, "--name", name, "--strength", 0.5)
    assert server.adapters == {}


def test_a_server_of_another_backbone_is_refused_where_its_folder_is_here(
    server: EngineServer, notes: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr("shine.export.server.Server.models", lambda _: [Served("tiny", str(tmp_path / "tiny"))])
    told = refused("serve-adapter", "register", notes, *at(server), "-o", tmp_path / "served", *MODEL)
    assert re.search(r"made for backbone cpu-world .*tiny has another shape .*start the server with the one", told)
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize("field", ["serialized_named_tensors", "serialized_tensors"])
def test_sglang_is_sent_the_weights_themselves(
    notes: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str], field: str
) -> None:
    with engine_server("sglang") as server:
        server.field = field
        name = run("serve-adapter", "register", notes, *at(server), "--from-tensors", "--tensor-parallel", 2, *MODEL).strip()
        assert server.adapters == {name: "__tensor__"}
        assert run("serve-adapter", "ask", name, *at(server), "-q", QUESTION) == "baker\n"
        if field == "serialized_named_tensors":
            assert len(server.requests[0][1][field]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with engine_server("vllm") as server:
        told = refused("serve-adapter", "register", notes, *at(server), "--from-tensors", *MODEL)
        assert "vLLM loads adapters from folders only" in told


def test_a_text_from_standard_input(
    server: EngineServer, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    name = run("serve-adapter", "register", "-", *at(server), "-o", tmp_path / "served", *MODEL).strip()
    assert name.startswith("standard-input-")
    assert run("serve-adapter", "ask", name, *at(server), "-q", QUESTION) == "baker\n"


def test_another_model_on_the_server_is_noted(
    server: EngineServer, notes: Path, tmp_path: Path, run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    run("encode", notes, "-o", tmp_path / "a", *MODEL)
    for backbone, noted in (("cpu-world", False), ("models/Qwen3-8B", True)):
        where = ("-o", str(tmp_path / "served"), "--name", f"for-{Path(backbone).name}", "--backbone", backbone)
        main(["serve-adapter", "register", "--adapter", str(tmp_path / "a"), *at(server), *where])
        assert ("the adapter is for models/Qwen3-8B" in capsys.readouterr().err) is noted


def test_contexts_do_not_mix_on_the_server(server: EngineServer, notes: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    first = run("serve-adapter", "register", notes, *at(server), "-o", tmp_path / "served", *MODEL).strip()
    notes.write_text(TEXT.replace("baker", "tailor"))
    second = run("serve-adapter", "register", notes, *at(server), "-o", tmp_path / "served", *MODEL).strip()
    assert first != second
    assert len(set(server.adapters.values())) == 2
    answers = [run("serve-adapter", "ask", name, *at(server), "-q", QUESTION) for name in (second, first)]
    assert answers == ["tailor\n", "baker\n"]


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_server_that_is_down_is_one_line(notes: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    for engine, remedy in (("vllm", "start vLLM: .*--enable-lora"), ("sglang", "start SGLang: ")):
        where = ("--engine", engine, "--server", address)
        for command in (
            ("register", notes, "-o", tmp_path / "served", *MODEL),
            ("list",),
            ("ask", "notes", "-q", QUESTION),
            ("unregister", "notes"),
        ):
            told = refused("serve-adapter", command[0], *command[1:], *where)
            assert f"{address}: no server answers there" in told
            assert remedy.split(".*")[0] in told
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("status", "body", "about"),
    [
        (500, {"error": {"message": "CUDA out of memory"}}, "it failed (status 500): CUDA out of memory; see its log"),
        (500, "Internal Server Error\nat line 5", "it failed (status 500): Internal Server Error; see its log"),
        (503, "", "it failed (status 503): nothing; see its log"),
        (401, {"error": "Unauthorized"}, "wants a key (status 401: Unauthorized): export OPENAI_API_KEY"),
        (200, "<html>a router</html>", "its answer is none of"),
        (200, {"data": None}, "its answer is none of"),
        (200, [], "its answer is none of"),
        (404, {"detail": "Not Found"}, "it has no such request"),
    ],
)
def test_a_server_that_fails_is_one_line_and_leaves_nothing(
    server: EngineServer, notes: Path, tmp_path: Path, refused: Callable[..., str], status: int, body: object, about: str
) -> None:
    server.failing = (status, body)
    for command in (
        ("register", notes, "-o", tmp_path / "served", *MODEL),
        ("list",),
        ("ask", "notes", "-q", QUESTION),
    ):
        told = refused("serve-adapter", command[0], *command[1:], *at(server))
        assert about in told
        assert server.address in told
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_adapter_that_the_server_refuses_is_not_left_on_disk(
    server: EngineServer, notes: Path, tmp_path: Path, refused: Callable[..., str], run: Callable[..., str]
) -> None:
    register = ("serve-adapter", "register", notes, *at(server), "-o", tmp_path / "served", *MODEL)
    server.max_rank = 1
    # Earlier releases of vLLM say 400, later ones 500.
    for server.refusal in ((400, "BadRequestError"), (500, "InternalServerError")):
        assert "rank 2" in refused(*register)
        assert not list((tmp_path / "served").iterdir())
    # What the server would refuse is known before, where it is told.
    assert "more than the server's 1" in refused(*register, "--server-rank", 1)
    server.max_rank = 16
    name = run(*register).strip()
    assert "has " + name + " already: unregister it" in refused(*register)
    run("serve-adapter", "unregister", name, *at(server))
    assert run(*register).strip() == name
    server.adapters[name] = "x"
    with pytest.raises(ValueError, match=f"{name}.*already"):
        Server(server.address, engine=server.kind).register(name, tmp_path / "served" / name)


def test_what_the_server_does_not_have_is_said(server: EngineServer, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "absent" in refused("serve-adapter", "ask", "absent", *at(server), "-q", QUESTION)
    assert "absent" in refused("serve-adapter", "unregister", "absent", *at(server))
    client = Server(server.address, engine=server.kind)
    with pytest.raises(ValueError, match=rf"it refuses.*{tmp_path}.*; see what it has with `shine serve-adapter list`"):
        client.register("notes", tmp_path / "absent")


def test_a_server_that_may_not_be_changed_is_told_apart(notes: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    with engine_server("vllm") as server:
        server.updating = False
        told = refused("serve-adapter", "register", notes, *at(server), "-o", tmp_path / "served", *MODEL)
    assert "has no such request (/v1/load_lora_adapter); start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in told
    assert not list((tmp_path / "served").iterdir())


def test_the_key_comes_from_the_environment(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    with engine_server("vllm", key="open sesame") as server:
        told = refused("serve-adapter", "list", *at(server))
        assert "export OPENAI_API_KEY" in told
        monkeypatch.setenv("OPENAI_API_KEY", "open sesame")
        assert Server(f"{server.address}/v1/", engine="vllm").base().name == "cpu-world"


def test_a_server_that_hangs_is_given_up(server: EngineServer, refused: Callable[..., str]) -> None:
    server.delay = 1.0
    assert "no answer within 0.2 s" in refused("serve-adapter", "list", *at(server), "--timeout", 0.2)


def test_what_is_asked_in_vain_is_said(notes: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    register = ("serve-adapter", "register", "--engine", "vllm", "--server", "http://127.0.0.1:9")
    assert "give a TEXT to encode, or --adapter" in refused(*register, "-o", tmp_path)
    assert "say how the server gets the weights" in refused(*register, notes)
    assert "no such file" in refused(*register, tmp_path / "none.txt", "-o", tmp_path / "served")
    assert "is no address of a server" in refused("serve-adapter", "list", "--engine", "vllm", "--server", "localhost:8000")
    lora = Shine.from_pretrained("cpu-world", device="cpu").encode(TEXT)
    LoRA(lora.weights).save(tmp_path / "unknown")
    with engine_server("vllm") as server:
        told = refused("serve-adapter", "register", "--adapter", tmp_path / "unknown", *at(server), "-o", tmp_path / "served")
    assert "does not say which one backbone it is for: give --backbone" in told
    notes.write_bytes(b"\0\1")
    assert "a binary file" in refused(*register, notes, "-o", tmp_path / "served", *MODEL)
