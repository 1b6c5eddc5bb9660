"""An evaluation: contexts side by side, one by one, and as the published recipe does it, in turns on the same questions.

    python benchmarks/evaluate.py                                      # SmolLM2-135M on invented stories
    python benchmarks/evaluate.py --model qwen3-8b --tokenizer models/Qwen3-8B --contexts 16 sets=squad

The contexts are different ones of like length, as an evaluation puts them together. All ways encode the contexts, wear their
adapters and answer greedily through what ``test.py`` runs. Ours encodes a context once for all its questions, in bfloat16
(float32 where that is slow), without padding; the recipe in float32, padded to the maximum (``stage.context_length``, 1,150
tokens), anew for each question. The hypernetwork is a random one: what it knows does not change how long it takes. No answer ends
before it has ``--new`` tokens: ways that round otherwise would stop apart, and be timed over different work. Useful tokens are
those of the contexts, each once, of the questions and of the answers. That both ways do the same is looked at twice: at their
adapters, and at the loss of one way's answers under both.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from machine import FORWARD_FORMULA, alternate, configured, peak_memory, ratio_with_spread, show_limits, show_profile, tf32
from recipe import RecipeShine, compare_adapters
from subject import DTYPES, MODELS, QWEN3, Subject, load
from torch.nn import functional as F

from shine.chat import token_ids
from shine.config import EvaluationConfig
from shine.data.examples import Example
from shine.data.sources import read_named
from shine.data.tally import Tally
from shine.evaluation import qa
from shine.evaluation.methods import Asked, Method, Shine, Speaker
from shine.flops import answering_flops, encoding_flops
from shine.lora import LoRA
from shine.pretrained import load_tokenizer
from shine.zoo import resolve

MOST_APART = 0.02
"""What bfloat16 may change of the loss of the same answers."""


class Way:
    """One way to evaluate, with the time that each part of each run took and what was answered.

    Args:
        size: contexts side by side; zero: each question by itself, its context encoded again.
    """

    def __init__(self, method: Method, examples: Sequence[Example], config: EvaluationConfig, *, size: int) -> None:
        self.method, self.config = method, replace(config, batch_size=max(size, 1))
        # What `test.py` runs has no option for it.
        method.speaker.backbone.model.generation_config.min_new_tokens = config.max_new_tokens
        alone = [replace(example, turns=(turn,)) for example in examples for turn in example.turns]
        self.groups = (
            [[example] for example in alone] if size == 0 else [examples[n : n + size] for n in range(0, len(examples), size)]
        )
        self.clocks: list[qa.Clock] = []
        self.answers: list[str] = []

    def __call__(self) -> None:
        clock, rows = qa.Clock(), []
        for group in self.groups:
            rows += qa.predict(self.method, "set", group, self.config, kind="squad", conversations=False, clock=clock)
        self.clocks.append(clock)
        self.answers = [row.prediction for row in rows]

    @torch.inference_mode()
    def adapter(self) -> LoRA:
        """That of the first context."""
        self.method.prepare(self.groups[0])
        assert self.method.lora is not None
        return self.method.lora.select([0])

    @torch.inference_mode()
    def loss(self, texts: Sequence[str]) -> float:
        """Mean loss a token of these answers to the questions, in their order."""
        speaker, remaining, losses = self.method.speaker, iter(texts), []
        for group in self.groups:
            self.method.prepare(group)
            for index, example in enumerate(group):
                for number, turn in enumerate(example.turns):
                    asked = Asked(index, turn.question, turn=number)
                    prompt, answer = self.method.prompt(asked), token_ids(speaker.tokenizer, next(remaining)) or [0]
                    ids, _ = speaker.batch([prompt + answer])
                    hidden = speaker.backbone.hidden(ids, None, lora=self.method.worn([asked]))
                    logits = speaker.backbone.logits(hidden[0, len(prompt) - 1 : -1]).float()
                    losses.append(F.cross_entropy(logits, ids[0, len(prompt) :], reduction="none"))
        return float(torch.cat(losses).mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="for a Qwen3 shape, which has none (default: SmolLM2's)")
    parser.add_argument("--contexts", type=int, default=4, help="side by side (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=2, help="at most, of each context (default: %(default)s)")
    parser.add_argument("--new", type=int, default=16, help="tokens of every answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="timed ones (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of ours; auto: bfloat16, or float32 where that is slow")
    parser.add_argument("--without-recipe", action="store_true", help="leave the published way out")
    parser.add_argument("--profile", action="store_true", help="print where ours spends its time, and nothing else")
    parser.add_argument("overrides", nargs="*", help="of the data, as for test.py: sets=squad data.test.squad.path=data/squad")
    args = parser.parse_intermixed_args()
    for override in args.overrides:
        if not override.lstrip("+~").startswith(("sets", "data.", "prompts", "stage.context_length")):
            parser.error(
                f"{override}: --model says which model; only sets, data and prompts, and stage.context_length, go to test.py"
            )
    config = configured(
        EvaluationConfig, "test", ["sets=stories", "stage.context_length=1150", *args.overrides, f"max_new_tokens={args.new}"]
    )
    subject = load(args.model, device=args.device, dtype=args.dtype)
    tokenizer = load_tokenizer(resolve(args.tokenizer or ("smollm2-135m" if args.model in QWEN3 else args.model)))
    speaker = Speaker(subject.backbone, tokenizer, config.prompts)
    try:
        examples = alike(config, speaker, contexts=args.contexts, questions=args.questions)
    except ValueError as error:
        parser.error(str(error))
    method = Shine("shine", speaker, subject.hypernetwork)
    together = f"{args.contexts} side by side"
    if args.profile:
        show_profile(Way(method, examples, config, size=args.contexts), subject.device)
        return
    rates = show_limits(subject.backbone, rows=(1, args.contexts, 256))
    ways = {together: Way(method, examples, config, size=args.contexts), "one by one": Way(method, examples, config, size=1)}
    peaks = {name: peak_memory(way, subject.device) for name, way in ways.items()}
    if not args.without_recipe:
        # The last: it makes the weights in float32, which the peaks of the others must not count.
        try:
            ways["recipe"], peaks["recipe"] = recipe_way(subject, speaker, examples, config)
        except torch.OutOfMemoryError:
            print("  recipe: out of memory")
        if "recipe" not in ways:
            # Not sooner: until here the error holds what was computed.
            subject.forget_precise()
    seconds = alternate(dict[str, Callable[[], object]](ways), rounds=args.rounds, device=subject.device, warm_up=0)
    show(subject, ways, seconds, peaks, rate=rates[256, subject.backbone.dtype])
    limit = rates[args.contexts, subject.backbone.dtype] / rates[1, subject.backbone.dtype]
    print(f"The products of a decoding step alone would allow {limit:.1f} times as many questions a second side by side.")


def recipe_way(subject: Subject, speaker: Speaker, examples: Sequence[Example], config: EvaluationConfig) -> tuple[Way, int]:
    """The recipe's way, run once, and its peak memory."""
    precise = replace(speaker, backbone=subject.precise)
    method = RecipeShine("recipe", precise, subject.hypernetwork, context_length=config.stage.context_length)
    way = Way(method, examples, config, size=0)
    return way, peak_memory(way, subject.device)


