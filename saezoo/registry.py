"""The registry: one YAML per release, read one at a time; from a name to an Entry.

registry/README.md shows the schema by example.
"""

import difflib
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from typing_extensions import TypeAliasType  # a dependency of pydantic; pydantic wants this one

from saezoo.config import Spec, one_line
from saezoo.entry import Entry
from saezoo.errors import AmbiguousName, BadName, RegistryError, UnknownSAE
from saezoo.files import registry_folder
from saezoo.names import Name
from saezoo.places import compose_yaml, line_of, lines_of_ids, located

RANGE = re.compile(r"(\d+)\.\.(\d+)")
PLACEHOLDER = re.compile(r"\{(\w+)\}")

LIMIT = 20_000
"""The most ids that the families of one release may stand for."""


Value = str | int | float

Each = TypeAliasType("Each", "dict[str, Value | list[Value] | dict[str | int, Each]]")
"""Placeholder -> values; "0..11" is a range, both ends included. In a mapping each value (or range)
has an `each` of its own: what hangs on it.
"""


class Family(Spec):
    """Ids by pattern: every combination of the values in `each`, put into every {placeholder}."""

    id: str
    each: Each
    facts: dict[str, Any] = Field(default_factory=dict)
    """Any key of Entry; strings may hold placeholders, and those of nothing but a placeholder
    and digits become numbers."""


class OpenIds(Spec):
    """A release whose ids are the folders of its repo: which folders are SAEs, and their sites."""

    id: str
    """Pattern, such as `layers.{layer}.mlp`; {layer} is a number, any other placeholder a word."""
    facts: dict[str, Any] = Field(default_factory=dict)


class FileFacts(Spec):
    """What is known of the files of one id, where a family's pattern cannot say it."""

    revision: str | None = None
    size: int | None = Field(default=None, ge=0)
    """Bytes of all needed files."""
    sha256: str | dict[str, str] | None = None
    """Of the one file, or by file name."""


class Release(Spec):
    """One YAML file."""

    release: str
    about: str
    aliases: list[str] = Field(default_factory=list)
    """Other names of the release: of its repo, or from before it moved."""
    shared: dict[str, Any] = Field(default_factory=dict)
    """Facts of every SAE of the release (any key of Entry); a row's own win."""
    saes: list[dict[str, Any]] = Field(default_factory=list)
    families: list[Family] = Field(default_factory=list)
    open: list[OpenIds] = Field(default_factory=list)
    files: dict[str, FileFacts] = Field(default_factory=dict)
    """By id, further facts: they win over `shared`, and a row's own over them."""

    @property
    def is_open(self) -> bool:
        """Whether its ids are not enumerated here."""
        return bool(self.open)


def find_registered(name: Name) -> Entry:
    """The entry of `release/id`, of the registry that ships with saezoo.

    Raises UnknownSAE (listing the closest), AmbiguousName, BadName or RegistryError.
    """
    if name.release not in release_names():
        raise _no_release(name.release, name.id)
    entry = find_in(read_release(name.release), name.id, name.release)
    return _with_revision(entry, name.revision)


def find_in(
    release: Release,
    id: str | None,  # noqa: A002
    called: str,
    where: str | None = None,
) -> Entry:
    """One SAE of a release. called: how names of this release start. where: how errors call its
    file. Raises UnknownSAE, listing the closest, or RegistryError.
    """
    if id is None:
        raise UnknownSAE(
            f"{called} is a release of {count_of(release)}: give one, such as "
            f"{_join(called, _example(release))}. See all: saezoo list {called}"
        )
    with _with_line(release, where):
        found = _one(release, id, where) or match_open(release, id, where)
    if found is None:
        raise UnknownSAE(_closest_ids(release, id, called))
    return found


def release_names() -> list[str]:
    """The names of all releases, sorted."""
    return sorted(path.stem for path in registry_folder().glob("*.yaml"))


def read_release(release: str) -> Release:
    """One release's YAML. Raises UnknownSAE if there is none, RegistryError if it is wrong."""
    path = registry_folder() / f"{release}.yaml"
    if release not in release_names():
        raise _no_release(release, None)
    return _parse(path, path.stat().st_mtime_ns)


