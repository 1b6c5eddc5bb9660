"""Downloads with the real libraries from a hub on loopback: whole, broken off, damaged, offline."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest
from hubs import LARGE, Hub, _Handler

from shine.checkpoint import read_info
from shine.cli.collect import load
from shine.cli.main import main
from shine.downloads import Item, RemoteFile, size_of
from shine.parsing import parse

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"a": 1}\n',
    "model.safetensors": WEIGHTS,
    "README.md": "Zoë\n".encode(),
    "deep/er/[1].pt": b"x" * 5000,
}
DATA = {"data/train-00000-of-00001.parquet.pt": b"p" * 70_000, "other.json": b"[]\n"}
CATALOGUE = """
models:
  tiny: {repository: owner/tiny, kind: model, folder: models/tiny, licence: Apache-2.0, modelscope: scope/tiny}
data:
  set: {repository: owner/set, folder: data/set, licence: CC BY 4.0}
  part: {repository: owner/set, folder: data, licence: MIT, files: [other.json]}
"""


class _Downloads(_Handler):
    """Data sets beside models, sizes and hashes of files, ranges, and a connection that breaks."""

    broken: dict[str, int]
    ranges: list[str]
    spoil: Callable[[str, bytes], bytes]

    def _handle(self, body: bytes) -> None:
        path = (
            unquote(urlparse(self.path).path).replace("/api/v1/datasets/", "/api/v1/models/").replace("/repo/tree", "/repo/files")
        )
        path = path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/", 1)
        if match := re.fullmatch("/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self.hub.requests.append((self.command, path))
            oid, files = self.hub.find(match[1], "main")
            siblings = [{"rfilename": name, **_known(name, data)} for name, data in files.items()]
            self._send({"id": match[1], "sha": oid, "siblings": siblings, "private": False, "tags": []})
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            oid, files = self.hub.find(match[1], "main")
            self._send([{"type": "file", "path": name, "oid": oid, **_known(name, data)} for name, data in files.items()])
        elif re.fullmatch("/api/models/[^/]+/[^/]+/tree/[^/]+/.+", path):
            self._send({"error": "no such folder"}, code=404, headers={"X-Error-Code": "EntryNotFound"})
        elif (match := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) and self.command == "GET":
            self.hub.requests.append((self.command, path))
            self._send_file(match[3], self.hub.find(match[1], match[2])[1][match[3]])
        elif match := re.fullmatch("/api/v1/models/([^/]+/[^/]+)/repo", path):
            self.hub.requests.append((self.command, path))
            query = {key: values[0] for key, values in parse_qs(urlparse(self.path).query).items()}
            self._send_file(query["FilePath"], self.hub.find(match[1], query["Revision"])[1][query["FilePath"]])
        else:
            self.path = path + ("?" + urlparse(self.path).query if urlparse(self.path).query else "")
            super()._handle(body)

    def _send_file(self, name: str, data: bytes) -> None:
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(asked[1])
            self.ranges.append(f"{name} from {start}")
        rest = self.spoil(name, data)[start:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        stop = self.broken.pop(name, len(rest))
        self.wfile.write(rest[:stop])
        if stop < len(rest):
            self.wfile.flush()
            self.close_connection = True


def _known(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "pointerSize": 130,
        "oid": hashlib.sha256(data).hexdigest(),
    }
    return {"size": len(data), "blobId": blob, **({"lfs": lfs} if name.endswith(LARGE) else {})}


class Loopback:
    """The hub, what is asked of it, and a folder with the catalogue where the command runs."""

    def __init__(self, folder: Path) -> None:
        self.hub, self.folder = Hub(), folder
        self.broken: dict[str, int] = {}
        self.ranges: list[str] = []
        self.spoil: Callable[[str, bytes], bytes] = lambda name, data: data
        owner = self
        values = {"hub": self.hub, "broken": self.broken, "ranges": self.ranges, "spoil": lambda _, *a: owner.spoil(*a)}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Downloads,), values))
        self.hub.url = f"http://127.0.0.1:{self.server.server_port}"
        for repository, files, branch in (
            ("owner/tiny", FILES, "main"),
            ("owner/set", DATA, "main"),
            ("scope/set", DATA, "master"),
            ("scope/tiny", {"config.json": FILES["config.json"], "model.safetensors": WEIGHTS}, "master"),
        ):
            self.hub.create(repository, private=False, main=branch)
            self.hub.commit(repository, branch, files)
        (folder / "catalogue.yaml").write_text(CATALOGUE)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``shine download``, in a process of its own as a user starts it."""
        command = ["-m", "shine.cli.main", "download", *arguments, "--catalogue", str(self.folder / "catalogue.yaml")]
        return self.python(*command, **environment)

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A process that knows no other hub."""
        known = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "MODELSCOPE_ENDPOINT": self.hub.url,
            "MODELSCOPE_CACHE": str(self.folder / "ms"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        environment = {**os.environ, **known, **environment}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)

    def fetched(self) -> list[str]:
        """Files that were asked for since the last look, by name."""
        names = [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path in self.hub.requests
            if method == "GET" and "/resolve/" in path
        ]
        self.hub.requests.clear()
        return sorted(names)


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    with _serving(Loopback(tmp_path)) as loopback:
        yield loopback


@contextmanager
def _serving(loopback: Loopback) -> Iterator[Loopback]:
    threading.Thread(target=loopback.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield loopback
    finally:
        loopback.server.shutdown()
        loopback.server.server_close()


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.parts))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_is_fetched_once_is_verified_and_skipped_then_mended_where_it_is_damaged(loopback: Loopback) -> None:
    folder = loopback.folder / "models" / "tiny"
    done = loopback.run("models")
    assert done.returncode == 0, done.stderr
    assert content(folder) == FILES
    assert loopback.fetched() == sorted(FILES)
    # Size and licence come before the first file.
    head, _, tail = done.stdout.partition("tiny: 4 files fetched")
    assert re.search(r"tiny +owner/tiny +models/tiny +Apache-2.0 +1 MB", head)
    assert "4 verified" in tail

    again = loopback.run("models")
    assert (again.returncode, loopback.fetched()) == (0, [])
    assert "models/tiny is complete, 4 files verified" in again.stdout

    # One byte of the same length, one file of another, one that is gone: large by SHA-256, small by git's hash.
    (folder / "model.safetensors").write_bytes(b"!" + WEIGHTS[1:])
    (folder / "config.json").write_bytes(b'{"a": 2}\n')
    (folder / "README.md").unlink()
    mended = loopback.run("models", "tiny")
    assert mended.returncode == 0, mended.stderr
    assert loopback.fetched() == ["README.md", "config.json", "model.safetensors"]
    assert "model.safetensors differs from the hub's: fetching it again" in mended.stdout
    assert content(folder) == FILES


@pytest.mark.slow
@pytest.mark.parametrize("way", ["folder", "id", "hf download"])
def test_a_checkpoint_knows_the_revision_of_its_backbone(way: str, tiny_backbone_folder: str, loopback: Loopback) -> None:
    """Whether the hub's id was trained on, or the folder that it was downloaded into, by us or by the hub's own command."""
    files = {path.name: path.read_bytes() for path in Path(tiny_backbone_folder).iterdir()}
    revision = loopback.hub.commit("owner/tiny", "main", files)
    path = "owner/tiny" if way == "id" else "models/tiny"
    if way == "folder":
        done = loopback.run("models")
        assert done.returncode == 0, done.stderr
    elif way == "hf download":
        code = "import huggingface_hub as hub; hub.snapshot_download('owner/tiny', local_dir='models/tiny')"
        done = loopback.python("-c", code)
        assert done.returncode == 0, done.stderr
    small = ["hypernetwork.rank=2", "hypernetwork.meta_rank=4", "hypernetwork.m2p.heads=2", "stage.steps=1", "stage.batch_size=2"]
    small += ["data.train.worlds.options.count=20", "stage.micro_batch_size=2", "stage.evaluate_every=0", "output=run"]
    done = loopback.python(str(ROOT / "train.py"), "experiment=cpu_world", f"backbone.path={path}", *small)
    assert done.returncode == 0, done.stderr
    info = read_info(loopback.folder / "run")
    assert info is not None
    assert info.revision == revision


@pytest.mark.slow
def test_a_download_that_is_broken_off_goes_on_within_the_file(loopback: Loopback) -> None:
    # The library writes ten megabytes at a time; what is less than that is asked for again.
    large = WEIGHTS * 22
    loopback.hub.commit("owner/tiny", "main", {"model.safetensors": large})
    loopback.broken["model.safetensors"] = 15_000_000
    done = loopback.run("models")
    if done.returncode:
        assert "it goes on where it stopped" in done.stderr
        done = loopback.run("models")
    assert done.returncode == 0, done.stderr
    assert content(loopback.folder / "models" / "tiny") == {**FILES, "model.safetensors": large}
    assert len(loopback.ranges) == 1
    assert re.fullmatch(r"model.safetensors from 1\d{7}", loopback.ranges[0])


@pytest.mark.slow
def test_a_file_that_arrives_damaged_is_not_taken_for_good(loopback: Loopback) -> None:
    loopback.spoil = lambda name, data: b"!" + data[1:] if name == "model.safetensors" else data
    done = loopback.run("models")
    assert done.returncode == 2
    assert "model.safetensors damaged on the way" in done.stderr
    assert "Traceback" not in done.stderr
    loopback.spoil = lambda name, data: data
    assert loopback.run("models").returncode == 0
    assert content(loopback.folder / "models" / "tiny") == FILES


@pytest.mark.slow
def test_offline_nothing_is_asked_and_what_is_there_is_verified(loopback: Loopback) -> None:
    refused = loopback.run("data", "set", HF_HUB_OFFLINE="1")
    assert refused.returncode == 2
    assert "HF_HUB_OFFLINE is set and data/set holds no finished download of set" in refused.stderr
    assert loopback.run("data").returncode == 0
    assert content(loopback.folder / "data" / "set") == DATA
    # Of the other item only what its patterns name, beside the first.
    assert (loopback.folder / "data" / "other.json").read_bytes() == DATA["other.json"]
    loopback.hub.requests.clear()
    done = loopback.run("data", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "set: data/set is complete, 2 files verified" in done.stdout
    (loopback.folder / "data" / "set" / "other.json").write_bytes(b"{}\n")
    damaged = loopback.run("data", HF_HUB_OFFLINE="1")
    assert damaged.returncode == 2
    assert "other.json in data/set missing or damaged, and HF_HUB_OFFLINE is set" in damaged.stderr
    assert loopback.hub.requests == []


@pytest.mark.slow
def test_one_bad_repository_does_not_stop_the_others(loopback: Loopback) -> None:
    catalogue = CATALOGUE.replace("data:\n", "data:\n  gone: {repository: owner/gone, folder: data/gone, licence: MIT}\n")
    (loopback.folder / "catalogue.yaml").write_text(catalogue)
    listed = loopback.run("data", "--list")
    assert (listed.returncode, loopback.fetched()) == (2, [])
    assert re.search(r"set +owner/set +data/set +CC BY 4.0 +70 kB", listed.stdout)
    loopback.spoil = lambda name, data: b"!" + data[1:] if name.endswith(".pt") else data
    done = loopback.run("data")
    assert done.returncode == 2
    # One cannot be looked at, one arrives damaged, and the one after both is there.
    assert done.stderr.startswith("error: 2 of 3 failed:\n  gone: looking at owner/gone failed")
    assert "\n  set: data/train-00000-of-00001.parquet.pt damaged on the way" in done.stderr
    assert "Traceback" not in done.stderr
    assert (loopback.folder / "data" / "other.json").read_bytes() == DATA["other.json"]


@pytest.mark.slow
def test_the_list_fetches_nothing_and_an_unknown_name_or_hub_is_refused(loopback: Loopback) -> None:
    listed = loopback.run("data", "--list")
    assert (listed.returncode, loopback.fetched()) == (0, [])
    assert re.search(r"set +owner/set +data/set +CC BY 4.0 +70 kB", listed.stdout)
    assert not (loopback.folder / "data").exists()
    unknown = loopback.run("data", "sett")
    assert (unknown.returncode, unknown.stderr) == (2, "error: no 'sett' among data: there are set, part\n")
    gone = loopback.run("data", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone.returncode == 2
    assert "looking at owner/set failed" in gone.stderr
    elsewhere = loopback.run("data", "set", "--from", "modelscope")
    assert elsewhere.returncode == 2
    assert "set is not known to be on ModelScope" in elsewhere.stderr


def test_modelscope_has_the_same_rules(loopback: Loopback) -> None:
    folder = loopback.folder / "models" / "tiny"
    done = loopback.run("models", "--from", "modelscope")
    assert done.returncode == 0, done.stderr
    whole = {"config.json": FILES["config.json"], "model.safetensors": WEIGHTS}
    assert {name: data for name, data in content(folder).items() if name in whole} == whole
    loopback.hub.requests.clear()
    assert loopback.run("models", "--from", "modelscope").returncode == 0
    assert not [path for _, path in loopback.hub.requests if path.endswith("/repo")]
    (folder / "model.safetensors").write_bytes(b"!" + WEIGHTS[1:])
    mended = loopback.run("models", "--from", "modelscope")
    assert mended.returncode == 0, mended.stderr
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.slow
def test_a_download_from_modelscope_that_is_broken_off_goes_on_within_the_file(loopback: Loopback) -> None:
    loopback.broken["model.safetensors"] = 700_000
    done = loopback.run("models", "--from", "modelscope")
    if done.returncode:
        assert "it goes on where it stopped" in done.stderr
        done = loopback.run("models", "--from", "modelscope")
    assert done.returncode == 0, done.stderr
    assert (loopback.folder / "models" / "tiny" / "model.safetensors").read_bytes() == WEIGHTS
    (begin,) = (found[1] for asked in loopback.ranges if (found := re.fullmatch(r"model.safetensors from (\d+)", asked)))
    assert 0 < int(begin) <= 700_000


@pytest.mark.slow
def test_modelscope_brings_data_sets_where_it_has_them(loopback: Loopback) -> None:
    catalogue = CATALOGUE.replace("licence: CC BY 4.0}", "licence: CC BY 4.0, modelscope: scope/set}")
    (loopback.folder / "catalogue.yaml").write_text(catalogue)
    done = loopback.run("data", "--from", "modelscope")
    assert done.returncode == 2
    assert "error: 1 of 2 failed:\n  part: part is not known to be on ModelScope" in done.stderr
    assert "set: 2 files fetched into data/set" in done.stdout
    assert {name: (loopback.folder / "data" / "set" / name).read_bytes() for name in DATA} == DATA


@pytest.mark.parametrize("group", ["models", "data"])
def test_the_scripts_are_posix_sh_and_add_nothing_but_the_group(group: str, tmp_path: Path) -> None:
    """Started from anywhere, with the arguments as they are."""
    script = ROOT / "scripts" / f"download_{group}.sh"
    subprocess.run(["sh", "-n", script], check=True)
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\nprintf "%s|" "$@"; pwd\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["sh", script, "a b", "--list"], cwd=tmp_path, env={**os.environ, "PYTHON": str(stand_in)}, capture_output=True, text=True
    )
    assert done.stdout == f"-m|shine.cli.main|download|{group}|a b|--list|{ROOT}\n"


def test_the_shipped_catalogue_holds_what_the_recipe_needs() -> None:
    catalogue = parse(dict[str, dict[str, Item]], load(ROOT / "configs" / "downloads.yaml"))
    assert {"qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "shine-pretrain", "shine-mqa", "shine-1qa"} == set(catalogue["models"])
    for group, folders in (("models", ("models/", "checkpoints/")), ("data", ("data",))):
        for item in catalogue[group].values():
            assert item.kind == group.removesuffix("s").replace("data", "dataset")
            assert item.folder.startswith(folders)
            assert item.licence
    # Every part of the two collections can be fetched to where the collections read it.
    folders = {item.repository: item.folder for item in catalogue["data"].values()}
    for name in ("mqa", "1qa"):
        parts = load(ROOT / "configs" / f"collection_{name}.yaml")["parts"].values()
        for part in parts:
            assert f"{part['source']['path']}/".startswith(f"{folders[part['hub']]}/")
    # What can be fetched has the name of its source; MS MARCO's two versions are one repository, and SQuAD has a part of its own.
    names = {"msmarco_v1": "msmarco", "msmarco_v2": "msmarco", "squad_unseen": "squad"}
    sources = {path.stem for path in (ROOT / "configs" / "source").glob("*.yaml")} - {
        "folder",
        "gaps",
        "jsonl",
        "recitations",
        "stories",
        "worlds",
    }
    assert {names.get(name, name) for name in sources} <= set(catalogue["data"])
    for name in sources:
        path = load(ROOT / "configs" / "source" / f"{name}.yaml")["path"]
        assert f"{path}/".startswith(f"{catalogue['data'][names.get(name, name)].folder}/")
    with pytest.raises(ValueError, match=r"Unexpected keyword|unknown key|extra"):
        parse(dict[str, Item], {"x": {"repository": "a/b", "folder": "c", "licence": "d", "license": "e"}})  # type: ignore[arg-type]


def _as_hf_leaves(folder: Path, files: dict[str, bytes]) -> None:
    """Files and what ``hf download --local-dir`` notes of them."""
    for name, data in files.items():
        note = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        note.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        known = _known(name, data)
        note.write_text(f"{'c' * 40}\n{known['lfs']['sha256'] if 'lfs' in known else known['blobId']}\n1700000000.5\n")


def test_offline_a_folder_that_hf_download_filled_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "catalogue.yaml").write_text(CATALOGUE)
    command = ["download", "data", "--catalogue", str(tmp_path / "catalogue.yaml")]
    _as_hf_leaves(tmp_path / "data" / "set", DATA)
    # One item of two is not there; the other is looked at all the same.
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert "set: data/set holds 2 files as `hf download` brought them, verified" in out
    assert err.startswith("error: 1 of 2 failed:\n  part: HF_HUB_OFFLINE is set and data holds no finished download of part")
    # Of a folder that several share, only the item's own files.
    _as_hf_leaves(tmp_path / "data", {"other.json": b"[]\n", "another.json": b"{}\n"})
    (tmp_path / "data" / "another.json").unlink()
    assert main(command) == 0
    assert "part: data holds 1 files" in capsys.readouterr().out
    for name, damage in (("other.json", b"{}\n"), (next(iter(DATA)), b"q" * 70_000), ("other.json", None)):
        path = tmp_path / "data" / "set" / name
        path.write_bytes(damage) if damage else path.unlink()
        assert main(["download", "data", "set", *command[2:]]) == 2
        assert f"set: {name} in data/set missing or damaged" in capsys.readouterr().err
        path.write_bytes(DATA[name])
    (tmp_path / "data" / "set" / ".cache" / "huggingface" / "download" / "other.json.metadata").write_text("torn")
    assert main(["download", "data", "set", *command[2:]]) == 2
    assert "other.json.metadata: not a note of `hf download`" in capsys.readouterr().err


def test_a_file_is_known_by_its_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello\n")
    # `git hash-object` of "hello\n".
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"
    assert RemoteFile("a", 6, blob=blob).is_at(tmp_path)
    assert RemoteFile("a", 6, sha256=hashlib.sha256(b"hello\n").hexdigest()).is_at(tmp_path)
    assert not RemoteFile("a", 6, sha256=hashlib.sha256(b"hellO\n").hexdigest()).is_at(tmp_path)
    assert not RemoteFile("a", 7, blob=blob).is_at(tmp_path)
    assert not RemoteFile("b", 6, blob=blob).is_at(tmp_path)
    assert [size_of(count) for count in (999, 1500, 16_400_000_000)] == ["999 B", "2 kB", "16.4 GB"]
