"""What the small Hub of the tests keeps of a repository: branches, commits, and who may see it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


# Like the Hub's .gitattributes: what goes to the large file storage.
LARGE = (".safetensors", ".bin", ".pt", ".pth")

Files = dict[str, bytes]


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(path) else blob_id(content)


@dataclass
class Repository:
    """Files of each branch. What was committed stays reachable by its hash, which follows from the files.

    Attributes:
        files: of the branch main. Changing them in place is a new commit.
        private: whether only `owner` sees it.
        owner: the namespace.
        branches: of all other branches and pull requests ("refs/pr/1").
        history: hash to the files of earlier commits.
        log: (branch, message, changed paths) of each commit that a client made.
    """

    files: Files = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    private: bool = False
    owner: str = ""
    branches: dict[str, Files] = field(default_factory=dict)
    history: dict[str, Files] = field(default_factory=dict)
    log: list[tuple[str, str, list[str]]] = field(default_factory=list)

    def at(self, revision: str) -> Files | None:
        """Files of a branch or commit; None where there is none."""
        if revision == "main":
            return self.files
        if revision in self.branches:
            return self.branches[revision]
        heads = {commit_id(files): files for files in (self.files, *self.branches.values())}
        return {**self.history, **heads}.get(revision)

    def commit(self, branch: str, files: Files, message: str, changed: list[str]) -> str:
        """Make these the files of a branch."""
        before = self.at(branch)
        if before is not None:
            self.history[commit_id(before)] = before
        if branch == "main":
            self.files = files
        else:
            self.branches[branch] = files
        self.log.append((branch, message, changed))
        return commit_id(files)


def commit_id(files: Files) -> str:
    """The 40 hexadecimal digits of a commit."""
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(f"{path} {blob_id(content)}\n".encode())
    return digest.hexdigest()


def tree(files: Files, folder: str, recursive: bool) -> list[dict]:
    """Entries of the files and folders below `folder` ("" is the root), as the Hub lists them."""
    prefix = f"{folder}/" if folder else ""
    entries = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            parent = prefix + "/".join(parts[:depth])
            entries[parent] = {"type": "directory", "path": parent, "oid": hashlib.sha1(parent.encode()).hexdigest()}
        if recursive or len(parts) == 1:
            entries[path] = _entry(path, content)
    return list(entries.values())


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if is_large(path):
        entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 134}
    return entry