def alike(config: EvaluationConfig, speaker: Speaker, *, contexts: int, questions: int) -> list[Example]:
    """Neighbours in length, as an evaluation puts them together, from the middle of those that are there.

    Raises:
        ValueError: there are not so many.
    """
    tally, length = Tally(), config.stage.context_length
    found = read_named(config.data.test, "data.test", tally=tally)
    usable = qa.usable_examples(found, speaker.tokenizer, context_length=length, questions=True, tally=tally)
    few = itertools.islice(usable, 10 * contexts)
    ranked = sorted(few, key=lambda example: len(token_ids(speaker.tokenizer, example.context)))
    if len(ranked) < contexts:
        raise ValueError(f"data.test holds {len(ranked)} contexts with questions: set --contexts to at most that")
    first = (len(ranked) - contexts) // 2
    return [replace(example, turns=example.turns[:questions]) for example in ranked[first : first + contexts]]


def show(subject: Subject, ways: dict[str, Way], seconds: dict[str, list[float]], peaks: dict[str, int], *, rate: float) -> None:
    """Print every way, and the ratios of ours to the others with their spread, whole and by part."""
    together, *others = ways
    ours = ways[together]
    useful, flops, questions = work(subject, ours)
    print(
        f"\n{subject.name}: {questions} questions, {ours.config.max_new_tokens} new tokens each, {useful:,} useful tokens, "
        f"{flops / 1e12:.2f} TFLOP ({FORWARD_FORMULA})"
    )
    for name, way in ways.items():
        clocks = way.clocks[-len(seconds[name]) :]
        encode, answer = (median(getattr(clock, part) for clock in clocks) for part in ("encode", "answer"))
        spent = median(seconds[name])
        print(
            f"  {name:16} {spent:8.3f} s (encoding {encode:.3f}, answering {answer:.3f})  {useful / spent:7,.0f} useful tokens/s  "
            f"{questions / spent:6.2f} questions/s  peak {peaks[name] / 2**30:6.2f} GiB"
        )
    print(f"  share of the {subject.dtype} matrix rate: {flops / median(seconds[together]) / rate:.0%}")
    for name in others:
        parts = [
            ratio_with_spread(*([getattr(c, part) for c in way.clocks[-len(seconds[name]) :]] for way in (ways[name], ours)))
            for part in ("encode", "answer")
        ]
        whole = ratio_with_spread(seconds[name], seconds[together])
        print(f"  against {name}: {whole} times as fast; encoding {parts[0].median:.2f}, answering {parts[1].median:.2f}")
        same = sum(a == b for a, b in zip(ours.answers, ways[name].answers, strict=True))
        print(f"  {same} of {questions} answers are the same to the letter")
    if "recipe" in ways:
        losses = [way.loss(ways["recipe"].answers) for way in (ours, ways["recipe"])]
        apart = abs(losses[0] - losses[1]) / losses[1]
        precise = Shine("shine", replace(ours.method.speaker, backbone=subject.precise), subject.hypernetwork)
        with tf32():
            exact = Way(precise, ours.groups[0], ours.config, size=1).adapter()
        adapters = compare_adapters(ways["recipe"].adapter(), ours=ours.adapter(), exact=exact)
        print(f"  losses of the recipe's answers {losses[0]:.4f} and {losses[1]:.4f}, {apart:.2%} apart; {adapters}")
        if apart > MOST_APART:
            raise SystemExit("the two ways do not compute the same: that is more than rounding explains")


def work(subject: Subject, way: Way) -> tuple[int, float, int]:
    """Useful tokens and arithmetic of a way that encodes each context once, and how many questions it answered."""
    tokenizer, rank = way.method.speaker.tokenizer, subject.hypernetwork.layout.rank
    useful, flops, new = 0, 0.0, way.config.max_new_tokens
    for example in (example for group in way.groups for example in group):
        read = len(token_ids(tokenizer, example.context))
        useful, flops = useful + read, flops + encoding_flops(subject.backbone, subject.hypernetwork, read=read)
        for number, turn in enumerate(example.turns):
            prompt = len(way.method.prompt(Asked(0, turn.question, turn=number)))
            useful, flops = useful + prompt + new, flops + answering_flops(subject.backbone, prompt=prompt, new=new, rank=rank)
    return useful, flops, len(way.answers)


if __name__ == "__main__":
    main()
