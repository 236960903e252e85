"""A small Hub on localhost: what huggingface_hub, transformers, timm and datasets ask of the real one, over HTTP.

It keeps repositories in memory, wants a token for every write, checks the SHA-256 of large files, makes a commit whole
or not at all, and fails on command: see ``Hub.fail``.
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


WRITER = "hf_writerwriterwriter"
READER = "hf_readerreaderreader"
"""Tokens of user ``me``: the first may write, the second may not."""

LARGE = (".safetensors", ".parquet", ".png")


@dataclass
class Repository:
    """A repository: its commits, oldest first, as files by path."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Fault:
    """A request that shall fail: ``what`` is a status, ``drop`` (half of the body, then nothing) or ``corrupt``."""

    method: str
    path: str
    what: int | str
    times: int


class RefusalError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or code


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """The state that all requests share, and the server's life.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: by kind (``models`` or ``datasets``) and id.
        large: contents of uploaded large files, by SHA-256.
        requests: every request so far, as ``METHOD path``.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()

    def add(self, kind: str, name: str, folder: Path, **options: Any) -> Repository:
        """A repository that holds a folder's files."""
        repository = self.repositories[kind, name] = Repository(**options)
        repository.commit({".gitattributes": b""})
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        repository.commit({str(path.relative_to(folder)): path.read_bytes() for path in paths})
        return repository

    def fail(self, method: str, path: str, what: int | str, times: int = 1_000_000) -> None:
        """The next ``times`` requests of this method whose path matches the expression fail."""
        self.faults.append(Fault(method, path, what, times))

    def heal(self) -> None:
        self.faults.clear()
        self.requests.clear()

    def fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.what
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        self.what = self.hub.fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.what == "drop" and self.command in ("POST", "PUT"):
            self.rfile.read(length // 2)
            return self.hang_up()
        body = self.read_body(length)
        try:
            if isinstance(self.what, int):
                raise RefusalError(self.what, message="as the test wants it")
            self.route(path, parse_qs(url.query), body)
        except RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message, "Retry-After": "0"}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send(json.dumps({"error": refusal.message}).encode(), headers, refusal.status)

    def read_body(self, length: int) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.what == "drop":
            self.wfile.write(body[: len(body) // 2])
            return self.hang_up()
        if self.what == "corrupt":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.wfile.write(body)

    def json(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", WRITER, READER):
            raise RefusalError(401, message="Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            if not token:
                raise RefusalError(401, message="Invalid username or password.")
            return self.json({"type": "user", "name": "me", "orgs": []})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(token, json.loads(body))
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):  # a signed address: needs no token
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise RefusalError(400, message="The content does not have the SHA-256 it was announced with")
            self.hub.large[match[1]] = body
            return self.send(b"")
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repository("models", match[1], token, write=True)
            return self.large_files(json.loads(body))
        if match := re.fullmatch(r"(/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve("datasets" if match[1] else "models", match[2], match[3], match[4], token)
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.+))?)?", path):
            kind, name, action, revision, rest = match.groups()
            repository = self.repository(kind, name, token, write=action in ("preupload", "commit"))
            commit = repository.at(revision or "main")
            if commit is None:
                raise RefusalError(404, "RevisionNotFound")
            sha, files = commit
            if action in (None, "revision"):
                return self.json(
                    {
                        "id": name,
                        "sha": sha,
                        "private": repository.private,
                        "gated": "auto" if repository.gated else False,
                        "tags": [],
                        "siblings": [{"rfilename": file} for file in files],
                    }
                )
            if repository.gated and token != WRITER:
                raise RefusalError(403 if token else 401, "GatedRepo", "Access to this repository is restricted")
            if action == "tree":
                return self.tree(files, rest or "", "recursive" in query and query["recursive"] != ["False"])
            if action == "paths-info":
                wanted = parse_qs(body.decode())["paths"]
                return self.json([entry for entry in entries(files) if entry["path"] in wanted])
            if action == "preupload":
                return self.json({"files": [preupload(file["path"], files) for file in json.loads(body)["files"]]})
            if action == "commit":
                return self.commit(name, repository, body)
        raise RefusalError(404, message="No such route")

    def repository(self, kind: str, name: str, token: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get((kind, name))
        if write and not token:
            raise RefusalError(401, message="Invalid username or password.")
        if repository is None or (repository.private and not token):
            raise RefusalError(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and token != WRITER:
            raise RefusalError(403, message="You don't have the rights to write here")
        return repository

    def create(self, token: str, wanted: dict[str, Any]) -> None:
        if not token:
            raise RefusalError(401, message="Invalid username or password.")
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if token != WRITER or not name.startswith("me/"):
            raise RefusalError(403, message="You don't have the rights to create a repository here")
        key = ("models" if wanted.get("type", "model") == "model" else "datasets", name)
        if key in self.hub.repositories:
            raise RefusalError(409, message="You already created this repository")
        self.hub.repositories[key] = Repository(private=wanted.get("visibility") == "private")
        self.hub.repositories[key].commit({".gitattributes": b""})
        self.json({"url": f"{self.hub.url}/{name}", "name": name})

    def large_files(self, wanted: dict[str, Any]) -> None:
        objects = []
        for thing in wanted["objects"]:
            answer = {"oid": thing["oid"], "size": thing["size"]}
            if thing["oid"] not in self.hub.large:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{thing['oid']}", "header": {}}}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def commit(self, name: str, repository: Repository, body: bytes) -> None:
        files = dict(repository.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise RefusalError(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files)
        self.json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def tree(self, files: dict[str, bytes], under: str, recursive: bool) -> None:
        inside = [entry for entry in entries(files) if not under or entry["path"].startswith(f"{under}/")]
        if under and not inside:
            raise RefusalError(404, "EntryNotFound")
        depth = under.count("/") + (2 if under else 1)
        self.json([entry for entry in inside if recursive or entry["path"].count("/") < depth])

    def resolve(self, kind: str, name: str, revision: str, path: str, token: str) -> None:
        repository = self.repository(kind, name, token)
        commit = repository.at(revision)
        if commit is None:
            raise RefusalError(404, "RevisionNotFound")
        if repository.gated and token != WRITER:
            raise RefusalError(403 if token else 401, "GatedRepo", "Access to this repository is restricted")
        sha, files = commit
        if path not in files:
            raise RefusalError(404, "EntryNotFound")
        content = files[path]
        oid = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_oid(content)
        headers = {"ETag": f'"{oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(content[first : last + 1], headers, 206)
        self.send(content, headers)


def entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Files and folders as the tree lists them."""
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    listed: list[dict[str, Any]] = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
    for path, content in files.items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        listed.append(entry)
    return sorted(listed, key=lambda entry: entry["path"])


def preupload(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    large = path.endswith(LARGE)
    oid = None
    if path in files:
        oid = hashlib.sha256(files[path]).hexdigest() if large else git_oid(files[path])
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
