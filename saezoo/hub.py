"""From an entry to local files: the one place that decides where they come from, and which of them
are needed.
"""

import difflib
import os
import sys
from dataclasses import replace
from pathlib import Path

from saezoo.entry import Entry
from saezoo.errors import (
    BadName,
    Corrupted,
    FetchError,
    FormatError,
    MissingFile,
    Offline,
    UnsafeFile,
)
from saezoo.fetched import (
    Fetched,
    detected,
    no_format,
    refuse_wrong_size,
    root_of,
    with_layer,
)
from saezoo.files import cache_root
from saezoo.formats import (
    FAMILIES,
    among,
    detect,
    format_of,
    is_read,
    match_file,
    match_names,
    names_in,
    split_layer,
    split_part,
    unread_format,
)
from saezoo.needed import layer_below, needed_files, split_listed, stated_hash
from saezoo.pointers import FORMAT as SET
from saezoo.pointers import POINTED, follow_pointer
from saezoo.transfer import Access, offline_wanted, refuse_unsafe_path
from saezoo.unlisted import fetch_unlisted


def fetch(
    entry: Entry,
    *,
    format: str | None = None,  # noqa: A002
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    refresh: bool = False,
    progress: bool | None = None,
    extras: bool = False,
) -> Fetched:
    """The files of an SAE on this machine, fetched unless they are cached: only those needed.

    format: a key of FORMATS; None: the entry's own, else the files decide.
    refresh: ask again which commit a branch points to, or for the file of an https host.
    progress: show bars; None: where stderr is a terminal.
    extras: also the optional files that no arithmetic needs (golden outputs, stats, README).

    Raises BadName, FormatError where no format fits, or a FetchError: MissingFile, NoAccess,
    Offline, Corrupted. The cache stays usable whatever happens.
    """
    refuse_unsafe_path(entry.path, entry.name)
    key = format or entry.format
    if key is not None and not is_read(key):
        raise unread_format(key, entry.name)
    access = _access(token, cache_dir, local_files_only, refresh, progress)
    try:
        meant = follow_pointer(entry, access) if key in (None, SET) else entry
        elsewhere = meant.source != entry.source and meant.source.startswith("hf://")
        if key in (None, SET) and not elsewhere and entry.source.startswith("hf://"):
            access = replace(access, refresh=False)  # it has just been asked
        key = format or meant.format if not elsewhere else None
        fetched = _fetch(meant, key, access, extras)
        if elsewhere and fetched.format not in POINTED:
            raise FormatError(
                f"{entry.name}: points to {meant.source}/{meant.path} of the format "
                f"{fetched.format}; pointers are followed to {', '.join(POINTED)}"
            )
        return fetched if meant is entry else replace(fetched, entry=meant)
    except FetchError:
        raise
    except FileNotFoundError:
        # also for a folder that was there a moment ago: another process may be replacing it
        raise MissingFile(f"{entry.name}: no such file or folder") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FetchError(f"{entry.name}: {reason} (in the cache {access.root}?)") from error


def _fetch(entry: Entry, key: str | None, access: Access, extras: bool) -> Fetched:
    if entry.source.startswith("hf://"):
        return _fetch_hub(entry, key, access, extras)
    if entry.source.startswith(("https://", "http://")):
        return fetch_unlisted(entry, key, access, extras)
    return _find_local(entry, key)


def fetch_file(
    entry: Entry,
    *,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    refresh: bool = False,
    limit: int,
) -> Fetched:
    """One small file, whatever it holds: a file of a Hub repo, or at an https URL. `format` is
    empty.

    Raises what `fetch` does, and UnsafeFile above `limit` bytes.
    """
    refuse_unsafe_path(entry.path, entry.name)
    access = _access(token, cache_dir, local_files_only, refresh, False)
    if entry.source.startswith("hf://"):
        from saezoo.hf import get_files, list_repo

        listing = list_repo(entry.source.removeprefix("hf://"), entry.revision, access)
        if entry.path not in listing.files:
            raise MissingFile(f"{listing.repo} at {listing.commit[:8]}…: there is no {entry.path}")
        (path,), commit, how = (
            get_files(listing, {entry.path: None}, access),
            listing.commit,
            listing.how,
        )
    else:
        from saezoo.https import fetch_url

        path, commit, how = fetch_url(entry.source, access), None, "https"
    if path.stat().st_size > limit:
        raise UnsafeFile(f"{entry.name}: {path.stat().st_size:,} bytes, more than {limit:,}")
    return Fetched(path, "", commit, how)


def list_files(
    entry_or_repo: Entry | str,
    revision: str | None = None,
    *,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    refresh: bool = False,
) -> list[str]:
    """The names of all files of a Hub repo at a revision: one request, then remembered.

    Raises BadName for what is not a Hub repo, MissingFile, NoAccess, Offline or FetchError.
    """
    from saezoo.hf import list_repo

    if isinstance(entry_or_repo, Entry):
        source, revision = entry_or_repo.source, revision or entry_or_repo.revision
        if not source.startswith("hf://"):
            raise BadName(f"{source}: only the files of a Hub repo (hf://org/repo) can be listed")
        entry_or_repo = source
    access = _access(token, cache_dir, local_files_only, refresh, False)
    return list(list_repo(entry_or_repo.removeprefix("hf://"), revision, access).files)


