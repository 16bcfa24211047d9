"""Find SAEs by what they are: model, layer, site, width, L0, words."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saezoo.errors import BadName, FetchError, RegistryError, UnknownSAE
from saezoo.index import Row, read_index, release_called
from saezoo.names import ZOO

if TYPE_CHECKING:
    from saezoo.entry import Entry
    from saezoo.registry import Release

    ListFiles = Callable[[Entry], list[str]]

MODELS = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2sm": "openai-community/gpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "meta-llama/llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-8b-it": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3-8b-it": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "meta-llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "meta-llama/meta-llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-it": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1-8b-it": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "llama3.3-70b-it": "meta-llama/Llama-3.3-70B-Instruct",
    "gemma-3-270m-pt": "google/gemma-3-270m",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "gemma-3-4b": "google/gemma-3-4b-pt",
    "gemma-3-12b": "google/gemma-3-12b-pt",
    "gemma-3-27b": "google/gemma-3-27b-pt",
    "r1-distill-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "r1-distill-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "esm2-8m": "facebook/esm2_t6_8M_UR50D",
    "esm2-650m": "facebook/esm2_t33_650M_UR50D",
    "evo2-7b": "arcinstitute/evo2_7b",
}
"""Usual names of host models that are not the last part of their HuggingFace id -> that id."""

Numbers = int | Collection[int] | None
Span = str | float | tuple[float, float] | None


@dataclass
class Listing:
    """What a search found, and what could not be searched."""

    rows: list[Row] = field(default_factory=list)
    """Known facts of each SAE as JSON values, and its `name`: an Entry, without the cost of one."""
    not_listed: dict[str, str] = field(default_factory=dict)
    """Open release -> why its folders could not be listed; its names load all the same."""

    @property
    def entries(self) -> "list[Entry]":
        """The rows as Entry objects."""
        from saezoo.entry import Entry

        return [
            Entry.model_validate({key: value for key, value in row.items() if key != "name"})
            for row in self.rows
        ]


def list_saes(
    model: str | None = None,
    layer: Numbers = None,
    site: str | None = None,
    width: int | str | None = None,
    l0: Span = None,
    search: str | None = None,
    release: str | None = None,
    *,
    list_files: "ListFiles | None" = None,
) -> "list[Entry]":
    """Registered SAEs that fit every filter given, in the order of their releases.

    model: a HuggingFace id, its last part, or a usual name (MODELS). layer: one, or several. site:
    a point such as `resid_post`. width: a number, or `16k`. l0: `50..150`, (50, 150), or one
    number. search: words, all of which must appear in name, model, format or author.
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
    list_files: "ListFiles | None" = None,
) -> Listing:
    """Like `list_saes`, and says which open releases could not be listed, and why."""
    widths = None if width is None else parse_width(width)
    layers = None if layer is None else {layer} if isinstance(layer, int) else set(layer)
    span = None if l0 is None else parse_span(l0)
    models = None if model is None else MODELS.get(model.lower(), model).lower()
    words = None if search is None else search.lower().split()
    listing = Listing()
    for about, row in _rows(release, models, listing, list_files):
        place = row.get("site") or {}
        if (
            (models is None or _same_model(place.get("model"), models))
            and (layers is None or place.get("layer") in layers)
            and (site is None or place.get("point") == site)
            and (widths is None or _within(row.get("d_sae"), widths))
            and (span is None or _within(row.get("l0"), span))
            and (words is None or _has_words(row, about, words))
        ):
            listing.rows.append(row)
    return listing


def what_narrows(rows: list[Row]) -> str:
    """In words, in what these rows differ, the fewest kinds first: what to ask for next."""
    kinds: dict[str, set[Any]] = {
        "release": {row.get("release") for row in rows},
        "width": {row.get("d_sae") for row in rows},
        "l0": {row.get("l0") for row in rows},
    }
    for key, name in (("model", "model"), ("site", "point"), ("layer", "layer")):
        kinds[key] = {(row.get("site") or {}).get(name) for row in rows}
    several = sorted(
        ((len(values), key, values) for key, values in kinds.items() if len(values) > 1),
        key=lambda item: item[0],
    )
    return "; ".join(f"{key}: {_sample(values)}" for _, key, values in several[:3])


