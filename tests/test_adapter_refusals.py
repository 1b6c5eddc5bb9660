"""What the commands with adapters refuse: one line with the remedy, exit code 2, nothing half-written."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ADAPTER_TEXT as TEXT
from conftest import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from shine import LoRA
from shine.cli.main import main
from shine.zoo import SHIPPED

MODEL = ("--model", "cpu-world", "--device", "cpu")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "noise": lambda file: file.write_bytes(bytes(range(256))),
    "a list": lambda file: file.write_text("[1]"),
    "null": lambda file: file.write_text("null"),
}


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
    assert about in refused("compare", "cpu-world", "cpu-world", "--context", notes)
    server = ("--engine", "vllm", "--server", "http://127.0.0.1:9", "-o", tmp_path / "out")
    assert about in refused("serve-adapter", "register", notes, *server, *MODEL)
    assert about in refused("app", "--context", notes, *MODEL)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unknown_checkpoint_is_one_line(notes: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    told = refused("encode", notes, "-o", tmp_path / "out", "--model", "checkpoints/absent")
    assert "checkpoints/absent: no such checkpoint directory; train the stage that makes it, or download it" in told
    assert not (tmp_path / "out").exists()
    assert "no such folder" in refused("info", tmp_path / "out")
    assert "no adapter there" in refused("chat", "--adapter", tmp_path / "out", "-q", "x", *MODEL)
    assert "no adapter there" in refused("export", tmp_path / "out", "-o", tmp_path / "peft")
    for command in (("store", "add", tmp_path / "out", "x", notes), ("check", _with(notes, f"{TEXT} Runa lives in Lorvik."))):
        assert "checkpoints/absent: no such checkpoint" in refused(*command, "--model", "checkpoints/absent")
    assert not (tmp_path / "out").exists()


def test_options_are_called_what_they_are_on_the_command_line(
    notes: Path, tmp_path: Path, tiny_backbone_folder: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tuned = tmp_path / "tuned"
    shutil.copytree(SHIPPED["cpu-world"], tuned)
    weights = load_file(tuned / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, tuned / "model.safetensors", metadata={"format": "pt"})
    released = Path(__file__).parent / "fixtures" / "tiny_qwen3" / "reference_checkpoint"
    for options, about in (
        (("--device", "gpu"), r"error: --device gpu: set it to auto, cpu, cuda or cuda:N$"),
        (("--device", "cuda:99"), r"error: --device cuda:99: no CUDA device 99, there are \d+: set it to cpu"),
        (("--backbone", "./no/such"), r"no folder \./no/such: download it .*, or give --backbone$"),
        (("--backbone", "owner/name"), r"cannot load backbone owner/name: .* and give --backbone models/name$"),
        (("--backbone", tiny_backbone_folder), r"give --backbone the model it was trained on$"),
        (("--backbone", tuned), r"other weights, .* allow this one: --allow-variant$"),
        (("--model", released), r"does not say which backbone it is for: give --backbone$"),
    ):
        for command in (("encode", notes, "-o", tmp_path / "out"), ("chat", "--context", notes, "-q", "x")):
            told = refused(*command, "--model", "cpu-world", *options)
            assert re.search(about, told.strip())
            assert not re.search(r"backbone[.=]|allow_variant", told)
    assert not (tmp_path / "out").exists()


def test_whatever_is_damaged_in_a_folder_is_one_line(
    notes: Path, adapter: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    """Each file of what the commands write, spoilt in each way, is either not needed by a command or refused by it."""
    kinds = {"peft": (), "gguf": ("--format", "gguf"), "merged": ("--merge",)}
    for kind, options in kinds.items():
        run("export", adapter, "-o", tmp_path / kind, *options)
    spoilt, out = tmp_path / "spoilt", tmp_path / "out"
    commands = {
        "adapter": [("info", spoilt), ("export", spoilt, "-o", out), ("chat", "--adapter", spoilt, "-q", "x", *MODEL)],
        "peft": [("info", spoilt), ("export", spoilt, "--check", "vllm")],
        "gguf": [("info", spoilt)],
        "merged": [
            ("export", adapter, "--backbone", spoilt, "-o", out),
            ("encode", notes, "-o", out, "--backbone", spoilt, *MODEL),
        ],
    }
    refusals = 0
    for kind, damage in itertools.product(commands, DAMAGES.values()):
        for file in sorted((tmp_path / kind).iterdir()):
            shutil.rmtree(spoilt, ignore_errors=True)
            shutil.copytree(tmp_path / kind, spoilt)
            damage(spoilt / file.name)
            for command in commands[kind]:
                shutil.rmtree(out, ignore_errors=True)
                if main([str(word) for word in command]) == 0:
                    continue
                shutil.rmtree(out, ignore_errors=True)
                refused(*command)
                refusals += 1
                assert not out.exists()
    assert refusals > 60


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
    for kind in ("peft", "gguf"):
        told = refused("export", adapter, "--format", kind, "--backbone", tmp_path / "tiny", "-o", tmp_path / "out")
        assert re.search(r"made for backbone models/Qwen3-8B .*tiny has another shape .*give --backbone", told)
        told = refused("export", adapter, "--format", kind, "--backbone", "./no/such", "-o", tmp_path / "out")
        assert "there is no folder ./no/such" in told
        told = refused("export", adapter, "--format", kind, "--backbone", adapter, "-o", tmp_path / "out")
        assert re.search(r"adapter: no configuration of a model there .*give --backbone", told)
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_in_a_store_is_named_beside_the_others(
    adapter: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Callable[..., str]
) -> None:
    store = tmp_path / "store"
    for name in ("good", "bad"):
        shutil.copytree(adapter, store / name / "1")
    (store / "bad" / "1" / "config.json").write_text("{")
    assert main(["store", "list", str(store)]) == 0
    told = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in told.out.splitlines() if line.strip().startswith(("good", "bad"))}
    assert rows["bad"] == ["bad", "1", "damaged"]
    assert rows["good"][-2] == "cpu-world"
    assert re.fullmatch(r"note: bad is damaged: \S+/bad/1/config.json: cannot be read .*, or forget it\n", told.err)
    bad, good = json.loads(run("store", "list", store, "--json"))
    assert "cannot be read" in bad["damage"]
    assert "damage" not in good
    assert run("store", "update", store, "bad", notes, *MODEL) == f"{store}/bad/2\n"


@pytest.mark.parametrize("value", ["nan", "inf", "much"])
def test_a_strength_is_a_finite_number(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, refused: Callable[..., str]
) -> None:
    for command in (["export", str(adapter), "-o", str(tmp_path / "out")], ["chat", "--adapter", str(adapter), *MODEL]):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--strength", value])
        assert f"argument --strength: invalid finite value: '{value}'" in capsys.readouterr().err
    if value != "much":
        with pytest.raises(ValueError, match="give a finite number"):
            LoRA.load(adapter).scale(float(value))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_timeout_is_longer_than_none(capsys: pytest.CaptureFixture[str], value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve-adapter", "list", "--engine", "vllm", f"--timeout={value}"])
    assert f"argument --timeout: invalid seconds value: '{value}'" in capsys.readouterr().err


def test_a_batch_that_cannot_be_written_whole_is_not_begun(
    notes: Path, adapter: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "m.txt").write_text("Runa lives in Lorvik.")
    (tmp_path / "out" / "m").mkdir(parents=True)
    (tmp_path / "out" / "m" / "mine").touch()
    assert "holds something else (mine)" in refused("encode", notes, tmp_path / "m.txt", "-o", tmp_path / "out", *MODEL)
    shutil.copytree(adapter, tmp_path / "m")
    for options in ([], ["--format", "gguf"], ["--merge"]):
        assert "holds something else (mine)" in refused("export", adapter, tmp_path / "m", "-o", tmp_path / "out", *options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m"]


def test_a_pipe_and_a_file_are_not_taken_for_something_else(notes: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a plain file (a pipe or device); give -" in refused("encode", tmp_path / "pipe", "-o", tmp_path / "out", *MODEL)
    assert "notes.txt: is a file; give the folder of an adapter" in refused("info", notes)


def test_a_read_only_folder_is_one_line(
    adapter: Path, read_only: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ("--engine", "vllm", "--server", "http://127.0.0.1:9")
    for arguments in (
        ("encode", "-", *MODEL),
        ("encode", "-", "--format", "gguf", *MODEL),
        ("export", adapter),
        ("export", adapter, "--format", "gguf"),
        ("export", adapter, "--merge"),
        ("serve-adapter", "register", "-", *server, *MODEL),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        assert "locked cannot be written; choose another folder" in refused(*arguments, "-o", read_only / "out")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    told = refused("store", "add", read_only / "store", "x", "-", *MODEL)
    assert "locked" in told
    assert "permission" in told or "cannot be written" in told
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
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    for options in (["--format", "gguf"], ["--merge"]):
        told = refused("export", adapter, *options, "-o", tmp_path / "out")
        assert "No space left on device; choose another place, or make room" in told
        assert sorted(tmp_path.iterdir()) == before


def test_what_is_asked_in_vain_is_said(notes: Path, adapter: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "nothing to talk about" in refused("chat", *MODEL)
    assert "--keep-text" in refused("chat", "--adapter", adapter, "--compare", "-q", "x", *MODEL)
    assert "the questions cannot" in refused("chat", "--context", "-", *MODEL)
    for command in (
        ("compare", adapter, adapter, "-q", "x"),
        ("encode", notes, "-o", tmp_path / "out"),
        ("chat", "--context", notes, "-q", "x"),
    ):
        assert "say which hypernetwork: --model CHECKPOINT, or SHINE_MODEL" in refused(*command)
    assert "holds something else" in refused("encode", notes, "-o", tmp_path, *MODEL)
    assert "give a longer text" in refused("check", _with(notes, "One fish."), *MODEL)


def _with(file: Path, text: str) -> Path:
    file.write_text(text)
    return file
