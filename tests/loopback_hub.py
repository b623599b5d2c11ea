# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face Hub on 127.0.0.1, in memory, for the real client: what huggingface_hub asks without Xet.

    with LoopbackHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.env})

The client reads its environment when it is imported, so whatever talks to this hub runs in a process of its own that
is started with `hub.env`. The one user is `tester`, with the token `hf_x`; any other token is refused.

Served: create and delete repositories, commits with regular and LFS files, branches, tags, revisions, listings,
downloads with ranges. Models, datasets and spaces.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN, DATE = "tester", "hf_x", "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".png", ".jpg", ".tar")
URL_PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass
class File:
    """One file of a commit: its git or LFS id, its size, and the key of its bytes."""

    oid: str
    size: int
    sha256: str
    is_lfs: bool

    def entry(self, path: str) -> dict[str, Any]:
        """As the Hub lists it."""
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.is_lfs else {}
        return {"type": "file", "path": path, "oid": self.oid, "size": self.size, **lfs}


@dataclass
class Commit:
    tree: dict[str, File]
    title: str
    parent: str | None


@dataclass
class Repo:
    is_private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, File], title: str) -> str:
        sha = hashlib.sha1(f"{branch} {title} {time.time_ns()}".encode()).hexdigest()
        self.commits[sha] = Commit(tree, title, self.refs.get(branch))
        self.refs[branch] = sha
        return sha


