"""What a user imports: encode, chat, stream, save, load; on the CPU world that is shipped, and on tiny models."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model, tiny_tokenizer

from shine import Conversation, LoRA, Shine
from shine.backbone import Backbone
from shine.checkpoint import CheckpointInfo, save_hypernetwork
from shine.config import BackboneConfig
from shine.data.worlds import World
from shine.fingerprint import fingerprint, hypernetwork_fingerprint
from shine.hub import HubId
from shine.hypernetwork import Hypernetwork
from shine.prompt_cache import PromptCache

EXAMPLES = [World(seed=3000).example(index) for index in range(6)]


@pytest.fixture(scope="module")
def world() -> Shine:
    return Shine.from_pretrained("cpu-world", device="cpu")


@pytest.fixture
def tiny(tiny_backbone_folder: str) -> Shine:
    """Untrained, on three layers, at a scale at which an adapter changes what is said."""
    backbone, config = Backbone(tiny_model()), BackboneConfig(path=tiny_backbone_folder, dtype="float32", device="cpu")
    torch.manual_seed(5)
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone).eval().requires_grad_(False)
    return Shine(backbone, tiny_tokenizer(), hypernetwork, config, "tiny", context_length=40)


def saved(shine: Shine, folder: Path) -> Path:
    found = fingerprint(shine.backbone.model, shine.tokenizer)
    info = CheckpointInfo(shine.config, shine.hypernetwork.config, ("mqa",), found, context_length=33)
    save_hypernetwork(folder, shine.hypernetwork.state_dict(), info)
    return folder


def same(a: LoRA, b: LoRA) -> bool:
    return set(a) == set(b) and all(torch.equal(x, y) for path in a for x, y in zip(a[path], b[path], strict=True))


# --- encode and chat -------------------------------------------------------------------------------------------------------


def test_the_answer_comes_from_the_context(world: Shine) -> None:
    lora = world.encode("Zoran works as a baker. Umar lives in Selkirk.")
    assert world.chat(lora, "What is the job of Zoran?") == "baker"
    assert world.chat(lora, "Where does Umar live?") == "Selkirk"
    assert world.chat(None, "What is the job of Zoran?") != "baker"
    assert world.chat(lora.scale(0.0), "What is the job of Zoran?") == world.chat(None, "What is the job of Zoran?")


def test_a_batch_is_its_contexts_one_by_one(world: Shine) -> None:
    texts = [example.context for example in EXAMPLES[:3]]
    batch = world.encode(texts)
    assert batch.batch == 3
    for index, text in enumerate(texts):
        alone = world.encode(text)
        for path, (a, b) in batch.select([index]).items():
            torch.testing.assert_close(a @ b, alone[path][0] @ alone[path][1], atol=1e-5, rtol=1e-4)


def test_a_stream_is_the_answer_and_a_conversation_remembers(tiny: Shine) -> None:
    lora = tiny.encode("a context")
    answer = tiny.chat(lora, "one?", max_new_tokens=20)
    pieces = list(tiny.stream(lora, "one?", max_new_tokens=20))
    assert "".join(pieces).strip() == answer
    talk = Conversation().then("one?", answer)
    assert tiny.chat(lora, "two?", history=talk, max_new_tokens=20) != tiny.chat(lora, "two?", max_new_tokens=20)
    assert [(m.role, m.content) for m in talk.asking("two?")] == [("user", "one?"), ("assistant", answer), ("user", "two?")]


def test_what_a_conversation_has_computed_is_kept(tiny: Shine) -> None:
    """Each turn says what it says without; only what was added is computed."""
    lora, kept, talk = tiny.encode("some text"), PromptCache(), Conversation()
    lengths: list[int] = []
    first = tiny.backbone.model.base_model.layers[0]
    counter = first.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    before = 0
    for question in ("one?", "two?", "three?"):
        alone = tiny.chat(lora, question, history=talk, max_new_tokens=6)
        whole = max(lengths)
        lengths.clear()
        assert "".join(tiny.stream(lora, question, history=talk, kept=kept, max_new_tokens=6)).strip() == alone
        # The turn before ends with an answer of at most 6 tokens, of which the last was never computed.
        assert max(lengths) <= whole - before + 1
        before, talk = whole, talk.then(question, alone)
        lengths.clear()
    counter.remove()


def test_a_stream_that_nobody_reads_on_ends(tiny: Shine) -> None:
    before = threading.active_count()
    stream = tiny.stream(tiny.encode("a context"), "one?", max_new_tokens=400)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_what_fails_while_streaming_is_raised_to_the_reader(tiny: Shine) -> None:
    with pytest.raises((TypeError, ValueError), match="no_such_option"):
        list(tiny.stream(tiny.encode("a context"), "one?", no_such_option=1))


def test_two_adapters_in_two_threads_do_not_mix(world: Shine) -> None:
    """Every answer of two interleaved conversations is the one it has alone, and the two differ."""
    loras = [world.encode(example.context) for example in EXAMPLES[:2]]
    questions = [turn.question for example in EXAMPLES for turn in example.turns]
    wanted = [[world.chat(lora, question, max_new_tokens=8) for question in questions] for lora in loras]
    assert wanted[0] != wanted[1]
    found: list[list[str]] = [[], []]
    overlap: list[int] = []
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        barrier.wait()
        for question in questions:
            found[number].append("".join(world.stream(loras[number], question, max_new_tokens=8)).strip())
            overlap.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted
    # They really took turns.
    assert sum(a != b for a, b in pairwise(overlap)) > 4


def test_two_threads_may_encode_while_others_answer(tiny: Shine) -> None:
    texts = [f"context number {number}" for number in range(12)]
    wanted = [tiny.encode(text) for text in texts]
    lora, answer = wanted[0], tiny.chat(wanted[0], "one?", max_new_tokens=12)
    found: dict[int, LoRA] = {}
    answers: list[str] = []
    jobs: list[Callable[[], object]] = [
        lambda: found.update({i: tiny.encode(texts[i]) for i in range(6)}),
        lambda: found.update({i: tiny.encode(texts[i]) for i in range(6, 12)}),
        lambda: answers.extend(tiny.chat(lora, "one?", max_new_tokens=12) for _ in range(6)),
    ]
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [answer] * 6
    assert all(same(found[index], wanted[index]) for index in range(12))


@pytest.mark.parametrize("options", [{}, {"long": "cut"}, {"max_rank": 1}])
def test_a_text_is_tokenised_whole_once_and_its_pieces_are_counted(
    world: Shine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    text = " ".join(example.context for example in EXAMPLES)
    kind, seen, told = type(world.tokenizer), [], []

    def counted(tokenizer: Any, given: Any, *, real: Any = kind.__call__, **more: Any) -> Any:
        seen.append(given)
        return real(tokenizer, given, **more)

    monkeypatch.setattr(kind, "__call__", counted)
    lora = world.encode(text, batch_size=2, progress=lambda done, about: told.append((done, about)), **options)
    assert seen.count(text) == 1
    pieces = lora.provenance[0][0].context.pieces
    assert (pieces > 3) == (options.get("long") != "cut")
    assert [done for done, _ in told] == [*range(2, pieces, 2), pieces]
    assert all(max(done, pieces / 2) <= about < 2 * pieces for done, about in told)


# --- loading ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_ours_comes_back_with_its_backbone(tiny: Shine, tmp_path: Path) -> None:
    loaded = Shine.from_pretrained(saved(tiny, tmp_path / "final"), device="cpu")
    assert loaded.context_length == 33
    assert same(loaded.encode("some text"), tiny.encode("some text"))
    # From the folder above it, with the backbone elsewhere, and with the length and type that are asked for.
    moved = Path(tiny.config.path).rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"there is no folder|cannot load backbone"):
        Shine.from_pretrained(tmp_path / "final", device="cpu")
    other = Shine.from_pretrained(tmp_path, backbone=str(moved), device="cpu", dtype="float64", context_length=12)
    assert (other.backbone.dtype, other.context_length) == (torch.float64, 12)


def test_a_checkpoint_is_not_bound_to_the_attention_it_was_trained_with(tiny: Shine, tmp_path: Path) -> None:
    trained = replace(tiny, config=replace(tiny.config, attention="flash_attention_2"))
    loaded = Shine.from_pretrained(saved(trained, tmp_path / "final"), device="cpu")
    assert loaded.config.attention == "auto"
    assert same(loaded.encode("some text"), tiny.encode("some text"))


def test_a_released_checkpoint_needs_to_be_told_its_backbone() -> None:
    folder = Path(__file__).parent / "fixtures" / "tiny_qwen3" / "reference_checkpoint"
    with pytest.raises(ValueError, match=r"a released checkpoint does not say which backbone.*backbone="):
        Shine.from_pretrained(folder)


@pytest.mark.parametrize("path", ["no-such-thing", "missing/folder/of/mine", "checkpoints/mine"])
def test_an_unknown_checkpoint_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path}.*no such checkpoint directory"):
        Shine.from_pretrained(path)


def test_a_hub_id_is_downloaded(tiny: Shine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that every checkpoint of a hub is taken: only its files, held against its manifest."""
    asked: list[HubId] = []

    def download(remote: HubId) -> Path:
        asked.append(remote)
        if remote.repository == "someone/else":
            raise ValueError("pulling hf:someone/else failed: no network")
        return tmp_path / "final"

    saved(tiny, tmp_path / "final")
    monkeypatch.setattr("shine.model.download", download)
    assert Shine.from_pretrained("someone/shine", device="cpu").context_length == 33
    with pytest.raises(ValueError, match=r"someone/else: no such checkpoint directory, and the hub.*no network"):
        Shine.from_pretrained("someone/else")
    assert asked == [HubId("hf", "someone/shine"), HubId("hf", "someone/else")]


