"""A Hub on loopback for the unmodified huggingface_hub: repositories in memory, with branches, whole commits and LFS.

Large files go to and come from another origin than the API's (localhost in place of 127.0.0.1), as on the Hub, where
that is a storage service that must not get the token. Xet, the client's other protocol of large files, is not here:
clients of this server set HF_HUB_DISABLE_XET.

    with loopback_hub() as hub:
        ran = run_client(hub, "from gkl_vl.export...", "ARGUMENT", home=tmp_path)     # a process of its own
        assert hub.files("me/tiny").keys() >= {"README.md"}
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

ME = "hf_" + "m" * 34
"""Token of the user `me`, who is in the organisation `lab`."""
READER = "hf_" + "r" * 34
"""Of the same user, without write access."""
OTHER = "hf_" + "o" * 34
"""Of the user `other`."""
ACCOUNTS = {ME: ("me", ["lab"], "write"), READER: ("me", ["lab"], "read"), OTHER: ("other", [], "write")}
LARGE = (".safetensors", ".onnx", ".png")
"""Endings of files that go to LFS."""


@dataclass(frozen=True)
class Blob:
    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """SHA-256 of a large file, git's hash of others."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


Tree = dict[str, Blob]


@dataclass
class Repo:
    """A repository: its commits are whole trees."""

    private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: Tree) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha


class Refused(Exception):
    """An answer other than 200: status, the Hub's X-Error-Code, message."""


