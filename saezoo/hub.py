"""From an entry to local files: the one place that decides where they come from, and which of them
are needed.
"""

import difflib
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from saezoo.config_multi import MOST
from saezoo.entry import Entry
from saezoo.errors import (
    BadName,
    Corrupted,
    FetchError,
    FormatError,
    MissingFile,
    NoAccess,
    Offline,
    UnsafeFile,
)
from saezoo.files import cache_root
from saezoo.formats import (
    FAMILIES,
    FORMATS,
    LAYER_NAME,
    among,
    detect,
    format_of,
    format_tables,
    holds_tensors,
    is_read,
    match_file,
    match_names,
    names_in,
    split_layer,
    unread_format,
    what_files,
    what_folders,
)
from saezoo.transfer import Access, offline_wanted, refuse_unsafe_path, remove_linked

WITH_EXTRAS = frozenset({"native"})
"""Formats whose optional files are for people and checks, not for the arithmetic."""


@dataclass(frozen=True)
class Fetched:
    """Files of one SAE on this machine."""

    path: Path
    """The folder, or the file where one SAE is one file. One layer of what spans several is called
    `FOLDER/layer_3`, which is no file.
    """
    format: str
    """A key of saezoo.formats.FORMATS."""
    commit: str | None
    """Of a Hub repo: the commit that was served."""
    how: str
    """In words: which commit and why, or from where."""


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
        if entry.source.startswith("hf://"):
            return _fetch_hub(entry, key, access, extras)
        if entry.source.startswith(("https://", "http://")):
            return _fetch_https(entry, key, access, extras)
        return _find_local(entry, key)
    except FetchError:
        raise
    except FileNotFoundError:
        # also for a folder that was there a moment ago: another process may be replacing it
        raise MissingFile(f"{entry.name}: no such file or folder") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FetchError(f"{entry.name}: {reason} (in the cache {access.root}?)") from error


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
    inside, layer = split_layer(path)
    if not inside.exists():
        raise MissingFile(f"{path}: no such file or folder")
    if key is None or key in FAMILIES:
        found = detect(path)
        if not among(key, [found]):
            raise FormatError(f"{path}: is of the format {found}, which is no {key}")
        key = found
    elif layer is not None and not format_of(key).layered:
        raise MissingFile(f"{path}: no such file or folder, and the format {key} has no layers")
    if inside.is_dir():
        there = names_in(inside)
        required, _ = needed_files(key, False, str(path), there=there, layer=layer)
        lacking = [name for name in required if not (inside / name).is_file()]
        if lacking:
            raise MissingFile(f"{path}: the format {key} needs {', '.join(lacking)}")
    return Fetched(path, key, None, "bundled" if bundled else "local")


def _fetch_hub(entry: Entry, key: str | None, access: Access, extras: bool) -> Fetched:
    from saezoo.hf import get_files, list_repo

    listing = list_repo(entry.source.removeprefix("hf://").strip("/"), entry.revision, access)
    folder, name = entry.path.strip("/"), ""
    candidates: list[str] = []
    where = f"{listing.repo} at {listing.commit[:8]}…: {folder or 'its root'}"
    if folder in listing.files:
        if key and (key in FAMILIES or not format_of(key).suffixes):
            raise FormatError(f"{where}: an SAE of the format {key} is a folder; name that")
        candidates = [key] if key else match_file(folder)
        if not candidates:
            raise _no_format(where, [folder])
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
        local = _root(paths[0], required[0], bool(name))
        return _with_layer(local, layer), paths[: len(required)], paths

    for taken in candidates:
        local, needed, paths = take(taken)
        # names alone may fit two formats: the files themselves decide, but of one layer they are
        # not all here
        if taken == key or layer is not None or _detected(local) == taken:
            break
    else:
        raise _no_format(where, list(below))
    _refuse_wrong_size(entry, needed, paths)
    return Fetched(local, taken, listing.commit, listing.how)