class Store:
    """All repositories (by `kind/owner/name`), all bytes (by SHA-256), and the requests that came."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.repos: dict[str, Repo] = {}
        self.log: list[str] = []
        self.lock = threading.RLock()

    def put(self, data: bytes) -> str:
        sha = hashlib.sha256(data).hexdigest()
        self.blobs[sha] = data
        return sha


class HubError(Exception):
    """An answer with an error status and the headers that the client turns into its own exceptions."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message, **headers}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive: every answer carries its Content-Length
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.store = self.server.store
        self.store.log.append(f"{self.command} {self.path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.is_user = token == TOKEN
        try:
            if token and not self.is_user:
                raise HubError(401, "Invalid credentials in Authorization header")
            with self.store.lock:
                self.route(url.path, parse_qs(url.query), body)
        except HubError as error:
            self.answer({"error": str(error)}, error.status, **error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815 (http.server's names)

    def answer(
        self, body: Any = None, status: int = 200, content_type: str = "application/json", **headers: str
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if path == "/api/whoami-v2":
            self.need_user()
            self.answer({"type": "user", "name": USER, "orgs": [], "auth": {}})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path in ("/api/repos/create", "/api/repos/delete"):
            self.need_user()
            self.create_or_delete(json.loads(body), is_delete=path.endswith("delete"))
        elif path == "/lfs/verify":
            self.answer(status=200 if json.loads(body)["oid"] in self.store.blobs else 404)
        elif found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            self.answer(status=200 if self.store.put(body) == found[1] else 400)
        elif re.fullmatch(r"/(datasets/|spaces/)?(.+?)\.git/info/lfs/objects/batch", path):
            self.lfs_batch(json.loads(body)["objects"])
        elif found := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve((found[1] or "models/") + found[2], unquote(found[3]), unquote(found[4]))
        elif found := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?", path):
            self.api(found[1], found[2], (found[3] or "").split("/"), query, body)
        else:
            raise HubError(404, f"no route for {self.command} {path}")

    def need_user(self) -> None:
        if not self.is_user:
            raise HubError(401, "Unauthorized")

    def create_or_delete(self, request: dict[str, Any], is_delete: bool) -> None:
        kind = (request.get("type") or "model") + "s"
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        key = f"{kind}/{repo_id}"
        if is_delete:
            self.answer(status=200 if self.store.repos.pop(key, None) else 404)
            return
        link = {"url": f"{self.server.endpoint}/{URL_PREFIXES[kind]}{repo_id}", "name": repo_id}
        if key in self.store.repos:
            self.answer({**link, "error": "You already created this repo"}, 409)
            return
        self.store.repos[key] = Repo(is_private=request.get("visibility") == "private")
        self.store.repos[key].commit("main", {}, "initial commit")
        self.answer(link)

    def lfs_batch(self, objects: list[dict[str, Any]]) -> None:
        for item in objects:
            if item["oid"] not in self.store.blobs:  # without "actions" the client skips the upload
                base = self.server.endpoint
                upload = {"href": f"{base}/lfs/{item['oid']}", "header": {}}
                item["actions"] = {"upload": upload, "verify": {"href": f"{base}/lfs/verify", "header": {}}}
        self.answer({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def find(self, key: str, revision: str) -> tuple[Repo, str]:
        repo = self.store.repos.get(key)
        if repo is None or (repo.is_private and not self.is_user):
            raise HubError(404, "Repository not found", "RepoNotFound")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, sha

    def resolve(self, key: str, revision: str, path: str) -> None:
        """The bytes of a file, whole or a range of them.

        The real Hub sends LFS files on to another host. A redirect to this same host would be followed by the
        client's HEAD, which then misses X-Repo-Commit; so the bytes are served here.
        """
        repo, sha = self.find(key, revision)
        file = repo.commits[sha].tree.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        data = self.store.blobs[file.sha256]
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(data))}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part and self.command == "GET":
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.answer(data[first : last + 1], 206, "application/octet-stream", **headers)
        else:
            self.answer(data, 200, "application/octet-stream", **headers)

    def api(self, kind: str, repo_id: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        verb, revision = rest[0], unquote(rest[1]) if len(rest) > 1 else "main"
        if self.command != "GET" and verb != "paths-info":
            self.need_user()
        if verb in ("branch", "tag"):
            self.make_ref(f"{kind}/{repo_id}", verb, revision, json.loads(body or b"{}"))
            return
        repo, sha = self.find(f"{kind}/{repo_id}", revision)
        tree = repo.commits[sha].tree
        if verb in ("", "revision"):
            info = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": sha, "tags": []}
            files = [{"rfilename": path} for path in sorted(tree)]
            self.answer({**info, "private": repo.is_private, "lastModified": DATE, "siblings": files})
        elif verb == "tree":
            self.answer(list_tree(tree, unquote("/".join(rest[2:])), query.get("recursive") == ["true"], revision))
        elif verb == "paths-info":
            paths = parse_qs(body.decode()).get("paths", [])
            self.answer([tree[path].entry(path) for path in paths if path in tree])
        elif verb == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repo.refs.items()]
            self.answer({"branches": branches, "converts": [], "tags": [], "pullRequests": []})
        elif verb == "commits":
            self.answer(list_commits(repo, sha))
        elif verb == "preupload":
            self.answer({"files": [upload_mode(item["path"], tree) for item in json.loads(body)["files"]]})
        elif verb == "commit":
            url = f"{self.server.endpoint}/{URL_PREFIXES[kind]}{repo_id}"
            self.make_commit(repo, sha, revision, body, query.get("create_pr") == ["1"], url)
        else:
            raise HubError(404, f"no verb {verb}")

    def make_ref(self, key: str, verb: str, revision: str, request: dict[str, Any]) -> None:
        start, name = revision, request.get("tag")
        if verb == "branch":
            start, name = request.get("startingPoint") or "main", revision
        repo, sha = self.find(key, start)
        if name in repo.refs:
            raise HubError(409, "Reference already exists")
        repo.refs[str(name)] = sha
        self.answer()

    def make_commit(self, repo: Repo, sha: str, revision: str, body: bytes, is_pr: bool, url: str) -> None:
        """A commit in lines of JSON: a header, then file, lfsFile, deletedFile or deletedFolder."""
        tree, title = dict(repo.commits[sha].tree), ""
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, sha):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                data = base64.b64decode(value["content"])
                git_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                tree[value["path"]] = File(git_id, len(data), self.store.put(data), is_lfs=False)
            elif kind == "lfsFile":
                if value["oid"] not in self.store.blobs:
                    raise HubError(400, f"lfs object {value['oid']} was not uploaded")
                size = len(self.store.blobs[value["oid"]])
                tree[value["path"]] = File(value["oid"], size, value["oid"], is_lfs=True)
            elif kind == "deletedFile":
                tree.pop(value["path"], None)
            elif kind == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                tree = {path: file for path, file in tree.items() if not path.startswith(folder)}
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        commit = repo.commit(f"refs/pr/{number}" if is_pr else revision, tree, title)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}", "hookOutput": ""}
        self.answer({**answer, "pullRequestUrl": f"{url}/discussions/{number}" if is_pr else None})


def list_tree(tree: dict[str, File], under: str, is_recursive: bool, revision: str) -> list[dict[str, Any]]:
    """Files and folders below `under`, in one page."""
    inside = {path: file for path, file in tree.items() if not under or path.startswith(under + "/")}
    if under and not inside:
        raise HubError(404, f"{under} does not exist on {revision!r}", "EntryNotFound")
    start = len(under) + 1 if under else 0
    folders = sorted({path[:i] for path in inside for i in range(start, len(path)) if path[i] == "/"})
    entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
    entries += [file.entry(path) for path, file in sorted(inside.items())]
    return [entry for entry in entries if is_recursive or "/" not in entry["path"][start:]]


def list_commits(repo: Repo, sha: str | None) -> list[dict[str, Any]]:
    """A commit and those before it."""
    commits = []
    while sha:
        title = repo.commits[sha].title
        commits.append({"id": sha, "title": title, "message": "", "authors": [{"user": USER}], "date": DATE})
        sha = repo.commits[sha].parent
    return commits


def upload_mode(path: str, tree: dict[str, File]) -> dict[str, Any]:
    """How a file is to be sent; its present id lets the client drop what has not changed."""
    oid = tree[path].oid if path in tree else None
    mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
    return {"path": path, "shouldIgnore": False, "oid": oid, "uploadMode": mode}


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.store = Store()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class LoopbackHub:
    """The server as a context; `env` points a client at it and `files` tells what a repository holds."""

    def __init__(self, port: int = 0):
        self.server = HubServer(port)
        self.store = self.server.store
        self.env = {
            "HF_ENDPOINT": self.server.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repo_id: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes of a repository."""
        repo = self.store.repos[f"{kind}/{repo_id}"]
        tree = repo.commits[repo.refs.get(revision, revision)].tree
        return {path: self.store.blobs[file.sha256] for path, file in tree.items()}

    def downloads(self) -> list[str]:
        """The paths of files that were downloaded, in order."""
        found = (re.fullmatch(r"GET .*/resolve/[^/]+/(.+)", line) for line in self.store.log)
        return [unquote(match[1]) for match in found if match]

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
