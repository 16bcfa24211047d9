"""The origins of every format, each variant as an `Origin`: ALL is collected from the modules here,
so that a new one needs no list to be added to.
"""

import importlib
import pkgutil


def __getattr__(name):
    """ALL, made when it is first asked for: a test of one format imports that origin alone."""
    if name != "ALL":
        raise AttributeError(name)
    from saezoo.formats import FORMATS
    from tests.origins._origin import Origin

    modules = [
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
        if not found.name.startswith("_")
    ]
    found = [
        origin
        for module in modules
        for origin in getattr(module, "ORIGINS", ())
        if isinstance(origin, Origin) and origin.format in FORMATS
    ]
    order = list(FORMATS)
    return sorted(found, key=lambda origin: order.index(origin.format))
