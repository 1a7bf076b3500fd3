"""A Hub over loopback: enough of its HTTP interface to create, upload to, list and download from model repos.

Everything is kept in memory; a commit is a whole tree of files, so that any revision can be read back. Uploads go
through LFS or the commit itself, never through Xet. Any token will do.

`huggingface_hub` reads its settings when it is imported, so a test runs its client code in a process of its own:

    def test_something(hub, tmp_path):
        run_python(f"from huggingface_hub import create_repo; create_repo({hub.repo_id('tiny')!r})", hub.env, tmp_path)

With HF_ENDPOINT and HF_TOKEN in the environment the same tests talk to that Hub, in repos that are deleted afterwards.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS_THRESHOLD_BYTES = 10_000_000
LFS_SUFFIX = ".safetensors"
USER = "loopback"


@dataclass(frozen=True)
class File:
    """A file's bytes and its identity: git's blob hash, or the plain SHA-256 for a file that is kept in LFS."""

    data: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


Tree = dict[str, File]


class HubError(Exception):
    """An answer other than 200, with the code by which the client chooses its exception."""

    def __init__(self, status: int, code: str):
        super().__init__(code)
        self.status, self.code = status, code


@dataclass
class Repo:
    """Branches and tags (`refs`: name -> commit) over immutable trees (`commits`: commit -> files by path)."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)

    def commit(self, branch: str, tree: Tree) -> str:
        content = json.dumps([len(self.commits), *((path, tree[path].oid) for path in sorted(tree))])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return sha


