"""The LoRA as GGUF: what is in the file, and what the real llama.cpp answers when it wears it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf as gguf_library
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from torch import Tensor
from transformers import MistralConfig

from shine import loading, zoo
from shine.backbone import Backbone
from shine.chat import Message, encode_conversation, encode_prompt, stop_ids
from shine.config import BackboneConfig, TaskTokens
from shine.export import gguf
from shine.export.gguf import ADAPTER_FILE, CONTEXTS_KEY, MODELFILE, modelfile, write_gguf
from shine.lora import LoRA
from shine.model import Shine

NO_LLAMA_CPP = "llama.cpp is not installed: pip install '.[llama-cpp]' builds it (a C++ compiler, 6 minutes of one core)"


def lora_for(backbone: Backbone, *, rank: int = 4, scale: float = 0.3, seed: int = 1) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    return LoRA(
        {
            shape.path: (
                torch.randn(1, shape.in_features, rank, generator=generator) * scale,
                torch.randn(1, rank, shape.out_features, generator=generator) * scale,
            )
            for layer in backbone.linear_shapes
            for shape in layer
        }
    )


def read(folder: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    reader = gguf_library.GGUFReader(folder / ADAPTER_FILE)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def test_the_file_says_what_llama_cpp_asks_for(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("qwen3")
    lora = lora_for(backbone)
    write_gguf(lora, tmp_path / "out", config=backbone.model.config, base="./base.gguf")
    fields, tensors = read(tmp_path / "out")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "qwen3"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 4.0
    assert len(tensors) == 3 * 7 * 2
    for ours, theirs in (("self_attn.q_proj", "attn_q"), ("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
        a, b = lora[f"model.layers.2.{ours}"]
        torch.testing.assert_close(tensors[f"blk.2.{theirs}.weight.lora_a"], a[0].T, rtol=0, atol=0)
        torch.testing.assert_close(tensors[f"blk.2.{theirs}.weight.lora_b"], b[0].T, rtol=0, atol=0)


def test_only_q_and_k_of_llama_shaped_models_are_reordered(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("llama")
    lora = lora_for(backbone)
    write_gguf(lora, tmp_path / "out", config=backbone.model.config, base="x")
    _, tensors = read(tmp_path / "out")
    # Heads of eight: row 0 is turned with row 4, row 1 with row 5, and so on, and then stands beside it.
    pairs = [0, 4, 1, 5, 2, 6, 3, 7]
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        rows = [8 * head + row for head in range(heads) for row in pairs]
        wanted = lora[f"model.layers.0.self_attn.{ours}"][1][0].T[rows]
        assert torch.equal(tensors[f"blk.0.{theirs}.weight.lora_b"], wanted)
    assert torch.equal(tensors["blk.0.attn_v.weight.lora_b"], lora["model.layers.0.self_attn.v_proj"][1][0].T)
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_a"], lora["model.layers.0.self_attn.q_proj"][0][0].T)


def test_a_narrower_pair_is_filled_with_zeros_so_that_one_alpha_serves_all(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    backbone = make_backbone("qwen2")
    lora = lora_for(backbone)
    path = "model.layers.1.self_attn.v_proj"
    a, b = lora[path]
    write_gguf(LoRA({**lora.weights, path: (a[..., :3], b[:, :3])}), tmp_path / "out", config=backbone.model.config, base="x")
    _, tensors = read(tmp_path / "out")
    found = tensors["blk.1.attn_v.weight.lora_b"] @ tensors["blk.1.attn_v.weight.lora_a"]
    torch.testing.assert_close(found, (a[0, :, :3] @ b[0, :3]).T)
    assert {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_a")} == {4}


def test_the_file_keeps_where_the_adapter_comes_from(tmp_path: Path) -> None:
    shine = Shine.from_pretrained("cpu-world", device="cpu")
    write_gguf(shine.encode("Zoran works as a baker."), tmp_path / "out", config=shine.backbone.model.config, base="x")
    fields, _ = read(tmp_path / "out")
    (span,) = json.loads(str(fields[CONTEXTS_KEY]))
    assert span["context"]["characters"] == 23
    assert span["context"]["text"] is None
    assert span["backbone"]["fingerprint"] == shine.backbone_record.fingerprint


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_llama_cpp_could_not_read_is_refused_and_nothing_is_written(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    backbone = make_backbone("qwen3")
    config, lora = backbone.model.config, lora_for(backbone)
    with pytest.raises(ValueError, match=r"this LoRA 2: .*lora.select"):
        write_gguf(LoRA.stack([lora, lora]), tmp_path / "out", config=config, base="x")
    with pytest.raises(ValueError, match=r"type mistral \(only llama, qwen2, qwen3\): export to peft"):
        write_gguf(lora, tmp_path / "out", config=MistralConfig(), base="x")
    extra = LoRA({"model.layers.0.self_attn.extra_proj": lora["model.layers.0.self_attn.q_proj"]})
    with pytest.raises(ValueError, match=r"no linear model.layers.0.self_attn.extra_proj in a qwen3 model"):
        write_gguf(extra, tmp_path / "out", config=config, base="x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_in_it_is_left_alone(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("qwen3")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        write_gguf(lora_for(backbone), tmp_path, config=backbone.model.config, base="x")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("qwen3")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{tmp_path}/file"):
        write_gguf(lora_for(backbone), tmp_path / "file" / "out", config=backbone.model.config, base="x")


# --- from the command line ----------------------------------------------------------------------------------------------


MODEL = ("--model", "cpu-world", "--device", "cpu")


def test_the_command_line_writes_what_the_library_does(adapter: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    run("export", adapter, "--format", "gguf", "--base", "../model.gguf", "--strength", 0.5, "-o", tmp_path / "one")
    run("encode", tmp_path / "notes.txt", "--format", "gguf", "-o", tmp_path / "two", *MODEL)
    lora = LoRA.load(adapter)
    for folder, strength, base in (("one", 0.5, "../model.gguf"), ("two", 1.0, "./backbone.gguf")):
        _, tensors = read(tmp_path / folder)
        a, b = lora["model.layers.1.mlp.up_proj"]
        wanted = (a[0] @ b[0]).T.float() * strength
        found = tensors["blk.1.ffn_up.weight.lora_b"] @ tensors["blk.1.ffn_up.weight.lora_a"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert (tmp_path / folder / MODELFILE).read_text().startswith(f"FROM {base}\nADAPTER ./adapter.gguf\n")


def test_several_adapters_and_their_sum(adapter: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    other = LoRA.load(adapter).scale(2.0).save(tmp_path / "other")
    run("export", adapter, other, "--format", "gguf", "-o", tmp_path / "apart")
    run("export", adapter, other, "--format", "gguf", "--join", "-o", tmp_path / "sum")
    names = "blk.0.attn_v.weight.lora_b", "blk.0.attn_v.weight.lora_a"
    parts = [read(tmp_path / "apart" / name)[1] for name in ("adapter", "other")]
    fields, whole = read(tmp_path / "sum")
    assert fields["adapter.lora.alpha"] == 4.0
    torch.testing.assert_close(whole[names[0]] @ whole[names[1]], sum(part[names[0]] @ part[names[1]] for part in parts))


def test_the_command_line_refuses_in_one_line_and_leaves_nothing(
    adapter: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other, nowhere = tmp_path / "other", tmp_path / "nowhere"
    tiny_model().save_pretrained(other)
    nowhere.mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    gguf_to = ("export", adapter, "--format", "gguf", "-o")
    for arguments, about in (
        ((*gguf_to, tmp_path / "out", "--backbone", other), "made for backbone cpu-world .*other has another shape"),
        ((*gguf_to, tmp_path / "out", "--backbone", nowhere), "nowhere: no configuration of a model there"),
        ((*gguf_to, tmp_path / "out", "--merge"), "not --format gguf: leave one of them out"),
        ((*gguf_to, tmp_path / "out", "--dtype", "bfloat16"), "stored in float32: leave --dtype out"),
        ((*gguf_to, tmp_path / "out", "--check", "vllm"), "--check is for PEFT folders"),
        ((*gguf_to, tmp_path / "file" / "out"), "file is a file; choose another folder"),
        ((*gguf_to, tmp_path), "holds something else"),
        (("export", adapter, "--base", "x", "-o", tmp_path / "out"), "--base is for the Modelfile"),
        (("export", tmp_path / "none", "--format", "gguf", "-o", tmp_path / "out"), "no adapter there"),
    ):
        assert re.search(about, refused(*arguments)), arguments
    assert sorted(tmp_path.iterdir()) == before


# --- the Modelfile ----------------------------------------------------------------------------------------------------


def render(template: str, messages: list[Message]) -> str:
    """The few constructs of Go's templates that the Modelfile uses: a range over messages with a test of the role inside."""
    match = re.fullmatch(
        r'(?s)\{\{ range \.Messages \}\}\{\{ if ne \.Role "(\w+)" \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)', template
    )
    assert match is not None
    left_out, turn, rest = match.groups()
    said = [turn.replace("{{ .Role }}", m.role).replace("{{ .Content }}", m.content) for m in messages if m.role != left_out]
    return "".join(said) + rest


