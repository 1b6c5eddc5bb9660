"""What a backbone, a hypernetwork, a stage, a run and an evaluation are: frozen, typed, checked where they enter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from string import Formatter
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid")
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NotNegative = Annotated[float, Field(ge=0)]
StageName = Literal["pretrain", "mqa", "1qa"]
MethodName = Literal["shine", "shine_other", "in_context", "in_context_tuned", "only_question", "fine_tuning"]


@dataclass(frozen=True, config=_STRICT)
class TaskTokens:
    """The tokens that ask for a reconstruction, a completion, or nothing.

    They are added to the tokenizer in this order where the vocabulary lacks them and the embedding has spare rows (Qwen3);
    where it has none (SmolLM2), they name unused special tokens of the vocabulary.
    """

    reconstruct: str = "<RECON>"
    complete: str = "<COMP>"
    nothing: str = "<NOTHING>"

    def __post_init__(self) -> None:
        if len({self.reconstruct, self.complete, self.nothing}) < 3:
            raise ValueError("reconstruct, complete and nothing must be three different tokens")


@dataclass(frozen=True, config=_STRICT)
class BackboneConfig:
    """Which frozen model, and how it is held.

    Attributes:
        path: a folder, a hub id, or the name of a model that `shine.zoo` knows.
        dtype: of the frozen weights and of the passes through them; ``auto`` is bfloat16, or float32 where that is slow.
        device: ``auto`` takes CUDA where there is some.
        attention: transformers' ``attn_implementation``; ``auto`` is our ``blocks`` on a CPU and ``fused`` elsewhere.
        activation_checkpointing: recompute layers in the backward pass.
        shard: spread the frozen layers over the ranks of a training run (FSDP2), for a backbone that does not fit one device.
        allow_variant: take a hypernetwork that was trained on other weights of the same architecture and vocabulary.
        baseline_prefix: what the baselines' answers start after, such as Qwen3's empty think block; SHINE sees plain ChatML.
    """

    path: str
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    device: str = "auto"
    attention: str = "auto"
    activation_checkpointing: bool = False
    shard: bool = False
    allow_variant: bool = False
    baseline_prefix: str = ""
    task_tokens: TaskTokens = field(default_factory=TaskTokens)


@dataclass(frozen=True, config=_STRICT)
class M2PConfig:
    """Depth, heads and feed-forward width of the M2P transformer; ``None`` derives heads from ``H`` and the width as ``2 H``.

    The states themselves always have the backbone's width ``H``, which is what makes the direct reshape into a LoRA possible.

    Attributes:
        layers_first: whether the first layer attends across backbone layers (published) or across memory tokens.
        standardise: before the first step, measure what memory states of different contexts have in common, and from then on
            take it off; not published, see `shine.m2p.StateStandard`.
    """

    layers: Positive = 4
    heads: Positive | None = None
    feed_forward: Positive | None = None
    layers_first: bool = True
    standardise: bool = False


@dataclass(frozen=True, config=_STRICT)
class HypernetworkConfig:
    """Ranks, scale, layout and depth; the number of memory tokens follows from them.

    Attributes:
        rank: of the generated LoRA.
        meta_rank: of the LoRA worn while encoding.
        scale: of the generated update; A and B each get its square root.
        layout: how A, then B, lie in the state; see `LoRALayout`.
        targets: the linears of each layer that get a LoRA, in the order in which the state is cut.
        memory_std: memory tokens start at N(0, this).
        meta_std: the meta LoRA's A starts at N(0, this), its B at zero.
    """

    rank: Positive = 8
    meta_rank: Positive = 128
    scale: PositiveFloat = 1e-3
    layout: Literal["rl", "lr", "rr", "ll"] = "rl"
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    memory_std: NotNegative = 0.02
    meta_std: NotNegative = 1e-3
    m2p: M2PConfig = field(default_factory=M2PConfig)

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets={list(self.targets)} must name at least one linear, each once")


@dataclass(frozen=True, config=_STRICT)
class SourceConfig:
    """Where examples come from.

    Attributes:
        kind: which reader; see `shine.data.sources`.
        path: the folder or file; ``worlds`` invents its examples and has none.
        split: which split of the folder.
        skip: leave out the first so many contexts.
        limit: then take only the first so many.
        malformed: whether a row that is not as it should be is refused, or skipped and counted.
        part: ``all`` contexts, or one side of a split by context (see `shine.data.splits`): ``train``, or those ``held_out``.
        held_out: the share of contexts held out.
        split_seed: of which ones.
        options: what the reader of this kind takes beside these.
    """

    kind: str
    path: str | None = None
    split: str = "train"
    skip: Count = 0
    limit: Positive | None = None
    malformed: Literal["refuse", "skip"] = "refuse"
    part: Literal["all", "train", "held_out"] = "all"
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.02
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Named sources, mixed by simple union: ``train`` to learn from, ``validation`` to watch while training, ``test`` to score."""

    train: Mapping[str, SourceConfig] = field(default_factory=dict)
    validation: Mapping[str, SourceConfig] = field(default_factory=dict)
    test: Mapping[str, SourceConfig] = field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class DistillationConfig:
    """Learning from the in-context model beside the labels (`shine.training.distillation`).

    Attributes:
        share: of the loss that is the divergence from it; the labels' own loss is the rest.
        top: so many of its most likely tokens are compared one by one, and all others as one.
        reader: the LoRA it reads contexts under, a folder that ``shine tune-reader`` wrote; ``None`` is the backbone as it is.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    top: Positive = 32
    reader: str | None = None


@dataclass(frozen=True, config=_STRICT)
class StageConfig:
    """One stage of the recipe.

    Attributes:
        name: pretrain, mqa or 1qa.
        context_length: most tokens of a context.
        conversation_length: most tokens of a conversation.
        pad_to_multiple: the lengths of a batch are padded to a multiple of this.
        epochs: passes over the data, unless ``steps`` says how many optimizer steps.
        batch_size: sequences an optimizer step, over all ranks and micro-batches.
        micro_batch_size: sequences a forward pass of one rank.
        length_window: so many batches at a time are drawn, and shared out among themselves by length, so that little is padded;
            zero draws each batch by itself.
        conversations_per_context: of 1qa, up to so many questions of a context share its pass and its adapter; each stands side by
            side with them in its batch. One draws each question by itself, as published.
        optimizer: ``adamw`` (published), or ``muon`` for the linears of the M2P transformer and AdamW for the rest.
        learning_rate: the peak, reached after ``warmup_steps``.
        schedule: what follows the peak: ``linear`` down to zero at the last step (published), or ``constant``, which makes every
            checkpoint of a run that of a shorter one; its last step is kept as any other, to go on from.
        clip: largest global gradient norm.
        evaluate_every, save_every, log_every: in steps; zero means never (save: only at the end).
        evaluation_batches: how many validation batches each evaluation looks at.
        keep: how many step checkpoints stay on disk, beside the best.
        check_every: in steps, how often the ranks make sure that they hold the same weights; zero means never.
        spike_factor: a gradient norm beyond so many times the median of the last ``spike_window`` is a spike, and its step is
            not taken; ``None`` lets spikes pass.
        most_skipped: so many steps in a row with bad numbers end the run.
        distillation: learn from the in-context model too.
    """

    name: StageName
    context_length: Positive
    conversation_length: Positive
    learning_rate: PositiveFloat
    warmup_steps: Count
    epochs: PositiveFloat = 1.0
    steps: Positive | None = None
    batch_size: Positive = 32
    micro_batch_size: Positive = 1
    length_window: Count = 0
    conversations_per_context: Positive = 1
    pad_to_multiple: Positive = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: NotNegative = 0.01
    clip: PositiveFloat = 1.0
    evaluate_every: Count = 0
    evaluation_batches: Positive = 8
    save_every: Count = 0
    log_every: Count = 10
    keep: Positive = 2
    check_every: Count = 100
    spike_factor: PositiveFloat | None = 20.0
    spike_window: Positive = 100
    most_skipped: Positive = 10
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch_size:
            sizes = f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}"
            raise ValueError(f"{sizes}: make it one")
        shared = f"conversations_per_context={self.conversations_per_context}"
        if self.conversations_per_context > 1 and self.name != "1qa":
            raise ValueError(f"{shared}: only in the stage 1qa has a context several conversations; set it to 1")
        if self.conversations_per_context > self.micro_batch_size:
            raise ValueError(f"{shared} cannot share a pass: make micro_batch_size={self.micro_batch_size} at least as much")


@dataclass(frozen=True, config=_STRICT)
class PromptConfig:
    """What the baselines see. ``{context}`` and ``{question}`` are filled in.

    The defaults are those of ``configs/prompts/default.yaml``, for commands of an installed SHINE, which has no ``configs/``.

    Attributes:
        system: the system turn of both baselines; empty leaves the turn out.
        in_context: the user turn of In-Context's first question; later questions stand alone.
        repeat: the question that stands for `TaskTokens.reconstruct` where a baseline is asked to reconstruct.
        complete: likewise for a completion.
    """

    system: str = "Answer with a few words only, without a sentence."
    in_context: str = "{context}\n\nQuestion: {question}"
    repeat: str = "Repeat the text above, word for word."
    complete: str = "Write the text above once more, word for word, and continue it to its end."

    def __post_init__(self) -> None:
        names = {name for _, name, _, _ in Formatter().parse(self.in_context) if name is not None}
        if names != {"context", "question"}:
            raise ValueError("in_context must hold {context} and {question}, and no other braces")


@dataclass(frozen=True, config=_STRICT)
class FineTuningConfig:
    """Ordinary LoRAs, each trained on one context: every number of conversations with every number of epochs is a method.

    Attributes:
        source: conversations about the contexts that are scored, matched by the context's text, each example one conversation.
            Fair where they were written from the contexts alone. ``None`` takes the other questions about the same context with
            their gold answers, never the one that is asked: half of them answers for the other half, which gives this baseline
            what no other method gets.
        conversations: how many of them are learned. The context itself is learned too, whatever the number: as the answer to
            ``prompts.repeat``.
        epochs: passes over them.
        rank, alpha: of the LoRA, on all of ``hypernetwork.targets``.
        batch_size: conversations a step.
    """

    source: SourceConfig | None = None
    conversations: tuple[Count, ...] = (0, 4)
    epochs: tuple[Positive, ...] = (5, 20)
    rank: Positive = 8
    alpha: PositiveFloat = 16.0
    learning_rate: PositiveFloat = 1e-3
    batch_size: Positive = 4


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class ScoringConfig:
    """How a checkpoint is scored, whatever it is scored on.

    Attributes:
        batch_size: contexts encoded, and questions answered, side by side. The batches are the same on every run of any number of
            ranks, resumed or not.
        history: what earlier turns of a conversation hold, the method's own answers or the gold ones.
        lengths: upper bounds, in tokens, of the length buckets; longer texts make one more bucket.
        resume: go on with what an interrupted evaluation left in the output folder; false sets it aside and begins again.
        reader: the LoRA that ``in_context_tuned`` reads contexts under, a folder that ``shine tune-reader`` wrote.
    """

    prompts: PromptConfig
    methods: tuple[MethodName, ...] = ("shine", "in_context", "only_question")
    batch_size: Positive = 16
    max_new_tokens: Positive = 64
    history: Literal["own", "gold"] = "own"
    lengths: tuple[Positive, ...] = (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1100)
    fine_tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    resume: bool = True
    reader: str | None = None

    def __post_init__(self) -> None:
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths={list(self.lengths)} must rise")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            known = ", ".join(get_args(MethodName))
            raise ValueError(f"methods={list(self.methods)}: name at least one of {known}, each once")
        if "in_context_tuned" in self.methods and self.reader is None:
            raise ValueError("methods=[in_context_tuned] needs reader=<folder>: make one with shine tune-reader")


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """A training run.

    Attributes:
        checkpoint: the previous stage's directory to start from; ``None`` starts the hypernetwork at random.
        from_scratch: let a QA stage start at random too, which otherwise needs a checkpoint.
        resume: continue from the ``latest`` step directory of this run, or from the one named here; ``auto`` is ``latest`` where
            there is one, a fresh start where there is none, and nothing where the run has ended: for jobs that a scheduler starts
            again.
        allow_changes: let a resumed run differ from the one it continues in what changes the result.
        dry_run: go once through everything on a tiny backbone instead, and leave nothing behind.
        output: where the run writes.
        engine: how several ranks train together: ``ddp`` holds everything trainable on each, ``fsdp`` a part on each,
            gathered whole within a step.
        evaluate_at_end: score the result the way the stage asks for, as ``scoring`` says, on ``data.test``; the files go to
            ``evaluation`` in the output folder.
    """

    backbone: BackboneConfig
    hypernetwork: HypernetworkConfig
    stage: StageConfig
    data: DataConfig
    output: str
    engine: Literal["ddp", "fsdp"] = "ddp"
    checkpoint: str | None = None
    from_scratch: bool = False
    resume: str | None = None
    allow_changes: bool = False
    dry_run: bool = False
    evaluate_at_end: bool = False
    scoring: ScoringConfig | None = None
    seed: Seed = 42

    def __post_init__(self) -> None:
        if self.evaluate_at_end and (self.scoring is None or not self.data.test):
            raise ValueError("evaluate_at_end=true needs scoring and a source in data.test: set them, or leave it false")


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class EvaluationConfig(ScoringConfig):
    """An evaluation run.

    Attributes:
        checkpoint: a hypernetwork directory, ours or a released three-file one; only the baselines can do without.
        hypernetwork: only read for what a released directory does not record.
        stage: whose evaluation this is, and how many tokens of a context are read; the rest of it belongs to training.
    """

    backbone: BackboneConfig
    hypernetwork: HypernetworkConfig
    stage: StageConfig
    data: DataConfig
    output: str
    checkpoint: str | None = None
    seed: Seed = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.test:
            raise ValueError("data.test is empty: name at least one source to score on")


@dataclass(frozen=True, config=_STRICT)
class RemoteConfig:
    """A model behind an OpenAI-compatible server; where it is and the key stay in the environment (see `shine.remote`).

    Attributes:
        model: its name on the server.
        concurrency: requests under way at once.
        attempts: how often a request is made, in all, before it counts as failed.
        timeout: seconds that one attempt may take.
        first_wait: seconds before the second attempt; doubles with each.
        longest_wait: seconds, where doubling ends; a server that asks for a longer wait has refused.
        options: what else is sent with each request: ``temperature``, ``max_tokens``, ``response_format`` and so on.
        prompt_price, completion_price: of a million tokens, in any one currency.
    """

    model: str
    concurrency: Positive = 8
    attempts: Positive = 6
    timeout: PositiveFloat = 120.0
    first_wait: NotNegative = 1.0
    longest_wait: NotNegative = 60.0
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt_price: NotNegative = 0.0
    completion_price: NotNegative = 0.0
