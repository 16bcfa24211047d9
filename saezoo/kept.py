"""What had to be unpacked once is kept as saezoo's own folder, so that the next load maps it.

Most weights are mapped where they lie. A deflated or unaligned .npz and a pickle of before torch
1.6 cannot be: they are read into memory, at every load. So what their reader made of them is kept
in `<cache>/kept/<key>/`, by the contents of the files and by all that the reader was told. (A .pt
of today is a zip of stored, aligned tensors, which torch maps: nothing to keep.)

Only files of the cache are kept: their sha256 is known from the check after the download. A local
file would have to be hashed at each load, or be trusted by its time and size, which `cp -p` and
rsync preserve; and whether its disk space is worth spending twice is its owner's choice, who has
`saezoo convert`.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from saezoo.entry import Entry
from saezoo.errors import ConfigError, SaezooError
from saezoo.fetched import Fetched
from saezoo.files import sha256_of, write_folder
from saezoo.formats import FORMATS, Weights, native
from saezoo.formats._npz import find_data, read_header
from saezoo.formats._stream import NAMES, byte_count, stream_safetensors
from saezoo.formats._tensors import is_zip
from saezoo.transfer import read_json, write_json

logger = logging.getLogger(__name__)

FOLDER, MARKER = "kept", "kept.json"
VERSION = 1
"""Of what a kept folder is; one of another version is never looked at."""

LIMIT_VARIABLE, LIMIT_GB = "SAEZOO_KEPT_GB", 20.0

LEAST = 2**20
"""Bytes that must have been copied into memory for keeping to be worth a folder."""

MAPPED = (".safetensors", ".json", ".yaml", ".yml", ".md")
"""Endings of files that are mapped, or too small to matter."""

ABANDONED = 24 * 3600
"""Seconds after which the work folder of a process that died is cleared away."""

NOT_READ = frozenset(
    {"release", "id", "revision", "sha256", "size", "l0", "variance_explained", "neuronpedia"}
    | {"licence", "use_restriction", "paper", "author", "notes", "gated", "unverified"}
)
"""Facts of an Entry that no reader looks at: their changes leave what was kept valid."""


@dataclass(frozen=True)
class Place:
    """Where what a reader makes of some files is kept."""

    root: Path
    """`<cache>/kept`"""
    key: str
    files: tuple[Path, ...]
    """Those that cannot be taken for mapped by their names."""

    @property
    def folder(self) -> Path:
        """The native folder, which need not exist."""
        return self.root / self.key


def read_kept(
    fetched: Fetched, entry: Entry | None, read: Callable[[Path, Entry | None], Weights]
) -> Weights:
    """What `read` makes of fetched files, from what was kept of it where there is such, else kept
    now if unpacking was needed.

    Raises what `read` raises, and ConfigError for a SAEZOO_KEPT_GB that is no number. A cache that
    cannot be written, or has no room, keeps nothing.
    """
    # the key has the code of saezoo's own readers in it, not that of another package's
    place = _place(fetched, entry) if fetched.format in FORMATS else None
    if place is None or not (limit := kept_limit()):
        return read(fetched.path, entry)
    if found := _open(place):
        return found
    weights = read(fetched.path, entry)
    try:
        if sum(_copied(file) for file in place.files) < LEAST:
            return weights
        _keep(weights, place, limit, entry.name if entry else fetched.path.name)
    except OSError as error:
        # no room, a cache that others own, or another process has just kept the same
        logger.info("nothing is written to %s: %s", place.folder, error.strerror or error)
    # the mapped copy is used at once, so that the unpacked one can go
    found = _open(place)
    return found if found and found.cfg == weights.cfg else weights


def kept_limit() -> int:
    """Bytes that kept folders may take together, by $SAEZOO_KEPT_GB (10^9 bytes; 0: keep nothing).

    Raises ConfigError where that is no number from 0.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    try:
        wanted = float(text) if text else LIMIT_GB
    except ValueError:
        wanted = math.nan
    if not 0 <= wanted < math.inf:
        raise ConfigError(f"{LIMIT_VARIABLE} is {text!r}, expected a number of GB such as 20")
    return int(wanted * 1e9)


def kept_folders(root: Path) -> list[tuple[Path, int, float]]:
    """(folder, bytes, seconds since the epoch when it was last used) of all in `<cache>/kept`, the
    least recently used first. Work folders count too, from when they were begun.
    """
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        try:
            sizes = [path.stat().st_size for path in folder.iterdir()]
            marker = folder / MARKER
            used = (marker if marker.exists() else folder).stat().st_mtime
        except OSError:
            continue  # another process has just removed it
        found.append((folder, sum(sizes), used))
    return sorted(found, key=lambda row: row[2])


def remove_folder(folder: Path) -> None:
    """Remove a folder: a reader sees all of it or nothing. Raises OSError."""
    gone = Path(tempfile.mkdtemp(prefix=".gone.", dir=folder.parent))
    try:
        os.replace(folder, gone / folder.name)
    finally:
        shutil.rmtree(gone, ignore_errors=True)


