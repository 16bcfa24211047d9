"""All registered SAEs in one file, so that listing thirteen thousand of them takes a moment.

`registry/index.json.gz` is made of the YAML by `make docs` and ships with it. Where a YAML file has
changed since, an index is made anew in the cache.
"""

import gzip
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saezoo.errors import RegistryError
from saezoo.files import cache_root, registry_folder, write_file

logger = logging.getLogger(__name__)

FILE = "index.json.gz"
VERSION = 2

Row = dict[str, Any]
"""The known facts of an Entry as JSON values, and its `name`."""


def read_index() -> dict[str, Any]:
    """The index of the registry as it is now: `releases` {name: {about, format, model, open,
    count, aliases}} and `rows`, one for every enumerated SAE, in the order of releases and ids.
    """
    folder = registry_folder()
    shipped = folder / FILE
    if not _looks_stale(folder, shipped):
        found = _read(shipped)
        if found is not None:
            return found
    made_from = digests(folder)
    for path in (shipped, _in_cache(made_from)):
        found = _read(path)
        if found is not None and found["made_from"] == made_from:
            return found
    logger.warning("the registry has changed: making its index anew")
    index = make_index()
    with write_file(_in_cache(made_from)) as part:
        part.write_bytes(to_bytes(index))
    return index


def make_index() -> dict[str, Any]:
    """The index, made of the YAML. Raises RegistryError where that is wrong."""
    # here, so that reading a made index needs neither YAML nor pydantic
    from saezoo.registry import expand, read_release

    releases: dict[str, Any] = {}
    rows: list[Row] = []
    made_from = digests(registry_folder())
    for name in made_from:
        release = read_release(name)
        entries = expand(release)
        releases[name] = {
            "about": release.about,
            "format": release.shared.get("format"),
            "model": (release.shared.get("site") or {}).get("model"),
            "licence": release.shared.get("licence"),
            "source": release.shared.get("source"),
            "paper": release.shared.get("paper"),
            "open": release.is_open,
            "count": len(entries),
            "aliases": release.aliases,
        }
        rows += [{"name": entry.name} | entry.to_json() for entry in entries.values()]
    _refuse_shared_names(releases)
    return {"version": VERSION, "made_from": made_from, "releases": releases, "rows": rows}


def release_called(alias: str) -> str | None:
    """The release that has this as another name of its own."""
    try:
        known = read_index()["releases"]
    except (RegistryError, OSError):
        return None  # some file is broken, or there is no room for an index: names are still names
    return next((name for name, facts in known.items() if alias in facts["aliases"]), None)


def _refuse_shared_names(releases: dict[str, Any]) -> None:
    """Raise RegistryError for an alias that is a release, or another one's alias, too."""
    owners: dict[str, str] = {}
    for name, facts in releases.items():
        for alias in facts["aliases"]:
            where = f"registry/{name}.yaml: the alias {alias!r} is"
            if alias in releases:
                raise RegistryError(f"{where} a release too")
            if alias in owners:
                raise RegistryError(f"{where} one of {owners[alias]} too")
            owners[alias] = name


def to_bytes(index: dict[str, Any]) -> bytes:
    """The file, the same for the same index."""
    text = json.dumps(index, separators=(",", ":"), ensure_ascii=False)
    return gzip.compress(text.encode(), mtime=0)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each release's YAML, by release."""
    return {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.yaml"))
    }


def _looks_stale(folder: Path, shipped: Path) -> bool:
    """Whether any file is newer than the index. A checkout's times prove nothing either way, so
    only then are contents compared.
    """
    try:
        made = shipped.stat().st_mtime_ns
    except OSError:
        return True
    return any(path.stat().st_mtime_ns > made for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    yield folder  # changes when a file is added or removed
    yield from folder.glob("*.yaml")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        return None
    return found


def _in_cache(made_from: dict[str, str]) -> Path:
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    return cache_root() / "index" / f"{key[:32]}.json.gz"
