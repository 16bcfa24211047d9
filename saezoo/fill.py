"""Write facts into a release's YAML as text: what a person wrote there stays, byte for byte."""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saezoo.errors import RegistryError
from saezoo.files import write_file
from saezoo.registry import compose_yaml, expand, parse_release

PLAIN = re.compile(r"[A-Za-z0-9_./@+:-]+")
"""Strings that YAML can take without quotes, unless they read as a number, a date or a bool."""
HEADER = "files:  # by id; written by `saezoo registry verify --fill`"

FileRows = Mapping[str, Mapping[str, Any]]
"""id -> facts of its files, see registry.FileFacts."""
Edit = tuple[int, str]
"""Where, in characters, and what is put in there."""


def fill_file(path: Path, revision: str | None, files: FileRows) -> bool:
    """Add facts to a release's file, whole or not at all. Returns whether it changed.

    revision: for `shared:`. files: for `files:`. A fact that stands there already is left as it is.
    Raises RegistryError where the file cannot be edited as text; then nothing is written.
    """
    where = f"registry/{path.name}"
    try:
        before = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise RegistryError(f"{where}: not UTF-8") from None
    after = add_facts(before, revision, files, where)
    if after == before:
        return False
    expand(parse_release(after, where), where)
    with write_file(path) as part:
        part.write_bytes(after.encode("utf-8"))
    return True


def add_facts(text: str, revision: str | None, files: FileRows, where: str) -> str:
    """The YAML with further facts, see `fill_file`. Raises RegistryError."""
    old = load_plain(text, where)
    wanted = _merged(old, revision, files)
    if wanted == old:
        return text
    root, eol = compose_yaml(text), "\r\n" if "\r\n" in text else "\n"
    edits: list[Edit] = []
    if wanted.get("shared") != old.get("shared"):
        if (shared := child_of(root, "shared")) is None:
            raise not_editable(where)
        edits.append(_revision_edit(text, shared, str(revision), eol))
    if wanted.get("files") != old.get("files"):
        had = old.get("files") or {}
        new = {
            id: {key: value for key, value in facts.items() if key not in had.get(id, {})}
            for id, facts in wanted["files"].items()
        }
        edits += _files_edits(text, root, {id: facts for id, facts in new.items() if facts}, eol)
    for place, words in sorted(edits, key=lambda edit: edit[0], reverse=True):
        text = text[:place] + words + text[place:]
    # whatever form the file has, only what was meant may have changed
    if load_plain(text, where, edited=True) != wanted:
        raise not_editable(where)
    return text


def _merged(old: dict[str, Any], revision: str | None, files: FileRows) -> dict[str, Any]:
    """What the file should say: its own facts, and those of ours that it lacks."""
    new = dict(old)
    if revision is not None:
        new["shared"] = {"revision": revision} | (old.get("shared") or {})
    had = old.get("files") or {}
    if rows := {id: {**facts, **had.get(id, {})} for id, facts in files.items() if facts}:
        new["files"] = {**had, **rows}
    return new


def _revision_edit(text: str, shared: Any, revision: str, eol: str) -> Edit:
    """Put `revision` behind the source, in the form that the facts there have."""
    pair = f"revision: {as_scalar(revision)}"
    source = child_of(shared, "source")
    if source is None:
        return _into(shared, [pair], eol)
    if shared.flow_style:
        return source.end_mark.index, f", {pair}"
    return line_end(text, source.end_mark.index), f"{eol}{' ' * shared.start_mark.column}{pair}"


def _files_edits(text: str, root: Any, rows: FileRows, eol: str) -> list[Edit]:
    """Facts of ids that stand under `files:` go into them, those of others to its end."""
    node = child_of(root, "files")
    lines = {id: f"{as_scalar(id)}: {as_flow(facts)}" for id, facts in rows.items()}
    if node is None:
        start = "" if text.endswith("\n") else eol
        block = [HEADER, *(f"  {line}" for line in lines.values())]
        return [(len(text), start + "".join(f"{line}{eol}" for line in block))]
    known = {key.value: value for key, value in node.value}
    edits = [_into(known[id], _pairs(facts), eol) for id, facts in rows.items() if id in known]
    new = [line for id, line in lines.items() if id not in known]
    if new and node.flow_style:
        edits.append(_into(node, new, eol))
    elif new:
        indent = " " * node.start_mark.column
        place = line_end(text, last_of(node).end_mark.index)
        edits.append((place, "".join(f"{eol}{indent}{line}" for line in new)))
    return edits


def _into(node: Any, pairs: list[str], eol: str) -> Edit:
    """Put pairs at the start of a mapping, in the form that it has."""
    if node.flow_style:
        return node.start_mark.index + 1, ", ".join(pairs) + (", " if node.value else "")
    indent = " " * node.start_mark.column
    return node.start_mark.index, "".join(f"{pair}{eol}{indent}" for pair in pairs)


def as_flow(value: Any) -> str:
    """A value on one line, as YAML."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(_pairs(value))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_flow, value))}]"
    # as JSON has numbers and booleans, YAML has them
    return as_scalar(value) if isinstance(value, str) else json.dumps(value)


def _pairs(facts: Mapping[str, Any]) -> list[str]:
    return [f"{as_scalar(key)}: {as_flow(value)}" for key, value in facts.items()]


def as_scalar(value: str) -> str:
    """A string as YAML: in quotes only where it would be read as something else without."""
    import yaml

    if PLAIN.fullmatch(value):
        with contextlib.suppress(yaml.YAMLError):
            # as a key and a value, on a line of its own and in braces
            for text in (f"{value}: {value}", f"{{{value}: {value}}}"):
                if yaml.safe_load(text) != {value: value}:
                    break
            else:
                return value
    return json.dumps(value, ensure_ascii=False)


def child_of(node: Any, name: str) -> Any:
    """The value of a key of a composed mapping, or None."""
    pairs = node.value if isinstance(getattr(node, "value", None), list) else []
    return next((value for key, value in pairs if key.value == name), None)


def last_of(node: Any) -> Any:
    """The last part of a node whose end is exactly where its text ends."""
    while node.value and isinstance(node.value, list) and not node.flow_style:
        item = node.value[-1]
        node = item[1] if isinstance(item, tuple) else item
    return node


def line_end(text: str, place: int) -> int:
    """Where the line of a place ends, before its line break."""
    end = text.find("\n", place)
    end = len(text) if end < 0 else end
    return end - 1 if text[place:end].endswith("\r") else end


def load_plain(text: str, where: str, *, edited: bool = False) -> dict[str, Any]:
    """What the YAML of a release says, as plain values. Raises RegistryError.

    edited: this text was made by an edit, so that what is wrong is the form of what it was made of.
    """
    import yaml

    try:
        data = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 safe
    except yaml.YAMLError as error:
        if edited:
            raise not_editable(where) from None
        raise RegistryError(f"{where}: not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(data, dict):
        raise not_editable(where)
    return data


def not_editable(where: str) -> RegistryError:
    """The error for a file whose form leaves no place for text to be put in."""
    return RegistryError(
        f"{where}: its form is not one that facts can be put into as text; write `shared:` and "
        "`files:` as plain blocks, or add them by hand"
    )
