"""Make the CPU world's own backbone: a tokenizer and a small Qwen3 that can read invented facts in its prompt.

    python examples/cpu_world/pretrain_backbone.py --output shine/assets/cpu-world/backbone

What it is taught, and why in this order, is in ``lessons.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lessons import (
    ALL_KINDS,
    IGNORE,
    ONE_KIND,
    PROMPTS,
    TASKS,
    THREE_KINDS,
    TWO_KINDS,
    Batches,
    conversations,
    pairs,
    questions,
    repetitions,
    restatements,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from shine.data.examples import Example
from shine.data.worlds import World

TOKENIZER_SEED = 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learned on invented worlds: their words are single tokens, any other text still has an encoding."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", TASKS.reconstruct, TASKS.complete, TASKS.nothing]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    many = World(seed=TOKENIZER_SEED, facts=(8, 8), people=(4, 4)).examples(4000)
    words = sorted({word for example in many for text in texts(example) for word in text.split()})
    # Each word as it stands in a sentence and as it opens an answer.
    corpus = [form for word in words for form in (f" {word}", word)] + [PROMPTS.system, PROMPTS.repeat, PROMPTS.complete]
    corpus += ["user\n", "assistant\n", "system\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special[1:]
    )


def texts(example: Example) -> list[str]:
    return [example.context, *(text for turn in example.turns for text in (turn.question, turn.answer))]


def build_model(vocabulary: int, args: argparse.Namespace) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=args.hidden,
            intermediate_size=2 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 16,
            num_key_value_heads=args.hidden // 16,
            # With 16 a head tells too few of the hundred names apart, and person and fact are never bound together.
            head_dim=32,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def loss_of(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy over the labels; right padding needs no mask under a causal one."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    chosen = labels[:, 1:] != IGNORE
    logits = model.lm_head(hidden[chosen]).float()
    target = labels[:, 1:][chosen]
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()


def learn(model: Qwen3ForCausalLM, name: str, batches: Batches, *, rates: Sequence[float]) -> None:
    """One optimizer step for each learning rate, with a fresh AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    started = time.time()
    for step, rate in enumerate(rates, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, accuracy = loss_of(model, *next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == len(rates):
            seconds = time.time() - started
            print(f"{name} {step}/{len(rates)}  loss {loss:.4f}  accuracy {accuracy:.3f}  {seconds:.0f} s", flush=True)


def rates(peak: float, steps: int, *, decay: float = 0) -> list[float]:
    """Warm-up over 100 steps, then the peak, then down to zero over the last ``decay`` of the steps (0: not at all)."""
    return [peak * min((s + 1) / 100, (steps - s) / (decay * steps) if decay else 1.0, 1.0) for s in range(steps)]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), args)
    print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    size = {"batch": args.batch, "seed": args.seed}
    some = [ONE_KIND, ONE_KIND, TWO_KINDS, THREE_KINDS, ALL_KINDS]
    learn(model, "repetitions", repetitions(tokenizer, **size), rates=rates(2e-3, 400))
    learn(model, "pairs", pairs(tokenizer, **size), rates=rates(2e-3, 200))
    learn(model, "restatements of one kind", restatements(tokenizer, [ONE_KIND], **size), rates=rates(2e-3, 300))
    learn(model, "restatements", restatements(tokenizer, some, **size), rates=rates(2e-3, 600))
    learn(model, "questions", questions(tokenizer, [ONE_KIND, ONE_KIND, TWO_KINDS], **size), rates=rates(1e-3, 600))
    every = conversations(tokenizer, [ONE_KIND, TWO_KINDS, ALL_KINDS, ALL_KINDS, ALL_KINDS], **size)
    learn(model, "conversations", every, rates=rates(1e-3, args.steps, decay=0.5))
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