def _fetch_https(entry: Entry, key: str | None, access: Access, extras: bool) -> Fetched:
    from saezoo.https import fetch_optional, fetch_url, folder_of, join_url, shown

    url = join_url(entry.source, entry.path)
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    layer = None
    if found := match_file(name) if key is None else []:
        key = _tell_apart(found, url, access, stated_hash(entry, name, (name,)))
    elif key is None or key in FAMILIES:
        key, url, layer = _probe_layers(url, key, access)
    name = name if is_one_file(name, key) else ""
    base = folder_of(url) if name else url
    there = [*_first_there(key, base, access), *_layer_files_at(base, key, layer, access)]
    required, optional = needed_files(key, extras, shown(url), name, there=there, layer=layer)
    needed = [
        fetch_url(join_url(base, item), access, sha256=stated_hash(entry, item, required))
        for item in required
    ]
    others = [
        fetch_optional(join_url(base, item), access, sha256=stated_hash(entry, item, required))
        for item in optional
    ]
    _refuse_wrong_size(entry, needed, [*needed, *(path for path in others if path)])
    local = _with_layer(_root(needed[0], required[0], bool(name)), layer)
    return Fetched(local, key, None, "https, cached")


def _probe_layers(url: str, key: str | None, access: Access) -> tuple[str, str, int | None]:
    """(format, URL of the folder, layer) of a folder that cannot be listed, or of a layer there."""
    from saezoo.https import folder_of

    found = LAYER_NAME.fullmatch(unquote(urlsplit(url).path.rpartition("/")[2]))
    if found is not None:
        # first, because asking for files below the name makes a folder of that name in the cache
        base, layer = folder_of(url), int(found[1])
        for form in among(key, [name for name, form in FORMATS.items() if form.layered]):
            if _has_layer(base, form, layer, access):
                return form, base, layer
    return _probe(url, access, key), url, None


def _has_layer(base: str, key: str, layer: int, access: Access) -> bool:
    """Whether the folder at a URL is of a format with this layer, as far as names say."""
    from saezoo.https import fetch_optional, join_url

    if format_of(key).layer_files:
        return bool(_layer_files_at(base, key, layer, access))
    files = (fetch_optional(join_url(base, name), access) for name in format_of(key).files)
    return all(files) and bool(_first_there(key, base, access))


def _layer_files_at(base: str, key: str, layer: int | None, access: Access) -> list[str]:
    """The files of layers below a URL that cannot be listed: of the one layer, or of 0, 1, 2, …
    until there is none.
    """
    from saezoo.https import fetch_optional, join_url

    found = []
    for template in format_of(key).layer_files:
        for number in range(MOST) if layer is None else [layer]:
            name = template.replace("{layer}", str(number))
            if fetch_optional(join_url(base, name), access) is None:
                break
            found.append(name)
    return found


def layer_below(folder: str, files: Collection[str]) -> tuple[dict[str, str], int | None]:
    """({name: file} of the folder that `folder` would be in, the number) where the name is that of
    a layer; else nothing.
    """
    parent, _, last = folder.rpartition("/")
    found = LAYER_NAME.fullmatch(last)
    if found is None:
        return {}, None
    start = f"{parent}/" if parent else ""
    below = {file[len(start) :]: file for file in files if file.startswith(start)}
    return below, int(found[1])


def _with_layer(local: Path, layer: int | None) -> Path:
    return local if layer is None else local / f"layer_{layer}"


def _probe(url: str, access: Access, key: str | None = None) -> str:
    """The format of a folder that cannot be listed: the first whose files are all there, of those
    that `key` allows.
    """
    from saezoo.https import fetch_url, join_url, shown

    refused: FetchError | None = None
    tables = format_tables()
    for name in (name for formats in tables for name in among(key, list(formats))):
        form = format_of(name)
        try:
            paths = [fetch_url(join_url(url, item), access) for item in form.files]
            _first_there(name, url, access)
        except MissingFile:
            continue
        except NoAccess as error:
            refused = error
            continue
        except Offline as error:
            if not access.offline:
                raise
            refused = error
            continue
        found = _detected(_root(paths[0], form.files[0], False)) if paths else None
        if found and among(key, [found]):
            return found
    raise refused or _no_format(shown(url), [])


