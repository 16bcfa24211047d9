"""One line of what is sent to the Hub's commit endpoint, and what may be in it."""

import base64
import binascii
from typing import Any

from tests.fakes.answers import Refused
from tests.fakes.cards import card_problems
from tests.fakes.hub import LFS, Repo

LARGEST_REGULAR = 10 * 2**20
"""Bytes above which a file must be in LFS."""


def apply(repo: Repo, files: dict[str, bytes], key: str, value: dict[str, Any]) -> str:
    """Do one line of a commit to `files`; returns its path."""
    path = value.get("path", "")
    if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.split("/")):
        raise Refused(400, f"Invalid path: {path!r}")
    if key == "lfsFile":
        body = repo.large.get(value["oid"]) if value["algo"] == "sha256" else None
        if body is None or value.get("size", len(body)) != len(body):
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
    elif key == "file":
        if value.get("encoding") != "base64":
            raise Refused(400, '"encoding" must be base64')
        try:
            body = base64.b64decode(value["content"], validate=True)
        except binascii.Error:
            raise Refused(400, '"content" is no base64') from None
        if path.endswith(LFS) or len(body) > LARGEST_REGULAR or not is_text(body):
            raise Refused(400, f"Your push was rejected because it contains binary files: {path}")
        if path == "README.md" and (errors := card_problems(body.decode())[0]):
            raise Refused(400, f"Invalid metadata in README.md: {errors[0]}")
    else:
        raise Refused(400, f'"key" must be one of [header, file, lfsFile], not {key}')
    files[path] = body
    return str(path)


def is_text(data: bytes, cut: bool = False) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        # a sample may end in the middle of a sign
        return cut and error.start > len(data) - 4 and b"\0" not in data
    return b"\0" not in data
