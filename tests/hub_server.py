"""A small Hugging Face Hub on 127.0.0.1, so that tests can use the unmodified `datasets` and `huggingface_hub`.

It serves repositories held in memory: repository info, tree, paths-info and file download. The clients read the Hub's
address when they are imported, so run them in a process of their own:

    with HubServer({"datasets/user/name": {"train.jsonl": b"..."}, "models/user/name": {"config.json": b"{}"}}) as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path), check=True)
"""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class HubServer:
    """Serves `repositories` until the `with` block ends.

    Args:
        repositories: `"models/user/name"` or `"datasets/user/name"` -> {path in the repository: content}. May be
            changed while the server runs: a change is a new commit, which then is the only one.

    Attributes:
        url: the address, for `HF_ENDPOINT`.
        requests: `"METHOD /path"` of every request so far.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories = repositories
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home) -> dict[str, str]:
        """This process's environment with the Hub at this server and all of its caches and settings below `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        # xet is another protocol, and a proxy would take the requests away from this server
        kept |= {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def commit(self, repository: str) -> str:
        """The 40 hexadecimal digits of the repository's only commit, which follow from its files."""
        digest = hashlib.sha1()
        for path, content in sorted(self.repositories[repository].items()):
            digest.update(f"{path} {_blob_id(content)}\n".encode())
        return digest.hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _file_entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}


def _folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """Entries of the files and folders below `folder` ("" is the root)."""
    prefix = f"{folder}/" if folder else ""
    entries = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            parent = prefix + "/".join(parts[:depth])
            entries[parent] = _folder_entry(parent)
        if recursive or len(parts) == 1:
            entries[path] = _file_entry(path, content)
    return list(entries.values())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        """Keep the tests' output clean: `HubServer.requests` has it all."""

    def _answer(self):
        self.server.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urlsplit(self.path)
        if match := _API.fullmatch(url.path):
            kind, name, action, revision, rest = match.groups()
            if (files := self._files(f"{kind}/{name}", revision)) is not None:
                self._answer_api(f"{kind}/{name}", files, action, unquote(rest or ""), parse_qs(url.query or body))
        elif match := _FILE.fullmatch(url.path):
            kind, name, revision, path = match.groups()
            repository = f"{kind or 'models/'}{name}"
            if (files := self._files(repository, revision)) is not None:
                self._answer_file(repository, files, unquote(path))
        else:
            self._send(404)

    def _files(self, repository: str, revision: str | None) -> dict[str, bytes] | None:
        """The repository's files; None, and the Hub's error is sent, where there is no such repository or revision."""
        hub = self.server.hub
        if repository not in hub.repositories:
            return self._send(404, headers={"X-Error-Code": "RepoNotFound"})
        if unquote(revision or "main") not in ("main", hub.commit(repository)):
            return self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        return hub.repositories[repository]

    def _answer_api(self, repository, files, action, path, query):
        if action == "tree":
            entries = _tree(files, path, recursive=query.get("recursive", ["false"])[0].lower() in ("true", "1"))
            if path and not entries:
                return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
            return self._send_json(entries)
        if action == "paths-info":
            known = {entry["path"]: entry for entry in _tree(files, "", recursive=True)}
            return self._send_json([known[asked] for asked in query.get("paths", []) if asked in known])
        name = repository.split("/", 1)[1]
        siblings = [{"rfilename": file} for file in sorted(files)]
        info = {"id": name, "sha": self.server.hub.commit(repository), "siblings": siblings, "tags": []}
        self._send_json(info | {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0})

    def _answer_file(self, repository, files, path):
        headers = {"X-Repo-Commit": self.server.hub.commit(repository)}
        if path not in files:
            return self._send(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        self._send(200, files[path], headers | {"ETag": f'"{_blob_id(files[path])}"'}, "application/octet-stream")

    def _send_json(self, value):
        self._send(200, json.dumps(value).encode(), content_type="application/json")

    def _send(self, status, content=b"", headers=None, content_type="text/plain"):
        self.send_response(status)
        for key, value in {"Content-Type": content_type, "Content-Length": len(content), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
