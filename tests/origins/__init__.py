"""The origins of every format, each variant as an `Origin` (ALL) or, of several layers or models, a
`MultiOrigin` (SEVERAL): both are collected from the modules here, so that a new one needs no list
to be added to.
"""

import importlib
import pkgutil


def __getattr__(name):
    """Made when first asked for: a test of one format imports that origin alone."""
    if name not in ("ALL", "SEVERAL"):
        raise AttributeError(name)
    from saezoo.formats import FORMATS
    from tests.origins._multi import MultiOrigin
    from tests.origins._origin import Origin

    kind = Origin if name == "ALL" else MultiOrigin
    modules = [
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
        if not found.name.startswith("_")
    ]
    found = [
        origin
        for module in modules
        for origin in getattr(module, "ORIGINS", ())
        if isinstance(origin, kind) and origin.format in FORMATS
    ]
    order = list(FORMATS)
    return sorted(found, key=lambda origin: order.index(origin.format))
