"""What a user imports: a context becomes a LoRA, and the model that wears it answers::

from shine import Shine

shine = Shine.from_pretrained("cpu-world")
lora = shine.encode("Zoran works as a baker.")
shine.chat(lora, "What is the job of Zoran?")
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

import shine
from shine.backbone import Backbone
from shine.chat import Conversation, clean_answer, encode_prompt, stop_ids, token_ids
from shine.checkpoint import check_backbone, find_checkpoint, load_hypernetwork, read_info
from shine.config import BackboneConfig, HypernetworkConfig
from shine.fingerprint import Fingerprint, fingerprint, hypernetwork_fingerprint
from shine.hub import HubId, download
from shine.hypernetwork import Hypernetwork
from shine.loading import load_backbone, with_dtype
from shine.lora import LoRA
from shine.pieces import how_many
from shine.pretrained import without_progress_bars
from shine.prompt_cache import PromptCache
from shine.provenance import ContextRecord, ModelRecord, Provenance, sha256
from shine.reading import Reader
from shine.zoo import looks_like_hub_id

NOTHING_SAID = Conversation()
CONTEXT_LENGTH = 1024
"""How many tokens a context may have where a checkpoint does not say what it was trained for."""


@dataclass(frozen=True, eq=False)
class Shine:
    """A hypernetwork with its backbone: contexts to LoRAs, questions to answers.

    Nothing in it changes after it is made, and what the backbone wears is kept per thread, so threads may share one.

    Attributes:
        backbone, tokenizer, hypernetwork: the models; the backbone is held as ``config`` says.
        name: of the hypernetwork, as it was asked for.
        context_length: tokens of a context, or of a piece of a long one, that the hypernetwork reads at once.
    """

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    hypernetwork: Hypernetwork
    config: BackboneConfig
    name: str
    context_length: int = CONTEXT_LENGTH

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        backbone: str | BackboneConfig | None = None,
        device: str = "auto",
        dtype: Literal["bfloat16", "float32", "float64"] | None = None,
        hypernetwork: HypernetworkConfig | None = None,
        context_length: int | None = None,
        allow_variant: bool = False,
    ) -> Shine:
        """A trained hypernetwork and the backbone it was trained on.

        Args:
            path: a checkpoint directory (or a run's output folder), a hub id, or what is shipped: ``cpu-world``, ``smollm2-135m``.
            backbone: a folder, hub id or known name of the backbone, where it does not lie where the checkpoint says; a whole
                configuration for a released checkpoint, which records none.
            device: ``auto`` takes CUDA where there is some; else ``cpu``, ``cuda``, ``cuda:N``.
            dtype: of the backbone: ``bfloat16``, ``float32`` or ``float64``; by default what it was trained in, but float32 for
                bfloat16 on a device that is slow at it, as older CPUs are, if the weights then fit.
            hypernetwork: what a released checkpoint does not record.
            context_length: tokens read at once, instead of what it was trained for.
            allow_variant: take a backbone with other weights of the same architecture and vocabulary.

        Raises:
            ValueError: there is no such checkpoint or backbone, or they do not belong together; with the remedy.
        """
        directory = find_checkpoint(_locate(str(path)))
        info = read_info(directory)
        config = _backbone_config(str(path), info.backbone if info is not None else None, backbone)
        config = replace(config, device=device, shard=False, activation_checkpointing=False, allow_variant=allow_variant)
        config = with_dtype(config if dtype is None else replace(config, dtype=dtype))
        shape = info.hypernetwork if info is not None else hypernetwork or HypernetworkConfig()
        with without_progress_bars():
            held, tokenizer = load_backbone(config, targets=shape.targets)
        # First, since it says in one line what would show as a hundred tensors that do not fit.
        check_backbone(directory, config=config, found=fingerprint(held.model, tokenizer))
        loaded = load_hypernetwork(directory, held, config=hypernetwork).eval().requires_grad_(False)
        length = context_length or (info.context_length if info is not None else None) or CONTEXT_LENGTH
        return cls(held, tokenizer, loaded, config, str(path), length)

    @torch.no_grad()
    def encode(
        self,
        contexts: str | Sequence[str],
        *,
        names: Sequence[str | None] | None = None,
        long: Literal["split", "cut"] = "split",
        overlap: int | None = None,
        max_rank: int | None = None,
        batch_size: int = 8,
        keep_text: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> LoRA:
        """Read each context once and write it into a LoRA.

        A context of more than ``context_length`` tokens is read in pieces, ``batch_size`` at a time, and the updates are added: the
        rank is the sum of theirs, at most full rank. The hypernetwork was trained on single pieces, not on sums, so what many have
        in common is counted many times and answers get worse as pieces are added; ``docs/adapters.md`` shows how much. Memory stays
        within a few updates of full rank, or of ``2 * max_rank``, however long the text.

        Args:
            contexts: one text, or several for several adapters side by side.
            names: what to call them, in their provenance.
            long: whether a context that is too long is read in pieces, or cut.
            overlap: tokens that two neighbouring pieces may share, see `shine.pieces.pieces`.
            max_rank: reduce the sum to the nearest update of this rank; the provenance says what share of it is kept.
            keep_text: keep the texts in the provenance, not only their hashes.
            progress: told how many pieces have been read, each time, and of about how many.

        Returns:
            A LoRA of batch one for a text, of batch ``B`` for ``B`` texts; ``lora.select([i])`` takes one of them.

        Raises:
            ValueError: there is no text, or nothing in it, several texts need different ranks, or an option has no such value.
        """
        texts = [contexts] if isinstance(contexts, str) else list(contexts)
        names = [None] * len(texts) if names is None else names
        _check_what_is_asked(texts, names, long=long, batch_size=batch_size, max_rank=max_rank)
        tokens = [token_ids(self.tokenizer, text) for text in texts]
        lengths = [len(ids) for ids in tokens]
        cut = [min(length, self.context_length) if long == "cut" else length for length in lengths]
        about = sum(how_many(length, limit=self.context_length, overlap=overlap) for length in cut)
        reader = Reader(
            self.hypernetwork, self.backbone, self.tokenizer, self.context_length, batch_size, max_rank, progress, about
        )
        rows = [ids[:length] for ids, length in zip(tokens, cut, strict=True)]
        if max(cut) <= self.context_length and (max_rank is None or max_rank >= self.hypernetwork.config.rank):
            found = [(lora, 1, 1.0) for lora in reader.each(rows)]
        else:
            found = [reader.whole(text, row, overlap=overlap) for text, row in zip(texts, rows, strict=True)]
        if len({lora.rank for lora, _, _ in found}) > 1:
            raise ValueError("these contexts need different ranks, since some are longer: encode each by itself, or set max_rank")
        records = [
            ContextRecord(sha256(text), len(text), length, read, count, name, text if keep_text else None)
            for text, length, read, (_, count, _), name in zip(texts, lengths, cut, found, names, strict=True)
        ]
        adapters = [
            LoRA(lora.weights, ((self._provenance(record, lora.rank, kept),),))
            for record, (lora, _, kept) in zip(records, found, strict=True)
        ]
        return LoRA.stack(adapters)

    def chat(
        self,
        lora: LoRA | None,
        question: str,
        *,
        history: Conversation = NOTHING_SAID,
        kept: PromptCache | None = None,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> str:
        """The answer to a question while wearing ``lora``; the context is not seen.

        Args:
            lora: one adapter (batch one); ``None`` asks the backbone as it is.
            history: the conversation so far.
            kept: what its earlier turns have computed, kept for this one and the next; see `shine.prompt_cache.PromptCache`.
            options: for transformers' ``generate``, such as ``do_sample=True, temperature=0.7``; greedy without any.

        Raises:
            ValueError: the adapter belongs to another backbone, or is several.
        """
        worn, prompt = self._ready(lora, history, question, kept)
        tokens = self._generate(worn, prompt, max_new_tokens, {**options, "cache": kept})[0].tolist()
        stops = stop_ids(self.tokenizer)
        end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
        return clean_answer(str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True)))

    def stream(
        self,
        lora: LoRA | None,
        question: str,
        *,
        history: Conversation = NOTHING_SAID,
        kept: PromptCache | None = None,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> Iterator[str]:
        """The answer in pieces as they are generated, otherwise as `chat`; closing the iterator ends the generation.

        Joined and stripped of white space the pieces are the answer of `chat`, where the model writes no think block.
        """
        worn, prompt = self._ready(lora, history, question, kept)
        return self._pieces(worn, prompt, max_new_tokens, {**options, "cache": kept})

    def check_fits(self, lora: LoRA) -> None:
        """Make sure that this backbone can wear ``lora``.

        Raises:
            ValueError: it was made for another backbone; the message names both.
        """
        for spans in lora.provenance:
            for span in spans:
                self._check_origin(span.backbone)
        odd = self.backbone.misfits(lora)
        if odd:
            raise ValueError(
                f"this adapter is for another backbone than {self.config.path}: {odd[0]} does not fit; encode the context again"
            )

    @cached_property
    def backbone_record(self) -> ModelRecord:
        """Name and fingerprint of the backbone."""
        return ModelRecord(self.config.path, str(fingerprint(self.backbone.model, self.tokenizer)))

    @cached_property
    def hypernetwork_record(self) -> ModelRecord:
        """Name and fingerprint of the hypernetwork."""
        return ModelRecord(self.name, hypernetwork_fingerprint(self.hypernetwork.config, self.hypernetwork.state_dict()))

    def _check_origin(self, made_for: ModelRecord) -> None:
        mine = self.backbone_record
        if made_for.fingerprint == mine.fingerprint:
            return
        both = (
            f"this adapter was made for backbone {made_for.name} (fingerprint {made_for.fingerprint}), not for {mine.name} "
            f"({mine.fingerprint})"
        )
        if not Fingerprint.parse(mine.fingerprint).is_variant_of(Fingerprint.parse(made_for.fingerprint)):
            raise ValueError(f"{both}: load that backbone, or encode the context again with this one")
        if not self.config.allow_variant:
            raise ValueError(
                f"{both}, the same architecture with other weights: load that one, or allow_variant=True to try this one"
            )

    def _provenance(self, context: ContextRecord, rank: int, kept: float) -> Provenance:
        versions = {"shine": shine.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Provenance(context, rank, self.hypernetwork_record, self.backbone_record, versions, now, kept=kept)

    def _ready(
        self, lora: LoRA | None, history: Conversation, question: str, kept: PromptCache | None
    ) -> tuple[LoRA | None, torch.Tensor]:
        """What to wear, on the backbone's device and in its type, and the prompt ``[1, T]``."""
        if kept is not None:
            kept.wear(lora)
        if lora is not None:
            if lora.batch != 1:
                raise ValueError(f"these are {lora.batch} adapters: chat with one of them, lora.select([i]), or with their sum")
            self.check_fits(lora)
            lora = lora.to(self.backbone.device, self.backbone.dtype)
        prompt = encode_prompt(self.tokenizer, history.asking(question))
        return lora, torch.tensor([prompt], device=self.backbone.device)

    def _generate(self, lora: LoRA | None, prompt: torch.Tensor, max_new_tokens: int, options: dict[str, Any]) -> torch.Tensor:
        return self.backbone.generate(
            prompt,
            torch.ones_like(prompt),
            lora=lora,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids(self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            **options,
        )

    def _pieces(self, lora: LoRA | None, prompt: torch.Tensor, max_new_tokens: int, options: dict[str, Any]) -> Iterator[str]:
        # generate() pushes its tokens, so it runs in a thread of its own: what is worn there is nobody else's.
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        abandoned = threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                stop = StoppingCriteriaList([_Abandoned(abandoned)])
                self._generate(lora, prompt, max_new_tokens, {**options, "streamer": streamer, "stopping_criteria": stop})
            except BaseException as error:
                failures.append(error)
            finally:
                streamer.text_queue.put(streamer.stop_signal)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            abandoned.set()
            worker.join()
        if failures:
            raise failures[0]


class _Abandoned(StoppingCriteria):
    """Ends a generation that nobody listens to."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _check_what_is_asked(
    texts: Sequence[str], names: Sequence[str | None], *, long: str, batch_size: int, max_rank: int | None
) -> None:
    if len(names) != len(texts):
        raise ValueError(f"{len(names)} names for {len(texts)} contexts: give one for each, or none at all")
    if long not in ("split", "cut"):
        raise ValueError(f"long={long!r}: a context that is too long is read in pieces, 'split', or to its limit, 'cut'")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one piece is read at a time")
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("a context is empty: give text to read")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank={max_rank}: a rank is at least 1")


def _locate(path: str) -> str:
    """What `find_checkpoint` finds: as it is, or the folder of one on the hub, which is downloaded."""
    if Path(path).expanduser().exists() or not looks_like_hub_id(path):
        return path
    try:
        return str(download(HubId("hf", path)))
    except ValueError as error:
        raise ValueError(f"{path}: no such checkpoint directory, and the hub does not give one: {error}") from None


def _backbone_config(path: str, recorded: BackboneConfig | None, asked: str | BackboneConfig | None) -> BackboneConfig:
    if isinstance(asked, BackboneConfig):
        return asked
    if recorded is not None:
        # How it attends is a matter of where it runs, not of what was trained, and so is whether bfloat16 pays.
        dtype = "auto" if recorded.dtype == "bfloat16" else recorded.dtype
        return replace(recorded, path=recorded.path if asked is None else asked, attention="auto", dtype=dtype)
    if asked is None:
        raise ValueError(f"{path}: a released checkpoint does not say which backbone it is for: give backbone=...")
    return BackboneConfig(path=asked)
