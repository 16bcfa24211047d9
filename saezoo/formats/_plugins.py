"""Formats that other installed packages bring, through the entry-point group `saezoo.formats`.

An entry point's name is the format's; it resolves to a module with FORMAT (a saezoo.formats.Format)
and what a module of this package has: `read`, and where FORMAT is writable `write`, perhaps
`origin_output`. Nothing is imported before a format is named, or files fit none of saezoo's own. No
package replaces one of those.
"""

import importlib.metadata
import logging
from functools import lru_cache
from importlib.metadata import EntryPoint
from types import ModuleType

from saezoo.formats._table import FORMATS, Format

logger = logging.getLogger(__name__)

GROUP = "saezoo.formats"


@lru_cache(maxsize=1)
def plugin_points() -> dict[str, EntryPoint]:
    """The formats of installed packages by name; none is imported. Of several with one name the
    first counts; what is not taken is warned of in one line.
    """
    points: dict[str, EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.name in FORMATS:
            _tell(point, "saezoo has a format of that name itself")
        elif point.name in points:
            _tell(point, f"{_package(points[point.name])} has one of that name too")
        else:
            points[point.name] = point
    return points


@lru_cache(maxsize=64)
def plugin_module(name: str) -> ModuleType | None:
    """The module behind a format of another package; None, and a warning in one line, where there
    is none that can be used.
    """
    point = plugin_points().get(name)
    if point is None:
        return None
    try:
        module = point.load()
    except Exception as error:  # the package is not ours: importing it may raise anything
        text = " ".join(str(error).split())
        _tell(point, f"it cannot be imported ({type(error).__name__}: {text})")
        return None
    form = getattr(module, "FORMAT", None)
    if not isinstance(form, Format):
        _tell(point, "it has no FORMAT that is a saezoo.formats.Format")
        return None
    for function, needed in (("read", True), ("write", form.writable)):
        if needed and not callable(getattr(module, function, None)):
            _tell(point, f"it has no function {function}")
            return None
    assert isinstance(module, ModuleType)
    return module


def plugin_formats() -> dict[str, Format]:
    """All formats of other packages that can be used. Imports them."""
    modules = {name: plugin_module(name) for name in plugin_points()}
    return {name: module.FORMAT for name, module in modules.items() if module is not None}


def forget_plugins() -> None:
    """Look at what is installed anew."""
    plugin_points.cache_clear()
    plugin_module.cache_clear()


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _tell(point: EntryPoint, why: str) -> None:
    logger.warning("the format %r of %s is left out: %s", point.name, _package(point), why)
