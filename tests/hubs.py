"""Two hubs on loopback: what the Hugging Face hub and ModelScope answer to the requests that their libraries make of them.

Files are kept by commit, large ones by hash as git-lfs does. Only what a push and a pull need is here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from loopback import LoopbackServer, serving

TOKEN = "hf_right"
LARGE = (".safetensors", ".pt", ".pth")


class Hub:
    """What is stored: ``commits[repository][revision]`` is name to content; branches move, commits do not."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, dict[str, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def create(self, repository: str, *, private: bool, main: str) -> None:
        if repository not in self.commits:
            self.commits[repository], self.heads[repository], self.private[repository] = {"0" * 40: {}}, {main: "0" * 40}, private

    def commit(self, repository: str, branch: str, files: dict[str, bytes], *, gone: Sequence[str] = ()) -> str:
        before = self.commits[repository][self.heads[repository].get(branch, "0" * 40)]
        content = {name: data for name, data in {**before, **files}.items() if name not in gone}
        oid = hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()
        self.commits[repository][oid] = content
        self.heads[repository][branch] = oid
        return oid

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = self.heads[repository].get(revision, revision)
        return oid, self.commits[repository][oid]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle(b"")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self._handle(self.rfile.read(int(self.headers.get("content-length") or 0)))

    do_PUT = do_POST  # noqa: N815

    def _handle(self, body: bytes) -> None:
        url = urlparse(self.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        self.hub.requests.append((self.command, path))
        if self.command == "POST" and TOKEN not in (self.headers.get("authorization") or ""):
            self._send({"error": "Invalid username or password.", "Code": 401, "Message": "not logged in"}, code=401)
        elif match := re.fullmatch("/blobs/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.hub.blobs[match[1]] = body
            self._send({"Code": 200, "Success": True, "Data": {}})
        elif path.startswith("/api/v1/"):
            self._modelscope(path.removeprefix("/api/v1/"), query, body)
        else:
            self._hugging_face(path, body)

    def _hugging_face(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            wish = json.loads(body)
            repository = f"{wish['organization']}/{wish['name']}" if wish.get("organization") else wish["name"]
            private = bool(wish.get("private")) or wish.get("visibility") == "private"
            hub.create(repository, private=private, main="main")
            self._send({"url": f"{hub.url}/{repository}", "id": repository, "name": repository})
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            heads = hub.heads[match[1]]
            there = match[2] in heads
            heads.setdefault(match[2], heads["main"])
            self._send({"error": "Reference already exists"} if there else {}, code=409 if there else 200)
        elif (match := re.fullmatch("/api/models/([^/]+/[^/]+)/(?:preupload|commit)/(.+)", path)) and (
            match[2] not in hub.heads[match[1]]
        ):
            self._send({"error": f"Invalid rev id: {match[2]}"}, code=404, headers={"X-Error-Code": "RevisionNotFound"})
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"} for f in files]
            self._send({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            self._send({"transfer": "basic", "objects": [self._upload_of(item) for item in objects]})
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            changed, gone = {}, []
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    changed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    changed[line["value"]["path"]] = hub.blobs[line["value"]["oid"]]
                elif line["key"] == "deletedFile":
                    gone.append(line["value"]["path"])
            oid = hub.commit(match[1], match[2], changed, gone=gone)
            self._send({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{match[1]}/commit/{oid}"})
        elif match := re.fullmatch("/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            found = self._look(match[1], match[3])
            if found is not None:
                oid, files = found
                tree = [{"type": "file", "path": name, "size": len(data), "oid": oid} for name, data in files.items()]
                siblings = [{"rfilename": name} for name in files]
                whole = {"id": match[1], "modelId": match[1], "sha": oid, "siblings": siblings, "private": False, "tags": []}
                self._send(tree if match[2] == "tree" else whole)
        elif match := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            found = self._look(match[1], match[2])
            if found is not None:
                oid, files = found
                if match[3] in files:
                    data = files[match[3]]
                    etag = hashlib.sha256(data).hexdigest()
                    self._send(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": oid})
                else:
                    self._send({"error": "Entry not found"}, code=404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            self._send({"error": f"no such path {path}"}, code=404)

    def _look(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repository not in self.hub.commits:
            self._send({"error": "Repository not found"}, code=404, headers={"X-Error-Code": "RepoNotFound"})
            return None
        try:
            return self.hub.find(repository, revision)
        except KeyError:
            self._send({"error": f"Invalid rev id: {revision}"}, code=404, headers={"X-Error-Code": "RevisionNotFound"})
            return None

    def _upload_of(self, item: dict[str, Any]) -> dict[str, Any]:
        there = item["oid"] in self.hub.blobs
        upload = {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/blobs/{item['oid']}"}}}
        return {"oid": item["oid"], "size": item["size"], **upload}

    def _modelscope(self, path: str, query: dict[str, str], body: bytes) -> None:
        hub = self.hub
        data: Any = {}
        if path == "models" and self.command == "POST":
            wish = json.loads(body)
            hub.create(f"{wish['Path']}/{wish['Name']}", private=wish["Visibility"] == 1, main="master")
        elif match := re.fullmatch("repos/models/([^/]+/[^/]+)/info/lfs/objects/batch", path):
            data = {"objects": [self._upload_of(item) for item in json.loads(body)["objects"]]}
        elif match := re.fullmatch("repos/models/([^/]+/[^/]+)/commit/(.+)", path):
            actions = json.loads(body)["actions"]
            gone = [a["path"] for a in actions if a["action"] == "delete"]
            kept = [a for a in actions if a["action"] != "delete"]
            changed = {a["path"]: hub.blobs[a["sha256"]] if a["type"] == "lfs" else base64.b64decode(a["content"]) for a in kept}
            data = {"oid": hub.commit(match[1], match[2], changed, gone=gone)}
        elif match := re.fullmatch("models/([^/]+/[^/]+)/repo/files", path):
            try:
                oid, files = hub.find(match[1], query["Revision"])
            except KeyError:
                self._send({"Code": 10010205001, "Success": False, "Message": "not found"}, code=404)
                return
            rows = [(name, content, hashlib.sha256(content).hexdigest()) for name, content in files.items()]
            data = {
                "Files": [
                    {"Name": name, "Path": name, "Type": "blob", "Size": len(content), "Sha256": sha, "Revision": oid}
                    for name, content, sha in rows
                ]
            }
        elif match := re.fullmatch("models/([^/]+/[^/]+)/repo", path):
            self._send(hub.find(match[1], query["Revision"])[1][query["FilePath"]])
            return
        elif (match := re.fullmatch("models/([^/]+/[^/]+)", path)) and match[1] in hub.commits:
            data = {"Id": 1, "Name": match[1]}
        else:
            self._send({"Code": 404, "Success": False, "Message": f"no such path {path}"}, code=404)
            return
        self._send({"Code": 200, "Success": True, "Data": data})

    def _send(self, content: Any, *, code: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers as both do, until the block ends."""
    hub = Hub()
    server = LoopbackServer(type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    with serving(server):
        yield hub
