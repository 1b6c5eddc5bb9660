"""``shine compare``: two adapters, or two hypernetworks on the same text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from shine.cli.commands import Commands, add_command
from shine.cli.models import (
    add_document_options,
    encode_document,
    load_shine,
    positive,
    print_json,
    read_inputs,
)

if TYPE_CHECKING:
    from shine.lora import LoRA
    from shine.model import Shine


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine compare``."""
    parser = add_command(
        commands,
        "compare",
        help="compare two adapters, or two checkpoints on one text",
        description=(
            "The cosine between two updates (1: the same direction, 0: nothing in common), their norms and ranks, and with\n"
            "--question the answers side by side. With --context A and B are checkpoints, which both read that text; without it\n"
            "they are adapters, and --model names the hypernetwork whose backbone answers."
        ),
        examples="""
shine compare adapters/monday adapters/tuesday
shine compare adapters/monday adapters/tuesday --model cpu-world --question "Where does Zoran live?"
shine compare checkpoints/old checkpoints/new --context notes.txt --question "Where does Zoran live?"
""",
    )
    parser.add_argument("a", metavar="A", help="an adapter, or with --context a checkpoint")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--context", metavar="TEXT", help="a file that both checkpoints read")
    parser.add_argument("-q", "--question", action="append", default=[], metavar="Q", help="ask both; may be repeated")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="longest answer (default: 64)")
    add_document_options(parser)
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    if args.context is None:
        from shine.lora import LoRA

        loras = [LoRA.load(args.a), LoRA.load(args.b)]
        shine = load_shine(args) if args.question else None
        answers = [[_answer(shine, lora, question, args) for question in args.question] for lora in loras]
    else:
        if args.model is not None:
            raise ValueError("with --context A and B are the checkpoints: leave --model out")
        loras, answers = _read_by_both(args)
    asked = [{"question": question, "a": a, "b": b} for question, a, b in zip(args.question, *answers, strict=True)]
    measures = {"a": _measures(args.a, loras[0]), "b": _measures(args.b, loras[1])}
    found: dict[str, Any] = {**measures, "cosine": _cosine(*loras), "answers": asked}
    if args.json:
        print_json(found)
    else:
        _show(found)


def _read_by_both(args: argparse.Namespace) -> tuple[list[LoRA], list[list[str]]]:
    documents = read_inputs([args.context], args)
    if len(documents) > 1:
        raise ValueError(f"{args.context} holds {len(documents)} documents: give one")
    loras, answers = [], []
    for name in (args.a, args.b):
        shine = load_shine(argparse.Namespace(**{**vars(args), "model": name}))
        loras.append(encode_document(shine, documents[0], args))
        answers.append([_answer(shine, loras[-1], question, args) for question in args.question])
    return loras, answers


def _answer(shine: Shine | None, lora: LoRA, question: str, args: argparse.Namespace) -> str:
    assert shine is not None
    return shine.chat(lora, question, max_new_tokens=args.max_new_tokens)


def _measures(name: str, lora: LoRA) -> dict[str, Any]:
    return {"name": name, "rank": lora.rank, "norm": lora.inner(lora) ** 0.5}


def _cosine(a: LoRA, b: LoRA) -> float | None:
    """``None`` where the two touch different linears and cannot be compared."""
    shapes = [{path: (x.shape[1], y.shape[2]) for path, (x, y) in lora.items()} for lora in (a, b)]
    norms = a.inner(a) * b.inner(b)
    return a.inner(b) / norms**0.5 if shapes[0] == shapes[1] and norms > 0 else None


def _show(found: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from shine.evaluation.tables import show

    for side in ("a", "b"):
        print(f"{side.upper()}: {found[side]['name']}  rank {found[side]['rank']}, norm of the update {found[side]['norm']:.4g}")
    cosine = "none, they are for different models" if found["cosine"] is None else f"{found['cosine']:.4f}"
    print(f"cosine between the updates: {cosine}")
    if found["answers"]:
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("question", "A", "B"):
            table.add_column(column)
        for row in found["answers"]:
            table.add_row(*(Text(row[key]) for key in ("question", "a", "b")))
        show(table)
