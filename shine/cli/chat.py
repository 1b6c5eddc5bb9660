"""``shine chat``: ask about a text that the model does not see."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shine.cli.commands import Commands, add_command
from shine.cli.models import (
    add_document_options,
    add_strength_option,
    encode_document,
    finite,
    load_shine,
    positive,
    print_json,
    read_inputs,
    strong,
)

if TYPE_CHECKING:
    from rich.console import Console

    from shine.chat import Conversation
    from shine.cli.side_by_side import SideBySide
    from shine.lora import LoRA
    from shine.model import Shine
    from shine.prompt_cache import PromptCache

_HELP = "/reset forgets the conversation, /strength X sets how strong the adapter is, /quit or Ctrl-D ends"


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine chat``."""
    parser = add_command(
        commands,
        "chat",
        help="ask about a text that the model does not see",
        description=(
            "Read a text once into an adapter, or take one from disk, and hold a conversation. Without --question the questions\n"
            "come from the terminal, or one a line from standard input. Several texts or adapters are added up.\n"
            "--compare answers each question three times: SHINE, In-Context (the text in the prompt), Only Question."
        ),
        examples="""
shine chat --context notes.txt --model cpu-world
shine chat --adapter adapters/notes --model cpu-world --question "Where does Zoran live?"
shine chat --context notes.txt --model cpu-world --compare
""",
    )
    parser.add_argument("--context", nargs="+", metavar="TEXT", default=[], help="files, folders, or - for standard input")
    parser.add_argument("--adapter", nargs="+", metavar="FOLDER", default=[], help="adapters that `shine encode` wrote")
    parser.add_argument("-q", "--question", action="append", metavar="Q", help="ask this; repeat it for further turns")
    parser.add_argument("--compare", action="store_true", help="SHINE, In-Context and Only Question side by side")
    add_strength_option(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer (default: 256)")
    add_document_options(parser)
    parser.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> None:
    if not args.context and not args.adapter:
        raise ValueError("nothing to talk about: give --context TEXT or --adapter FOLDER")
    if "-" in args.context and not args.question:
        raise ValueError("the text comes from standard input, so the questions cannot: give them with --question")
    documents = read_inputs(args.context, args)
    from rich.console import Console

    from shine.lora import LoRA

    adapters = [LoRA.load(path) for path in args.adapter]
    shine = load_shine(args)
    lora = LoRA.concat([*adapters, *(encode_document(shine, document, args, keep_text=True) for document in documents)])
    shine.check_fits(lora)
    text = _text(lora) if args.compare else ""
    console = Console(highlight=False)
    talk = _Comparison(shine, lora, args, console, text) if args.compare else _Talk(shine, lora, args, console)
    if args.question:
        turns = [talk.turn(question) for question in args.question]
        if args.json:
            print_json(turns)
    else:
        _converse(talk, console, json=args.json)


def _text(lora: LoRA) -> str:
    texts = [span.context.text for span in lora.provenance[0]]
    if None in texts:
        raise ValueError("--compare needs the text itself, which an adapter holds only if made with --keep-text: give --context")
    return "\n\n".join(text for text in texts if text is not None)


def _converse(talk: _Talk, console: Console, *, json: bool) -> None:
    interactive = sys.stdin.isatty() and not json
    if interactive:
        console.print(f"[dim]{talk.introduction()}\n{_HELP}[/dim]")
    turns = []
    while True:
        try:
            line = console.input("\n[bold]> [/bold]" if interactive else "").strip()
        except EOFError:
            break
        if line in ("/quit", "/exit"):
            break
        if line == "/help":
            console.print(_HELP, style="dim")
        elif line == "/reset":
            talk.reset()
            console.print("a new conversation", style="dim")
        elif line.startswith("/strength"):
            console.print(talk.set_strength(line.removeprefix("/strength").strip()), style="dim")
        elif line:
            turns.append(talk.turn(line))
    if json:
        print_json(turns)


@dataclass
class _Talk:
    """A conversation of SHINE alone, printed as it is generated."""

    shine: Shine
    lora: LoRA
    args: argparse.Namespace
    console: Console
    strength: float = field(init=False)
    worn: LoRA = field(init=False)
    history: Conversation = field(init=False)
    kept: PromptCache = field(init=False)

    def __post_init__(self) -> None:
        self._strengthen(self.args.strength)
        self.reset()

    def _strengthen(self, strength: float) -> None:
        # One value for all turns: another object is another adapter, for which nothing is kept.
        self.strength, self.worn = strength, strong(self.lora, strength)

    def introduction(self) -> str:
        """What is talked about."""
        names = ", ".join(span.context.name or span.context.sha256[:12] for spans in self.lora.provenance for span in spans)
        return f"about {names or 'an adapter of unknown origin'}, which {self.shine.config.path} does not see"

    def reset(self) -> None:
        """Forget what was said."""
        from shine.chat import Conversation
        from shine.prompt_cache import PromptCache

        self.history, self.kept = Conversation(), PromptCache()

    def set_strength(self, text: str) -> str:
        """Make the adapter stronger or weaker; what to tell the user."""
        try:
            self._strengthen(finite(text))
        except ValueError:
            return f"strength is {self.strength:g}; a number sets it, as in /strength 0.7"
        return f"strength {self.strength:g}"

    def turn(self, question: str) -> dict[str, object]:
        """Ask, print the answer, and return both."""
        started = time.perf_counter()
        pieces = []
        answer = self.shine.stream(
            self.worn, question, history=self.history, kept=self.kept, max_new_tokens=self.args.max_new_tokens
        )
        for piece in answer:
            pieces.append(piece)
            if not self.args.json:
                print(piece, end="", flush=True)
        if not self.args.json:
            print(flush=True)
        said = "".join(pieces).strip()
        self.history = self.history.then(question, said)
        return {"question": question, "answer": said, "seconds": round(time.perf_counter() - started, 3)}


@dataclass
class _Comparison(_Talk):
    """The three methods side by side, each with its own earlier answers."""

    text: str = ""
    talks: SideBySide = field(init=False)

    def __post_init__(self) -> None:
        from shine.cli.side_by_side import SideBySide

        self.talks = SideBySide(self.shine, self.lora, self.text)
        super().__post_init__()

    def reset(self) -> None:
        self.talks.reset()

    def turn(self, question: str) -> dict[str, object]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        from shine.evaluation.tables import TITLES

        told = list(self.talks.ask(question, strength=self.strength, max_new_tokens=self.args.max_new_tokens))
        answers = {each.method: each.text + (" …" if each.cut else "") for each in told}
        seconds = {each.method: round(each.seconds, 3) for each in told}
        if not self.args.json:
            table = Table(box=box.SIMPLE_HEAD, expand=True, title=Text(question), title_justify="left")
            for name in answers:
                table.add_column(f"{TITLES[name]}  [dim]{seconds[name]:.2f} s[/dim]", ratio=1)
            table.add_row(*(Text(answer) for answer in answers.values()))
            self.console.print(table)
        return {"question": question, "answers": answers, "seconds": seconds}
