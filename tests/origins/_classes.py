"""Checkpoints that name classes of packages that are not here: as an author's machine pickles them,
who has the package.
"""

import sys
import types
from contextlib import contextmanager


@contextmanager
def classes_of(*names):
    """Plain classes of these full names, which can be pickled in the block and are gone after."""
    modules = {}
    made = []
    for name in names:
        *packages, called = name.split(".")
        # pickle imports a class's module, and so what that is in
        for count in range(1, len(packages) + 1):
            path = ".".join(packages[:count])
            modules.setdefault(path, types.ModuleType(path)).__path__ = []
        kind = type(called, (), {"__module__": ".".join(packages)})
        setattr(modules[kind.__module__], called, kind)
        made.append(kind)
    # none of these may be a real one
    assert not modules.keys() & sys.modules.keys()
    sys.modules.update(modules)
    try:
        yield made
    finally:
        for module in modules:
            del sys.modules[module]


def filled(kind, fields):
    """An object of a class with these fields."""
    made = kind()
    made.__dict__.update(fields)
    return made