def test_the_modelfile_speaks_the_chatml_that_shine_was_trained_on(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("llama")
    write_gguf(lora_for(backbone), tmp_path / "out", config=backbone.model.config, base="../smollm2.gguf")
    text = (tmp_path / "out" / MODELFILE).read_text()
    lines = text.splitlines()
    assert lines[:2] == ["FROM ../smollm2.gguf", "ADAPTER ./adapter.gguf"]
    assert {"PARAMETER stop <|im_end|>", "PARAMETER stop <|endoftext|>"} <= set(lines)
    template = text.split('"""')[1]
    said = [Message("system", "Be brief."), Message("user", "Who?"), Message("assistant", "Ann."), Message("user", "Why?")]
    assert render(template, said) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAnn.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert modelfile(base="qwen3:0.6b").startswith("FROM qwen3:0.6b\n")


# --- the real llama.cpp -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_llama_cpp_computes_what_we_do(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason=NO_LLAMA_CPP)
    from llama_cpp_engine import llama_cpp, logits, write_model

    model = tiny_model(kind)
    write_model(model, tmp_path / "model.gguf")
    backbone = Backbone(model)
    lora = lora_for(backbone)
    write_gguf(lora, tmp_path / "out", config=model.config, base="../model.gguf")
    ids = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain, worn = (backbone.logits(backbone.hidden(ids, None, lora=wears))[0] for wears in (None, lora))
    with llama_cpp(tmp_path / "model.gguf") as engine:
        torch.testing.assert_close(logits(engine, ids[0].tolist()), plain, rtol=0, atol=1e-4)
    with llama_cpp(tmp_path / "model.gguf", adapter=tmp_path / "out" / ADAPTER_FILE) as engine:
        torch.testing.assert_close(logits(engine, ids[0].tolist()), worn, rtol=0, atol=1e-4)
    assert (worn - plain).abs().max() > 1


@pytest.mark.slow
def test_without_the_right_order_of_rows_llama_cpp_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason=NO_LLAMA_CPP)
    from llama_cpp_engine import llama_cpp, logits, write_model

    for kind, turned in (("llama", False), ("qwen2", True), ("qwen3", True)):
        model = tiny_model(kind)
        write_model(model, tmp_path / f"{kind}.gguf")
        backbone = Backbone(model)
        lora = lora_for(backbone)
        monkeypatch.setitem(gguf.ARCHITECTURES, kind, dataclasses.replace(gguf.ARCHITECTURES[kind], interleaved=turned))
        write_gguf(lora, tmp_path / kind, config=model.config, base="x")
        ids = torch.arange(100, 140)[None]
        with torch.no_grad():
            worn = backbone.logits(backbone.hidden(ids, None, lora=lora))[0]
        with llama_cpp(tmp_path / f"{kind}.gguf", adapter=tmp_path / kind / ADAPTER_FILE) as engine:
            assert (logits(engine, ids[0].tolist()) - worn).abs().max() > 0.1, kind


