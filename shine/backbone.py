"""The frozen causal LM: wear a LoRA, read memory states, loss on labels, generate.

No modelling file is copied. Two hooks do everything, on any model whose decoder layers hold named linears:

* each target linear adds ``(x A) B`` of the LoRA that its layer wears (a forward hook);
* each decoder layer puts on, for the time of its own call, the LoRA worn when the pass began. Because the call captures that
  LoRA, activation checkpointing recomputes each layer under the LoRA it had, even though the encoding pass and the answering
  pass wear different ones.

What is worn is kept per thread, so two threads may use one backbone with different adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel

from shine.lora import LinearShape, LoRA
from shine.norms import fuse_norms
from shine.prompt_cache import PromptCache
from shine.wearing import LayerLoRA, Wearing

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that a Llama-like layer gives the same tensor; where one does not, they are computed apart."""


CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
"""Of the float32 logits of one chunk of labels: about what a CPU's caches hold; what a GPU takes in one large product."""


def chunk_rows(vocabulary_size: int, *, device_type: str) -> int:
    """Labels whose logits are held at one time."""
    return max(CHUNK_BYTES[device_type] // (4 * vocabulary_size), 1)


class Backbone:
    """A frozen causal LM that can wear a LoRA, one per sample of the batch.

    Not a ``Module`` on purpose: its weights never belong to an optimizer, a DDP wrapper or a checkpoint of ours.

    Args:
        model: what ``AutoModelForCausalLM`` loads. It is frozen, put into evaluation mode and gets hooks.
        targets: names of the linears in each decoder layer that LoRAs touch, in the order in which states are cut.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.

    Raises:
        ValueError: a target linear is missing in a layer; the message names the layer and the linears it has.
    """

    def __init__(self, model: PreTrainedModel, *, targets: Sequence[str] = TARGETS, activation_checkpointing: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        # What a checkpoint suggests (sampling, repetition penalties) would make greedy answers something else.
        model.generation_config = GenerationConfig()
        self.activation_checkpointing = activation_checkpointing
        self._targets = tuple(targets)
        self._wearing = Wearing()
        if not isinstance(getattr(model.base_model, "layers", None), nn.ModuleList):
            raise ValueError(
                f"{type(model).__name__} keeps its decoder layers elsewhere than in .layers: SHINE needs a Llama-like model"
            )
        self.layers = cast(nn.ModuleList, model.base_model.layers)
        fuse_norms(model)
        self.linear_shapes = self._hook_linears(self._targets)
        self._check_logits()
        for layer in self.layers:
            layer.forward = functools.partial(self._layer_forward, layer.forward)

    @property
    def hidden_size(self) -> int:
        """``H``."""
        return int(self.model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocabulary_size(self) -> int:
        """Rows of the input embedding, ``V``."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def misfits(self, lora: LoRA) -> list[str]:
        """The linears of ``lora`` that this backbone has not as targets, or where it has them in other shapes."""
        shapes = {shape.path: (shape.in_features, shape.out_features) for layer in self.linear_shapes for shape in layer}
        return [path for path, (a, b) in lora.items() if shapes.get(path) != (a.shape[1], b.shape[2])]

    @contextmanager
    def wearing(self, lora: LoRA | None) -> Iterator[None]:
        """Every pass of this thread inside the block wears ``lora``.

        A batch of the pass must be a multiple ``k`` of the LoRA's batch: sample ``i`` wears adapter ``i // k``, which is the
        order in which ``generate`` lays out its beams. A LoRA with a batch of one serves any batch.
        """
        before = self._wearing.pass_lora
        self._wearing.pass_lora = lora
        try:
            yield
        finally:
            self._wearing.pass_lora = before

    def memory_states(self, context_ids: Tensor, context_mask: Tensor | None, *, memory_tokens: Tensor, meta_lora: LoRA) -> Tensor:
        """Read contexts once and return what each layer holds at the memory tokens appended to them.

        The residual stream after every decoder layer, before the final norm; no vocabulary logits are computed.

        Args:
            context_ids: ``[B, T]``, left-padded.
            context_mask: ``[B, T]``, one where there is a token; ``None`` when nothing is padded.
            memory_tokens: ``[M, H]``, appended to every context.
            meta_lora: worn for this pass only.

        Returns:
            ``[B, L, M, H]`` in the backbone's dtype.
        """
        batch, count = context_ids.shape[0], memory_tokens.shape[0]
        embedded = self.model.get_input_embeddings()(context_ids)
        memory = memory_tokens.to(embedded.dtype).expand(batch, -1, -1)
        mask = None if context_mask is None else F.pad(context_mask, (0, count), value=1)
        self._wearing.tap, self._wearing.tap_tokens = [], count
        try:
            with self.wearing(meta_lora):
                self.model.base_model(inputs_embeds=torch.cat([embedded, memory], dim=1), attention_mask=mask, use_cache=False)
            return torch.stack(self._wearing.tap, dim=1)
        finally:
            self._wearing.tap = None

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, *, lora: LoRA | None) -> Tensor:
        """Final hidden states ``[B, T, H]``, after the last norm, wearing ``lora``."""
        with self.wearing(lora):
            return self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits ``[..., V]`` of hidden states ``[..., H]``."""
        return self.model.get_output_embeddings()(hidden)

    def label_chunks(self, hidden: Tensor) -> list[slice]:
        """Which rows of ``[N, H]`` have their logits in memory at one time; at least one chunk, an empty one of no rows."""
        rows = chunk_rows(self.vocabulary_size, device_type=hidden.device.type)
        return [slice(start, start + rows) for start in range(0, len(hidden), rows)] or [slice(0, 0)]

    def wide_logits(self, hidden: Tensor) -> Tensor:
        """`logits` in float32 at least."""
        logits = self.logits(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def label_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, *, label_positions: Tensor, lora: LoRA | None
    ) -> Tensor:
        """Hidden states ``[N, H]`` that predict the ``N`` labels.

        Args:
            input_ids: ``[B, T]``, left-padded.
            attention_mask: ``[B, T]`` or ``None``.
            label_positions: ``[N]``, positions of the labels themselves in the flattened ``[B * T]`` batch; each is
                predicted from the position before it.
            lora: worn for this pass.
        """
        return self.hidden(input_ids, attention_mask, lora=lora).flatten(0, 1).index_select(0, label_positions - 1)

    def label_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, *, label_positions: Tensor, lora: LoRA | None
    ) -> Tensor:
        """Logits ``[N, V]``, float32 at least, of `label_hidden`; nothing is computed where there is no label."""
        return self.wide_logits(self.label_hidden(input_ids, attention_mask, label_positions=label_positions, lora=lora))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        lora: LoRA | None,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None,
        pad_id: int,
        beams: int = 1,
        cache: PromptCache | None = None,
        **options: Any,
    ) -> Tensor:
        """New tokens ``[B, <= max_new_tokens]``: greedy, or the best of ``beams``; sample ``i`` wears adapter ``i`` of ``lora``.

        ``cache`` keeps a conversation (batch one) for its next turn: prompts that go on from it are computed from there.
        ``options`` go to transformers' ``generate`` unchanged (a streamer, sampling, ...).
        """
        if cache is not None:
            options["past_key_values"] = cache.take(input_ids, self.model.config)
        with self.wearing(lora):
            tokens = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                num_beams=beams,
                eos_token_id=list(stop_ids) if stop_ids else None,
                pad_token_id=pad_id,
                **options,
            )
        if cache is not None:
            cache.keep(tokens)
        return tokens[:, input_ids.shape[1] :]

    @torch.no_grad()
    def merged(self, lora: LoRA) -> Backbone:
        """A second backbone with ``lora`` inside its weights, for many questions about one context.

        It holds its own weights of the linears that ``lora`` touches and shares all others. The sum of weight and update is rounded
        to the backbone's dtype, so in bfloat16 answers are not to the last bit those of wearing it.

        Raises:
            ValueError: ``lora`` holds more than one adapter, or the weights are quantised.
        """
        lora.require_one()
        state = self.model.state_dict()
        for path in lora:
            weight = state[f"{path}.weight"]
            if not weight.is_floating_point():
                raise ValueError(f"{path} is quantised: wear the adapter instead of merging it")
            state[f"{path}.weight"] = lora.merged_into(path, weight)
        with torch.device("meta"):
            twin = type(self.model)(self.model.config)
        twin.load_state_dict(state, assign=True)
        twin.tie_weights()
        for name, buffer in self.model.named_buffers():
            owner, _, last = name.rpartition(".")
            setattr(twin.get_submodule(owner), last, buffer)
        return Backbone(twin, targets=self._targets)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Make sure that the output embedding alone gives the logits, since only those of labels are ever computed."""
        if self.device.type == "meta":
            return
        probe = torch.arange(2, device=self.device)[None]
        own = self.model(input_ids=probe, use_cache=False).logits
        if not torch.allclose(own, self.logits(self.hidden(probe, None, lora=None)).to(own.dtype), rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{type(self.model).__name__} scales or caps its logits after the output embedding, which SHINE does not: choose "
                "a backbone that does not either (Qwen3, Qwen2.5, Llama-shaped)"
            )

    def _hook_linears(self, targets: tuple[str, ...]) -> tuple[tuple[LinearShape, ...], ...]:
        prefixes = {id(module): path for path, module in self.model.named_modules()}
        shapes = []
        for layer in self.layers:
            paths = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
            linears = {path.rsplit(".", 1)[-1]: cast(nn.Linear, layer.get_submodule(path)) for path in paths}
            missing = [name for name in targets if name not in linears]
            if missing:
                raise ValueError(
                    f"{prefixes[id(layer)]} of {type(self.model).__name__} has no linear called {', '.join(missing)}: "
                    f"set hypernetwork.targets to some of {', '.join(linears)}"
                )
            several = [name for name in targets if sum(path.rsplit(".", 1)[-1] == name for path in paths) > 1]
            if several:
                raise ValueError(
                    f"{prefixes[id(layer)]} of {type(self.model).__name__} has more than one linear called {', '.join(several)} "
                    "(experts?): SHINE needs one of each; set hypernetwork.targets to others"
                )
            for name in targets:
                together = next((names for names in SAME_INPUT if name in names), (name,))
                group = tuple(prefixes[id(linears[other])] for other in together if other in targets)
                linears[name].register_forward_hook(functools.partial(self._add_update, prefixes[id(linears[name])], group))
            shapes.append(
                tuple(LinearShape(prefixes[id(linears[n])], linears[n].in_features, linears[n].out_features) for n in targets)
            )
        return tuple(shapes)

    def _layer_forward(self, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lora = self._wearing.pass_lora

        def run(hidden: Tensor) -> Tensor:
            before = self._wearing.layer
            self._wearing.layer = None if lora is None else LayerLoRA(lora)
            try:
                return forward(hidden, *args, **kwargs)
            finally:
                self._wearing.layer = before

        if self.activation_checkpointing and torch.is_grad_enabled():
            output = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
        else:
            output = run(hidden)
        if self._wearing.tap is not None:
            # A copy, so that the list does not keep the whole sequence of every layer alive.
            self._wearing.tap.append(output[:, -self._wearing.tap_tokens :].clone())
        return output

    def _add_update(
        self, path: str, group: tuple[str, ...], _linear: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        worn = self._wearing.layer
        return None if worn is None else worn.add(path, group, args[0], output)