def expand(release: Release, where: str | None = None) -> dict[str, Entry]:
    """Every enumerated id of a release and its Entry, in the order of the file.

    where: how errors call the file. Raises RegistryError for an id that appears twice, an unknown
    key, too many ids, or files of an id that there is not.
    """
    with _with_line(release, where):
        return _expand(release, where or f"registry/{release.release}.yaml")


def _expand(release: Release, where: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for row in itertools.chain(
        release.saes, *(_rows(family, where) for family in release.families)
    ):
        if not isinstance(row.get("id"), str):
            raise RegistryError(f"{where}: a row without an id: {str(row)[:80]}")
        if row["id"] in entries:
            raise RegistryError(f"{where}: the id {row['id']!r} appears twice")
        entries[row["id"]] = _entry(release, row, where)
        if len(entries) > LIMIT:
            raise RegistryError(f"{where}: more than {LIMIT:,} ids")
    for id in release.files.keys() - entries.keys():  # noqa: A001
        if match_open(release, id, where) is None:
            raise RegistryError(f"{where}: `files` names {id!r}, which is no id of this release")
    return entries


def match_open(release: Release, id: str, where: str | None = None) -> Entry | None:  # noqa: A002
    """The Entry of an id of an open release, or None if no pattern allows it."""
    for pattern in release.open:
        parts = [
            re.escape(part) if place % 2 == 0 else _group(part)
            for place, part in enumerate(PLACEHOLDER.split(pattern.id))
        ]
        if found := re.fullmatch("".join(parts), id):
            row = _fill({"id": id, "path": id} | pattern.facts, found.groupdict())
            return _entry(release, row, where or f"registry/{release.release}.yaml")
    return None


@contextmanager
def _with_line(release: Release, where: str | None) -> Iterator[None]:
    """Adds the line to what is wrong with an id of our own registry; whoever gives `where` has the
    text, and does so too.
    """
    try:
        yield
    except RegistryError as error:
        path = registry_folder() / f"{release.release}.yaml"
        if where is not None or not path.is_file():
            raise
        lines = lines_of_ids(compose_yaml(path.read_text(encoding="utf-8")))
        raise RegistryError(located(str(error), f"registry/{path.name}", lines)) from None


def _one(release: Release, id: str, where: str | None) -> Entry | None:  # noqa: A002
    """One enumerated id, without making an Entry of all the others."""
    where = where or f"registry/{release.release}.yaml"
    for row in itertools.chain(
        release.saes, *(_rows(family, where, only=id) for family in release.families)
    ):
        if row.get("id") == id:
            return _entry(release, row, where)
    return None


def _no_release(release: str, id: str | None) -> UnknownSAE:  # noqa: A002
    close = difflib.get_close_matches(release, release_names(), n=4, cutoff=0.5)
    hint = f" Closest releases: {', '.join(close)}." if close else ""
    if id is None:
        return UnknownSAE(f"no release {release!r}.{hint} See all: saezoo list")
    both = f"{release}/{id}"
    return AmbiguousName(
        f"no release {release!r}, so {both!r} is no name here.{hint} If it is a HuggingFace repo "
        f"write hf://{both}, if it is a local folder write ./{both}"
    )


def _closest_ids(release: Release, id: str, called: str) -> str:  # noqa: A002
    ids = list(expand(release))
    if release.is_open:
        patterns = ", ".join(pattern.id for pattern in release.open)
        return (
            f"no SAE {id!r} in release {called!r}: its ids are the folders of "
            f"{release.shared.get('source')}, and read {patterns}"
        )
    # digits tell siblings apart: without them one layer is as close as any other
    close = difflib.get_close_matches(id, ids, n=4, cutoff=0.4) or ids[:4]
    return (
        f"no SAE {id!r} in release {called!r}. Closest: {', '.join(close)}. "
        f"See all: saezoo list {called}"
    )


def _join(called: str, id: str) -> str:  # noqa: A002
    return f"{called}{id}" if called.endswith("#") else f"{called}/{id}"


def count_of(release: Release) -> str:
    """How many SAEs a release has, in words."""
    return "any number of SAEs" if release.is_open else f"{len(expand(release)):,} SAEs"


def _example(release: Release) -> str:
    return (
        release.open[0].id.replace("{layer}", "0")
        if release.is_open
        else next(iter(expand(release)))
    )


@lru_cache(maxsize=512)
def _parse(path: Path, _changed: int) -> Release:
    where = f"registry/{path.name}"
    release = parse_release(path.read_text(encoding="utf-8"), where)
    if release.release != path.stem:
        raise RegistryError(
            f"{where}: release is {release.release!r}, but the file says {path.stem!r}"
        )
    return release


def parse_release(text: str, where: str) -> Release:
    """One release from its YAML. Raises RegistryError in one line with file, line and key."""
    import yaml  # here, since a folder or a Hub path needs none of it

    Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return Release.model_validate(yaml.load(text, Loader))  # noqa: S506 a safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RegistryError(
            f"{where}{line}: not YAML ({getattr(error, 'problem', error)})"
        ) from None
    except ValidationError as error:
        number = line_of(compose_yaml(text), error.errors()[0]["loc"])
        raise RegistryError(f"{where}, line {number}: {one_line(error)}") from None


