"""The loopback Hub as one that can be written to: repos, branches, LFS storage, commits, pull
requests. It refuses what the real one refuses.
"""

import base64
import json
import re
from typing import Any
from urllib.parse import parse_qs

from tests.fakes.answers import Refused, json_answer
from tests.fakes.cards import card_problems
from tests.fakes.commits import LARGEST_REGULAR, apply, is_text
from tests.fakes.hub import LFS, Repo, blob
from tests.fakes.hub_lfs import NAME, LfsHub
from tests.fakes.server import Answer


class UploadHub(LfsHub):
    """Repos that are made, listed and committed to. `page`: files that one answer lists; `log`: the
    commits that were sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.page = 1000
        self.log: list[dict[str, Any]] = []
        self.routes += [
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("GET", "/api/whoami-v2", self._whoami),
            ("GET", f"/api/models/{NAME}/tree/(.+)", self._tree),
            ("POST", f"/api/models/{NAME}/preupload/(.+)", self._preupload),
            ("POST", f"/api/models/{NAME}/branch/(.+)", self._branch),
            ("POST", f"/api/models/{NAME}/commit/(.+)", self._commit),
        ]

    def reset(self) -> None:
        """Forget what was committed too."""
        super().reset()
        self.page = 1000
        self.log.clear()

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        """One answer, to whatever method."""
        token = headers.get("authorization", "").removeprefix("Bearer ")
        storage = path.startswith(("/lfs", "/storage/"))
        try:
            if storage and token:
                raise Refused(400, "a token left the Hub")
            if token and self.users and token not in self.users and not storage:
                raise Refused(401, "Invalid credentials in Authorization header")
            for method, pattern, do in self.routes:
                if self.now.method == method and (found := re.fullmatch(pattern, path)):
                    return do(token, headers, *found.groups())
            if self.now.method not in ("GET", "HEAD"):
                raise Refused(404, "Sorry, we can't find the page you are looking for.")
        except Refused as refused:
            return refused.answer
        return super().answer(path, headers)

    def _create(self, token: str, _: object) -> Answer:
        user, body = self.user(token), self.sent()
        owner, name = body["organization"] or user.name, body["name"]
        if not re.fullmatch(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,95}", name) or name[-1] in ".-":
            raise Refused(400, f"Invalid repo name: {owner}/{name}")
        if owner not in user.writes or user.read_only:
            raise Refused(
                403, f'You don\'t have the rights to create a model under the namespace "{owner}"'
            )
        full = f"{owner}/{name}"
        url = {"url": f"{self.url}/{full}", "name": full}
        if full in self.repos:
            said = "You already created this model repo"
            return json_answer({"error": said} | url, 409)
        self.commit(
            full, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )
        if body.get("visibility") == "private":
            self.repos[full].private_to = token
        return json_answer(url)

    def _validate(self, _token: str, _: object) -> Answer:
        body = self.sent()
        if body.get("repoType") != "model":
            raise Refused(400, '"repoType" must be one of [model]')
        errors, warnings = card_problems(body["content"])
        found = {"errors": errors, "warnings": warnings}
        said = {kind: [{"message": text} for text in texts] for kind, texts in found.items()}
        return json_answer(said, 400 if errors else 200)

    def _whoami(self, token: str, _: object) -> Answer:
        user = self.user(token)
        return json_answer({"type": "user", "name": user.name, "orgs": []})

    def _tree(self, token: str, _: object, name: str, revision: str) -> Answer:
        found = self.find(name, revision, token)
        if isinstance(found, Answer):
            return found
        repo, commit = found
        query = parse_qs(self.now.query)
        if query.get("recursive") not in (["true"], ["True"]):
            raise Refused(400, "the fake lists whole trees only")
        start = int(query.get("cursor", ["0"])[0])
        paths = sorted(repo.commits[commit])
        items = []
        for path in paths[start : start + self.page]:
            facts = blob(repo.in_lfs(path, body := repo.commits[commit][path]), body)
            lfs = facts.get("lfs")
            item = {"type": "file", "oid": facts["blobId"], "size": facts["size"], "path": path}
            if isinstance(lfs, dict):
                item["lfs"] = {"oid": lfs["sha256"]} | {
                    key: lfs[key] for key in ("size", "pointerSize")
                }
            items.append(item)
        answer = json_answer(items)
        if start + self.page < len(paths):
            more = f"{self.url}/api/models/{name}/tree/{commit}?recursive=true"
            answer.headers["Link"] = f'<{more}&cursor={start + self.page}>; rel="next"'
        return answer

    def _preupload(self, token: str, _: object, name: str, revision: str) -> Answer:
        repo = self.writable(name, token, self.asks_pr(), revision)
        head = self._head(repo, revision)
        body, files = self.sent(), []
        if len(body["files"]) > 256:
            raise Refused(413, "too many files")
        for item in body["files"]:
            sample = base64.b64decode(item["sample"], validate=True)
            large = (
                item["path"].endswith(LFS)
                or item["size"] > LARGEST_REGULAR
                or not is_text(sample, cut=item["size"] > len(sample))
            )
            there = repo.commits[head].get(item["path"])
            oid = None
            if there is not None:
                facts = blob(repo.in_lfs(item["path"], there), there)
                lfs = facts.get("lfs")
                oid = lfs["sha256"] if isinstance(lfs, dict) else facts["blobId"]
            files.append(
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": self._ignores(repo, head, body, item["path"]),
                    "oid": oid,
                }
            )
        return json_answer({"files": files})

    def _ignores(self, repo: Repo, head: str, body: dict[str, Any], path: str) -> bool:
        """By the endings in a .gitignore: *.png and the like."""
        text = body.get("gitIgnore", repo.commits[head].get(".gitignore", b"").decode())
        return any(path.endswith(line[1:]) for line in text.split() if line.startswith("*."))

    def _head(self, repo: Repo, branch: str) -> str:
        if branch not in repo.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return repo.branches[branch]

    def _branch(self, token: str, _: object, name: str, branch: str) -> Answer:
        repo = self.writable(name, token)
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        start = self.sent().get("startingPoint") or "main"
        commit = repo.branches.get(start, start)
        if commit not in repo.commits:
            raise Refused(404, f"Invalid rev id: {start}", "RevisionNotFound")
        repo.branches[branch] = commit
        return json_answer({})

    def _commit(self, token: str, headers: dict[str, str], name: str, branch: str) -> Answer:
        opens_pr = self.asks_pr()
        repo = self.writable(name, token, opens_pr, branch)
        head = self._head(repo, branch)
        if headers.get("content-type") != "application/x-ndjson":
            raise Refused(415, "application/x-ndjson is wanted")
        lines = [json.loads(line) for line in self.now.body.splitlines()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            raise Refused(400, '"summary" is not allowed to be empty')
        parent = lines[0]["value"].get("parentCommit", head)
        if parent not in repo.commits:
            raise Refused(404, f"Invalid rev id: {parent}", "RevisionNotFound")
        if parent != head and not opens_pr:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        changed = [apply(repo, files, line["key"], line["value"]) for line in lines[1:]]
        if not changed:
            raise Refused(400, "No operation in this commit")
        if opens_pr:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.branches)
            branch = f"refs/pr/{number}"
        oid = self.commit(name, files, branch)
        summary = lines[0]["value"]["summary"]
        self.log.append(
            {"repo": name, "branch": branch, "summary": summary, "paths": changed, "oid": oid}
        )
        done = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}
        if opens_pr:
            done["pullRequestUrl"] = f"{self.url}/{name}/discussions/{number}"
        return json_answer(done)
