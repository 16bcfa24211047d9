"""From a format's name to how its files look, and to the module that reads them. Formats of other
packages (`_plugins.py`) are asked for when one of theirs is named.
"""

import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType

from saezoo.errors import FormatError
from saezoo.formats._table import FAMILIES, FORMATS, REFUSED, Format


def format_of(name: str) -> Format:
    """How the files of a format look. Raises FormatError for a name that nothing reads."""
    if name in FORMATS:
        return FORMATS[name]
    form: Format = format_module(name).FORMAT
    return form


def format_module(name: str) -> ModuleType:
    """The module that reads (and perhaps writes) a format. Raises FormatError for a name that
    nothing reads.
    """
    if name in FORMATS:
        return importlib.import_module(f"saezoo.formats.{name}")
    module: ModuleType | None = _others().plugin_module(name)
    if module is None:
        raise unread_format(name, "these files")
    return module


def format_tables() -> Iterator[Mapping[str, Format]]:
    """saezoo's own formats first; those of other packages where none of these was taken."""
    yield FORMATS
    yield _others().plugin_formats()


def writable_formats() -> list[str]:
    """Formats of the table that `saezoo convert --to` writes."""
    return [key for key, form in FORMATS.items() if form.writable]


def is_read(name: str | None) -> bool:
    """Whether files of this format can be loaded; None: the files decide."""
    return name is None or name in FORMATS or name in FAMILIES or name in _others().plugin_points()


def unread_format(name: str, where: str) -> FormatError:
    """What to say of a format that nothing reads. where: whose format it is."""
    if name in REFUSED:
        return FormatError(f"{where}: its format {name} cannot be read: {REFUSED[name]}")
    if name in _others().plugin_points():
        return FormatError(f"{where}: the package that has the format {name} cannot be used")
    return FormatError(
        f"no format {name!r}. There are: {', '.join([*FORMATS, *_others().plugin_points()])}"
    )


def among(key: str | None, found: list[str]) -> list[str]:
    """Of the formats that some files may be, those that `key` allows: itself, or its family."""
    if key is None:
        return found
    return [name for name in found if name in FAMILIES[key]] if key in FAMILIES else [key]


def may_have_layers(name: str | None) -> bool:
    """Whether one layer of this format, or of some of this family, can be had by name."""
    return any(key in FORMATS and FORMATS[key].layered for key in FAMILIES.get(name or "", (name,)))


def _others() -> ModuleType:
    # imported when asked for: the metadata of installed packages takes time to import and to read
    return importlib.import_module("saezoo.formats._plugins")
