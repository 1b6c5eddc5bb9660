"""``shine serve-adapter``: adapters in a running vLLM or SGLang."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shine.cli.commands import Commands, add_command
from shine.cli.models import (
    add_document_options,
    add_json_option,
    add_strength_option,
    encode_document,
    load_shine,
    positive,
    print_json,
    read_inputs,
    seconds,
    strong,
)

if TYPE_CHECKING:
    from shine.documents import Document
    from shine.export.server import Server
    from shine.lora import LoRA


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine serve-adapter`` and its own subcommands."""
    parser = add_command(
        commands,
        "serve-adapter",
        help="register adapters with a running vLLM or SGLang, and ask it",
        description=(
            "Encode a text, write it as a PEFT folder that the server can read, and register it there under a name that no other\n"
            "weights have; ask the server; take the adapter away. `shine export --check` says how to start the server. Its key,\n"
            "where it wants one, is OPENAI_API_KEY in the environment."
        ),
        examples="""
shine serve-adapter register notes.txt --model checkpoints/mine/train --engine vllm --output /srv/adapters
shine serve-adapter list --engine vllm
shine serve-adapter ask notes-5f0c2a9e41 --engine vllm --question "Where does Zoran live?"
shine serve-adapter unregister notes-5f0c2a9e41 --engine vllm
""",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_register(actions)
    listing = _add_action(
        actions,
        "list",
        "say what the server has",
        _list,
        "shine serve-adapter list --engine vllm\nshine serve-adapter list --engine sglang --server http://gpu7:30000 --json",
    )
    ask = _add_action(
        actions,
        "ask",
        "ask the model that wears an adapter",
        _ask,
        'shine serve-adapter ask notes-5f0c2a9e41 --engine vllm --question "Where does Zoran live?"',
    )
    unregister = _add_action(
        actions,
        "unregister",
        "take an adapter away; its folder stays",
        _unregister,
        "shine serve-adapter unregister notes-5f0c2a9e41 --engine vllm",
    )
    for action in (ask, unregister):
        action.add_argument("name", metavar="NAME", help="under which it was registered")
    ask.add_argument("-q", "--question", action="append", required=True, metavar="Q", help="ask this; repeat it for further turns")
    ask.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer (default: 256)")
    for action in (ask, listing, unregister):
        add_json_option(action)


def _add_register(actions: Commands[argparse.ArgumentParser]) -> None:
    register = _add_action(
        actions,
        "register",
        "encode a text, or take an adapter, and register it",
        _register,
        "shine serve-adapter register notes.txt --model checkpoints/mine/train --engine vllm --output /srv/adapters\n"
        "shine serve-adapter register --adapter adapters/notes --engine vllm --output /mnt/adapters --mounted-as /srv/adapters\n"
        "shine serve-adapter register notes.txt --model checkpoints/mine/train --engine sglang --from-tensors",
    )
    register.add_argument("text", nargs="?", metavar="TEXT", help="a file, or - for standard input")
    register.add_argument("--adapter", metavar="FOLDER", help="register this one, which `shine encode` wrote")
    register.add_argument("-o", "--output", metavar="FOLDER", help="where the PEFT folder is written, below a name of its own")
    register.add_argument("--mounted-as", metavar="FOLDER", help="where the server sees --output; default: at the same place")
    register.add_argument("--from-tensors", action="store_true", help="SGLang: send the weights, write nothing")
    register.add_argument("--tensor-parallel", type=positive, default=1, metavar="N", help="with --from-tensors: the server's GPUs")
    register.add_argument("--name", help="instead of the text's name and a hash of the weights")
    register.add_argument("--server-rank", type=positive, metavar="N", help="the largest rank it was started with")
    add_strength_option(register)
    add_document_options(register)


def _add_action(
    actions: Commands[argparse.ArgumentParser], name: str, about: str, run: object, examples: str
) -> argparse.ArgumentParser:
    action = add_command(actions, name, help=about, description=f"{about[0].upper()}{about[1:]}.", examples=examples)
    group = action.add_argument_group("server")
    group.add_argument("--engine", choices=("vllm", "sglang"), required=True, help="which engine it is")
    group.add_argument("--server", metavar="URL", help="where it listens; default: port 8000 (vLLM) or 30000 (SGLang) here")
    group.add_argument("--timeout", type=seconds, default=120.0, metavar="S", help="seconds a request may take (default: 120)")
    action.set_defaults(run=run)
    return action


def _connect(args: argparse.Namespace) -> Server:
    from shine.export.server import Server

    return Server(args.server, engine=args.engine, timeout=args.timeout)


def _register(args: argparse.Namespace) -> None:
    if (args.text is None) == (args.adapter is None):
        raise ValueError("give a TEXT to encode, or --adapter FOLDER, one of the two")
    if (args.output is None) != args.from_tensors:
        raise ValueError("say how the server gets the weights: --output FOLDER that it can read, or --from-tensors (SGLang)")
    if args.from_tensors and args.engine != "sglang":
        raise ValueError("vLLM loads adapters from folders only: give --output FOLDER, which it can read, not --from-tensors")
    from shine.checkpoint import output_folder

    output = None if args.output is None else output_folder(args.output)
    documents = [] if args.text is None else read_inputs([args.text], args)
    if len(documents) > 1:
        raise ValueError(f"{args.text} holds {len(documents)} documents: register one at a time, or `shine encode --join` them")
    server = _connect(args)
    # Before anything is encoded: a server that is down is known at once.
    models = server.models()
    stem, lora, backbone = _encoded(documents[0], args) if documents else _from_disk(args)
    lora = strong(lora, args.strength)
    name = args.name or _name(stem, lora)
    modules = {path.rsplit(".", 1)[-1] for path in lora}
    server.engine.check(name, rank=lora.rank, modules=modules, base=backbone, server_rank=args.server_rank)
    if name in {model.name for model in models}:
        raise ValueError(f"{server.address} has {name} already: unregister it, or give another --name")
    _check_base(models[0].root or models[0].name if models else "", lora, backbone)
    if output is None:
        server.register_tensors(name, lora, tensor_parallel=args.tensor_parallel)
        seen = None
    else:
        seen = _write_and_load(server, name, lora, output / name, args, backbone=backbone)
    if args.json:
        print_json({"name": name, "folder": seen, "server": server.address, "engine": args.engine, "rank": lora.rank})
    else:
        print(name)


def _name(stem: str, lora: LoRA) -> str:
    from shine.export.server import name_for

    return name_for(stem, lora)


def _encoded(document: Document, args: argparse.Namespace) -> tuple[str, LoRA, str]:
    """What to call an adapter, the adapter, and the backbone it is for."""
    shine = load_shine(args)
    return Path(document.name).stem, encode_document(shine, document, args), shine.config.path


def _from_disk(args: argparse.Namespace) -> tuple[str, LoRA, str]:
    """As `_encoded`, of an adapter that is there."""
    from shine.lora import LoRA

    lora = LoRA.load(args.adapter)
    names = {span.backbone.name for spans in lora.provenance for span in spans}
    if args.backbone is None and len(names) != 1:
        raise ValueError(f"{args.adapter}: does not say which one backbone it is for: give --backbone")
    if args.max_rank is not None and lora.rank > args.max_rank:
        lora, share = lora.reduce(args.max_rank)
        print(f"note: reduced to rank {lora.rank}, {share:.1%} of the update (squared norm) is kept", file=sys.stderr)
    return Path(args.adapter).absolute().name, lora, args.backbone or names.pop()


def _write_and_load(server: Server, name: str, lora: LoRA, folder: Path, args: argparse.Namespace, *, backbone: str) -> str:
    """Write the folder and have it loaded; the path as the server sees it. What it refuses is not left on the disk.

    A folder with these very weights, which a server had that was started again since, is loaded as it is.
    """
    from shine.export.engines import check_new_folder
    from shine.export.peft import holds, write_peft

    there = holds(folder, lora)
    if not there:
        check_new_folder(folder)
        write_peft(lora, folder, backbone=backbone)
    seen = str(Path(args.mounted_as) / name if args.mounted_as else folder.absolute())
    try:
        server.register(name, seen)
    except BaseException:
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return seen


def _check_base(served: str, lora: LoRA, backbone: str) -> None:
    """Refuse a server of another backbone where it can be seen from here, else note that it is called otherwise."""
    from shine.export.backbones import backbone_config
    from shine.export.engines import model_path

    if (Path(served) / "config.json").is_file():
        backbone_config(served, lora, remedy="start the server with the one it was made for")
    if served and backbone and Path(served).name not in (backbone, Path(model_path(backbone)).name):
        print(f"note: the server has {served}, the adapter is for {backbone}; answers need the same weights", file=sys.stderr)


def _list(args: argparse.Namespace) -> None:
    models = _connect(args).models()
    if args.json:
        print_json([{"name": model.name, "root": model.root, "parent": model.parent} for model in models])
        return
    for model in models:
        print(f"{model.name}  ({'adapter of ' + model.parent if model.parent else 'model'}, {model.root or 'origin not said'})")


def _ask(args: argparse.Namespace) -> None:
    from shine.chat import Conversation

    server, history, turns = _connect(args), Conversation(), []
    base = server.base().name
    for question in args.question:
        answer = server.ask(args.name, question, history=history, max_new_tokens=args.max_new_tokens, base=base)
        history = history.then(question, answer)
        turns.append({"question": question, "answer": answer})
        if not args.json:
            print(answer, flush=True)
    if args.json:
        print_json(turns)


def _unregister(args: argparse.Namespace) -> None:
    server = _connect(args)
    server.unregister(args.name)
    if args.json:
        print_json({"name": args.name, "server": server.address, "registered": False})
    else:
        print(f"{server.address} has {args.name} no more")