def peek(entry: Entry, *, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """In words, where the files are or would come from. Makes no request."""
    try:
        return fetch(entry, cache_dir=cache_dir, local_files_only=True).how
    except (Offline, Corrupted):
        if not entry.source.startswith("hf://"):
            return "https, not in the cache"
    from saezoo.hf import how_pinned, is_commit

    revision = entry.revision or "main"
    pin = how_pinned(revision) if is_commit(revision) else f"branch {revision}"
    return f"{pin}; not in the cache"


def _access(
    token: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    refresh: bool,
    progress: bool | None,
) -> Access:
    offline = local_files_only or offline_wanted()
    if refresh and offline:
        raise Offline("refresh needs the network, and no network is wanted")
    shown = sys.stderr.isatty() if progress is None else progress
    root = cache_root(os.fspath(cache_dir) if cache_dir else None)
    return Access(root, token, offline, refresh, shown)


def _find_local(entry: Entry, key: str | None) -> Fetched:
    """Files of this package, or of the person's own; they are not checked here."""
    bundled = entry.source.startswith("bundled:")
    folder = entry.source.removeprefix("bundled:")
    if bundled:
        refuse_unsafe_path(folder, entry.name)
        path = Path(__file__).parent / "bundled" / folder / entry.path
    else:
        path = Path(folder).expanduser() / entry.path
    whole, part = split_part(path)
    inside, layer = split_layer(whole)
    if not inside.exists():
        raise MissingFile(f"{path}: no such file or folder")
    if key is None or key in FAMILIES:
        found = detect(whole)
        if not among(key, [found]):
            raise FormatError(f"{path}: is of the format {found}, which is no {key}")
        key = found
    elif layer is not None and not format_of(key).layered:
        raise MissingFile(f"{path}: no such file or folder, and the format {key} has no layers")
    if inside.is_dir():
        there = names_in(inside, {key: format_of(key)})
        required, _ = needed_files(key, False, str(path), there=there, layer=layer)
        lacking = [name for name in required if not (inside / name).is_file()]
        if lacking:
            raise MissingFile(f"{path}: the format {key} needs {', '.join(lacking)}")
    _refuse_part(part, key, str(whole))
    return Fetched(path, key, None, "bundled" if bundled else "local")


def _fetch_hub(entry: Entry, key: str | None, access: Access, extras: bool) -> Fetched:
    from saezoo.hf import get_files, list_repo

    listing = list_repo(entry.source.removeprefix("hf://").strip("/"), entry.revision, access)
    folder, part = split_listed(entry.path.strip("/"), listing.files)
    name, candidates = "", list[str]()
    where = f"{listing.repo} at {listing.commit[:8]}…: {folder or 'its root'}"
    if folder in listing.files:
        if key and (key in FAMILIES or not format_of(key).suffixes):
            raise FormatError(f"{where}: an SAE of the format {key} is a folder; name that")
        candidates = [key] if key else match_file(folder)
        if not candidates:
            raise no_format(where, [folder])
        folder, _, name = folder.rpartition("/")
    start = f"{folder}/" if folder else ""
    below = {file[len(start) :]: file for file in listing.files if file.startswith(start)}
    layer = None
    if not below:
        below, layer = layer_below(folder, listing.files)
    if not name:
        candidates = [key] if key and key not in FAMILIES else among(key, match_names(set(below)))
    if layer is not None:
        candidates = [form for form in candidates if format_of(form).layered]
    if not below or (layer is not None and not candidates):
        raise MissingFile(f"{where}: no such file or folder.{_closest(folder, listing.files)}")

    def take(form: str) -> tuple[Path, list[Path], list[Path]]:
        required, optional = needed_files(form, extras, where, name, there=below, layer=layer)
        if lacking := [item for item in required if item not in below]:
            raise MissingFile(f"{where}: the format {form} needs {', '.join(lacking)}")
        names = [*required, *(item for item in optional if item in below)]
        wanted = {below[item]: stated_hash(entry, item, required) for item in names}
        paths = get_files(listing, wanted, access, entry.size)
        local = root_of(paths[0], required[0], bool(name))
        return with_layer(local, layer), paths[: len(required)], paths

    for taken in candidates:
        local, needed, paths = take(taken)
        # names alone may fit two formats: the files themselves decide, but of one layer they are
        # not all here
        if taken == key or layer is not None or detected(local) == taken:
            break
    else:
        raise no_format(where, list(below))
    _refuse_part(part, taken, where)
    refuse_wrong_size(entry, needed, paths)
    return Fetched(local / part, taken, listing.commit, listing.how)


def _refuse_part(part: str, key: str, where: str) -> None:
    if part and not format_of(key).parts:
        raise MissingFile(f"{where}: is one SAE of the format {key}, so there is no {part!r} in it")


def _closest(path: str, files: tuple[str, ...]) -> str:
    folders = {file.rpartition("/")[0] for file in files} | set(files)
    close = difflib.get_close_matches(path, sorted(folders - {""}), n=4)
    return f" Closest: {', '.join(close)}" if close else ""
