"""``shine check``: does an adapter know its document?"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from shine.cli.commands import Commands, add_command
from shine.cli.models import (
    add_document_options,
    add_strength_option,
    encode_document,
    load_shine,
    positive,
    print_json,
    read_inputs,
    strong,
)

if TYPE_CHECKING:
    from shine.evaluation.cloze import Knowledge


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine check``."""
    parser = add_command(
        commands,
        "check",
        help="tell whether an adapter knows its document",
        description=(
            "Hold a word that the text uses only once out of each of its sentences, and see whether the model finds it among\n"
            "words held out elsewhere in the same text, with the adapter and without. This shows whether what the text says is\n"
            "in the adapter, not only how it sounds; it does not show how well questions are answered. An adapter knows its text\n"
            "that finds more than chance explains (sign test, 5 %)."
        ),
        code_1="it cannot be told from chance",
        examples="""
shine check notes.txt --model cpu-world
shine check notes.txt --adapter adapters/notes --model cpu-world --json
""",
    )
    parser.add_argument("text", metavar="TEXT", help="a file, or - for standard input")
    parser.add_argument("--adapter", metavar="FOLDER", help="the adapter to check; without it the text is encoded now")
    add_strength_option(parser)
    parser.add_argument("--sentences", type=positive, default=64, metavar="N", help="ask for at most so many (default: 64)")
    add_document_options(parser)
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    documents = read_inputs([args.text], args)
    if len(documents) > 1:
        raise ValueError(f"{args.text} holds {len(documents)} documents: check one at a time")
    from shine.evaluation.cloze import examine, make_clozes
    from shine.lora import LoRA
    from shine.provenance import sha256

    clozes = make_clozes(documents[0].text, most=args.sentences)
    lora = None if args.adapter is None else LoRA.load(args.adapter)
    shine = load_shine(args)
    if lora is None:
        lora = encode_document(shine, documents[0], args)
    elif sha256(documents[0].text) not in {span.context.sha256 for spans in lora.provenance for span in spans}:
        print(f"note: {args.adapter} was made from another text than {args.text}", file=sys.stderr)
    shine.check_fits(lora)
    worn = strong(lora, args.strength).to(shine.backbone.device, shine.backbone.dtype)
    found = examine(shine, worn, clozes)
    if args.json:
        print_json(_values(found))
    else:
        _show(found)
    return 0 if found.knows else 1


def _values(found: Knowledge) -> dict[str, Any]:
    def of(guesses: Any) -> dict[str, float]:
        count = len(guesses)
        return {"right": sum(g.right for g in guesses), "loss": sum(g.loss for g in guesses) / count}

    return {
        "sentences": len(found.with_adapter),
        "guessing": sum(1 / len(g.cloze.choices) for g in found.with_adapter),
        "with_adapter": of(found.with_adapter),
        "without": of(found.without),
        "helped": found.helped,
        "p": found.p,
        "knows": found.knows,
        "clozes": [
            {"start": a.cloze.start, "word": a.cloze.word, "with_adapter": a.choice, "without": b.choice}
            for a, b in zip(found.with_adapter, found.without, strict=True)
        ],
    }


def _show(found: Knowledge) -> None:
    from rich import box
    from rich.table import Table

    from shine.evaluation.tables import show

    values = _values(found)
    table = Table(title="Words held out of the text's own sentences", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("found", "of", "guessing finds", "loss of the right word (nats)"):
        table.add_column(column, justify="right")
    for title, key in (("with the adapter", "with_adapter"), ("without", "without")):
        scores = values[key]
        guessing, loss = f"{values['guessing']:.1f}", f"{scores['loss']:.2f}"
        table.add_row(title, str(scores["right"]), str(values["sentences"]), guessing, loss)
    show(table)
    wrong = [guess for guess in found.with_adapter if not guess.right][:5]
    for guess in wrong:
        print(f"  not found: {guess.cloze.start[-70:]} [{guess.cloze.word}], it prefers {guess.choice}")
    verdict = "The adapter knows its text" if found.knows else "That the adapter knows its text cannot be told from chance"
    print(f"{verdict}: it helps in {found.helped} of {values['sentences']} sentences (p = {found.p:.2g}).")