def what_widens(filters: dict[str, Any]) -> str:
    """In words, how many SAEs fit without each of these filters of `find_all`, the most first."""
    given = {key: value for key, value in filters.items() if value is not None}
    counts = {
        key: len(find_all(**{name: value for name, value in given.items() if name != key}).rows)
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


def parse_layers(layers: str) -> list[int]:
    """The layers of `12`, `5,12` or `5..12`. Raises BadName otherwise."""
    found: list[int] = []
    for part in layers.split(","):
        numbers = re.fullmatch(r"(\d{1,4})(?:\.\.(\d{1,4}))?", part.strip())
        if not numbers:
            raise BadName(f"layers {layers!r}: write 12, or 5,12 or 5..12")
        found += range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)
    return found


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


def _rows(
    only: str | None, model: str | None, listing: Listing, list_files: "ListFiles | None"
) -> Iterator[tuple[str, Row]]:
    """(what the release is about, row) of everything to search: our own registry, then pinned zoos
    as `zoo/release`. What cannot be searched is said in `listing`.
    """
    if only is None or not only.startswith(f"{ZOO}/"):
        index = read_index()
        known = index["releases"]
        if only is not None and only not in known:
            from saezoo.registry import read_release

            only = release_called(only) or only
            read_release(only)  # raises, with the closest names
        for row in index["rows"]:
            if only in (None, row["release"]):
                yield known[row["release"]]["about"], row
        for name, facts in known.items():
            if not facts["open"] or only not in (None, name):
                continue
            if model is not None and not _same_model(facts["model"], model):
                continue
            if only is None and model is None:
                # dozens of repos would be asked for one list of everything
                listing.not_listed[name] = "a repo is asked where its release or a model is named"
                continue
            from saezoo.registry import read_release

            yield from _open_rows(read_release(name), listing, list_files)
    if only is None or only.startswith(f"{ZOO}/"):
        yield from _zoo_rows(only, listing, list_files)


def _zoo_rows(
    only: str | None, listing: Listing, list_files: "ListFiles | None"
) -> Iterator[tuple[str, Row]]:
    """Rows of pinned zoos. A zoo that is broken is said to be, and keeps nothing else from being
    found.
    """
    from saezoo.files import cache_root

    if not (cache_root() / "zoos").is_dir() and only is None:
        return
    from saezoo.registry import expand
    from saezoo.zoo import list_zoos

    pins = [pin for pin in list_zoos() if only in (None, f"{ZOO}/{pin.release}")]
    if only and not pins:
        raise UnknownSAE(f"no {only!r} is pinned on this machine. See all: saezoo zoo list")
    for pin in pins:
        called = f"{ZOO}/{pin.release}"
        try:
            release = pin.parse().model_copy(update={"release": called})
        except RegistryError as error:
            listing.not_listed[called] = str(error)
            continue
        for entry in expand(release, pin.where).values():
            yield release.about, {"name": entry.name} | entry.to_json()
        if release.is_open:
            yield from _open_rows(release, listing, list_files)


def _open_rows(
    release: "Release", listing: Listing, list_files: "ListFiles | None"
) -> Iterator[tuple[str, Row]]:
    """Rows of an open release, by the folders and files of its repo."""
    from saezoo.entry import Entry
    from saezoo.registry import match_open

    if list_files is None:
        listing.not_listed[release.release] = "its repo was not asked"
        return
    source, revision = release.shared["source"], release.shared.get("revision")
    try:
        files = list_files(Entry(source=source, revision=revision))
    except FetchError as error:
        listing.not_listed[release.release] = str(error)
        return
    folders = sorted({file.rpartition("/")[0] for file in files} - {""}, key=_natural)
    for folder in folders:
        entry = match_open(release, folder)
        if entry is not None and entry.path == folder:
            yield release.about, {"name": entry.name} | entry.to_json()
    for file in sorted(files, key=_natural):
        entry = match_open(release, file.rpartition(".")[0])
        if entry is not None and entry.path == file:
            yield release.about, {"name": entry.name} | entry.to_json()


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts layers.10 after layers.9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", text)]


def _same_model(own: str | None, model: str) -> bool:
    lower = (own or "").lower()
    return model in (lower, lower.rpartition("/")[2])


def _has_words(row: Row, about: str, words: list[str]) -> bool:
    model = (row.get("site") or {}).get("model")
    told = (row["name"], model, row.get("format"), row.get("author"), about)
    text = " ".join(str(part) for part in told).lower()
    return all(word in text for word in words)
