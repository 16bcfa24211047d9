"""The loopback Hub's LFS storage, and who may write to it."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from tests.fakes.answers import Refused, json_answer
from tests.fakes.hub import FakeHub, Repo
from tests.fakes.server import Answer

NAME = r"([\w.-]+/[\w.-]+)"
CREATE_PR = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"


@dataclass
class User:
    """Who a token stands for, and what it may write to."""

    name: str
    writes: set[str] = field(default_factory=set)
    """Namespaces."""
    read_only: bool = False
    """Of the token."""


class LfsHub(FakeHub):
    """A FakeHub that takes files from those whose token is in `users`. `part_size`: bytes above
    which a file is to be sent in parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[str, User] = {}
        self.part_size = 2**30
        self.parts: dict[tuple[str, int], bytes] = {}
        self.routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", self._batch),
            ("POST", rf"/{NAME}\.git/info/lfs/objects/verify", self._verify),
            ("PUT", f"/lfs/{NAME}/([0-9a-f]+)", self._put),
            ("PUT", f"/lfs/{NAME}/([0-9a-f]+)/([0-9]+)", self._put_part),
            ("POST", f"/lfs-complete/{NAME}/([0-9a-f]+)", self._complete),
        ]

    def reset(self) -> None:
        """Forget users and half-sent files too."""
        super().reset()
        self.users.clear()
        self.parts.clear()
        self.part_size = 2**30

    def user(self, token: str) -> User:
        if token not in self.users:
            raise Refused(401, "Invalid username or password.")
        return self.users[token]

    def writable(self, name: str, token: str, opens_pr: bool = False, branch: str = "") -> Repo:
        """The repo, if the token may write to it. Whoever sees a repo may open a pull request, and
        go on with one.
        """
        user, repo = self.user(token), self.repos.get(name)
        if repo is None or (repo.private_to and repo.private_to != token):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if user.read_only:
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        may = opens_pr or branch.startswith("refs/pr/")
        if not may and name.partition("/")[0] not in user.writes:
            raise Refused(403, CREATE_PR)
        return repo

    def asks_pr(self) -> bool:
        return parse_qs(self.now.query).get("create_pr") == ["1"]

    def sent(self) -> Any:
        try:
            return json.loads(self.now.body)
        except ValueError:
            raise Refused(400, "The body is no JSON") from None

    def _batch(self, token: str, headers: dict[str, str], name: str) -> Answer:
        body = self.sent()
        branch = body.get("ref", {}).get("name", "")
        # without a ref, as for a pull request, whoever sees the repo may send
        repo = self.writable(name, token, opens_pr=not branch, branch=branch)
        if headers.get("content-type") != "application/vnd.git-lfs+json":
            raise Refused(415, "git-lfs JSON is wanted")
        if body["operation"] != "upload" or body["hash_algo"] != "sha256":
            raise Refused(422, "only uploads of sha256 objects")
        return json_answer(
            {"objects": [self._object(repo, name, item) for item in body["objects"]]}
        )

    def _object(self, repo: Repo, name: str, item: dict[str, Any]) -> dict[str, Any]:
        oid, size = item["oid"], item["size"]
        if not re.fullmatch(r"[0-9a-f]{64}", oid):
            return item | {"error": {"code": 422, "message": "Invalid oid"}}
        if oid in repo.large:
            return item
        storage = self.url.replace("127.0.0.1", "localhost")
        verify = {"href": f"{self.url}/{name}.git/info/lfs/objects/verify"}
        upload: dict[str, Any] = {"href": f"{storage}/lfs/{name}/{oid}?X-Signature=s3cr3t"}
        if size > self.part_size:
            parts = range(1, -(-size // self.part_size) + 1)
            upload["href"] = f"{self.url}/lfs-complete/{name}/{oid}"
            upload["header"] = {"chunk_size": str(self.part_size)} | {
                str(number): f"{storage}/lfs/{name}/{oid}/{number}" for number in parts
            }
        return item | {"authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def _put(self, _token: str, headers: dict[str, str], name: str, oid: str) -> Answer:
        if "content-length" not in headers:
            raise Refused(411, "MissingContentLength")
        return self._store(name, oid, self.now.body)

    def _store(self, name: str, oid: str, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "BadDigest: the sha256 is not that of what was received")
        # the storage is another host, which takes what was signed for even if the repo is gone
        if repo := self.repos.get(name):
            repo.large[oid] = body
        return Answer(200)

    def _put_part(self, _t: str, headers: dict[str, str], _: str, oid: str, number: str) -> Answer:
        if "content-length" not in headers:
            raise Refused(411, "MissingContentLength")
        self.parts[oid, int(number)] = self.now.body
        return Answer(200, {"ETag": f'"{hashlib.md5(self.now.body).hexdigest()}"'})

    def _complete(self, _token: str, _: object, name: str, oid: str) -> Answer:
        body = self.sent()
        pieces = []
        for number, part in enumerate(body["parts"], start=1):
            piece = self.parts.get((oid, number))
            if piece is None or part["partNumber"] != number:
                raise Refused(400, f"InvalidPart: {number}")
            if part["etag"] != f'"{hashlib.md5(piece).hexdigest()}"':
                raise Refused(400, f"InvalidPart: the etag of {number}")
            pieces.append(piece)
        return self._store(name, body["oid"], b"".join(pieces))

    def _verify(self, token: str, _: object, name: str) -> Answer:
        body = self.sent()
        stored = self.writable(name, token, opens_pr=True).large.get(body["oid"])
        if stored is None or len(stored) != body["size"]:
            raise Refused(404, "Not found: the object was not received whole")
        return json_answer({})