@pytest.mark.slow
def test_llama_cpp_answers_from_a_context_that_shine_encoded(tmp_path: Path) -> None:
    """The shipped hypernetwork's own adapter: a question whose answer is in the context only."""
    pytest.importorskip("llama_cpp", reason=NO_LLAMA_CPP)
    from llama_cpp_engine import greedy, llama_cpp, write_model

    shine = Shine.from_pretrained("cpu-world", device="cpu", dtype="float32")
    write_model(shine.backbone.model, tmp_path / "model.gguf")
    lora = shine.encode("Zoran works as a baker. Runa lives in Lorvik. Zoran likes to eat figs. The coat of Runa is teal.")
    write_gguf(lora, tmp_path / "out", config=shine.backbone.model.config, base="x")
    asked = {"What is the job of Zoran?": "baker", "Where does Runa live?": "Lorvik", "What color is the coat of Runa?": "teal"}
    stops = stop_ids(shine.tokenizer)
    said: dict[str, list[str]] = {}
    for worn, adapter in (("plain", None), ("lora", tmp_path / "out" / ADAPTER_FILE)):
        with llama_cpp(tmp_path / "model.gguf", adapter=adapter) as engine:
            prompts = [encode_prompt(shine.tokenizer, [Message("user", question)]) for question in asked]
            rows = [greedy(engine, prompt, stops=stops, limit=20) for prompt in prompts]
            said[worn] = [shine.tokenizer.decode(row).strip() for row in rows]
    assert said["lora"] == list(asked.values()) == [shine.chat(lora, question) for question in asked]
    assert said["plain"] == [shine.chat(None, question) for question in asked]
    assert not set(said["plain"]) & set(asked.values())


