"""Models, checkpoints and data sets onto this machine, from the Hugging Face hub or ModelScope, each file held against its hash.

Addresses, tokens and proxies are those of the libraries (``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``;
``MODELSCOPE_ENDPOINT``, ``MODELSCOPE_API_TOKEN``), and so is going on after an interruption in the middle of a file.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

Hub = Literal["huggingface", "modelscope"]


@dataclass(frozen=True)
class Item:
    """Something that can be fetched.

    Attributes:
        repository: its id on the Hugging Face hub.
        folder: where it belongs.
        licence: as its card states it.
        kind: of the repository.
        files: patterns of the files to take; none takes all.
        modelscope: its id on ModelScope, where it is there.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    repository: str
    folder: str
    licence: str
    kind: Literal["model", "dataset"] = "dataset"
    files: tuple[str, ...] = ()
    modelscope: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: large ones are known by their SHA-256, small ones by git's blob hash."""

    name: str
    size: int
    sha256: str | None = None
    blob: str | None = None

    def is_at(self, folder: Path) -> bool:
        """Whether ``folder`` holds it, whole and unchanged."""
        path = folder / self.name
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return _digest(path, hashlib.sha256()) == self.sha256
        # As git names it: a header with the size before the content.
        return self.blob is None or _digest(path, hashlib.sha1(b"blob %d\0" % self.size)) == self.blob


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one revision.

    Attributes:
        whole: ``files`` is known to be all of it, and not only what was fetched so far.
    """

    revision: str
    files: tuple[RemoteFile, ...]
    whole: bool = True

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(file.size for file in self.files)


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` (or ``TRANSFORMERS_OFFLINE``) forbids the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def list_files(name: str, item: Item, *, hub: Hub = "huggingface") -> Listing:
    """The files of an item, from its hub; offline, from the record that its download left, ours or that of ``hf download``.

    Raises:
        ValueError: the hub cannot be reached or does not have it; offline, nothing was downloaded here before.
    """
    if offline():
        record = _record(name, item)
        if record.is_file():
            kept = json.loads(record.read_text(encoding="utf-8"))
            return Listing(kept["revision"], tuple(RemoteFile(**file) for file in kept["files"]))
        listing = _list_local(item)
        if not listing.files:
            raise ValueError(
                f"HF_HUB_OFFLINE is set and {item.folder} holds no finished download of {name}: unset it, or copy the folder "
                "from a machine that has it"
            )
        return listing
    with _library_errors(f"looking at {item.repository}"):
        listing = _list_huggingface(item) if hub == "huggingface" else _list_modelscope(name, item)
    if not listing.files:
        raise ValueError(
            f"{item.repository} holds none of {', '.join(item.files)}: mend the catalogue, or use a mirror that is whole"
        )
    return listing


def fetch(
    name: str, item: Item, listing: Listing, *, hub: Hub = "huggingface", say: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Bring an item into its folder: what is there is verified and left alone, what is damaged is fetched again.

    Returns:
        The names of the files that were fetched.

    Raises:
        ValueError: the hub cannot be reached, the disk is too small, or a file is damaged as it arrives.
    """
    folder = Path(item.folder).expanduser()
    missing = [file for file in listing.files if not file.is_at(folder)]
    if not missing:
        if listing.whole:
            _write_record(name, item, listing)
            say(f"{name}: {folder} is complete, {len(listing.files)} files verified")
        else:
            say(f"{name}: {folder} holds {len(listing.files)} files as `hf download` brought them, verified")
        return []
    damaged = [file.name for file in missing if (folder / file.name).exists()]
    if offline():
        listed = ", ".join(file.name for file in missing)
        raise ValueError(f"{name}: {listed} in {folder} missing or damaged, and HF_HUB_OFFLINE is set: unset it and fetch again")
    folder.mkdir(parents=True, exist_ok=True)
    need, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{name}: {size_of(need)} to fetch, {size_of(free)} free at {folder}: make room, or move the folder")
    for old in damaged:
        say(f"{name}: {old} differs from the hub's: fetching it again")
        (folder / old).unlink()
    names = [file.name for file in missing]
    with _library_errors(f"fetching {item.repository}"):
        if hub == "huggingface":
            _fetch_huggingface(item, listing, folder, names)
        else:
            _fetch_modelscope(item, listing, folder, names)
    if bad := [file.name for file in missing if not file.is_at(folder)]:
        raise ValueError(f"{name}: {', '.join(bad)} damaged on the way: run it again, or choose another mirror")
    _write_record(name, item, listing)
    say(f"{name}: {len(missing)} files fetched into {folder} ({size_of(need)}), {len(listing.files)} verified")
    return names


