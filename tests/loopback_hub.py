"""A small Hugging Face Hub on this machine: an HTTP server that speaks the Hub's protocol, and fails when told to.

Import it before anything imports huggingface_hub, which reads its environment once: from then on that client, whoever uses it,
talks to this address and to no other. The protocol is the one of plain HTTP with LFS, basic and multipart; transfers of Xet are
switched off, and not covered.

Large files are redirected to another host name, as the Hub's go to its content network: the token must not travel there.
As a command (``python loopback_hub.py FOLDER``) it prints its address and serves until its input ends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
SMALL = 1 << 16  # bytes: at least so large, or binary, files go through LFS
READ = 1 << 20


@dataclass
class Repository:
    """Branches hold commits; a commit holds paths, each with the SHA-256 of its content and whether it is an LFS file."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[str, bool]]] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that match ``METHOD path``.

    ``what``: a status code; "cut": the connection ends in the middle of the body; "damage": one byte of the body is wrong
    when it arrives; or a function of the hub, called before the request is answered.
    """

    pattern: str
    what: int | str | Callable[[LoopbackHub], None]
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class LoopbackHub:
    """The server's state. Content lies in ``folder`` under its SHA-256.

    Attributes:
        requests: ``METHOD path`` of every request so far.
        sent: SHA-256 -> how many times that content arrived in full, as a large file.
        authorized: paths of the content network that were asked for with a token.
        resumed: paths of which a part was asked for.
        struck: patterns of the faults that have happened.
    """

    def __init__(self, folder: Path, listening: socket.socket | None = None, part_bytes: int = 1 << 30):
        self.folder, self.part_bytes = folder, part_bytes
        self.lock = threading.RLock()
        listening = listening or socket.create_server(("127.0.0.1", 0))
        self.port: int = listening.getsockname()[1]
        self.reset(folder)
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler, bind_and_activate=False)
        self.server.socket.close()
        self.server.socket, self.server.daemon_threads = listening, True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self, folder: Path) -> None:
        """Forget everything; content goes into ``folder`` from now on."""
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.sent: dict[str, int] = {}
        self.authorized: list[str] = []
        self.resumed: list[str] = []
        self.struck: set[str] = set()

    def fail(self, pattern: str, what, times: int = 1, **headers: str) -> None:
        """Have requests fail; see :class:`Fault`. ``times`` may be larger than the client is patient."""
        self.faults.append(Fault(pattern, what, times, headers))

    @contextmanager
    def failing(self, pattern: str, what, **headers: str) -> Iterator[None]:
        """Have every such request fail, as long as this lasts."""
        self.fail(pattern, what, 1 << 30, **headers)
        try:
            yield
        finally:
            self.faults.clear()

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    self.struck.add(fault.pattern)
                    return fault
        return None

    def content(self, sha256: str) -> Path:
        return self.folder / sha256

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.content(sha256).write_bytes(content)
        return sha256

    def files(self, repo_id: str, revision: str = "main") -> dict[str, tuple[str, bool]]:
        """What is visible in a repository."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.commit_of(revision)]

    def commit(self, repo_id: str, revision: str, files: dict[str, tuple[str, bool]]) -> str:
        repository = self.repositories[repo_id]
        told = json.dumps([repository.branches.get(revision), len(repository.commits), sorted(files.items())])
        oid = hashlib.sha1(told.encode()).hexdigest()
        repository.commits[oid] = files
        repository.branches[revision] = oid
        return oid

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Refused(Exception):
    """An answer that ends a request: status, and the Hub's error code."""

    def __init__(self, status: int, code: str | None = None, message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Cut(Exception):
    """The connection is to end here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LoopbackHub
    disable_nagle_algorithm = True

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        request = f"{self.command} {self.route}"
        with self.server_hub.lock:
            self.server_hub.requests.append(request)
        self.unread = int(self.headers.get("Content-Length") or 0)
        self.trouble = self.server_hub.fault(request)
        try:
            if self.trouble and callable(self.trouble.what):
                self.trouble.what(self.server_hub)
                self.trouble = None
            if self.trouble and isinstance(self.trouble.what, int):
                raise _Refused(self.trouble.what, None, "as the test wants it")
            self._answer()
        except _Refused as refused:
            self._drain()
            headers = {"X-Error-Message": refused.message, **(self.trouble.headers if self.trouble else {})}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._reply(refused.status, json.dumps({"error": refused.message}).encode(), headers)
        except (_Cut, ConnectionError):
            self.close_connection = True
            with suppress(OSError):  # the client was faster
                self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_POST = do_PUT = do_GET

    # ------------------------------------------------------------------------------------------------ bodies

    def _chunks(self) -> Iterator[bytes]:
        """The request's body, of stated length or in chunks; cut in its middle if that is the trouble."""
        cut = self.trouble is not None and self.trouble.what == "cut"
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
                if cut:
                    raise _Cut
            self.rfile.readline()
            return
        stop = self.unread // 2 if cut else 0
        while self.unread > stop:
            chunk = self.rfile.read(min(READ, self.unread - stop))
            if not chunk:
                raise _Cut
            self.unread -= len(chunk)
            yield chunk
        if cut:
            raise _Cut

    def _drain(self) -> None:
        self.trouble, trouble = None, self.trouble
        for _ in self._chunks():
            pass
        self.trouble = trouble

    def _body(self) -> bytes:
        return b"".join(self._chunks())

    def _json(self):
        return json.loads(self._body() or b"{}")

    def _reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reply_json(self, value, status: int = 200) -> None:
        self._reply(status, json.dumps(value).encode())

    # ------------------------------------------------------------------------------------------------ routes

    def _answer(self) -> None:
        routes = {
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": lambda: self._body() and self._reply_json({"warnings": [], "errors": []}),
            r"POST /api/models/(.+?/.+?)/preupload/(.+)": self._preupload,
            r"POST /api/models/(.+?/.+?)/paths-info/(.+)": self._paths_info,
            r"POST /api/models/(.+?/.+?)/branch/(.+)": self._branch,
            r"POST /api/models/(.+?/.+?)/commit/(.+)": self._commit,
            r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self._info,
            r"POST /(.+?/.+?)\.git/info/lfs/objects/batch": self._batch,
            r"PUT /upload/([0-9a-f]{64})": self._receive,
            r"PUT /upload/([0-9a-f]{64})/(\d+)": self._receive_part,
            r"POST /complete/([0-9a-f]{64})": self._complete,
            r"POST /(.+?/.+?)/verify": self._verify,
            r"(?:GET|HEAD) /content/([0-9a-f]{64})": self._content,
            r"(?:GET|HEAD) /(.+?/.+?)/resolve/([^/]+)/(.+)": self._resolve,
        }
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, f"{self.command} {self.route}"):
                return answer(*found.groups())
        raise _Refused(404, None, f"the loopback Hub knows no {self.command} {self.route}")

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _must_be_known(self) -> None:
        if not self._known:
            raise _Refused(401, None, "Invalid username or password.")

    def _repository(self, repo_id: str) -> Repository:
        found = self.server_hub.repositories.get(repo_id)
        if found is None or (found.private and not self._known):
            raise _Refused(404 if self._known else 401, "RepoNotFound", "Repository not found")
        return found

    def _revision(self, repository: Repository, revision: str) -> str:
        commit = repository.commit_of(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _create(self) -> None:
        self._must_be_known()
        asked = self._json()
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = json.dumps({"url": f"{self.server_hub.endpoint}/{repo_id}"}).encode()
        if repo_id in self.server_hub.repositories:
            return self._reply(409, url)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server_hub.repositories[repo_id] = Repository(bool(private))
        self.server_hub.commit(repo_id, "main", {})
        self._reply(200, url)

    def _branch(self, repo_id: str, branch: str) -> None:
        self._must_be_known()
        self._body()
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise _Refused(409, None, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._reply_json({})

    def _info(self, repo_id: str, revision: str | None = None) -> None:
        repository = self._repository(repo_id)
        commit = self._revision(repository, revision or "main")
        self._reply_json({"id": repo_id, "sha": commit, "private": repository.private, "siblings": []})

    def _described(self, path: str, sha256: str, lfs: bool) -> dict:
        size = self.server_hub.content(sha256).stat().st_size
        if lfs:
            pointer = {"oid": sha256, "size": size, "pointerSize": 130}
            return {"type": "file", "path": path, "size": size, "oid": sha256[:40], "lfs": pointer}
        return {"type": "file", "path": path, "size": size, "oid": self._git_hash(sha256)}

    def _git_hash(self, sha256: str) -> str:
        content = self.server_hub.content(sha256).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _paths_info(self, repo_id: str, revision: str) -> None:
        asked = parse_qs(self._body().decode())["paths"]
        repository = self._repository(repo_id)
        files = repository.commits[self._revision(repository, revision)]
        self._reply_json([self._described(path, *files[path]) for path in asked if path in files])

    def _preupload(self, repo_id: str, revision: str) -> None:
        self._must_be_known()
        asked = self._json()["files"]
        repository = self._repository(repo_id)
        files = repository.commits[self._revision(repository, revision)]
        answers = []
        for file in asked:
            large = file["size"] >= SMALL or file["path"].endswith((".safetensors", ".png"))
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in files:
                sha256, lfs = files[file["path"]]
                answer["oid"] = sha256 if lfs else self._git_hash(sha256)
            answers.append(answer)
        self._reply_json({"files": answers})

    def _batch(self, repo_id: str) -> None:
        self._must_be_known()
        asked, base = self._json(), self.server_hub.endpoint
        self._repository(repo_id)
        answers = []
        for thing in asked["objects"]:
            oid, size = thing["oid"], thing["size"]
            answer = {"oid": oid, "size": size}
            if not self.server_hub.content(oid).exists():
                part = self.server_hub.part_bytes
                upload = {"href": f"{base}/upload/{oid}"}
                if size > part:
                    count = -(-size // part)
                    parts = {str(k): f"{base}/upload/{oid}/{k}" for k in range(1, count + 1)}
                    upload = {"href": f"{base}/complete/{oid}", "header": {"chunk_size": str(part), **parts}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{base}/{repo_id}/verify"}}
            answers.append(answer)
        self._reply_json({"transfer": "basic", "objects": answers})

    def _store(self, path: Path) -> str:
        """Write the body to a file, whole or not at all; returns its SHA-256."""
        digest, partial = hashlib.sha256(), path.with_name(f"{path.name}.{threading.get_ident()}")
        try:
            with open(partial, "wb") as file:
                for chunk in self._chunks():
                    if self.trouble and self.trouble.what == "damage":
                        self.trouble, chunk = None, bytes([chunk[0] ^ 1]) + chunk[1:]
                    digest.update(chunk)
                    file.write(chunk)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return digest.hexdigest()

    def _receive(self, oid: str) -> None:
        path = self.server_hub.content(oid)
        if self._store(path) != oid:
            path.unlink()
            raise _Refused(400, None, "the content has another SHA-256")
        self.server_hub.sent[oid] = self.server_hub.sent.get(oid, 0) + 1
        self._reply(200)

    def _receive_part(self, oid: str, number: str) -> None:
        digest = self._store(self.server_hub.folder / f"{oid}-part{number}")
        self._reply(200, headers={"ETag": f'"{digest}"'})

    def _complete(self, oid: str) -> None:
        parts = self._json()["parts"]
        digest, whole = hashlib.sha256(), self.server_hub.folder / f"{oid}-whole"
        with open(whole, "wb") as file:
            for part in parts:
                path = self.server_hub.folder / f"{oid}-part{part['partNumber']}"
                with open(path, "rb") as source:
                    while chunk := source.read(READ):
                        digest.update(chunk)
                        file.write(chunk)
                path.unlink()
        if digest.hexdigest() != oid:
            whole.unlink()
            raise _Refused(400, None, "the parts make another SHA-256")
        os.replace(whole, self.server_hub.content(oid))
        self.server_hub.sent[oid] = self.server_hub.sent.get(oid, 0) + 1
        self._reply_json({})

    def _verify(self, repo_id: str) -> None:
        asked = self._json()
        path = self.server_hub.content(asked["oid"])
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise _Refused(404, None, "not uploaded")
        self._reply_json({})

    def _commit(self, repo_id: str, revision: str) -> None:
        self._must_be_known()
        lines = [json.loads(line) for line in self._body().splitlines() if line]
        repository = self._repository(repo_id)
        if revision not in repository.branches:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(repository.commits[repository.branches[revision]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (self.server_hub.put(base64.b64decode(value["content"])), False)
            elif line["key"] == "lfsFile":
                if not self.server_hub.content(value["oid"]).exists():
                    raise _Refused(400, None, f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = (value["oid"], True)
        oid = self.server_hub.commit(repo_id, revision, files)
        self._reply_json({"commitUrl": f"{self.server_hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(repo_id)
        commit = self._revision(repository, revision)
        headers = {"X-Repo-Commit": commit}
        files = repository.commits[commit]
        if path not in files:
            self._reply(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", **headers})
            return
        sha256, lfs = files[path]
        if lfs:
            size = self.server_hub.content(sha256).stat().st_size
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(size), "ETag": f'"{sha256[:16]}"'}
            headers["Location"] = f"http://localhost:{self.server_hub.port}/content/{sha256}"
            self._reply(302, headers=headers)
        else:
            self._stream(self.server_hub.content(sha256), headers | {"ETag": f'"{self._git_hash(sha256)}"'})

    def _content(self, sha256: str) -> None:
        if "Authorization" in self.headers:
            self.server_hub.authorized.append(self.route)
        self._stream(self.server_hub.content(sha256), {"ETag": f'"{sha256}"'})

    def _stream(self, path: Path, headers: dict[str, str]) -> None:
        """Answer with a file, or the part of it that was asked for; cut or damaged in its middle if that is the trouble."""
        size = path.stat().st_size
        first, last, status = 0, size - 1, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, status = int(found[1]), int(found[2] or last), 206
            self.server_hub.resumed.append(self.route)
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command == "HEAD":
            return
        trouble = self.trouble.what if self.trouble else None
        middle = first + (last - first + 1) // 2
        with open(path, "rb") as file:
            file.seek(first)
            at = first
            while at <= last:
                stop = middle if at < middle else last + 1
                chunk = file.read(min(READ, stop - at))
                if at == middle and trouble == "cut":
                    raise _Cut
                if at == middle and trouble == "damage":
                    chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
                self.wfile.write(chunk)
                at += len(chunk)


# The port is taken when this module is imported, for the client to be told of it before it is.
LISTENING = socket.create_server(("127.0.0.1", 0))
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{LISTENING.getsockname()[1]}"


if __name__ == "__main__":
    served = LoopbackHub(Path(sys.argv[1]), LISTENING)
    print(served.endpoint, flush=True)
    sys.stdin.read()
