"""A small Hugging Face Hub on localhost, for tests: models and data sets, git-like commits, LFS, faults on demand.

It speaks the calls that `huggingface_hub` 1.31 to 2.4 makes without Xet: whoami, create, settings, preupload, LFS batch
and PUT, commit (NDJSON), repo info, tree, resolve. Everything lives in a folder, so that a server started again on the
same folder goes on with the same repositories. Not implemented: pull requests, tags, gated repositories, multipart
uploads, Xet (its token call answers 404, as a server without Xet would).

By hand:  python tests/support/hub_server.py --root /tmp/hub --port 8899
          HF_ENDPOINT=http://127.0.0.1:8899 HF_TOKEN=<the token that it prints> ...
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import mmap
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_testtokentesttokentesttoken"  # never a real one
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".pt", ".gguf", ".msgpack")
LFS_SIZE = 10_000_000


@dataclass
class Fault:
    """What goes wrong: requests `nth` to `nth + times - 1` (from 1) whose method and path match.

    action: a status code to answer, "drop" (close the connection without an answer), "cut" (read a part of the body,
    then close), "lose" (do what is asked, then close without an answer), or "hang" (keep the request until `released`
    is set; the request then fails like "drop").
    """

    method: str
    path: str
    action: int | str
    nth: int = 1
    times: int = 1_000_000
    message: str = "made to fail by the test"
    seen: int = 0
    hit: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def strikes(self, method: str, path: str) -> bool:
        """Count a request; whether this one fails."""
        if method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        if not self.nth <= self.seen < self.nth + self.times:
            return False
        self.hit.set()
        return True


@dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    status: int | str
    authorized: bool
    received: int = 0


Body = bytes | mmap.mmap | memoryview


def content(file: IO[bytes]) -> Body:
    """What a file holds; a large one is mapped, so that weights of any size pass through without being in memory."""
    file.seek(0, os.SEEK_END)
    if file.tell() > LFS_SIZE:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.seek(0)
    return file.read()


class Store:
    """Repositories in a folder: `objects/<sha256>` and `repos.json`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "objects").mkdir(parents=True, exist_ok=True)
        self.index = root / "repos.json"
        self.repos: dict[str, dict[str, Any]] = json.loads(self.index.read_text()) if self.index.exists() else {}
        self.lock = threading.RLock()

    def save(self) -> None:
        temporary = self.index.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.repos))
        os.replace(temporary, self.index)

    def put_object(self, data: Body) -> str:
        sha = hashlib.sha256(data).hexdigest()
        (self.root / "objects" / sha).write_bytes(data)
        return sha

    def object(self, sha: str) -> Path:
        return self.root / "objects" / sha

    def create(self, key: str, visibility: str) -> dict[str, Any]:
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repo = {"visibility": visibility, "lfs": [], "branches": {}, "commits": {}}
        self.repos[key] = repo
        self.commit(repo, "main", {".gitattributes": self.regular(attributes)}, "initial commit")
        return repo

    def regular(self, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"sha256": self.put_object(data), "size": len(data), "oid": oid, "lfs": False}

    def commit(self, repo: dict[str, Any], branch: str, files: dict[str, Any], summary: str) -> str:
        parent = repo["branches"].get(branch, "")
        text = json.dumps([parent, files, summary, len(repo["commits"])], sort_keys=True)
        oid = hashlib.sha1(text.encode()).hexdigest()
        repo["commits"][oid] = {"parent": parent, "files": files, "summary": summary}
        repo["branches"][branch] = oid
        self.save()
        return oid


class HubServer(ThreadingHTTPServer):
    """The server. `faults` may be changed at any time; `requests` is what it was asked."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, root: Path, *, port: int = 0, token: str = TOKEN, user: str = "tester") -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store = Store(Path(root))
        self.token, self.user = token, user
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.role = "write"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """What a client process needs in its environment to talk to this server, and to nothing else."""
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}

    def add_fault(self, method: str, path: str, action: int | str, **kwargs: Any) -> Fault:
        fault = Fault(method, path, action, **kwargs)
        self.faults.append(fault)
        return fault

    def count(self, method: str, path: str) -> int:
        """How many requests matched."""
        return sum(r.method == method and re.search(path, r.path) is not None for r in self.requests)

    def files(self, repo_id: str, kind: str = "models", branch: str = "main") -> dict[str, dict[str, Any]]:
        """Path -> {sha256, size, oid, lfs} at the head of `branch`."""
        repo = self.store.repos[f"{kind}/{repo_id}"]
        return repo["commits"][repo["branches"][branch]]["files"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed on purpose are no news."""