def _tell_apart(keys: list[str], url: str, access: Access, sha256: str | None) -> str:
    """Which of the formats of which an SAE is one file with this name, decided by what is in it."""
    from saezoo.https import fetch_optional, fetch_url, folder_of, join_url, shown

    if len(keys) == 1:
        return keys[0]
    local = fetch_url(url, access, sha256=sha256)
    for key in keys:
        if format_of(key).marker and holds_tensors(local, key):
            for item in format_of(key).optional_of(local.name):
                fetch_optional(join_url(folder_of(url), item), access)
    if (found := _detected(local)) in keys:
        return str(found)
    raise _no_format(shown(url), [local.name])


def _first_there(key: str, base: str, access: Access) -> list[str]:
    """Of the files of which a format's folder has one, the one that is below a URL."""
    from saezoo.https import fetch_optional, join_url

    found = (item for item in format_of(key).one_of if fetch_optional(join_url(base, item), access))
    return [first] if (first := next(found, None)) else []


def _root(path: Path, name: str, one_file: bool) -> Path:
    """What a reader opens: the file itself, or the folder below which it is called `name`."""
    return path if one_file else path.parents[name.count("/")]


def needed_files(
    key: str,
    extras: bool,
    where: str,
    one_file: str = "",
    *,
    there: Collection[str] = (),
    layer: int | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The file names that a format requires, and those to take where they exist.

    there: file names that a folder is known to have; of those of layers, all of them count.
    layer: only its files are wanted.
    """
    form = format_of(key)
    optional = form.optional_of(one_file) if extras or key not in WITH_EXTRAS else ()
    if one_file:
        return (one_file,), optional
    if not form.files:
        endings = ", ".join(f"*{suffix}" for suffix in form.suffixes)
        raise FormatError(f"{where}: an SAE of the format {key} is one file ({endings}); name it")
    chosen = ([item for item in form.one_of if item in there] or [*form.one_of])[:1]
    if layer is None:
        own = form.layer_files_in(there)
        return tuple(dict.fromkeys([*form.files, *chosen, *own])), optional
    own = [template.replace("{layer}", str(layer)) for template in form.layer_files]
    return (*form.shared_files(), *chosen, *own), optional


def is_one_file(name: str, key: str) -> bool:
    form = format_of(key)
    return name.endswith(form.suffixes) if form.files else True


def stated_hash(entry: Entry, name: str, required: tuple[str, ...]) -> str | None:
    """The sha256 that the entry states of a file; a bare one is that of the weights."""
    if entry.sha256 is None or isinstance(entry.sha256, dict):
        return (entry.sha256 or {}).get(name)
    weights = [item for item in required if not item.endswith((".json", ".yaml"))]
    return entry.sha256 if name in weights[:1] else None


def _refuse_wrong_size(entry: Entry, required: list[Path], all_of_them: list[Path]) -> None:
    """Raise Corrupted, and remove the files, when they have not the size that the entry states."""
    sizes = [sum(path.stat().st_size for path in paths) for paths in (required, all_of_them)]
    if entry.size is None or entry.size in sizes:
        return
    for path in all_of_them:
        remove_linked(path)
    raise Corrupted(
        f"{entry.name}: its files have {sizes[0]:,} bytes, {entry.size:,} were promised; they were "
        "removed, fetch it again"
    )


def _detected(local: Path) -> str | None:
    try:
        return detect(local)
    except FormatError:
        return None


def _no_format(where: str, names: list[str]) -> FormatError:
    among = f" among {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" if names else ""
    return FormatError(
        f"{where}: no known format{among}. Looked for {what_folders()}, {what_files()}. "
        "Give format=… (--from) if you know it"
    )


def _closest(path: str, files: tuple[str, ...]) -> str:
    folders = {file.rpartition("/")[0] for file in files} | set(files)
    close = difflib.get_close_matches(path, sorted(folders - {""}), n=4)
    return f" Closest: {', '.join(close)}" if close else ""
