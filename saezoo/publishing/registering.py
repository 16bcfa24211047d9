"""Put published SAEs into the registry of a checkout: a release's YAML, validated, sorted, nothing
twice.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saezoo.entry import Entry
from saezoo.errors import BadName, RegistryError
from saezoo.files import write_file
from saezoo.formats import FAMILIES, FORMATS
from saezoo.hf import is_commit
from saezoo.index import read_index
from saezoo.registry import Release, expand, parse_release
from saezoo.stanza import put_rows, row_of, write_release
from saezoo.verify import writable_registry
from saezoo.zoo import RELEASE_NAME, Terms, read_zoo

LARGEST = 2**20
"""Bytes of a stanza."""


@dataclass(frozen=True)
class Added:
    """What was written."""

    path: Path
    release: str
    ids: list[str]
    new_release: bool


def add_to_registry(source: str | os.PathLike[str], *, token: str | None = None) -> Added:
    """Register the SAEs of a stanza (a YAML file, such as `saezoo publish` prints), or of the
    saezoo.yaml of hf://org/repo[@revision], pinned at its commit.

    A release that is not there gets its file; in one that is there, of the same source, the new
    rows are put in their places and every other line stays. Raises RegistryError, and writes
    nothing, for what is registered already, lacks what an entry needs, or where the registry is not
    for writing; and what reading the saezoo.yaml raises.
    """
    folder = writable_registry()
    release = _read(source, token)
    where = f"registry/{release.release}.yaml"
    if not RELEASE_NAME.fullmatch(release.release) or release.release.startswith("."):
        raise RegistryError(f"{release.release[:100]!r} is no name of a release")
    if release.is_open:
        raise RegistryError(f"{where}: its ids are not enumerated: write such a file by hand")
    entries = expand(release, where)
    if not entries:
        raise RegistryError(f"{where}: there is no SAE in it")
    if problems := list(_problems(entries.values(), release.release)):
        raise RegistryError("; ".join(problems[:5]))
    rows = [row_of(entry) for entry in entries.values()]
    path = folder / f"{release.release}.yaml"
    new = not path.is_file()
    if new:
        text = write_release(release.release, release.about, rows)
    else:
        text = _with_rows(path, rows, where)
    with write_file(path) as part:
        part.write_bytes(text.encode("utf-8"))
    return Added(path, release.release, list(entries), new)


def _read(source: str | os.PathLike[str], token: str | None) -> Release:
    text = os.fspath(source)
    if text.startswith("hf://"):
        return read_zoo(text, Terms(token=token, refresh=True)).parse()
    if "://" in text:
        raise BadName(f"{text}: give hf://org/repo, or a YAML file")
    path = Path(text).expanduser()
    if not path.is_file():
        raise RegistryError(f"{path}: no such file; give hf://org/repo, or a YAML file")
    if path.stat().st_size > LARGEST:
        raise RegistryError(f"{path}: {path.stat().st_size:,} bytes; at most {LARGEST:,}")
    try:
        return parse_release(path.read_text(encoding="utf-8"), path.name)
    except UnicodeDecodeError:
        raise RegistryError(f"{path}: not UTF-8") from None


def _problems(entries: Iterable[Entry], release: str) -> Iterable[str]:
    """What an entry of ours lacks, and what is registered already."""
    index = read_index()
    owner = next((k for k, v in index["releases"].items() if release in v["aliases"]), None)
    if owner is not None:
        yield f"{release} is another name of the release {owner}: give yours another"
    names = {row["name"] for row in index["rows"]}
    places = {(row["source"], row.get("path", "")): row["name"] for row in index["rows"]}
    for entry in entries:
        if entry.name in names:
            yield f"{entry.name} is registered already"
        elif known := places.get((entry.source, entry.path)):
            yield f"{entry.name}: is registered already, as {known}"
        lacking = [
            key
            for key, value in (
                ("format", entry.format),
                ("licence", entry.licence),
                ("site.model", entry.model),
                ("d_in", entry.d_in),
                ("d_sae", entry.d_sae),
            )
            if value is None
        ]
        if lacking:
            yield f"{entry.name}: does not say {', '.join(lacking)}"
        if entry.format and entry.format not in FORMATS and entry.format not in FAMILIES:
            yield f"{entry.name}: there is no format {entry.format!r}"
        yield from _source_problems(entry)


def _source_problems(entry: Entry) -> Iterable[str]:
    if entry.source.startswith("hf://"):
        if not re.fullmatch(r"hf://[\w.-]+/[\w.-]+", entry.source):
            yield f"{entry.name}: {entry.source!r} is no hf://org/repo"
        if not is_commit(entry.revision):
            yield f"{entry.name}: no commit: its revision is {entry.revision!r}"
    elif not entry.source.startswith("https://"):
        yield f"{entry.name}: others cannot reach {entry.source!r}: publish it to the Hub first"
    elif entry.sha256 is None:
        yield f"{entry.name}: an https source needs a sha256"


def _with_rows(path: Path, rows: list[dict[str, Any]], where: str) -> str:
    text = path.read_bytes().decode("utf-8")
    known = {entry.source for entry in expand(parse_release(text, where), where).values()}
    if foreign := {row["source"] for row in rows} - known:
        raise RegistryError(
            f"{where} is there already, for {', '.join(sorted(known))}: "
            f"{', '.join(sorted(foreign))} needs a release of another name"
        )
    return put_rows(text, rows, where)