@dataclass
class Hub:
    """What the server holds. Tests read it, and make it fail with `fail`."""

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded large files by SHA-256, committed or not."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path with its query, token) of each request."""
    failures: list[tuple[str, int | str, int]] = field(default_factory=list)

    def fail(self, pattern: str, how: int | str, *, after: int = 0) -> None:
        """From now on requests "METHOD /path" that match fail, but for the first `after`.

        `how`: a status, "echo" for status 500 with the request's headers as the message, or "drop" for a connection
        that is reset in the middle of the request.
        """
        self.failures.append((pattern, how, after))

    def failure(self, method: str, path: str) -> int | str | None:
        for index, (pattern, how, after) in enumerate(self.failures):
            if re.search(pattern, f"{method} {path}"):
                if after == 0:
                    return how
                self.failures[index] = (pattern, how, after - 1)
        return None

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Path -> content in a branch, without the .gitattributes of a new repository."""
        repo = self.repos[repo_id]
        tree = repo.commits[repo.branches[branch]]
        return {path: blob.content for path, blob in tree.items() if path != ".gitattributes"}


class Handler(BaseHTTPRequestHandler):
    """The routes that huggingface_hub uses to push, list and download a model."""

    server: "Server"

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        hub, self.token = self.server.hub, (self.headers["authorization"] or "").removeprefix("Bearer ") or None
        hub.requests.append((self.command, self.path, self.token))
        how = hub.failure(self.command, self.path)
        if how == "drop":
            return self._drop()
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            if how == "echo":
                raise Refused(500, "", f"cannot handle {dict(self.headers)}")
            if how is not None:
                raise Refused(how, "", "as the test demands")
            for pattern, route in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {url.path}"):
                    return route(self, hub, *map(unquote, match.groups()))
            raise Refused(404, "", f"no route for {self.command} {url.path}")
        except Refused as refused:
            status, code, message = refused.args
            headers = {"X-Error-Code": code} if code else {}
            self.answer({"error": message}, status, headers | {"X-Error-Message": message.replace("\n", " ")})

    def _read_body(self) -> bytes:
        if self.headers["transfer-encoding"] == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers["content-length"] or 0))

    def _drop(self) -> None:
        self.rfile.read(min(int(self.headers["content-length"] or 0), 1000))
        linger = struct.pack("ii", 1, 0)  # reset the connection, do not end it in order
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Logs nothing."""

    # ---- accounts and repositories

    def account(self) -> tuple[str, list[str], str]:
        if self.token not in ACCOUNTS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return ACCOUNTS[self.token]

    def may_write(self, repo_id: str) -> bool:
        user, organisations, role = self.account()
        return role == "write" and repo_id.split("/")[0] in (user, *organisations)

    def require_write(self, repo_id: str) -> None:
        if not self.may_write(repo_id):
            raise Refused(403, "", "You have read access but not the required permissions for this operation")

    def repo(self, hub: Hub, repo_id: str) -> Repo:
        repo = hub.repos.get(repo_id)
        hidden = repo is not None and repo.private and (self.token not in ACCOUNTS or not self.may_write(repo_id))
        if repo is None or hidden:
            raise Refused(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def revision(self, hub: Hub, repo_id: str, revision: str) -> tuple[str, Tree]:
        repo = self.repo(hub, repo_id)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def whoami(self, hub: Hub) -> None:
        user, organisations, role = self.account()
        orgs = [{"name": name, "roleInOrg": "write"} for name in organisations]
        self.answer({"type": "user", "name": user, "orgs": orgs, "auth": {"accessToken": {"role": role}}})

    def create(self, hub: Hub) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.require_write(repo_id)
        url = f"{hub.address}/{repo_id}"
        if repo_id in hub.repos:
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE)
        hub.repos[repo_id].commit("main", {".gitattributes": Blob(attributes.encode(), large=False)})
        self.answer({"url": url})

    def validate(self, hub: Hub) -> None:
        self.answer({"errors": [], "warnings": []})

    def info(self, hub: Hub, repo_id: str, revision: str = "main") -> None:
        sha, tree = self.revision(hub, repo_id, revision)
        siblings = [{"rfilename": path} for path in tree]
        private = hub.repos[repo_id].private
        self.answer({"id": repo_id, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def refs(self, hub: Hub, repo_id: str) -> None:
        branches = self.repo(hub, repo_id).branches.items()
        shown = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self.answer({"branches": shown, "converts": [], "tags": []})

    def make_branch(self, hub: Hub, repo_id: str, branch: str) -> None:
        repo = self.repo(hub, repo_id)
        self.require_write(repo_id)
        if branch in repo.branches:
            raise Refused(409, "", f"Reference already exists: {branch}")
        repo.branches[branch] = repo.branches["main"]
        self.answer({})

    def tree(self, hub: Hub, repo_id: str, revision: str, folder: str = "") -> None:
        _, tree = self.revision(hub, repo_id, revision)
        inside = {path: blob for path, blob in tree.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        self.answer([described(path, blob) for path, blob in inside.items()])

    def paths_info(self, hub: Hub, repo_id: str, revision: str) -> None:
        _, tree = self.revision(hub, repo_id, revision)
        form = parse_qs(self.body.decode())
        asked = form["paths"] if "paths" in form else json.loads(self.body)["paths"]
        self.answer([described(path, tree[path]) for path in asked if path in tree])

    # ---- uploads

    def preupload(self, hub: Hub, repo_id: str, revision: str) -> None:
        _, tree = self.revision(hub, repo_id, revision)
        self.require_write(repo_id)
        answers = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            known = {"oid": tree[path].oid} if path in tree else {}
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        self.answer({"files": answers})

    def batch(self, hub: Hub, repo_id: str) -> None:
        self.require_write(repo_id)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{storage(hub)}/upload/{asked['oid']}"}
            verify = {"href": f"{hub.address}/{repo_id}/verify"}
            actions = {} if asked["oid"] in hub.large else {"actions": {"upload": upload, "verify": verify}}
            objects.append(asked | actions)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, hub: Hub, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "", "the content has another hash")
        hub.large[oid] = self.body
        self.answer(b"")

    def verify(self, hub: Hub, repo_id: str) -> None:
        self.require_write(repo_id)
        asked = json.loads(self.body)
        if len(hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "", "the file was not uploaded")
        self.answer({})

    def commit(self, hub: Hub, repo_id: str, branch: str) -> None:
        """All of a commit or nothing of it."""
        parent, tree = self.revision(hub, repo_id, branch)
        self.require_write(repo_id)
        changed = dict(tree)
        for line in map(json.loads, self.body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "header":
                if value.get("parentCommit", parent) != parent:
                    raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                changed[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif kind == "lfsFile":
                if value["oid"] not in hub.large:
                    raise Refused(400, "", f"{value['path']} was not uploaded")
                changed[value["path"]] = Blob(hub.large[value["oid"]], large=True)
            elif kind == "deletedFile":
                del changed[value["path"]]
            else:
                raise Refused(400, "", f"{kind} is not known here")
        sha = hub.repos[repo_id].commit(branch, changed)
        self.answer({"commitUrl": f"{hub.address}/{repo_id}/commit/{sha}", "commitOid": sha})

    # ---- downloads

    def resolve(self, hub: Hub, repo_id: str, revision: str, path: str) -> None:
        sha, tree = self.revision(hub, repo_id, revision)
        if path not in tree:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        blob, headers = tree[path], {"X-Repo-Commit": sha}
        if not blob.large:
            return self.answer(blob.content, headers=headers | {"ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        self.answer(b"", 302, headers | {"Location": f"{storage(hub)}/download/{blob.oid}"})

    def download(self, hub: Hub, oid: str) -> None:
        self.answer(hub.large[oid], headers={"ETag": f'"{oid}"'})


ID = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET /api/models/{ID}", Handler.info),
    (rf"GET /api/models/{ID}/revision/([^/]+)", Handler.info),
    (rf"GET /api/models/{ID}/refs", Handler.refs),
    (rf"POST /api/models/{ID}/branch/([^/]+)", Handler.make_branch),
    (rf"GET /api/models/{ID}/tree/([^/]+)", Handler.tree),
    (rf"GET /api/models/{ID}/tree/([^/]+)/(.+)", Handler.tree),
    (rf"POST /api/models/{ID}/paths-info/([^/]+)", Handler.paths_info),
    (rf"POST /api/models/{ID}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /upload/(\w+)", Handler.upload),
    (rf"POST /{ID}/verify", Handler.verify),
    (rf"POST /api/models/{ID}/commit/([^/]+)", Handler.commit),
    (rf"(?:GET|HEAD) /{ID}/resolve/([^/]+)/(.+)", Handler.resolve),
    (r"(?:GET|HEAD) /download/(\w+)", Handler.download),
]


class Server(ThreadingHTTPServer):
    hub: Hub


def storage(hub: Hub) -> str:
    """The address of large files: another origin than the API's."""
    return hub.address.replace("127.0.0.1", "localhost")


def described(path: str, blob: Blob) -> dict:
    """A file in a listing."""
    large = {"lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": 134}} if blob.large else {}
    return {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid[:40]} | large


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A running Hub without repositories."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.hub = Hub(address=f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server.hub
        server.shutdown()
        thread.join()


def use_in_process(hub: Hub, patch: pytest.MonkeyPatch, *, token: str | None = ME) -> None:
    """Directs this process's huggingface_hub to the hub. The client repeats failed requests without waiting."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    for name, value in {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        patch.setattr(constants, name, value)
    patch.setattr(_http.time, "sleep", lambda seconds: None)
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # the client's own way to send a large file
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)


def run_client(hub: Hub, code: str, *arguments: object, home: Path, token: str = ME) -> subprocess.CompletedProcess:
    """Runs Python code in a process whose huggingface_hub talks to the hub, with its cache below `home`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