def test_importing_is_quick_quiet_and_free_of_hydra() -> None:
    code = (
        "import sys, shine; assert 'torch' not in sys.modules; from shine import Shine, LoRA, Conversation; "
        "assert not {'hydra', 'omegaconf'} & set(sys.modules); s = Shine.from_pretrained('cpu-world', device='cpu'); "
        "s.chat(s.encode('Zoran works as a baker.'), 'What is the job of Zoran?')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- provenance ------------------------------------------------------------------------------------------------------------


def test_an_adapter_says_where_it_comes_from(tiny: Shine, tmp_path: Path) -> None:
    text = "Ünïcode text"
    lora = tiny.encode(text, names=["page"])
    span = lora.provenance[0][0]
    assert span.context.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (span.context.characters, span.context.tokens, span.context.read) == (12, 14, 14)
    assert (span.context.name, span.context.text, span.rank, span.strength) == ("page", None, 2, 1.0)
    assert span.backbone.name == tiny.config.path
    assert span.backbone.fingerprint == str(fingerprint(tiny_model(), tiny_tokenizer()))
    assert set(span.versions) == {"shine", "torch", "transformers"}
    assert tiny.encode(text, keep_text=True).provenance[0][0].context.text == text
    loaded = LoRA.load(lora.scale(0.5).save(tmp_path / "a"))
    assert same(loaded, lora.scale(0.5))
    assert loaded.provenance == ((replace(span, strength=0.5),),)
    assert text not in (tmp_path / "a" / "config.json").read_text()


def test_a_hypernetworks_fingerprint_is_of_its_values_not_of_their_type(tiny: Shine) -> None:
    config, weights = tiny.hypernetwork.config, tiny.hypernetwork.state_dict()
    mine = hypernetwork_fingerprint(config, weights)
    assert tiny.encode("x").provenance[0][0].hypernetwork.fingerprint == mine
    assert hypernetwork_fingerprint(config, {name: tensor.bfloat16() for name, tensor in weights.items()}) == mine
    changed = {**weights, "memory_tokens": weights["memory_tokens"] * 1.1}
    assert hypernetwork_fingerprint(config, changed) != mine
    assert hypernetwork_fingerprint(replace(config, scale=0.06), weights) != mine


def test_a_sum_knows_its_parts_and_gives_them_back(tiny: Shine) -> None:
    one, two, three = (tiny.encode(text, names=[text]) for text in ("one", "two", "three"))
    joined = LoRA.concat([one, two.scale(0.3)])
    assert [(p.context.name, p.strength) for p in joined.provenance[0]] == [("one", 1.0), ("two", 0.3)]
    parts = joined.spans()
    assert same(parts[0], one)
    assert same(parts[1], two.scale(0.3))
    parts[1] = three
    assert same(LoRA.concat(parts), LoRA.concat([one, three]))


def test_an_adapter_of_another_backbone_is_refused_with_both_names(tiny: Shine, world: Shine) -> None:
    lora = world.encode("Zoran works as a baker.")
    pattern = f"made for backbone cpu-world .*not for {tiny.config.path} .*load that backbone, or encode the context again"
    for call in (tiny.chat, tiny.stream):
        with pytest.raises(ValueError, match=pattern):
            call(lora, "What is the job of Zoran?")
    # Of unknown origin, the shapes tell.
    with pytest.raises(ValueError, match="does not fit"):
        tiny.chat(LoRA(lora.weights), "What is the job of Zoran?")


def test_other_weights_of_the_same_architecture_are_a_variant(tiny: Shine) -> None:
    lora = tiny.encode("text")
    tuned = replace(tiny, backbone=Backbone(tiny_model(seed=7)))
    with pytest.raises(ValueError, match=r"the same architecture with other weights.*allow_variant=True"):
        tuned.chat(lora, "one?", max_new_tokens=2)
    replace(tuned, config=replace(tuned.config, allow_variant=True)).chat(lora, "one?", max_new_tokens=2)


def test_several_adapters_are_not_one(tiny: Shine, tmp_path: Path) -> None:
    batch = tiny.encode(["one", "two"])
    with pytest.raises(ValueError, match=r"2 adapters.*lora\.select"):
        tiny.chat(batch, "one?")
    with pytest.raises(ValueError, match=r"2 adapters.*save each"):
        batch.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a batch of 1 adapters cannot be added to one of 2"):
        LoRA.concat([batch, tiny.encode("three")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", ["", "  \n", [], ["text", ""]])
def test_nothing_cannot_be_encoded(tiny: Shine, texts: str | list[str]) -> None:
    with pytest.raises(ValueError, match="a context is empty"):
        tiny.encode(texts)


# --- on disk ---------------------------------------------------------------------------------------------------------------


def test_saving_never_takes_a_folder_of_the_users(tiny: Shine, tmp_path: Path) -> None:
    lora = tiny.encode("text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=r"mine holds something else \(thesis\.txt\)"):
        lora.save(tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    lora.save(tmp_path / "adapter")
    assert same(LoRA.load(lora.scale(2.0).save(tmp_path / "adapter")), lora.scale(2.0))


def test_an_adapter_appears_whole_or_not_at_all(tiny: Shine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shine.adapter_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        tiny.encode("text").save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "about"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"no adapter there \(no config\.json\)"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not an adapter but something else"),
        (lambda folder: (folder / "config.json").write_text('{"adapter": 2}'), "adapter format 2.*upgrade shine"),
        (lambda folder: (folder / "config.json").write_text('{"adapter": 1, "contexts": [{}]}'), "missing"),
        (lambda folder: (folder / "lora.safetensors").unlink(), r"lora\.safetensors: cannot be read"),
        (lambda folder: (folder / "lora.safetensors").write_bytes(b"x" * 50), r"lora\.safetensors: cannot be read"),
    ],
)
def test_a_damaged_adapter_is_named(tiny: Shine, tmp_path: Path, damage: Callable[[Path], object], about: str) -> None:
    folder = tiny.encode("text").save(tmp_path / "a")
    damage(folder)
    with pytest.raises(ValueError, match=f"{folder}.*{about}"):
        LoRA.load(folder)


def test_the_configuration_is_versioned(tiny: Shine, tmp_path: Path) -> None:
    folder = tiny.encode("text").save(tmp_path / "a")
    assert json.loads((folder / "config.json").read_text())["adapter"] == 1
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "lora.safetensors"]


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"long": "splitt"}, "'split', or to its limit, 'cut'"),
        ({"names": []}, "0 names for 1 contexts: give one for each, or none at all"),
        ({"batch_size": 0}, "batch_size=0: at least one piece"),
        ({"max_rank": 0}, "a rank is at least 1"),
    ],
)
def test_an_option_of_encoding_that_means_nothing_is_refused(world: Shine, options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        world.encode("Zoran works as a baker.", **options)