class HubHandler(BaseHTTPRequestHandler):
    """One request: find the route, check the token, answer with JSON or with a file."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, Repo]  # shared by all requests, as are the LFS objects by SHA-256
    lfs: dict[str, bytes]

    def handle_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.query = parse_qs(urlsplit(self.path).query)
        try:
            self.answer()
        except HubError as error:
            self.send(error.status, json.dumps({"error": error.code}).encode(), {"X-Error-Code": error.code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self) -> None:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        token_free = method == "GET" or path.startswith(("/lfs/", "/api/validate-yaml"))
        if not token_free and not self.headers.get("Authorization"):
            raise HubError(401, "Unauthorized")
        for route_method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and route_method == method:
                groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                result = handler(self, **groups)
                if result is not None:
                    self.send(200, json.dumps(result).encode(), {"Content-Type": "application/json"})
                return
        raise HubError(404, "NoSuchRoute")

    def send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass

    def repo(self, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None:
            raise HubError(404, "RepoNotFound")
        if repo.private and not self.headers.get("Authorization"):
            raise HubError(401, "RepoNotFound")
        return repo

    def url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"

    # Routes. A returned value is sent as JSON.

    def whoami(self) -> Any:
        return {"type": "user", "name": USER, "orgs": []}

    def create_repo(self) -> Any:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": self.url(repo_id)}
        if repo_id in self.repos:
            self.send(409, json.dumps(answer).encode(), {})
            return None
        self.repos[repo_id] = Repo(private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
        self.repos[repo_id].commit("main", {".gitattributes": File(b"*.safetensors filter=lfs -text\n")})
        return answer

    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id: str, revision: str) -> Any:
        repo = self.repo(repo_id)
        tree = repo.commits[repo.resolve(revision)]

        def mode(file: Mapping[str, Any]) -> dict[str, Any]:
            lfs = file["size"] > LFS_THRESHOLD_BYTES or file["path"].endswith(LFS_SUFFIX)
            known = {"oid": tree[file["path"]].oid} if file["path"] in tree else {}
            return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known}

        return {"files": [mode(file) for file in json.loads(self.body)["files"]]}

    def lfs_batch(self, repo_id: str) -> Any:
        self.repo(repo_id)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.lfs:
                wanted["actions"] = {"upload": {"href": self.url(f"lfs/{wanted['oid']}")}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "HashMismatch")
        self.lfs[oid] = self.body
        return {}

    def commit(self, repo_id: str, branch: str) -> Any:
        repo = self.repo(repo_id)
        tree = dict(repo.commits[repo.resolve(branch)])
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                tree[value["path"]] = File(self.lfs[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = value["path"].rstrip("/")
                tree = {path: file for path, file in tree.items() if path != gone and not path.startswith(gone + "/")}
        sha = repo.commit(branch, tree)
        return {"success": True, "commitOid": sha, "commitUrl": self.url(f"{repo_id}/commit/{sha}")}

    def info(self, repo_id: str, revision: str = "main") -> Any:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision)
        siblings = [{"rfilename": path, "size": len(file.data)} for path, file in sorted(repo.commits[sha].items())]
        return {"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, repo_id: str, revision: str, folder: str) -> Any:
        repo = self.repo(repo_id)
        prefix = f"{folder}/" if folder else ""
        files = {path: file for path, file in repo.commits[repo.resolve(revision)].items() if path.startswith(prefix)}
        if folder and not files:
            raise HubError(404, "EntryNotFound")
        entries = {}
        for path, file in sorted(files.items()):
            head, _, below = path.removeprefix(prefix).partition("/")
            if below and self.query.get("recursive", ["false"])[0].lower() != "true":
                entries[prefix + head] = {"type": "directory", "path": prefix + head, "oid": "", "size": 0}
            else:
                lfs = {"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 134}} if file.lfs else {}
                entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": len(file.data), **lfs}
        return list(entries.values())

    def create_tag(self, repo_id: str, revision: str) -> Any:
        repo = self.repo(repo_id)
        name = json.loads(self.body)["tag"]
        if name in repo.refs:
            raise HubError(409, "RefExists")
        repo.refs[name] = repo.resolve(revision)
        return {}

    def download(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision)
        file = repo.commits[sha].get(path)
        if file is None:
            raise HubError(404, "EntryNotFound")
        self.send(200, file.data, {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'})


ID, REVISION = "(?P<repo_id>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
MODEL = f"/api/models/{ID}"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", HubHandler.whoami),
    ("POST", "/api/repos/create", HubHandler.create_repo),
    ("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    ("POST", f"{MODEL}/preupload/{REVISION}", HubHandler.preupload),
    ("POST", f"{MODEL}/commit/(?P<branch>[^/]+)", HubHandler.commit),
    ("POST", f"{MODEL}/tag/{REVISION}", HubHandler.create_tag),
    ("GET", MODEL, HubHandler.info),
    ("GET", f"{MODEL}/revision/{REVISION}", HubHandler.info),
    ("GET", f"{MODEL}/tree/{REVISION}/?(?P<folder>.*)", HubHandler.tree),
    ("POST", f"/{ID}[.]git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", HubHandler.lfs_put),
    ("GET", f"/{ID}/resolve/{REVISION}/(?P<path>.+)", HubHandler.download),
]


@dataclass
class Hub:
    """What a test needs of a Hub: the environment of a client's process, and names of repos that it may create."""

    env: dict[str, str]
    user: str
    suffix: str = ""
    repo_ids: list[str] = field(default_factory=list)

    def repo_id(self, name: str) -> str:
        self.repo_ids.append(f"{self.user}/{name}{self.suffix}")
        return self.repo_ids[-1]


def run_python(code: str, env: Mapping[str, str], cwd: Path) -> str:
    """Runs code in a new interpreter; returns what it printed, or fails the test with its traceback."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=dict(env), cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A fresh loopback Hub, or the one that HF_ENDPOINT and HF_TOKEN name; with an empty cache."""
    endpoint, token = os.environ.get("HF_ENDPOINT"), os.environ.get("HF_TOKEN")
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    if endpoint and token:
        yield from real_hub(env | {"HF_ENDPOINT": endpoint, "HF_TOKEN": token}, tmp_path)
        return
    handler = type("Handler", (HubHandler,), {"repos": {}, "lfs": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Hub(env | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "any"}, USER)
        server.shutdown()


def real_hub(env: dict[str, str], cwd: Path) -> Iterator[Hub]:
    user = run_python("from huggingface_hub import whoami; print(whoami()['name'])", env, cwd).strip()
    hub = Hub(env, user, suffix=f"-{secrets.token_hex(4)}")
    yield hub
    code = "from huggingface_hub import delete_repo\nfor repo_id in {!r}: delete_repo(repo_id, missing_ok=True)"
    run_python(code.format(hub.repo_ids), env, cwd)
