"""The part of the loopback Hub that serves data sets: what `datasets` asks for to stream one."""

import hashlib
import json
import re

from tests.fakes.server import Answer

COMMIT = "d" * 40
JSON = {"Content-Type": "application/json"}


def answer_dataset(datasets: dict[str, dict[str, bytes]], path: str) -> Answer:
    """One answer about data sets, each given as its files by name. They have one commit."""
    if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
        files = datasets.get(found[1])
        if files is None:
            return Answer(404, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in files]
        facts = {"id": found[1], "sha": COMMIT, "siblings": siblings, "tags": []}
        return Answer(200, JSON, json.dumps(facts).encode())
    if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.+))?", path):
        return Answer(200, JSON, json.dumps(_tree(datasets[found[1]], found[2] or "")).encode())
    if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
        body = datasets.get(found[1], {}).get(found[2])
        if body is None:
            return Answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return Answer(200, {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": COMMIT}, body)
    return Answer(404)


def _tree(files: dict[str, bytes], folder: str) -> list[dict[str, object]]:
    """What lies directly in a folder."""
    inside = {name: body for name, body in files.items() if name.startswith(folder)}
    start = len(folder) + 1 if folder else 0
    folders = {name[:start] + name[start:].split("/")[0] for name in inside if "/" in name[start:]}
    return [
        {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)
    ] + [
        {"type": "file", "path": name, "size": len(body), "oid": _oid(body)}
        for name, body in inside.items()
        if "/" not in name[start:]
    ]


def _oid(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()
