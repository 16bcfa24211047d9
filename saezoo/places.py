"""Where things stand in a YAML file, so that an error can name the line."""

import re
from collections.abc import Iterable
from typing import Any

Lines = list[tuple[re.Pattern[str], int]]
"""Ids of a file, as patterns, and the lines that they stand in."""


def compose_yaml(text: str) -> Any:
    """The nodes of a YAML document, which know their lines; nothing is made of them."""
    import yaml

    return yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def place_of(where: str, id: str, lines: Lines) -> str:  # noqa: A002
    """Where an id stands: the last such line, since a second of a name is the one that is wrong."""
    of_id = [line for pattern, line in lines if pattern.fullmatch(id)]
    return f"{where}, line {of_id[-1]}" if of_id else where


def located(message: str, where: str, lines: Lines) -> str:
    """An error of `expand`, which names an id first or in quotes, with that id's line."""
    rest = message.removeprefix(where).lstrip(":, ")
    named = [rest.partition(":")[0], *re.findall(r"'([^']+)'", rest)]
    places = [place_of(where, name, lines) for name in named]
    return f"{next((place for place in places if place != where), where)}: {rest}"


def lines_of_ids(node: Any) -> Lines:
    """Each `id` of a composed manifest, its {placeholders} matching anything, and its line."""
    found: Lines = []
    if isinstance(node.value, str):
        return found
    for item in node.value:
        name, below = item if isinstance(item, tuple) else (None, item)
        if name is not None and name.value == "id" and isinstance(below.value, str):
            parts = re.split(r"\{\w+\}", below.value)
            pattern = re.compile(".+".join(map(re.escape, parts)))
            found.append((pattern, below.start_mark.line + 1))
        else:
            found += lines_of_ids(below)
    return found


def line_of(node: Any, place: Iterable[str | int]) -> int:
    """The line, from 1, of the deepest node on the way to `place` in a composed YAML document."""
    for step in place:
        children = getattr(node, "value", None)
        if isinstance(step, int) and isinstance(children, list) and step < len(children):
            node = children[step]
        elif isinstance(children, list):
            node = next(
                (pair for pair in children if isinstance(pair, tuple) and pair[0].value == step),
                (node,),
            )[-1]
        else:
            break
    return int(node.start_mark.line) + 1 if node is not None else 1
