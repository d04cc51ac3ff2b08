"""A small Hugging Face Hub on 127.0.0.1, so that tests can use the unmodified `datasets` and `huggingface_hub`.

It speaks the Hub's protocol for data sets and models: repository information, tree, paths-info, refs and file download
(large files by a redirect to another host); creating and deleting repositories and branches; preupload, large file
storage and commit; tokens and private repositories. The clients read the Hub's address when they are imported, so run
them in a process of their own:

    with HubServer({"datasets/user/name": {"train.jsonl": b"..."}, "models/user/name": {"config.json": b"{}"}}) as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path), check=True)
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_repository import Repository, commit_id, etag, is_large, tree


# Method and path of a request -> the name of what answers it. The first that matches is taken.
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("GET", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/refs", "refs"),
    (
        "GET",
        r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?",
        "tree",
    ),
    (
        "POST",
        r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)",
        "paths",
    ),
    ("POST", r"/api/(?P<kind>models)/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", r"/api/(?P<kind>models)/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/api/(?P<kind>models)/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "branch"),
    ("DELETE", r"/api/(?P<kind>models)/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "delete_branch"),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/verify", "verify"),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "upload"),
    ("GET|HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", "storage"),
    ("GET|HEAD", r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
]
REPOSITORY_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubServer:
    """Serves `repositories` until the `with` block ends.

    Args:
        repositories: `"models/user/name"` or `"datasets/user/name"` -> {path in the repository: content}, or a
            `Repository`. The files may be changed while the server runs: a change is a new commit.
        tokens: token -> (user, "write" or "read"). A token that is not among them is refused.

    Attributes:
        url: the address, for `HF_ENDPOINT`.
        repositories: `Repository` by name.
        requests: `"METHOD /path"` of every request so far.
        faults: name of a route (see `ROUTES`) -> what is done instead of answering: a function of the handler.
    """

    def __init__(self, repositories=None, tokens: dict[str, tuple[str, str]] | None = None):
        self.repositories = {
            name: files if isinstance(files, Repository) else Repository(files, owner=name.split("/")[1])
            for name, files in (repositories or {}).items()
        }
        self.tokens = tokens or {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another host for the client, as the Hub's storage is: tokens do not go there.
        self.storage_url = f"http://localhost:{self._server.server_port}/storage"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, **variables: str) -> dict[str, str]:
        """This process's environment with the Hub at this server and all of its caches and settings below `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        # xet is another protocol, and a proxy would take the requests away from this server
        kept |= {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        kept["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        here = "127.0.0.1,localhost"
        return kept | {"HF_HOME": str(home), "NO_PROXY": here, "no_proxy": here, **variables}


def fail(status: int, message: str = ""):
    """A fault: answer with this status."""
    return lambda handler: handler.refuse(status, message=message)


def hang_up(handler) -> None:
    """A fault: close the connection without an answer."""
    handler.close_connection = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for methods, pattern, route in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match is None or self.command not in methods.split("|"):
                continue
            if route in hub.faults:
                return hub.faults[route](self)
            values = {key: value and unquote(value) for key, value in match.groupdict().items()}
            if "name" in values:
                values["name"] = f"{values.pop('kind', None) or 'models'}/{values['name']}"
            return self._answer(route, values)
        self._send(404)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *args):
        """Keep the tests' output clean: `HubServer.requests` has it all."""

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send_json({"error": message or code}, status, {key: value for key, value in headers.items() if value})

    def _answer(self, route: str, values: dict) -> None:
        """Check token and repository, then call the method of the route."""
        hub = self.server.hub
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in hub.tokens:
            return self.refuse(401, message="Invalid credentials in Authorization header")
        self.user, role = hub.tokens.get(token, (None, None))
        if "name" in values and route != "verify":
            repository = hub.repositories.get(values["name"])
            if repository is None or (repository.private and self.user != repository.owner):
                return self.refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
            values["repository"] = repository
            own = repository.owner == self.user
        else:
            own = True
        if route in ("create", "delete", "preupload", "commit", "branch", "delete_branch", "batch"):
            if self.user is None:
                return self.refuse(401, message="Invalid username or password.")
            # Everybody may open a pull request.
            if role != "write" or not (own or "create_pr" in self.query or route == "batch"):
                return self.refuse(403, message="Forbidden: you must use a write token to upload to a repository.")
        if "revision" in values:
            values["revision"] = values["revision"] or "main"
            values["files"] = values["repository"].at(values["revision"])
            if values["files"] is None:
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        getattr(self, f"_{route}")(**values)

    # Reading

    def _whoami(self):
        if self.user is None:
            return self.refuse(401, message="Invalid username or password.")
        self._send_json({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def _info(self, name, repository, revision, files):
        siblings = [{"rfilename": file} for file in sorted(files)]
        info = {"id": name.split("/", 1)[1], "sha": commit_id(files), "siblings": siblings, "tags": []}
        info |= {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        self._send_json(info)

    def _refs(self, name, repository):
        heads = {"main": repository.files, **repository.branches}
        refs = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit_id(files)}
            for branch, files in heads.items()
            if not branch.startswith("refs/")
        ]
        self._send_json({"branches": refs, "converts": [], "tags": []})

    def _tree(self, name, repository, revision, files, path):
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = tree(files, path or "", recursive)
        if path and not entries:
            return self.refuse(404, "EntryNotFound")
        self._send_json(entries)

    def _paths(self, name, repository, revision, files):
        known = {entry["path"]: entry for entry in tree(files, "", recursive=True)}
        query = self.query or parse_qs(self.body.decode())
        self._send_json([known[asked] for asked in query.get("paths", []) if asked in known])

    def _file(self, name, repository, revision, files, path):
        headers = {"X-Repo-Commit": commit_id(files)}
        if path not in files:
            return self._send(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        content, tag = files[path], etag(path, files[path])
        if not is_large(path):
            return self._send(200, content, headers | {"ETag": f'"{tag}"'}, "application/octet-stream")
        self.server.hub.storage[tag] = content
        headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": len(content)}
        self._send(302, headers=headers | {"Location": f"{self.server.hub.storage_url}/{tag}"})

    def _storage(self, oid):
        content = self.server.hub.storage.get(oid)
        if content is None:
            return self._send(404)
        self._send(200, content, {"ETag": f'"{oid}"'}, "application/octet-stream")

    # Writing

    def _validate(self):
        text = json.loads(self.body)["content"]
        metadata = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
        if metadata is None:
            return self._send_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        base = metadata.get("base_model")
        if base is not None and not REPOSITORY_ID.fullmatch(str(base)):
            wrong = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            return self._send_json({"errors": [{"message": wrong}], "warnings": []}, 400)
        self._send_json({"errors": [], "warnings": []})

    def _create(self):
        hub, asked = self.server.hub, json.loads(self.body)
        owner = asked["organization"] or self.user
        if owner != self.user:
            return self.refuse(403, message=f"You don't have the rights to create a model under the namespace {owner}")
        name, url = f"models/{owner}/{asked['name']}", f"{hub.url}/{owner}/{asked['name']}"
        if name in hub.repositories:
            return self._send_json({"error": "You already created this model repo", "url": url}, 409)
        hub.repositories[name] = Repository(private=asked.get("visibility") == "private", owner=owner)
        self._send_json({"url": url})

    def _delete(self):
        asked = json.loads(self.body)
        name = f"models/{asked['organization'] or self.user}/{asked['name']}"
        if self.server.hub.repositories.pop(name, None) is None:
            return self.refuse(404, "RepoNotFound")
        self._send_json({})

    def _branch(self, name, repository, branch):
        if repository.at(branch) is not None:
            return self.refuse(409, message="Reference already exists")
        repository.branches[branch] = dict(repository.files)
        self._send_json({})

    def _delete_branch(self, name, repository, branch):
        del repository.branches[branch]
        self._send_json({})

    def _preupload(self, name, repository, revision, files):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [
            {
                "path": path,
                "uploadMode": "lfs" if is_large(path) else "regular",
                "shouldIgnore": False,
                "oid": etag(path, files[path]) if path in files else None,
            }
            for path in paths
        ]
        self._send_json({"files": modes, "commitOid": commit_id(files)})

    def _batch(self, name, repository):
        hub, answers = self.server.hub, []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in hub.storage:  # else the client has nothing to do
                verify = f"{hub.url}/{name.split('/', 1)[1]}.git/info/lfs/verify"
                answer["actions"] = {
                    "upload": {"href": f"{hub.storage_url}/{wanted['oid']}"},
                    "verify": {"href": verify},
                }
            answers.append(answer)
        self._send_json({"transfer": "basic", "objects": answers})

    def _upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, message="the content is not that of its hash")
        self.server.hub.storage[oid] = self.body
        self._send(200)

    def _verify(self, name):
        wanted = json.loads(self.body)
        known = self.server.hub.storage.get(wanted["oid"])
        self._send(200 if known is not None and len(known) == wanted["size"] else 404)

    def _commit(self, name, repository, revision, files):
        hub, files, changed, message = self.server.hub, dict(files), [], ""
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, commit_id(files)):
                    return self.refuse(412, message="A commit has happened since. Please refresh and try again.")
                continue
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in hub.storage:
                    return self.refuse(400, message=f"LFS pointer pointed to a file that does not exist: {value}")
                files[value["path"]] = hub.storage[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                return self.refuse(400, message=f"unknown operation {key}")
            changed.append(value["path"])
        pull_request = None
        if "create_pr" in self.query:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
            revision, pull_request = f"refs/pr/{number}", f"{hub.url}/{name.split('/', 1)[1]}/discussions/{number}"
        commit = repository.commit(revision, files, message, changed)
        url = f"{hub.url}/{name.split('/', 1)[1]}/commit/{commit}"
        answer = {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}
        self._send_json(answer | ({"pullRequestUrl": pull_request} if pull_request else {}))

    def _send_json(self, value, status=200, headers=None):
        self._send(status, json.dumps(value).encode(), headers, "application/json")

    def _send(self, status, content=b"", headers=None, content_type="text/plain"):
        self.send_response(status)
        for key, value in {"Content-Type": content_type, "Content-Length": len(content), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
