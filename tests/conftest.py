"""Tiny models and a tiny ChatML tokenizer, built in memory; and the commands, run in this process."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported, here and in every process that a test starts: models this small gain nothing from a second thread, and
# threads of two processes on two cores wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shine import attention
from shine.backbone import Backbone
from shine.cli.main import main
from shine.config import HypernetworkConfig, M2PConfig

# The same examples on every machine and every run, however slow it is.
settings.register_profile("house", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("house")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<RECON>", "<COMP>", "<NOTHING>"]
VOCABULARY = 320
ADAPTER_TEXT = "The pet of Yorick is a beetle. The coat of Delphi is silver. Umar lives in Selkirk. Zoran works as a baker."
ARCHITECTURES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and rotations of Qwen3 in the model's own precision (see `exact`)."""
    # Here, because it imports from benchmarks/, which only pytest puts on the path: other processes import this module too.
    from exact import install_exact_norms

    install_exact_norms(monkeypatch)


def tiny_model(kind: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Three layers, ``H`` 32, ``V`` 320, random weights drawn from ``seed`` (biases too, where the architecture has them)."""
    config_class, model_class, extra = ARCHITECTURES[kind]
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # What `load_backbone` takes on a CPU.
        "attn_implementation": attention.BLOCKS,
        **extra,
    }
    attention.register()
    torch.manual_seed(seed)
    model = model_class(config_class(**values))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() > 1:
            # Larger than the default, so that what is read really changes what is said.
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()


def tiny_hypernetwork_config(**changes: Any) -> HypernetworkConfig:
    """Rank 2, meta rank 4, two M2P layers; a scale at which the LoRA matters."""
    values: dict[str, Any] = {"rank": 2, "meta_rank": 4, "scale": 0.05, "meta_std": 0.1, "m2p": M2PConfig(layers=2, heads=2)}
    return HypernetworkConfig(**{**values, **changes})


def tiny_tokenizer(
    special: Sequence[str] = SPECIAL, *, merges: Sequence[tuple[str, str]] = (), alphabet: Sequence[str] | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte, and the ChatML marks: 262 tokens; then one for each merge.

    Args:
        alphabet: the bytes that have a token, as `ByteLevel` writes them; others are dropped.
    """
    tokens = [*special, *sorted(alphabet or pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(special[1:])
    )


def counted_flops(run: Callable[[], object]) -> int:
    """What PyTorch counts in the matrix products of ``run``, those in place included, which it leaves out by itself."""

    def product(_sum: Sequence[int], a: Sequence[int], b: Sequence[int], **_: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    mapping = {torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(params=sorted(ARCHITECTURES))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture
def make_backbone() -> Callable[..., Backbone]:
    """A backbone of a tiny model: ``make_backbone(kind="qwen3", seed=0, dtype=..., **options of Backbone)``."""

    def make(kind: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Backbone:
        return Backbone(tiny_model(kind, seed=seed, dtype=dtype), **options)

    return make


@pytest.fixture
def tiny_backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3 with its tokenizer on disk, as a hub folder is."""
    folder = tmp_path_factory.mktemp("backbone")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that may not be written, also to a superuser: the test gives up its rights for the time being."""
    folder = Path(tempfile.mkdtemp())
    (folder / "locked").mkdir()
    for place, mode in ((folder, 0o755), (folder / "locked", 0o555)):
        place.chmod(mode)
    superuser = os.getuid() == 0
    if superuser:
        os.setresuid(65534, 65534, 0)
    yield folder / "locked"
    if superuser:
        os.setresuid(0, 0, 0)
    shutil.rmtree(folder)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A text that the shipped hypernetwork reads."""
    file = tmp_path / "notes.txt"
    file.write_text(ADAPTER_TEXT)
    return file


@pytest.fixture
def adapter(notes: Path, tmp_path: Path, run: Callable[..., str]) -> Path:
    """What it makes of them."""
    run("encode", notes, "-o", tmp_path / "adapter", "--model", "cpu-world", "--device", "cpu")
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


@pytest.fixture
def contexts_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many contexts each pass over contexts reads, from now on."""
    read, states = list[int](), Backbone.memory_states

    def watched(self: Backbone, context_ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        read.append(len(context_ids))
        return states(self, context_ids, *args, **options)

    monkeypatch.setattr(Backbone, "memory_states", watched)
    return read