def _place(fetched: Fetched, entry: Entry | None) -> Place | None:
    """Where this would be kept; None for files that are mapped, or not of a cache, or changed since
    they were checked.
    """
    files = _files(fetched)
    odd = tuple(path for path in files if not path.name.endswith(MAPPED))
    checked = [_checked(path) for path in files] if odd else []
    if not checked or None in checked:
        return None
    facts = entry.model_dump(mode="json", exclude=set(NOT_READ)) if entry else None
    # the readers also look at where a file lies, since some publishers say layer and site so only
    told = {
        "version": VERSION,
        "readers": _readers(),
        "format": fetched.format,
        "files": [(where, sha256) for _, where, sha256 in filter(None, checked)],
        "one_file": fetched.path.is_file(),
        "entry": facts,
    }
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:40]
    root = next(root for root, _, _ in filter(None, checked))
    return Place(root / FOLDER, key, odd)


def _files(fetched: Fetched) -> list[Path]:
    """Every file that the reader may open."""
    form, path = FORMATS[fetched.format], fetched.path
    if path.is_file():
        names: tuple[str, ...] = (path.name, *form.optional_of(path.name))
        path = path.parent
    else:
        names = (*form.files, *form.one_of, *form.optional)
    return [path / name for name in names if (path / name).is_file()]


def _checked(path: Path) -> tuple[Path, str, str] | None:
    """(the cache that a file is in, its place there without the commit, its sha256), by the marker
    of the check after its download; None where there is none, or the file has changed since.
    """
    path = path.absolute()
    for root in path.parents:
        match path.relative_to(root).parts:
            case ("hub", repo, "snapshots", commit, *below) if below:
                marked, place = ("hub", repo, commit, *below), (str(root), "hub", repo, *below)
            case ("https", *below) if below:
                marked = ("https", *below)
                place = (str(root), *marked)
            case _:
                continue
        marker = root.joinpath("checked", *marked)
        known = read_json(marker.with_name(f"{marker.name}.json"))
        if not known:
            continue
        status = path.stat()
        stamp = (known.get("size"), known.get("mtime_ns"))
        if stamp == (status.st_size, status.st_mtime_ns) and known.get("sha256"):
            return root, "/".join(place), str(known["sha256"])
    return None


@lru_cache(maxsize=1)
def _readers() -> str:
    """The version of the readers: a hash of their code, which nobody can forget to count up."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in [*package.glob("config.py"), *sorted(package.glob("formats/*.py"))]:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _copied(path: Path) -> int:
    """Bytes that cannot be mapped, and so are in memory when a file has been read."""
    if not is_zip(path):
        return path.stat().st_size
    if not path.name.endswith(".npz"):
        return 0  # torch.load maps it
    copied = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                dtype, _, _, start = read_header(stream, str(path))
            aligned = (find_data(path, member) + start) % dtype.itemsize == 0
            if member.compress_type != zipfile.ZIP_STORED or not aligned:
                copied += member.file_size
    return copied


def _open(place: Place) -> Weights | None:
    """What is kept, mapped; None where there is nothing, or what is there was torn or altered, and
    then removed.
    """
    folder = place.folder
    known = read_json(folder / MARKER)
    try:
        if not known:
            raise FileNotFoundError
        if known.get("stamp") != _stamp(folder):
            raise ConfigError("its size, time or config has changed")
        weights = native.read(folder, None)
        if _shapes(weights) != weights.cfg.tensor_shapes():
            raise ConfigError("its tensors are not those of its config")
    except (SaezooError, OSError) as error:
        if folder.exists():
            logger.info("%s is made anew: %s", folder, error)
            _try(remove_folder, folder)
        return None
    # when it was last used: so of the files that it stands for too, which nobody opens any more
    _try(os.utime, folder / MARKER)
    for file in place.files:
        _try(is_zip, file)
    return weights


def _keep(weights: Weights, place: Place, limit: int, what: str) -> None:
    """Write what a reader made, unless it is not whole or there is no room. Raises OSError."""
    need = sum(byte_count(value) for value in weights.tensors.values())
    whole = _shapes(weights) == weights.cfg.tensor_shapes()
    if not whole or need > limit or any(v.dtype not in NAMES for v in weights.tensors.values()):
        return
    place.root.mkdir(parents=True, exist_ok=True)
    _make_room(place.root, limit - need)
    # as much again is left free: a full disk harms more than a slow load
    if shutil.disk_usage(place.root).free < 2 * need:
        return
    with write_folder(place.folder) as work:
        stream_safetensors(weights.tensors, work / native.WEIGHTS)
        native.write_config(weights.cfg, work)
        write_json(work / MARKER, {"what": what, "stamp": _stamp(work)})


def _make_room(root: Path, room: int) -> None:
    """Remove the least recently used until the rest takes at most `room` bytes."""
    folders = kept_folders(root)
    total = sum(size for _, size, _ in folders)
    for folder, size, used in folders:
        at_work = folder.name.startswith(".")
        if time.time() - used > ABANDONED if at_work else total > room:
            _try(remove_folder, folder)
            total -= size


def _stamp(folder: Path) -> dict[str, Any]:
    """What changes when anything is done to a kept folder: cheap to look at."""
    status = (folder / native.WEIGHTS).stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "config": sha256_of(folder / native.CONFIG),
    }


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.tensors.items()}


def _try(do: Callable[..., object], *words: object) -> None:
    """Do what may fail without harm in a cache that others own, or use at the same time."""
    try:
        do(*words)
    except OSError as error:
        logger.info("%s", error)
