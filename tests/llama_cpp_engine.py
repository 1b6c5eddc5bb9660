"""The real llama.cpp, and tiny models of ours as the GGUF files it reads. Imported only where llama-cpp-python is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import torch
from llama_cpp import Llama
from torch import Tensor
from transformers import PreTrainedModel

KINDS = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


@contextmanager
def llama_cpp(model: Path, *, adapter: Path | None = None, context: int = 512) -> Iterator[Llama]:
    """llama.cpp with a model, wearing an adapter; freed at the end."""
    engine = Llama(
        str(model),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=context,
        n_batch=context,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        # Keys and values in float32, so that what differs is the arithmetic alone.
        type_k=gguf.GGMLQuantizationType.F32,
        type_v=gguf.GGMLQuantizationType.F32,
        flash_attn=False,
        verbose=False,
    )
    try:
        yield engine
    finally:
        engine.close()


def logits(engine: Llama, ids: Sequence[int]) -> Tensor:
    """``[T, V]``."""
    engine.reset()
    engine.eval(list(ids))
    return torch.from_numpy(engine.scores[: len(ids)].copy())


def greedy(engine: Llama, ids: Sequence[int], *, stops: Sequence[int], limit: int) -> list[int]:
    """New tokens, without the stop token."""
    engine.reset()
    engine.eval(list(ids))
    answer: list[int] = []
    while len(answer) < limit:
        token = int(engine.scores[engine.n_tokens - 1].argmax())
        if token in stops:
            break
        answer.append(token)
        engine.eval([token])
    return answer


def write_model(model: PreTrainedModel, file: Path) -> None:
    """A float32 GGUF of a Llama-, Qwen2.5- or Qwen3-shaped model, without a vocabulary.

    The rows of a Llama's q and k are paired here by hand, row ``i`` of a head with row ``i + head_dim / 2``.
    """
    config, kind = model.config, KINDS[model.config.model_type]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[kind])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, last = name.rpartition(".")
        if kind is gguf.MODEL_ARCH.LLAMA and stem.endswith((".q_proj", ".k_proj")):
            half = head // 2
            rows = [start + row for start in range(0, len(weight), head) for i in range(half) for row in (i, i + half)]
            weight = weight[rows]
        writer.add_tensor(f"{names.get_name(stem)}.{last}", weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