def revision_of(place: str) -> str | None:
    """The hub's revision of what was downloaded, as far as it was recorded.

    Args:
        place: a folder, with the record that ``shine download`` or ``hf download`` left in it, or a hub id, of which the library's
            cache holds what was asked for last.
    """
    folder = Path(place)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(place, "config.json")
        return Path(config).parent.name if isinstance(config, str) else None
    if records := sorted(folder.glob(".*.download.json"), key=lambda file: file.stat().st_mtime):
        return str(json.loads(records[-1].read_text(encoding="utf-8"))["revision"])
    return _list_local(Item("", place, "")).revision or None


def size_of(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _list_local(item: Item) -> Listing:
    """What ``hf download --local-dir`` noted beside each file that it finished: commit, ETag and time, a line each.

    The hub's ETag is the SHA-256 of a large file and git's blob hash of a small one; of another server's, only that the file is
    there can be verified.
    """
    folder = Path(item.folder).expanduser()
    notes = folder / ".cache" / "huggingface" / "download"
    commits: list[tuple[float, str]] = []
    files = []
    for note in sorted(notes.rglob("*.metadata")):
        name = note.relative_to(notes).as_posix().removesuffix(".metadata")
        if not _wanted(name, item):
            continue
        try:
            commit, etag, time = note.read_text(encoding="utf-8").split()
            commits.append((float(time), commit))
        except ValueError:
            raise ValueError(f"{note}: not a note of `hf download`: run that again, or unset HF_HUB_OFFLINE") from None
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        sha256, blob = (etag if re.fullmatch(f"[0-9a-f]{{{digits}}}", etag) else None for digits in (64, 40))
        files.append(RemoteFile(name, size, sha256, blob))
    return Listing(max(commits)[1] if commits else "", tuple(files), whole=False)


def _list_huggingface(item: Item) -> Listing:
    from huggingface_hub import HfApi

    api = HfApi()
    look = api.model_info if item.kind == "model" else api.dataset_info
    info = look(item.repository, files_metadata=True)
    found = [sibling for sibling in info.siblings or [] if _wanted(sibling.rfilename, item)]
    files = tuple(RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id) for s in found)
    return Listing(str(info.sha), files)


def _list_modelscope(name: str, item: Item) -> Listing:
    if item.modelscope is None:
        raise ValueError(f"{name} is not known to be on ModelScope: fetch it from the hub, or from a mirror with HF_ENDPOINT")
    from modelscope_hub import HubApi

    rows = HubApi().list_repo_files(item.modelscope, item.kind)
    found = (row for row in rows if not row.is_dir and _wanted(row.path, item))
    return Listing("master", tuple(RemoteFile(row.path, row.size, row.sha256) for row in found))


def _wanted(name: str, item: Item) -> bool:
    return not item.files or any(fnmatch.fnmatch(name, pattern) for pattern in item.files)


def _fetch_huggingface(item: Item, listing: Listing, folder: Path, names: Sequence[str]) -> None:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    snapshot_download(
        item.repository, repo_type=item.kind, revision=listing.revision, local_dir=str(folder), allow_patterns=patterns
    )


def _fetch_modelscope(item: Item, listing: Listing, folder: Path, names: Sequence[str]) -> None:
    from modelscope import snapshot_download

    patterns = [glob.escape(name) for name in names]
    snapshot_download(
        item.modelscope, repo_type=item.kind, revision=listing.revision, local_dir=str(folder), allow_patterns=patterns
    )


def _record(name: str, item: Item) -> Path:
    return Path(item.folder).expanduser() / f".{name}.download.json"


def _write_record(name: str, item: Item, listing: Listing) -> None:
    content: Mapping[str, Any] = {"revision": listing.revision, "files": [asdict(file) for file in listing.files]}
    record = _record(name, item)
    temporary = record.with_name(f"{record.name}.partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(record)


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Whatever the libraries raise, in one line with the remedy."""
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    try:
        # ModelScope prints a banner; standard output is for our own result.
        with redirect_stdout(sys.stderr):
            yield
    except ValueError:
        raise
    except Exception as error:  # their own families, and those of the HTTP libraries below them
        text = " ".join(str(error).split())
        raise ValueError(
            f"{what} failed ({type(error).__name__}: {text:.300}): check the network and run it again, it goes on where it "
            "stopped; or set HF_ENDPOINT to a mirror; some repositories need `hf auth login` first"
        ) from error
