"""What the cache holds, by kind, and how to be rid of some of it."""

import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from saezoo.errors import BadName
from saezoo.files import cache_root
from saezoo.kept import FOLDER, MARKER, kept_folders, remove_folder
from saezoo.transfer import read_json

if TYPE_CHECKING:
    from huggingface_hub.utils import CachedRevisionInfo

KINDS = {
    "hub": "a commit of a Hub repo",
    "https": "a file of another host",
    "kept": "what was unpacked once, to be mapped",
    "hosts": "a language model",
    "zoos": "a collection that was pinned",
    "index": "the registry, made ready for listing",
}
"""What lies in the cache, by the name of its folder there."""

NEVER_UNASKED = frozenset({"zoos"})
"""Kinds that a person made and no fetch brings back."""

DAY = 86_400


@dataclass(frozen=True)
class Cached:
    """One thing in the cache that can be removed by itself."""

    kind: str
    """A key of KINDS."""
    what: str
    size: int
    """Bytes on disk. A Hub blob that several commits have counts once, for the one last used."""
    used: float
    """When it was last read or written, seconds since the epoch; where the disk notes no reading,
    when it was written.
    """
    path: Path
    """What is removed; of the Hub's, the snapshot."""
    marks: tuple[Path, ...] = field(default=())
    """Our own notes on it, which go with it."""


def list_cached(
    cache_dir: str | os.PathLike[str] | None = None, kinds: Collection[str] = ()
) -> list[Cached]:
    """What the cache holds, by kind, the largest first; of the kinds given, or of all.

    Raises BadName for a kind that there is not.
    """
    root = cache_root(os.fspath(cache_dir) if cache_dir else None)
    if unknown := sorted(set(kinds) - KINDS.keys()):
        raise BadName(f"no kind {unknown[0]!r} in the cache. There are: {', '.join(KINDS)}")
    found: list[Cached] = []
    for kind in KINDS:
        if not kinds or kind in kinds:
            found += sorted(_LISTED[kind](root), key=lambda item: (-item.size, item.what))
    return found


def to_prune(
    items: Iterable[Cached], *, older_than: float | None = None, kinds: Collection[str] = ()
) -> list[Cached]:
    """Those that were not used for `older_than` days (None: all), of the kinds given; pinned zoos
    only where that kind is.
    """
    limit = time.time() - (older_than or 0) * DAY
    return [
        item
        for item in items
        if (item.kind in kinds if kinds else item.kind not in NEVER_UNASKED)
        and (older_than is None or item.used < limit)
    ]


def remove_cached(
    items: Collection[Cached], cache_dir: str | os.PathLike[str] | None = None
) -> int:
    """Remove things from the cache; returns their size in bytes. What is gone already is no error.

    Raises OSError where the cache is not ours to change.
    """
    root = cache_root(os.fspath(cache_dir) if cache_dir else None)
    commits = [item.path.name for item in items if item.kind == "hub"]
    if commits:
        from huggingface_hub import scan_cache_dir

        # the Hub's client knows which blobs no other commit needs
        scan_cache_dir(root / "hub").delete_revisions(*commits).execute()
    for item in items:
        for path in (item.path, *item.marks) if item.kind != "hub" else item.marks:
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)
    return sum(item.size for item in items)


def _hub(root: Path) -> list[Cached]:
    if not (root / "hub").is_dir():
        return []
    from huggingface_hub import scan_cache_dir

    items = []
    for repo in scan_cache_dir(root / "hub").repos:
        counted: set[Path] = set()
        for revision in sorted(repo.revisions, key=_last_used, reverse=True):
            sizes = {file.blob_path: file.size_on_disk for file in revision.files}
            size = sum(bytes_ for blob, bytes_ in sizes.items() if blob not in counted)
            counted |= sizes.keys()
            commit = revision.commit_hash
            marks = root / "checked" / "hub" / repo.repo_path.name / commit
            what = f"{repo.repo_id} at {commit[:8]}…, {_count(len(revision.files))}"
            used = _last_used(revision)
            items.append(Cached("hub", what, size, used, revision.snapshot_path, (marks,)))
    return items


def _last_used(revision: "CachedRevisionInfo") -> float:
    times = [max(file.blob_last_accessed, file.blob_last_modified) for file in revision.files]
    return max(times, default=revision.last_modified)


def _https(root: Path) -> list[Cached]:
    items = []
    for path in _files(root / "https"):
        place = path.relative_to(root / "https")
        mark = root / "checked" / "https" / place.with_name(f"{place.name}.json")
        items.append(_item("https", place.as_posix(), path, (mark,)))
    return items


def _kept(root: Path) -> list[Cached]:
    return [
        Cached("kept", str(read_json(folder / MARKER).get("what", folder.name)), size, used, folder)
        for folder, size, used in kept_folders(root / FOLDER)
    ]


def _hosts(root: Path) -> list[Cached]:
    found = (root / "hosts").iterdir() if (root / "hosts").is_dir() else iter(())
    return [_item("hosts", path.name, path) for path in found]


def _zoos(root: Path) -> list[Cached]:
    return [_item("zoos", f"zoo/{path.stem}", path) for path in _files(root / "zoos")]


def _index(root: Path) -> list[Cached]:
    return [_item("index", path.name, path) for path in _files(root / "index")]


_LISTED = {
    "hub": _hub,
    "https": _https,
    "kept": _kept,
    "hosts": _hosts,
    "zoos": _zoos,
    "index": _index,
}


def _item(kind: str, what: str, path: Path, marks: tuple[Path, ...] = ()) -> Cached:
    seen = [file.stat() for file in ([path] if path.is_file() else _files(path))]
    used = max((max(item.st_atime, item.st_mtime) for item in seen), default=0.0)
    return Cached(kind, what, sum(item.st_size for item in seen), used, path, marks)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _count(files: int) -> str:
    return f"{files} file{'' if files == 1 else 's'}"