@contextmanager
def running_hub(root: Path, **kwargs: Any) -> Iterator[HubServer]:
    """A server in a thread, stopped at the end; hanging requests are let go."""
    server = HubServer(root, **kwargs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        for fault in server.faults:
            fault.released.set()
        server.shutdown()
        server.server_close()


class AnswerError(Exception):
    """Ends a request with this status."""

    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        super().__init__(status)
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


REPO = r"(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("PUT", rf"/api/{REPO}/settings", "settings"),
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/{REPO}/branch/(?P<revision>[^/]+)", "branch"),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"/api/{REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", r"/(?P<prefix>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", rf"/lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})", "lfs_put"),
    ("HEAD", r"/(?P<prefix>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", r"/(?P<prefix>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's acknowledgement
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: tests read `server.requests`."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    # ---- one request ----

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        header = self.headers.get("Authorization", "")
        self.authorized = header == f"Bearer {self.server.token}"
        record = Request(self.command, unquote(path), "pending", self.authorized)
        self.server.requests.append(record)
        fault = next((f for f in self.server.faults if f.strikes(self.command, record.path)), None)
        if fault is not None and isinstance(fault.action, str) and fault.action != "lose":
            record.status = fault.action
            self._break(fault)
            return
        try:
            body = self._read(record)
            if header and not self.authorized:
                raise AnswerError(
                    401, {"error": "Invalid user token"}, X_Error_Message="Invalid credentials in Authorization header"
                )
            if fault is not None and fault.action != "lose":
                raise AnswerError(int(fault.action), {"error": fault.message}, X_Error_Message=fault.message)
            self._route(path, body)
        except AnswerError as answer:
            record.status = answer.status
            if fault is not None and fault.action == "lose":
                self._break(fault)
            else:
                self._send(answer)

    def _read(self, record: Request) -> Body:
        with tempfile.TemporaryFile(dir=self.server.store.root) as spool:
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    self._copy(spool, size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                self._copy(spool, int(self.headers.get("Content-Length") or 0))
            spool.flush()
            record.received = spool.tell()
            return content(spool)

    def _copy(self, spool: IO[bytes], size: int) -> None:
        while size:
            block = self.rfile.read(min(size, 1 << 20))
            if not block:
                raise ConnectionError("the client went away")
            spool.write(block)
            size -= len(block)

    def _break(self, fault: Fault) -> None:
        if fault.action == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
        elif fault.action == "hang":
            fault.released.wait(60)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, answer: AnswerError) -> None:
        data = answer.body if isinstance(answer.body, Body) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json", **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, body: Body) -> None:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path) if method == self.command else None
            if match:
                arguments = {key: unquote(value or "") for key, value in match.groupdict().items()}
                with self.server.store.lock:
                    getattr(self, f"_on_{name}")(arguments, body)
                raise AssertionError(f"{name} gave no answer")
        raise AnswerError(404, {"error": f"no such call: {self.command} {path}"})

    # ---- what calls share ----

    def _need_write(self) -> None:
        if not self.authorized:
            raise AnswerError(401, {"error": "log in"}, X_Error_Message="Invalid username or password.")
        if self.server.role != "write":
            raise AnswerError(403, {"error": "the token may only read"}, X_Error_Message="the token may only read")

    def _repo(self, arguments: dict[str, str]) -> dict[str, Any]:
        kind = arguments.get("kind") or ("datasets" if arguments.get("prefix") else "models")
        repo = self.server.store.repos.get(f"{kind}/{arguments['repo']}")
        if repo is None or (repo["visibility"] == "private" and not self.authorized):
            raise AnswerError(
                404 if self.authorized else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound"
            )
        return repo

    def _commit_of(self, repo: dict[str, Any], revision: str) -> str:
        oid = repo["branches"].get(revision or "main", revision)
        if oid not in repo["commits"]:
            raise AnswerError(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return oid

    # ---- the calls ----

    def _on_whoami(self, arguments: dict[str, str], body: Body) -> None:
        if not self.authorized:
            raise AnswerError(401, {"error": "Invalid username or password."})
        token = {"accessToken": {"role": self.server.role}}
        raise AnswerError(200, {"type": "user", "name": self.server.user, "orgs": [], "auth": token})

    def _on_create(self, arguments: dict[str, str], body: Body) -> None:
        self._need_write()
        request = json.loads(body)
        owner = request.get("organization") or self.server.user
        if owner != self.server.user:
            raise AnswerError(
                403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
            )
        kind = f"{request.get('type') or 'model'}s"
        name = f"{owner}/{request['name']}"
        url = f"{self.server.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        if f"{kind}/{name}" in self.server.store.repos:
            raise AnswerError(409, {"error": "You already created this model repo", "url": url})
        self.server.store.create(f"{kind}/{name}", request.get("visibility") or "public")
        raise AnswerError(200, {"url": url, "name": name, "id": name})

    def _on_validate_yaml(self, arguments: dict[str, str], body: Body) -> None:
        content = json.loads(body)["content"]
        ok = content.startswith("---\n") and "\n---\n" in content
        errors = [] if ok else [{"message": "no metadata"}]
        raise AnswerError(200 if ok else 400, {"errors": errors, "warnings": []})

    def _on_settings(self, arguments: dict[str, str], body: Body) -> None:
        self._need_write()
        repo = self._repo(arguments)
        request = json.loads(body)
        if "visibility" in request:
            repo["visibility"] = request["visibility"]
        self.server.store.save()
        raise AnswerError(200, {"private": repo["visibility"] == "private"})

    def _on_preupload(self, arguments: dict[str, str], body: Body) -> None:
        self._need_write()
        repo = self._repo(arguments)
        stored = repo["commits"][self._commit_of(repo, arguments["revision"])]["files"]
        files = []
        for item in json.loads(body)["files"]:
            lfs = item["path"].endswith(LFS_SUFFIXES) or item["size"] > LFS_SIZE
            there = stored.get(item["path"])
            oid = None if there is None else there["sha256" if there["lfs"] else "oid"]
            mode = "lfs" if lfs else "regular"
            files.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise AnswerError(200, {"files": files})

    def _on_lfs_batch(self, arguments: dict[str, str], body: Body) -> None:
        self._need_write()
        repo = self._repo(arguments)
        kind = "datasets" if arguments["prefix"] else "models"
        objects = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo["lfs"]:
                href = f"{self.server.endpoint}/lfs/{kind}/{arguments['repo']}/{item['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        raise AnswerError(200, {"transfer": "basic", "objects": objects})

    def _on_lfs_put(self, arguments: dict[str, str], body: Body) -> None:
        repo = self.server.store.repos[f"{arguments['kind']}/{arguments['repo']}"]
        if hashlib.sha256(body).hexdigest() != arguments["oid"]:
            raise AnswerError(400, {"error": "the content is not what its name says"})
        self.server.store.put_object(body)
        repo["lfs"].append(arguments["oid"])
        self.server.store.save()
        raise AnswerError(200, {})

    def _on_commit(self, arguments: dict[str, str], body: Body) -> None:
        self._need_write()
        repo = self._repo(arguments)
        store = self.server.store
        head = self._commit_of(repo, arguments["revision"])
        files = dict(repo["commits"][head]["files"])
        summary = ""
        for item in (json.loads(line) for line in body.splitlines() if line):
            key, value = item["key"], item["value"]
            if key == "header":
                summary = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise AnswerError(
                        412, {"error": "A commit has happened since"}, X_Error_Message="A commit has happened since"
                    )
            elif key == "file":
                files[value["path"]] = store.regular(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in repo["lfs"]:
                    raise AnswerError(400, {"error": f"{value['path']}: its content was never uploaded"})
                pointer = hashlib.sha1(f"pointer {value['oid']}".encode()).hexdigest()
                size = store.object(value["oid"]).stat().st_size
                files[value["path"]] = {"sha256": value["oid"], "size": size, "oid": pointer, "lfs": True}
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise AnswerError(
                        404, {"error": "A file with this name doesn't exist"}, X_Error_Code="EntryNotFound"
                    )
            else:
                raise AnswerError(400, {"error": f"unknown operation {key}"})
        oid = store.commit(repo, arguments["revision"], files, summary)
        url = f"{self.server.endpoint}/{arguments['repo']}/commit/{oid}"
        raise AnswerError(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def _on_branch(self, arguments: dict[str, str], body: Body) -> None:
        self._need_write()
        repo = self._repo(arguments)
        if arguments["revision"] in repo["branches"]:
            raise AnswerError(409, {"error": "Reference already exists"})
        start = (json.loads(body) if body else {}).get("startingPoint") or "main"
        repo["branches"][arguments["revision"]] = self._commit_of(repo, start)
        self.server.store.save()
        raise AnswerError(200, {})

    def _entries(self, repo: dict[str, Any], revision: str) -> Iterator[dict[str, Any]]:
        for path, file in repo["commits"][self._commit_of(repo, revision)]["files"].items():
            entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
            if file["lfs"]:
                entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}
            yield entry

    def _on_tree(self, arguments: dict[str, str], body: Body) -> None:
        repo = self._repo(arguments)
        prefix = arguments["path"].rstrip("/") + "/" if arguments["path"] else ""
        inside = [e for e in self._entries(repo, arguments["revision"]) if e["path"].startswith(prefix)]
        if prefix and not inside:
            raise AnswerError(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        if recursive:
            raise AnswerError(200, inside)
        files = [e for e in inside if "/" not in e["path"][len(prefix) :]]
        folders = {prefix + e["path"][len(prefix) :].split("/")[0] for e in inside if e not in files}
        raise AnswerError(
            200, files + [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in sorted(folders)]
        )

    def _on_paths_info(self, arguments: dict[str, str], body: Body) -> None:
        repo = self._repo(arguments)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(body)["paths"]
        else:
            wanted = parse_qs(body.decode()).get("paths", [])
        raise AnswerError(200, [e for e in self._entries(repo, arguments["revision"]) if e["path"] in wanted])

    def _on_info(self, arguments: dict[str, str], body: Body) -> None:
        repo = self._repo(arguments)
        oid = self._commit_of(repo, arguments["revision"])
        name = arguments["repo"]
        siblings = [{"rfilename": path} for path in repo["commits"][oid]["files"]]
        info = {"id": name, "modelId": name, "sha": oid, "private": repo["visibility"] == "private", "tags": []}
        raise AnswerError(200, {**info, "downloads": 0, "likes": 0, "siblings": siblings})

    def _on_resolve(self, arguments: dict[str, str], body: Body) -> None:
        repo = self._repo(arguments)
        oid = self._commit_of(repo, arguments["revision"])
        file = repo["commits"][oid]["files"].get(arguments["path"])
        if file is None:
            raise AnswerError(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        with open(self.server.store.object(file["sha256"]), "rb") as handle:
            data = content(handle)
        etag = file["sha256"] if file["lfs"] else file["oid"]
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": oid, "Content_Type": "application/octet-stream"}
        if file["lfs"]:
            headers |= {"X_Linked_ETag": f'"{etag}"', "X_Linked_Size": str(file["size"])}
        start = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if start:
            first, last = int(start[1]), int(start[2] or len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            raise AnswerError(206, memoryview(data)[first : last + 1], **headers)
        raise AnswerError(200, data, **headers)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A small Hugging Face Hub on localhost, for tests.")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8899)
    arguments = parser.parse_args()
    with running_hub(arguments.root, port=arguments.port) as server:
        print(f"HF_ENDPOINT={server.endpoint} HF_TOKEN={server.token}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
