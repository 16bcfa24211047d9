"""A HuggingFace Hub on loopback: what the real client asks for to list and download models."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from tests.fakes.hub_datasets import answer_dataset
from tests.fakes.server import Answer, FakeServer

LFS = (".safetensors", ".pt", ".bin", ".npz")
"""Endings of files that the Hub keeps in LFS, named by their sha256."""


@dataclass
class Repo:
    """Commits by hash, each with its files, and the branches that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private_to: str | None = None
    """The one token that sees this repo."""
    large: dict[str, bytes] = field(default_factory=dict)
    """What was sent to its LFS storage, by sha256."""

    def in_lfs(self, file: str, body: bytes) -> bool:
        """Whether the Hub keeps a file in LFS: by its name, or because it was sent there."""
        return file.endswith(LFS) or hashlib.sha256(body).hexdigest() in self.large


class FakeHub(FakeServer):
    """Repos as the Hub serves them: /api/models/…, /ORG/REPO/resolve/REVISION/FILE, and LFS
    files from a storage host that it sends on to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.repos: dict[str, Repo] = {}
        self.datasets: dict[str, dict[str, bytes]] = {}

    def reset(self) -> None:
        """Forget the repos too."""
        super().reset()
        self.repos.clear()
        self.datasets.clear()

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit with exactly these files, move the branch to it, and return its hash."""
        repo = self.repos.setdefault(name, Repo())
        seed = f"{name} {len(repo.commits)}".encode()
        commit = hashlib.sha1(seed, usedforsecurity=False).hexdigest()
        repo.commits[commit] = dict(files)
        repo.branches[branch] = commit
        return commit

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        """One answer of the Hub."""
        if path.startswith(("/api/datasets/", "/datasets/")):
            return answer_dataset(self.datasets, path)
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._model(found[1], found[2] or "main", token)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(found[1], found[2], found[3], token)
        if found := re.fullmatch(r"/storage/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            assert not token, "a token left the Hub"
            return Answer(
                200, {"ETag": '"its-own"'}, self.repos[found[1]].commits[found[2]][found[3]]
            )
        return Answer(404)

    def find(self, name: str, revision: str, token: str) -> tuple[Repo, str] | Answer:
        """A repo and the commit that a revision of it is, or the refusal."""
        repo = self.repos.get(name)
        if repo is None or (repo.private_to and repo.private_to != token):
            # the real Hub tells nobody whether a repo is private or is not there
            headers = {"X-Error-Code": "RepoNotFound", "Content-Type": "application/json"}
            return Answer(404 if token else 401, headers, b'{"error": "Repository not found"}')
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        return repo, commit

    def _model(self, name: str, revision: str, token: str) -> Answer:
        found = self.find(name, revision, token)
        if isinstance(found, Answer):
            return found
        repo, commit = found
        blobs = parse_qs(self.now.query).get("blobs") in (["true"], ["True"])
        siblings = [
            {"rfilename": file} | (blob(repo.in_lfs(file, body), body) if blobs else {})
            for file, body in repo.commits[commit].items()
        ]
        facts = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "siblings": siblings,
            "private": repo.private_to is not None,
        }
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(facts).encode())

    def _file(self, name: str, revision: str, file: str, token: str) -> Answer:
        found = self.find(name, revision, token)
        if isinstance(found, Answer):
            return found
        repo, commit = found
        if repo.gated:
            return Answer(403, {"X-Error-Code": "GatedRepo"})
        body = repo.commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if body is None:
            return Answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        if repo.in_lfs(file, body):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(body).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(body))
            # another host name, so that the client takes it for the storage that it is
            storage = self.url.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{storage}/storage/{name}/{commit}/{file}"
            return Answer(302, headers)
        headers["ETag"] = f'"{git_sha1(body)}"'
        return Answer(200, headers, body)


def blob(in_lfs: bool, body: bytes) -> dict[str, object]:
    """What `?blobs=true` adds to a file: its size and git name, and the sha256 of one in LFS, whose
    git name is that of the pointer.
    """
    if not in_lfs:
        return {"size": len(body), "blobId": git_sha1(body)}
    sha256 = hashlib.sha256(body).hexdigest()
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(body)}\n"
    ).encode()
    lfs = {"sha256": sha256, "size": len(body), "pointerSize": len(pointer)}
    return {"size": len(body), "blobId": git_sha1(pointer), "lfs": lfs}


def git_sha1(body: bytes) -> str:
    """The name that git gives to contents."""
    blob = b"blob %d\0" % len(body) + body
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()
