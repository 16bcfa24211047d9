"""Which files of a format are needed, by name."""

from collections.abc import Collection

from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import LAYER_NAME, format_of

WITH_EXTRAS = frozenset({"native"})
"""Formats whose optional files are for people and checks, not for the arithmetic."""


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
    chosen = form.one_of_in(there) or [*form.one_of]
    if len(chosen) > 1 and chosen[0] not in form.one_of:
        more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
        raise FormatError(f"{where}: holds {', '.join(chosen[:3])}{more}: name one of them")
    if layer is None:
        own = form.layer_files_in(there)
        return tuple(dict.fromkeys([*form.files, *chosen[:1], *own])), optional
    own = [template.replace("{layer}", str(layer)) for template in form.layer_files]
    return (*form.shared_files(), *chosen[:1], *own), optional


def is_one_file(name: str, key: str) -> bool:
    form = format_of(key)
    return bool(form.is_called(name)) if form.files else True


def stated_hash(entry: Entry, name: str, required: tuple[str, ...]) -> str | None:
    """The sha256 that the entry states of a file; a bare one is that of the weights."""
    if entry.sha256 is None or isinstance(entry.sha256, dict):
        return (entry.sha256 or {}).get(name)
    weights = [item for item in required if not item.endswith((".json", ".yaml"))]
    return entry.sha256 if name in weights[:1] else None


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


def split_listed(path: str, files: Collection[str]) -> tuple[str, str]:
    """(file, part) of FILE/PART, as `split_part` has it, among the files of a repo."""
    parts = path.split("/")
    starts = ("/".join(parts[:count]) for count in range(1, len(parts)))
    file = next((start for start in starts if start in files), None)
    return (path, "") if file is None else (file, path.removeprefix(f"{file}/"))