def _rows(family: Family, where: str, only: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a family; with `only`, just those of that id."""
    names = set(PLACEHOLDER.findall(family.id))
    for known in _combinations(family.each, f"{where}: {family.id}"):
        if not names <= known.keys():
            raise RegistryError(
                f"{where}: the id {family.id!r} and `each` name different placeholders: "
                f"{', '.join(sorted(names ^ known.keys()))}"
            )
        row = _fill({"id": family.id}, known)
        if only in (None, row["id"]):
            yield row | _fill(family.facts, known)


def _combinations(each: Each, where: str) -> Iterator[dict[str, str]]:
    """Every combination of the values, with what hangs on them."""
    choices = [_bounded(_choices(name, choice, where), where) for name, choice in each.items()]
    for chosen in itertools.product(*choices):
        yield {name: value for part in chosen for name, value in part.items()}


def _choices(name: str, choice: Any, where: str) -> Iterator[dict[str, str]]:
    """The values of one placeholder, each with every combination of what hangs on it."""
    for key, more in choice.items() if isinstance(choice, dict) else [(choice, {})]:
        hanging = _bounded(_combinations(more, where), where)
        for value, rest in itertools.product(_values(key, where), hanging):
            yield {name: value} | rest


def _bounded(rows: Iterator[dict[str, str]], where: str) -> list[dict[str, str]]:
    """All of them, unless they are too many for any release."""
    found = list(itertools.islice(rows, LIMIT + 1))
    if len(found) > LIMIT:
        raise RegistryError(f"{where}: `each` has more than {LIMIT:,} combinations")
    return found


def _values(choice: Value | list[Value], where: str) -> list[str]:
    if isinstance(choice, list):
        return [str(value) for value in choice]
    if found := RANGE.fullmatch(str(choice)):
        first, last = int(found[1]), int(found[2])
        if last - first >= LIMIT:
            raise RegistryError(f"{where}: the range {choice} has more than {LIMIT:,} values")
        return [str(value) for value in range(first, last + 1)]
    return [str(choice)]


def _fill(value: Any, known: dict[str, str]) -> Any:
    """Put values into placeholders, in strings however deep."""
    if isinstance(value, dict):
        return {key: _fill(item, known) for key, item in value.items()}
    if not isinstance(value, str) or "{" not in value:
        return value
    text = PLACEHOLDER.sub(lambda found: known.get(found[1], found[0]), value)
    return int(text) if PLACEHOLDER.fullmatch(value) and text.isdigit() else text


def _group(name: str) -> str:
    return rf"(?P<{name}>\d+)" if name == "layer" else rf"(?P<{name}>[\w-]+)"


def _entry(release: Release, row: dict[str, Any], where: str) -> Entry:
    known = release.files.get(row["id"])
    facts = release.shared | (known.to_json() if known else {}) | row | {"release": release.release}
    for key in ("site", "out_site"):
        ours, own = release.shared.get(key), row.get(key)
        if isinstance(ours, dict) and isinstance(own, dict):
            facts[key] = ours | own
    try:
        return Entry.model_validate(facts)
    except ValidationError as error:
        raise RegistryError(f"{where}: {row.get('id')}: {one_line(error)}") from None


def _with_revision(entry: Entry, revision: str | None) -> Entry:
    if revision is None:
        return entry
    if not entry.source.startswith("hf://"):
        raise BadName(f"{entry.name} is not on the Hub, so it has no revision {revision!r}")
    # what is stated of one revision's files says nothing of another's
    return entry.model_copy(update={"revision": revision, "sha256": None, "size": None})
