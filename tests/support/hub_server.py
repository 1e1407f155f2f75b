"""A stand-in for the Hub on this machine: model repositories with revisions, downloaded and uploaded over HTTP.

It speaks what huggingface_hub 2.4 and transformers 5.23 ask for: HEAD and GET of `/{id}/resolve/{revision}/{file}`,
with ranges, model info, file trees, and the upload of folders (`create_repo`, `create_branch`, LFS, commits). Large
files are redirected, as the Hub does: https://huggingface.co/docs/huggingface_hub/package_reference/file_download
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from transformers.utils import hub as transformers_hub


LARGE = (".safetensors",)  # kept in LFS, behind a redirect
MAIN = "main"
FOUND = 302
API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|preupload|commit|branch)/(?P<rest>.+))?$")
RESOLVE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
LFS = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch$")


class Missing(Exception):
    """Of a repository, a revision or a file: the Hub's name of it, and the commit where there is one."""

    def __init__(self, code: str, commit: str | None = None):
        super().__init__(code)
        self.code, self.commit = code, commit


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        commits: The files of each commit, `{commit: {path: content}}`, of all repositories.
        branches: `{repo_id: {branch: commit}}`.
        log: Requests in their order, such as `"HEAD /me/model/resolve/main/config.json"`.
        uploads: Commits that came over HTTP: repository, branch, message and the paths that they brought.
        created: What `create_repo` was asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.uploads: list[tuple[str, str, str, list[str]]] = []
        self.created: list[dict] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def serve_folder(self, repo_id: str, folder: Path, branch: str = MAIN) -> str:
        """Makes a folder the newest commit of a branch; returns the commit's id."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.add_commit(repo_id, branch, files)

    def add_commit(self, repo_id: str, branch: str, files: dict[str, bytes]) -> str:
        listing = "".join(f"{path} {sha256(content)}\n" for path, content in sorted(files.items()))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[commit] = files
        self.branches.setdefault(repo_id, {MAIN: commit})[branch] = commit
        self.blobs |= {sha256(content): content for path, content in files.items() if path.endswith(LARGE)}
        return commit

    def commit_of(self, repo_id: str, revision: str) -> str:
        if repo_id not in self.branches:
            raise Missing("RepoNotFound")
        commit = self.branches[repo_id].get(revision, revision)
        if commit not in self.commits:
            raise Missing("RevisionNotFound")
        return commit


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, server: HubServer):
    """What `HF_ENDPOINT` does in a process that has not imported huggingface_hub yet."""
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.log.append(f"{self.command} {path}")
        try:
            self.route(path)
        except Missing as missing:
            headers = {"X-Error-Code": missing.code, "X-Error-Message": f"{missing.code}: {path}"}
            headers |= {"X-Repo-Commit": missing.commit} if missing.commit else {}
            self.answer(404, b"", headers)

    def route(self, path: str):
        if match := RESOLVE.match(path):
            self.resolve(**match.groupdict())
        elif path.startswith("/blobs/"):
            self.blob(path.removeprefix("/blobs/"))
        elif path == "/api/repos/create":
            self.create(json.loads(self.body))
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif match := LFS.match(path):
            self.lfs_batch(json.loads(self.body))
        elif match := API.match(path):
            verb, rest = match["verb"] or "revision", match["rest"] or MAIN
            getattr(self, f"api_{verb}")(match["id"], rest)
        else:
            raise Missing("RepoNotFound")

    # -------------------------------------------------------------------------------------------------- downloads

    def resolve(self, id: str, revision: str, file: str):
        commit = self.server.commit_of(id, revision)
        content = self.server.commits[commit].get(file)
        if content is None:
            raise Missing("EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not file.endswith(LARGE):
            return self.send_content(content, headers)
        digest = sha256(content)
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
        # by another name, since redirects to the same host are followed before their headers are read
        store = f"http://localhost:{self.server.server_port}/blobs/{digest}"
        self.answer(FOUND, b"", headers | {"Location": store})

    def blob(self, digest: str):
        if self.command == "PUT":
            if sha256(self.body) != digest:
                return self.answer(400, b"checksum")
            self.server.blobs[digest] = self.body
            return self.answer(200, b"")
        self.send_content(self.server.blobs[digest], {"ETag": f'"{digest}"'})

    def send_content(self, content: bytes, headers: dict[str, str]):
        """All of it, or the range that was asked for."""
        headers |= {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if first > last:
            return self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
        part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self.answer(206, content[first : last + 1], headers | part)

    def api_revision(self, repo_id: str, revision: str):
        commit = self.server.commit_of(repo_id, revision)
        files = self.server.commits[commit]
        card = ModelCard(files["README.md"].decode()).data.to_dict() if "README.md" in files else {}
        self.answer_json(
            {
                "_id": commit[:24],
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "cardData": card,
                "tags": card.get("tags", []),
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def api_tree(self, repo_id: str, rest: str):
        revision, _, folder = rest.partition("/")
        commit = self.server.commit_of(repo_id, revision)
        rows = []
        for path, content in sorted(self.server.commits[commit].items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            row = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if path.endswith(LARGE):
                row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            rows.append(row)
        if folder and not rows:
            raise Missing("EntryNotFound", commit)
        self.answer_json(rows)

    # ---------------------------------------------------------------------------------------------------- uploads

    def create(self, asked: dict):
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        found = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.server.branches:
            return self.answer_json(found | {"error": "You already created this model repo"}, 409)
        self.server.created.append(asked)
        self.server.add_commit(repo_id, MAIN, {})
        self.answer_json(found)

    def api_branch(self, repo_id: str, branch: str):
        branches = self.server.branches[repo_id]
        if branch in branches:
            return self.answer_json({"error": "Reference already exists"}, 409)
        branches[branch] = branches[MAIN]
        self.answer_json({})

    def api_preupload(self, repo_id: str, revision: str):
        self.server.commit_of(repo_id, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer_json({"files": files})

    def lfs_batch(self, asked: dict):
        put = f"{self.server.endpoint}/blobs/"
        objects = [part | {"actions": {"upload": {"href": put + part["oid"]}}} for part in asked["objects"]]
        self.answer_json({"transfer": "basic", "objects": objects})

    def api_commit(self, repo_id: str, branch: str):
        files = dict(self.server.commits[self.server.commit_of(repo_id, branch)])
        head, *operations = (json.loads(line) for line in self.body.splitlines())
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                del files[value["path"]]
        paths = [operation["value"]["path"] for operation in operations]
        self.server.uploads.append((repo_id, branch, head["value"]["summary"], paths))
        commit = self.server.add_commit(repo_id, branch, files)
        self.answer_json({"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{commit}", "commitOid": commit})

    # --------------------------------------------------------------------------------------------------- answers

    def answer_json(self, content: dict | list, status: int = 200):
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
