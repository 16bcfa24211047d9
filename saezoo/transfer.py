"""What every fetch does, whichever host it asks: refuse unsafe paths, wait and ask again, tell the
size, and check each file once.
"""

import email.utils
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from saezoo.errors import BadName, Corrupted, NoAccess
from saezoo.files import sha256_of, write_file

logger = logging.getLogger(__name__)

LARGE = 100_000_000
"""Bytes above which the size is told before a fetch."""
BUSY = frozenset({429, 500, 502, 503, 504})
"""Answers after which asking again makes sense."""
TRIES = 4
LONGEST_WAIT = 60.0
"""Seconds; a host that wants a longer pause is left alone."""

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """On which terms files may be had: where the cache is, whether requests are allowed, and what
    is shown meanwhile.
    """

    root: Path
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    refresh: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        refuse_bad_token(self.token)


def refuse_bad_token(token: str | None) -> None:
    """Raise NoAccess for what cannot be a token: a line end in a header makes an HTTP library
    complain, and print the header.
    """
    if token and not re.fullmatch(r"[!-~]+", token):
        raise NoAccess("the token holds a space, a line end or another sign that no token has")


def offline_wanted() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests; it holds for every host."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def refuse_unsafe_path(path: str, where: str) -> None:
    """Raise BadName for a path that could leave the folder it is joined to."""
    if "\\" in path or "\0" in path or path.startswith("/") or re.match(r"[A-Za-z]:", path):
        raise BadName(f"{where}: the path {path!r} must be relative, with / between its parts")
    if ".." in path.split("/"):
        raise BadName(f"{where}: the path {path!r} must not contain '..'")


def announce(what: str, size: int, progress: bool) -> None:
    """Tell the size of a fetch before it starts, if it is large."""
    if size <= LARGE:
        return
    line = f"{what}: {size / 1e6:,.0f} MB to fetch"
    logger.info("%s", line)
    if progress:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(line, markup=False)


def ask_again(ask: Callable[[], T], wait_for: Callable[[OSError, int], float | None]) -> T:
    """What `ask` returns, asked at most TRIES times.

    wait_for(error, times asked before): seconds to wait, or None where asking again is of no use.
    """
    for asked in range(TRIES - 1):
        try:
            return ask()
        except OSError as error:
            seconds = wait_for(error, asked)
            if seconds is None or seconds > LONGEST_WAIT:
                raise
            logger.info("the host is busy, asking again in %.0f s", seconds)
            time.sleep(seconds)
    return ask()


def seconds_to_wait(status: int, headers: Mapping[str, str], asked: int) -> float | None:
    """How long a busy host wants to be left alone (Retry-After in seconds or as a date, RFC 9110
    10.2.3), else 1, 2, 4 seconds; None if it is not busy.
    """
    if status not in BUSY:
        return None
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 2.0**asked
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def verify_file(path: Path, marker: Path, promised: Collection[str], where: str) -> None:
    """Check a file against the hashes promised (64 hex digits: sha256; 40: git's sha1), once.

    `marker` remembers the check with the file's size and time: without it, or when those changed,
    the file is hashed again. On a mismatch the file is removed, so that the next fetch repairs it,
    and Corrupted is raised.
    """
    known = read_json(marker)
    stamp = {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    same = all(known.get(key) == value for key, value in stamp.items())
    sha256s = {item.lower() for item in promised if len(item) == 64}
    if same and sha256s <= {known.get("sha256")}:
        return
    found = {sha256_of(path)}
    if not sha256s and "sha256" in known:
        sha256s = {str(known["sha256"])}
    git = {item.lower() for item in promised if len(item) == 40}
    wrong = (sha256s - found) | (git - {_git_sha1(path)} if git else set())
    if wrong:
        remove_linked(path)
        marker.unlink(missing_ok=True)
        kind = "sha256" if len(max(wrong, key=len)) == 64 else "git sha1"
        raise Corrupted(
            f"{where}: the {kind} is not the promised {max(wrong, key=len)[:16]}…; "
            "the file was removed, fetch it again"
        )
    write_marker(marker, path, found.pop())


def write_marker(marker: Path, path: Path, sha256: str) -> None:
    """Remember that the file has been checked."""
    status = path.stat()
    facts = {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    try:
        write_json(marker, facts)
    except OSError as error:
        # a cache that others own can be read all the same; it is only hashed again next time
        logger.info("%s could not be written: %s", marker, error.strerror)


def read_json(path: Path) -> dict[str, object]:
    """A small JSON object of our own; empty where there is none, or a broken one."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: dict[str, object]) -> None:
    """Write a small JSON object whole."""
    with write_file(path) as part:
        part.write_text(json.dumps(data), encoding="utf-8")


def remove_linked(path: Path) -> None:
    """Remove a file, and what it is a link to, so that nothing of it is taken for whole again."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink(missing_ok=True)
        path = target
    path.unlink(missing_ok=True)


def _git_sha1(path: Path) -> str:
    """The name that git gives to the contents of a file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
