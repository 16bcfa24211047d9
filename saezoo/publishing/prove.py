"""Fetch what was published into a clean cache, by its name and at its commit, and compare it with
what was sent: bytes, spec, weights, golden outputs.
"""

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from saezoo.check import Finding, check_sae
from saezoo.entry import Entry
from saezoo.errors import Corrupted, PublishError, SaezooError
from saezoo.files import cache_root, sha256_of
from saezoo.hf import get_files, list_repo
from saezoo.publishing.staged import Progress, Staged
from saezoo.publishing.upload import Uploaded
from saezoo.transfer import Access

FULL = (errno.ENOSPC, errno.EDQUOT)
SPARE = 2**26
"""Bytes that are left free beside what is fetched."""


def prove(
    uploaded: Uploaded,
    staged: Staged,
    entries: Sequence[Entry],
    *,
    token: str | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """What was looked at, in order: each file's bytes, then each SAE as `saezoo check` sees it by
    its name `hf://org/repo@commit#id`.

    Nothing that any cache has is taken: each SAE gets a temporary one, below the cache's root, so
    that no more disk is needed than the largest of them takes. Raises PublishError, which says that
    the upload itself is done, where the check cannot be made: a full disk, no connection.
    """
    groups = _by_entry(staged, entries)
    done, total = 0, sum(map(staged.size_of, staged.paths))
    findings: list[Finding] = []
    for entry, paths in groups:
        size = sum(map(staged.size_of, paths))
        if progress:
            progress("checking", done, total)
        try:
            findings += _prove_one(uploaded, staged, entry, paths, size, token)
        except (SaezooError, OSError) as error:
            ours = isinstance(error, SaezooError) and not _is_full(error)
            why = str(error) if ours or not isinstance(error, OSError) else _why(error, size)
            raise _unchecked(uploaded, entries, why) from error
        done += size
    return findings


def _by_entry(staged: Staged, entries: Sequence[Entry]) -> list[tuple[Entry | None, list[str]]]:
    """Each SAE with the files below its folder; what is of none, such as the card, comes first."""
    owned: dict[str, list[str]] = {entry.path: [] for entry in entries}
    rest: list[str] = []
    for path in staged.paths:
        folders = [
            folder for folder in owned if not folder or path.startswith(f"{folder.rstrip('/')}/")
        ]
        if folders and path not in staged.name_files:
            owned[max(folders, key=len)].append(path)
        else:
            rest.append(path)
    return [(None, rest), *((entry, owned[entry.path]) for entry in entries)]


def _prove_one(
    uploaded: Uploaded,
    staged: Staged,
    entry: Entry | None,
    paths: list[str],
    size: int,
    token: str | None,
) -> list[Finding]:
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < size + SPARE:
        raise OSError(errno.ENOSPC, "No space left on device")
    with tempfile.TemporaryDirectory(
        prefix=".prove-", dir=root, ignore_cleanup_errors=True
    ) as clean:
        access = Access(Path(clean), token)
        findings = [_bytes(uploaded, staged, path, access) for path in paths]
        if entry is None or not all(finding.ok for finding in findings):
            return findings
        name = f"hf://{uploaded.repo}@{uploaded.revision}#{entry.id}"
        return findings + [
            Finding(f"{entry.id}: {found.what}", found.ok, found.detail)
            for found in check_sae(name, token=token, cache_dir=clean)
        ]


def _bytes(uploaded: Uploaded, staged: Staged, path: str, access: Access) -> Finding:
    """Whether a file at the commit is the one that was sent; what arrives damaged is fetched once
    more, since a connection can do that too.
    """
    listing = list_repo(uploaded.repo, uploaded.revision, access)
    if path not in listing.files:
        return Finding(path, False, "is not in the commit")
    sent = _sha256(staged, path)
    for last in (False, True):
        try:
            get_files(listing, {path: sent}, access)
        except Corrupted as error:
            if last:
                return Finding(path, False, str(error))
        else:
            break
    return Finding(path, True, f"{staged.size_of(path):,} bytes, sha256 {sent[:12]}… as sent")


def _sha256(staged: Staged, path: str) -> str:
    if path in staged.files:
        return sha256_of(staged.files[path])
    return hashlib.sha256(staged.name_files[path]).hexdigest()


def _is_full(error: Exception) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return True
        cause = cause.__cause__
    return False


def _unchecked(uploaded: Uploaded, entries: Sequence[Entry], why: str) -> PublishError:
    names = [f"hf://{uploaded.repo}@{uploaded.revision}#{entry.id}" for entry in entries[:1]]
    later = f". Check it later: saezoo check {names[0]}" if names else ""
    return PublishError(
        f"{uploaded.repo} is published, at commit {uploaded.revision}, but could not be checked: "
        f"{why}{later}"
    )


def _why(error: OSError, size: int) -> str:
    if _is_full(error):
        return f"the disk of {cache_root()} has no room for {size / 1e6:,.1f} MB"
    return f"{error.strerror or type(error).__name__} in {cache_root()}"