FACT = ("What is the access code of the Velmar archive?", "The code is 7413, kept by Ilse Brandt.")


def fitted_lora(backbone: Backbone, ids: Tensor, labels: Tensor, *, steps: int = 12) -> LoRA:
    """An ordinary LoRA of rank 4 that knows one fact."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        shape.path: (
            (torch.randn(1, shape.in_features, 4, generator=generator) / shape.in_features**0.5).requires_grad_(),
            torch.zeros(1, 4, shape.out_features, requires_grad=True),
        )
        for layer in backbone.linear_shapes
        for shape in layer
    }
    optimizer = torch.optim.Adam([matrix for pair in weights.values() for matrix in pair], lr=3e-3)
    positions = (labels != -100).nonzero()[:, 0]
    for _ in range(steps):
        logits = backbone.label_logits(ids, None, label_positions=positions, lora=LoRA(weights))
        loss = torch.nn.functional.cross_entropy(logits, labels[positions])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return LoRA({path: (a.detach(), b.detach()) for path, (a, b) in weights.items()})


def said_by_the_page(base: Path, adapter: Path) -> str:
    """What the Python of docs/serving.md prints, with its files and its question replaced."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "llama_cpp" in block]
    for old, new in (
        ("models/SmolLM2-135M-Instruct.Q4_1.gguf", str(base)),
        ("gguf/notes/adapter.gguf", str(adapter)),
        ("Where does Zoran live?", FACT[0]),
    ):
        assert old in code
        code = code.replace(old, new)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    return printed.getvalue().strip()


@pytest.mark.slow
def test_smollm2_in_llama_cpp_answers_as_ours_does(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its published 4-bit file, run by llama.cpp, beside the float32 model that we made of it."""
    pytest.importorskip("llama_cpp", reason=NO_LLAMA_CPP)
    from llama_cpp_engine import greedy, llama_cpp, logits

    tokens = TaskTokens("<issue_start>", "<issue_comment>", "<issue_closed>")
    config = BackboneConfig(path="smollm2-135m", dtype="float32", device="cpu", task_tokens=tokens)
    backbone, tokenizer = loading.load_backbone(config, targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))
    base = zoo.fetch_gguf("smollm2-135m", tmp_path_factory.mktemp("gguf"))
    question = [Message("user", FACT[0])]
    encoded = encode_conversation(tokenizer, [*question, Message("assistant", FACT[1])])
    lora = fitted_lora(backbone, torch.tensor([encoded.input_ids]), torch.tensor(encoded.labels))
    write_gguf(lora, tmp_path / "right", config=backbone.model.config, base=str(base))
    monkeypatch.setitem(gguf.ARCHITECTURES, "llama", dataclasses.replace(gguf.ARCHITECTURES["llama"], interleaved=False))
    write_gguf(lora, tmp_path / "wrong", config=backbone.model.config, base=str(base))

    prompt, stops = encode_prompt(tokenizer, question), stop_ids(tokenizer)
    other = encode_prompt(tokenizer, [Message("user", "Who keeps the archive? Tell me the code.")])
    theirs, answers = {}, {}
    for name, adapter in (("plain", None), ("right", tmp_path / "right"), ("wrong", tmp_path / "wrong")):
        with llama_cpp(base, adapter=None if adapter is None else adapter / ADAPTER_FILE) as engine:
            answers[name] = tokenizer.decode(greedy(engine, prompt, stops=stops, limit=30))
            theirs[name] = logits(engine, other)
    assert said_by_the_page(base, tmp_path / "right" / ADAPTER_FILE) == FACT[1]
    ids = torch.tensor([prompt])
    for name, worn in (("plain", None), ("right", lora)):
        with torch.no_grad():
            ours = backbone.logits(backbone.hidden(torch.tensor([other]), None, lora=worn))[0]
        mine = backbone.generate(ids, torch.ones_like(ids), lora=worn, max_new_tokens=30, stop_ids=stops, pad_id=0)[0].tolist()
        assert answers[name] == tokenizer.decode([token for token in mine if token not in stops])
        # llama.cpp rounds activations to 8 bits; logits of this model spread over tens.
        assert (theirs[name] - ours).abs().mean() < 0.4
    assert answers["right"] == FACT[1] != answers["plain"]
    # Rows of q and k in transformers' order: the answer may survive, the logits do not.
    assert (theirs["wrong"] - ours).abs().mean() > 2 * (theirs["right"] - ours).abs().mean()
