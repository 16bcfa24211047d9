"""A release of SAEs as YAML: written anew, or as rows put into a file whose other lines stay, byte
for byte.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from saezoo.config import one_line
from saezoo.entry import Entry
from saezoo.errors import RegistryError
from saezoo.fill import as_flow, as_scalar, child_of, last_of, line_end, load_plain, not_editable
from saezoo.places import compose_yaml
from saezoo.registry import expand, parse_release

ORDER = ("id", "path", "sha256", "size", "d_in", "d_sae", "k", "l0", "variance_explained")
"""The first keys of a row; the others follow in their own order, the sites last."""
SHARED = ("format", "source", "revision", "licence", "use_restriction", "gated", "author", "paper")
SHARED_SITE = ("model", "revision", "quantisation", "centred")
"""Facts that are written once where all rows agree."""

Facts = Mapping[str, Any]
"""A row: the keys of an Entry but for `release`, as JSON values."""


def row_of(entry: Entry) -> dict[str, Any]:
    """What is known of an SAE, as a row in which everything stands."""
    facts = entry.model_dump(mode="json", exclude_none=True, exclude={"release"})
    for key in ("site", "out_site"):
        if site := facts.pop(key, None):
            # the side is `output` where nothing is said
            facts[key] = {k: v for k, v in site.items() if (k, v) != ("side", "output")}
    first = {key: facts[key] for key in ORDER if key in facts}
    return {key: value for key, value in (first | facts).items() if value != ""}


def write_release(release: str, about: str, rows: Sequence[Facts]) -> str:
    """The YAML of a release of these rows, sorted by id, what they share written once.

    Raises RegistryError for rows that are no rows, or an id that stands twice.
    """
    rows = sorted(rows, key=lambda row: id_key(row["id"]))
    shared = {key: rows[0][key] for key in SHARED if key in rows[0] and _agree(rows, key)}
    sites = [row.get("site") or {} for row in rows]
    site = {key: sites[0][key] for key in SHARED_SITE if key in sites[0] and _agree(sites, key)}
    if site:
        shared["site"] = site
    lines = [f"release: {as_scalar(release)}", f"about: {as_scalar(about)}", "shared:"]
    lines += [f"  {as_scalar(key)}: {as_flow(value)}" for key, value in shared.items()]
    lines.append("saes:")
    for row in rows:
        lines.append(f"- {_row_text(_without(row, shared), '  ')}")
    text = "\n".join(lines) + "\n"
    where = f"{release}.yaml"
    _refuse_other_facts(text, rows, where)
    return text


def put_rows(text: str, rows: Sequence[Facts], where: str) -> str:
    """The YAML of a release with these rows in it: one of an id that stands there is replaced, the
    others come before the first whose id is larger. Everything else stays as it is.

    Raises RegistryError where the file cannot be edited as text, or what it says of all its SAEs is
    not so of one of these.
    """
    old = load_plain(text, where)
    there = old.get("saes") or []
    if not all(isinstance(row, dict) for row in there):
        raise not_editable(where)
    keys = [id_key(str(row.get("id"))) for row in there]
    places = {row.get("id"): place for place, row in enumerate(there)}
    replaced: dict[int, dict[str, Any]] = {}
    new: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: id_key(row["id"])):
        lean, key = _without(row, old.get("shared") or {}), id_key(row["id"])
        if (place := places.get(row["id"])) is None:
            larger = (at for at, known in enumerate(keys) if known > key)
            new.setdefault(next(larger, len(there)), []).append(lean)
        elif there[place] != lean:
            replaced[place] = lean
    if not new and not replaced:
        return text
    text = _edited(text, replaced, new, where)
    wanted = []
    for place in range(len(there) + 1):
        wanted += new.get(place, [])
        wanted += [replaced.get(place, row) for row in there[place : place + 1]]
    if load_plain(text, where, edited=True) != old | {"saes": wanted}:
        raise not_editable(where)
    _refuse_other_facts(text, rows, where)
    return text


def id_key(id: str) -> list[tuple[int, int | str]]:  # noqa: A002
    """Sorts ids as people do: layer_9 before layer_10."""
    parts = re.split(r"(\d+)", id)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _agree(rows: Sequence[Facts], key: str) -> bool:
    return all(row.get(key) == rows[0].get(key) for row in rows)


def _without(row: Facts, shared: Facts) -> dict[str, Any]:
    """A row without what `shared` says already."""
    lean = {key: value for key, value in row.items() if key == "id" or shared.get(key) != value}
    for key in ("site", "out_site"):
        if isinstance(lean.get(key), dict) and isinstance(shared.get(key), dict):
            lean[key] = {k: v for k, v in lean[key].items() if shared[key].get(k) != v}
            if not lean[key]:
                del lean[key]
    return lean


def _row_text(row: Facts, indent: str, eol: str = "\n") -> str:
    """A row as the lines of a block, the first without its indent."""
    pairs = [f"{as_scalar(key)}: {as_flow(value)}" for key, value in row.items()]
    return f"{eol}{indent}".join(pairs)


def _edited(
    text: str,
    replaced: Mapping[int, Facts],
    new: Mapping[int, Sequence[Facts]],
    where: str,
) -> str:
    """With other rows in the places of some, and further ones before those of some places."""
    eol = _eol(text)
    listed = child_of(compose_yaml(text), "saes")
    if listed is None:
        ended = text if text.endswith("\n") else f"{text}{eol}"
        lines = [f"- {_row_text(row, '  ', eol)}{eol}" for row in new.get(0, ())]
        return f"{ended}saes:{eol}{''.join(lines)}"
    if not isinstance(listed.value, list) or listed.flow_style:
        raise not_editable(where)
    edits: list[tuple[int, int, str]] = []
    for place, row in replaced.items():
        node = listed.value[place]
        indent = " " * node.start_mark.column
        words = as_flow(row) if node.flow_style else _row_text(row, indent, eol)
        edits.append((node.start_mark.index, last_of(node).end_mark.index, words))
    dash = " " * listed.start_mark.column
    for place, rows in new.items():
        lines = [f"{dash}- {_row_text(row, f'{dash}  ', eol)}" for row in rows]
        if place == len(listed.value):
            at = line_end(text, last_of(listed).end_mark.index)
            edits.append((at, at, "".join(f"{eol}{line}" for line in lines)))
        else:
            at = _above_comments(text, listed.value[place].start_mark.index)
            edits.append((at, at, "".join(f"{line}{eol}" for line in lines)))
    for start, end, words in sorted(edits, reverse=True):
        text = text[:start] + words + text[end:]
    return text


def _above_comments(text: str, place: int) -> int:
    """The start of a place's line, or of the comments above it, which are that line's."""
    at = text.rfind("\n", 0, place) + 1
    while (above := text.rfind("\n", 0, max(at - 1, 0)) + 1) < at and _is_comment(text[above:at]):
        at = above
    return at


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _eol(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _refuse_other_facts(text: str, rows: Sequence[Facts], where: str) -> None:
    """Raise RegistryError unless the file says of each row just what the row says."""
    release = parse_release(text, where)
    # a live zoo's source is where it lies, and nobody says it
    unsaid = release.model_copy(update={"shared": {"source": "none"} | release.shared})
    entries = expand(unsaid, where)
    for row in rows:
        try:
            wanted = Entry.model_validate({"source": "none", **row})
        except ValidationError as error:
            raise RegistryError(f"{where}: {row['id']}: {one_line(error)}") from None
        for key, value in entries[row["id"]]:
            if key in ("release", "source", "revision") and key not in row:
                continue
            if value != getattr(wanted, key):
                raise RegistryError(
                    f"{where}: says {key}: {as_flow(_plain(value))} of all its SAEs, which is not "
                    f"so of {row['id']}: put it into the rows that it is true of"
                )


def _plain(value: Any) -> Any:
    return value.to_json() if hasattr(value, "to_json") else value
