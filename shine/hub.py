"""Checkpoints on the Hugging Face hub and on ModelScope, through the libraries of the two.

``hf:owner/name`` and ``ms:owner/name`` name a repository, ``hf:owner/name@revision`` one state of it; without a revision it is the
newest. Addresses, tokens, caches and proxies are those of the libraries (``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``,
``HF_HUB_OFFLINE``; ``MODELSCOPE_ENDPOINT``, ``MODELSCOPE_API_TOKEN``, ``MODELSCOPE_CACHE``).
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shine.manifest import MANIFEST_FILE, damage, unlisted, write_manifest
from shine.released import RELEASED_FILES

FILES = ("config.json", "hypernetwork.safetensors", *RELEASED_FILES)
"""What a checkpoint is made of; nothing else is taken from a repository or brought there, but the manifest."""
_PATTERN = re.compile(r"(hf|ms):([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_LOGIN = {"hf": "hf auth login (or HF_TOKEN)", "ms": "modelscope login (or MODELSCOPE_API_TOKEN)"}


@dataclass(frozen=True)
class HubId:
    """A repository on a hub.

    Attributes:
        hub: ``hf`` for Hugging Face, ``ms`` for ModelScope.
        repository: ``owner/name``.
        revision: branch, tag or commit; ``None`` is the newest of the main branch.
    """

    hub: Literal["hf", "ms"]
    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}" + (f"@{self.revision}" if self.revision else "")


def hub_id(name: str | Path) -> HubId | None:
    """The repository that ``name`` means; ``None`` for a path.

    Raises:
        ValueError: it begins like one and is none.
    """
    if not isinstance(name, str) or not name.startswith(("hf:", "ms:")):
        return None
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: not a repository; write hf:owner/name or ms:owner/name, with @revision for one state of it")
    return HubId("hf" if match[1] == "hf" else "ms", match[2], match[3])


def download(remote: HubId) -> Path:
    """The folder of a checkpoint in the library's own cache, whole: what has a manifest is held against it.

    Raises:
        ValueError: there is no such repository or revision, the hub cannot be reached, or the checkpoint is damaged.
    """
    with _library_errors(f"pulling {remote}", remote):
        folder = _download(remote)
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"{remote} holds no checkpoint: none of {', '.join(FILES)} is in it; name another repository or revision")
    if not (folder / MANIFEST_FILE).is_file():
        return folder
    problem = damage(folder)
    if problem is None and (others := unlisted(folder, FILES)):
        problem = f"{others[0]} is of another checkpoint than the one that was pushed"
    if problem is not None:
        raise ValueError(f"{remote}: {problem}; delete {folder} and pull again, or have it pushed again")
    return folder


def upload(folder: Path, remote: HubId, *, private: bool) -> HubId:
    """Bring a checkpoint to a hub, with a manifest of its files; the repository is made where it is not there, and so is the branch
    on Hugging Face (ModelScope's library cannot make one).

    A checkpoint of the other format that the repository holds gives way, other files stay.

    Args:
        folder: a checkpoint directory, ours or released.
        private: of a repository that is made.

    Returns:
        The repository with the commit that holds the checkpoint, where the hub says which.

    Raises:
        ValueError: not logged in, no right to write, or the hub cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="shine-push-") as place:
        staged = Path(place)
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staged / name)
        write_manifest(staged)
        with _library_errors(f"pushing to {remote}", remote):
            return _upload(staged, remote, private=private)


def _download(remote: HubId) -> Path:
    wanted = [*FILES, MANIFEST_FILE]
    # Both libraries take a second to import, and most runs name a folder.
    if remote.hub == "hf":
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(remote.repository, revision=remote.revision, allow_patterns=wanted))
    from modelscope import snapshot_download as modelscope_download

    return Path(modelscope_download(remote.repository, revision=remote.revision, allow_patterns=wanted))


def _upload(folder: Path, remote: HubId, *, private: bool) -> HubId:
    message = "Push a SHINE hypernetwork"
    others = [name for name in FILES if not (folder / name).exists()]
    if remote.hub == "hf":
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(remote.repository, private=private, exist_ok=True)
        if remote.revision is not None:
            api.create_branch(remote.repository, branch=remote.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=remote.repository,
            folder_path=folder,
            revision=remote.revision,
            commit_message=message,
            delete_patterns=others,
        )
        return HubId("hf", remote.repository, done.oid)
    from modelscope.hub.api import HubApi

    hub = HubApi()
    hub.create_repo(remote.repository, repo_type="model", visibility="private" if private else "public", exist_ok=True)
    hub.upload_folder(
        remote.repository,
        folder,
        revision=remote.revision,
        commit_message=message,
        use_cache=False,
        disable_tqdm=True,
    )
    hub.delete_files(remote.repository, "model", delete_patterns=others, revision=remote.revision)
    return remote


@contextmanager
def _library_errors(what: str, remote: HubId) -> Iterator[None]:
    """Whatever the libraries raise, in one line with the remedy."""
    # ModelScope's logs every step of an upload and prints a report; standard output is for our own result.
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # their own families, and those of three HTTP libraries below them
        cause = error.__cause__ or error
        text = " ".join(f"{error} {cause if cause is not error else ''}".split()) or type(cause).__name__
        text = text if len(text) <= 300 else f"{text[:300]}…"
        raise ValueError(
            f"{what} failed ({type(error).__name__}: {text}): check name, revision and network; for what is not public or is "
            f"written to, {_LOGIN[remote.hub]}"
        ) from error
