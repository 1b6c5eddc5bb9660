"""What a model has already computed of a conversation, kept from one turn to the next."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from shine.lora import LoRA


class PromptCache:
    """Keys and values of one conversation under one adapter: a turn computes only what was added since the last.

    A prompt that parts from what is kept, or another adapter, is computed anew from there. For one conversation at a time, in
    one thread.
    """

    def __init__(self) -> None:
        self._cache: DynamicCache | None = None
        self._ids: list[int] = []
        self._lora: LoRA | None = None

    def __len__(self) -> int:
        """Tokens that are kept."""
        return len(self._ids)

    def wear(self, lora: LoRA | None) -> None:
        """Forget everything that another adapter than ``lora`` has computed."""
        if lora is not self._lora:
            self._cache, self._ids, self._lora = None, [], lora

    def take(self, input_ids: Tensor, config: PreTrainedConfig) -> DynamicCache:
        """The cache for a prompt ``[1, T]``, cut to what it shares with the tokens kept; `keep` must follow.

        Raises:
            ValueError: there are several prompts.
        """
        if input_ids.shape[0] != 1:
            raise ValueError(f"a prompt cache keeps one conversation, these are {input_ids.shape[0]}: give each its own")
        asked = input_ids[0].tolist()
        # The last token of the prompt is always computed: what it predicts is the answer's first.
        most = min(len(self._ids), len(asked) - 1)
        shared = next((index for index in range(most) if self._ids[index] != asked[index]), most)
        if self._cache is None or shared == 0:
            self._cache = DynamicCache(config=config)
        elif (beyond := self._cache.get_seq_length() - shared) > 0:
            self._cache.crop(-beyond)
        # Until `keep` is reached, nothing is known about what the cache holds.
        self._ids = []
        return self._cache

    def keep(self, tokens: Tensor) -> None:
        """Remember which of ``tokens`` ``[1, T]``, prompt and answer, the cache now holds."""
        assert self._cache is not None
        self._ids = tokens[0, : self._cache.get_seq_length()].tolist()
