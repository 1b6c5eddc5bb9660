"""Make the CPU world's own backbone: a tokenizer and a small Qwen3 that can read invented facts in its prompt.

Two phases. Random sequences, each said three times, with the loss on the repetitions, grow induction heads; without them the
model sits for thousands of steps on "copy any value of the context". Then conversations about invented worlds: questions with
the context, questions without it (which teaches what kind of answer a question wants, and nothing about the answer), and
repetitions of the context.

    python examples/cpu_world/pretrain_backbone.py --output shine/assets/cpu-world/backbone
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from shine.chat import IGNORE, Message, encode_conversation
from shine.config import PromptConfig, TaskTokens, parse
from shine.data.examples import Example
from shine.data.worlds import World

PROMPTS = parse(PromptConfig, yaml.safe_load((Path(__file__).parents[2] / "configs/prompts/default.yaml").read_text()))
TRAINING_SEED, TOKENIZER_SEED = 1, 2
Batches = Iterator[tuple[Tensor, Tensor]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learned on invented worlds: their words are single tokens, any other text still has an encoding."""
    tasks = TaskTokens()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", tasks.reconstruct, tasks.complete, tasks.nothing]
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
            num_key_value_heads=args.hidden // 32,
            head_dim=16,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def repeated_sequences(vocabulary: int, *, batch: int, seed: int) -> Batches:
    """``[B, 3 n]`` ids and labels, without end: a random sequence three times, the first time without labels."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        length = int(torch.randint(8, 24, (1,), generator=generator))
        once = torch.randint(6, vocabulary, (batch, length), generator=generator)
        ids = once.repeat(1, 3)
        labels = ids.clone()
        labels[:, :length] = IGNORE
        yield ids, labels


def worlds() -> Iterator[Example]:
    """Worlds without end, as the hypernetwork will meet them."""
    return (World(seed=TRAINING_SEED).example(index) for index in itertools.count())


def conversation(example: Example, rng: random.Random) -> list[Message]:
    """One of the ways in which the backbone meets a world."""
    system = Message("system", PROMPTS.system)
    way = rng.random()
    if way < 0.15:
        # Half of it as the baselines ask, half in the plain ChatML that a SHINE answer uses.
        question = [Message("user", f"{example.context}\n\n{PROMPTS.repeat}"), Message("assistant", example.context)]
        return [system, *question] if way < 0.1 else question
    turns = [m for turn in example.turns for m in (Message("user", turn.question), Message("assistant", turn.answer))]
    if way < 0.3:
        return turns if way < 0.25 else [system, *turns]
    turns[0] = Message("user", PROMPTS.in_context.format(context=example.context, question=turns[0].content))
    return [system, *turns] if way < 0.85 else turns


def conversations(tokenizer: PreTrainedTokenizerFast, examples: Iterator[Example], *, batch: int, seed: int) -> Batches:
    """Right-padded ids and labels, without end."""
    rng = random.Random(seed)
    while True:
        encoded = [encode_conversation(tokenizer, conversation(next(examples), rng)) for _ in range(batch)]
        yield (
            pad_sequence([torch.tensor(e.input_ids) for e in encoded], batch_first=True, padding_value=0),
            pad_sequence([torch.tensor(e.labels) for e in encoded], batch_first=True, padding_value=IGNORE),
        )


def loss_of(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy over the labels; right padding needs no mask under a causal one."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    chosen = labels[:, 1:] != IGNORE
    logits = model.lm_head(hidden[chosen]).float()
    target = labels[:, 1:][chosen]
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()


def run_phase(model: Qwen3ForCausalLM, name: str, batches: Batches, *, rates: Sequence[float]) -> None:
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


def rates(peak: float, steps: int, *, decay: float) -> list[float]:
    """Warm-up over 100 steps, then the peak, then down to zero over the last ``decay`` of the steps (0: not at all)."""
    return [peak * min((s + 1) / 100, (steps - s) / (decay * steps) if decay else 1.0, 1.0) for s in range(steps)]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), args)
    print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    induction = repeated_sequences(len(tokenizer), batch=args.batch, seed=args.seed)
    run_phase(model, "induction", induction, rates=rates(args.lr, 600, decay=0))
    facts = conversations(tokenizer, worlds(), batch=args.batch, seed=TRAINING_SEED)
    run_phase(model, "facts", facts, rates=rates(args.lr, args.steps, decay=0.45))
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
