"""A tree on this disk: the same files that a repo gets, each appearing whole, README.md and
saezoo.yaml last.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from saezoo.check import Finding, check_sae
from saezoo.entry import Entry
from saezoo.errors import PublishError
from saezoo.files import sha256_of, write_file, write_folder
from saezoo.publishing.staged import LARGEST_TEXT, Progress, Staged


def text_there(folder: Path, name: str) -> str | None:
    """A small text file of a folder, None if there is none. Raises PublishError for what is no
    text.
    """
    try:
        if (folder / name).stat().st_size > LARGEST_TEXT:
            raise PublishError(f"{folder / name}: more than {LARGEST_TEXT:,} bytes, left alone")
        # newlines as they are: lines that are not ours stay byte for byte
        return (folder / name).read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise PublishError(f"{folder / name}: cannot be read as text ({error})") from None


def same_there(folder: Path, name: str, content: Path | bytes) -> bool | None:
    """Whether a file of a folder has this content; None where there is none."""
    path = folder / name
    if not path.is_file():
        return None
    if isinstance(content, bytes):
        return path.read_bytes() == content
    return path.stat().st_size == content.stat().st_size and sha256_of(path) == sha256_of(content)


def write_tree(staged: Staged, folder: Path, progress: Progress) -> None:
    """Write what `folder` lacks of a staged tree; nothing else in it is touched.

    A new folder appears whole. Into one that is there, files are renamed one by one, what gives
    them a name last; run again after an interruption, it finishes. Raises PublishError.
    """
    if folder.exists() and not folder.is_dir():
        raise PublishError(f"{folder} is a file: name a folder to publish to")
    try:
        if folder.exists():
            _fill(staged, folder, progress)
        else:
            with write_folder(folder) as work:
                _fill(staged, work, progress)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PublishError(
            f"{folder}: {reason}; {_left(folder)}, and running it again finishes it"
        ) from error


def _left(folder: Path) -> str:
    return "what was written is whole but not all" if folder.is_dir() else "nothing was written"


def _fill(staged: Staged, folder: Path, progress: Progress) -> None:
    total, done = sum(map(staged.size_of, staged.paths)), 0
    for name in staged.paths:
        content = staged.content_of(name)
        if not same_there(folder, name, content):
            with write_file(folder / name) as part:
                if isinstance(content, bytes):
                    part.write_bytes(content)
                else:
                    shutil.copyfile(content, part)
        done += staged.size_of(name)
        progress("writing", done, total)


def prove_folder(staged: Staged, folder: Path, entries: Sequence[Entry]) -> list[Finding]:
    """Read again what was written: the bytes, then each SAE as `saezoo check` sees it by its name
    in the folder's own saezoo.yaml.
    """
    findings = []
    for name in staged.paths:
        content = staged.content_of(name)
        digest = (
            hashlib.sha256(content).hexdigest()
            if isinstance(content, bytes)
            else sha256_of(content)
        )
        same = same_there(folder, name, content)
        said = f"{staged.size_of(name):,} bytes, sha256 {digest[:12]}…"
        findings.append(Finding(name, bool(same), said if same else "is not what was written"))
    for entry in entries:
        found = check_sae(f"{os.path.abspath(folder)}#{entry.id}")
        findings += [Finding(f"{entry.id}: {one.what}", one.ok, one.detail) for one in found]
    return findings
