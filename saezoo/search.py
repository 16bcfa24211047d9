"""Find SAEs by what they are: model, layer, site, width, L0, words."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from saezoo.entry import Entry
from saezoo.errors import BadName, FetchError, RegistryError, UnknownSAE
from saezoo.names import ZOO
from saezoo.registry import Release, expand, match_open, read_release, release_names
from saezoo.zoo import list_zoos

Numbers = int | Collection[int] | None
Span = str | float | tuple[float, float] | None


@dataclass
class Listing:
    """What a search found, and what could not be searched."""

    entries: list[Entry] = field(default_factory=list)
    not_listed: dict[str, str] = field(default_factory=dict)
    """Open release -> why its folders could not be listed; its names load all the same."""


def list_saes(
    model: str | None = None,
    layer: Numbers = None,
    site: str | None = None,
    width: int | str | None = None,
    l0: Span = None,
    search: str | None = None,
    release: str | None = None,
    *,
    list_files: Callable[[Entry], list[str]] | None = None,
) -> list[Entry]:
    """Registered SAEs that fit every filter given, in the order of their releases.

    model: a HuggingFace id, or its last part. layer: one, or several. site: a point such as
    `resid_post`. width: a number, or `16k`. l0: `50..150`, (50, 150), or one number. search: words,
    all of which must appear in name, model, format or author.
    list_files: how to ask for the files of an open release's repo (`saezoo.hub.list_files`);
    without it, or when it fails, such a release is left out.
    """
    return find_all(model, layer, site, width, l0, search, release, list_files=list_files).entries


def find_all(
    model: str | None = None,
    layer: Numbers = None,
    site: str | None = None,
    width: int | str | None = None,
    l0: Span = None,
    search: str | None = None,
    release: str | None = None,
    *,
    list_files: Callable[[Entry], list[str]] | None = None,
) -> Listing:
    """Like `list_saes`, and says which open releases could not be listed, and why."""
    widths = None if width is None else parse_width(width)
    layers = None if layer is None else {layer} if isinstance(layer, int) else set(layer)
    span = None if l0 is None else parse_span(l0)
    listing = Listing()
    for known, where in _releases(release, listing):
        if model is not None and not _same_model(known, model):
            continue
        for entry in _entries(known, where, listing, list_files):
            if (
                (layers is None or entry.layer in layers)
                and (site is None or (entry.site is not None and entry.site.point == site))
                and (widths is None or _within(entry.width, widths))
                and (span is None or _within(entry.l0, span))
                and (search is None or _has_words(entry, known, search))
            ):
                listing.entries.append(entry)
    return listing


def what_narrows(entries: list[Entry]) -> str:
    """In words, in what these entries differ, the fewest kinds first: what to ask for next."""
    kinds: dict[str, set[object]] = {
        "release": {entry.release for entry in entries},
        "model": {entry.model for entry in entries},
        "site": {entry.site.point if entry.site else None for entry in entries},
        "layer": {entry.layer for entry in entries},
        "width": {entry.width for entry in entries},
        "l0": {entry.l0 for entry in entries},
    }
    several = sorted(
        ((len(values), key, values) for key, values in kinds.items() if len(values) > 1),
        key=lambda item: item[0],
    )
    return "; ".join(f"{key}: {_sample(values)}" for _, key, values in several[:3])


def what_widens(filters: dict[str, Any]) -> str:
    """In words, how many SAEs fit without each of these filters of `find_all`, the most first."""
    given = {key: value for key, value in filters.items() if value is not None}
    counts = {
        key: len(find_all(**{name: value for name, value in given.items() if name != key}).entries)
        for key in given
    }
    helpful = sorted((item for item in counts.items() if item[1]), key=lambda item: -item[1])
    if not helpful:
        return "more than one of the filters must go"
    return ", ".join(f"{count:,} without {key}" for key, count in helpful)


def _sample(values: set[object], most: int = 4) -> str:
    known = [value for value in values if value is not None]
    numbers = [value for value in known if isinstance(value, int | float)]
    shown = [f"{value:g}" for value in sorted(numbers)] if numbers else sorted(map(str, known))
    more = f" … ({len(shown)} of them)" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def parse_width(width: int | str) -> tuple[int, int]:
    """(lowest, highest) number of features: a number is itself, `16k` is every width of 16 thousand
    and some, such as 16,384, and `1m` every one of a million and some. Raises BadName otherwise.
    """
    found = re.fullmatch(r"(\d+)([km]?)", str(width).strip().lower())
    if not found:
        raise BadName(f"width {width!r}: write a number, 16k or 1m")
    unit = {"": 1, "k": 1000, "m": 1_000_000}[found[2]]
    return int(found[1]) * unit, (int(found[1]) + 1) * unit - 1


def parse_span(l0: str | float | tuple[float, float]) -> tuple[float, float]:
    """(lowest, highest) of `50..150`, `50..`, `..150`, a pair, or one number. Raises BadName."""
    if isinstance(l0, tuple):
        return l0
    if isinstance(l0, int | float):
        return (l0, l0)
    low, dots, high = l0.partition("..")
    try:
        if not dots:
            return (float(low), float(low))
        return (float(low or "-inf"), float(high or "inf"))
    except ValueError:
        raise BadName(f"l0 {l0!r}: write 50..150, or one number") from None


def _within(value: float | None, span: tuple[float, float]) -> bool:
    return value is not None and span[0] <= value <= span[1]


def _releases(only: str | None, listing: Listing) -> Iterator[tuple[Release, str | None]]:
    """Releases to search, and how errors call their files: our own, then pinned zoos as
    `zoo/release`. A zoo that is broken is said to be, and keeps nothing else from being found.
    """
    if only is None or not only.startswith(f"{ZOO}/"):
        for name in [only] if only else release_names():
            yield read_release(name), None
    if only is not None and not only.startswith(f"{ZOO}/"):
        return
    pins = [pin for pin in list_zoos() if only in (None, f"{ZOO}/{pin.release}")]
    if only and not pins:
        raise UnknownSAE(f"no {only!r} is pinned on this machine. See all: saezoo zoo list")
    for pin in pins:
        try:
            known = pin.parse()
        except RegistryError as error:
            listing.not_listed[f"{ZOO}/{pin.release}"] = str(error)
            continue
        yield known.model_copy(update={"release": f"{ZOO}/{pin.release}"}), pin.where


def _entries(
    release: Release,
    where: str | None,
    listing: Listing,
    list_files: Callable[[Entry], list[str]] | None,
) -> list[Entry]:
    entries = list(expand(release, where).values())
    if not release.is_open:
        return entries
    if list_files is None:
        listing.not_listed[release.release] = "its repo was not asked"
        return entries
    try:
        source, revision = release.shared["source"], release.shared.get("revision")
        files = list_files(Entry(source=source, revision=revision))
    except FetchError as error:
        listing.not_listed[release.release] = str(error)
        return entries
    folders = sorted({file.rpartition("/")[0] for file in files} - {""}, key=_natural)
    found = (match_open(release, folder) for folder in folders)
    return entries + [entry for entry in found if entry is not None]


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts layers.10 after layers.9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", text)]


def _same_model(release: Release, model: str) -> bool:
    own = str((release.shared.get("site") or {}).get("model", "")).lower()
    return model.lower() in (own, own.rpartition("/")[2])


def _has_words(entry: Entry, release: Release, words: str) -> bool:
    text = f"{entry.name} {entry.model} {entry.format} {entry.author} {release.about}".lower()
    return all(word in text for word in words.lower().split())
