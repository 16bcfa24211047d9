"""Torch checkpoints with a pickled config object beside the tensors: tensors and plain values are
read, the object becomes a bag of its fields, and nothing is imported or run.

A pickle names classes and functions as text, `module.name`. torch's weights-only unpickler looks
these up in a table of its own and refuses all others. Here that table is completed, for one read,
by one class: `Inert`. Every name of an author's package stands for it, so that "make an
object of sae_training.config.RunnerConfig with these fields" makes an `Inert` with these fields.
It takes any arguments and uses none, has no method that a pickle could call but `__setstate__`,
which copies a dict, and no attribute that a pickle could set.

Names of Python itself, of torch and of numpy are refused (UnsafeFile) rather than made inert: no
config is of these classes, but for those in DATA, so a file that names them means no good. What
torch knows, such as its dtypes, is looked up before `Inert` is: that table comes first. A file that
changes between the look at its names and the read is refused, since the names are then unknown.
"""

import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from saezoo.errors import FormatError, UnsafeFile
from saezoo.formats._tensors import (
    BROKEN,
    MAX_BYTES,
    PICKLES,
    check_archive,
    first_line,
    is_zip,
    need_file,
    plain_name,
    read_pickle,
)

MAX_NAMES = 32
"""Classes that a checkpoint may name: a config holds a few others."""

MAX_PICKLE = 4 * 2**20
"""Bytes of the pickle itself; the tensors lie beside it. Those of SAEs have some thousand, and each
may become an object of a hundred.
"""

MAX_WORDS = 1000
"""Letters of a word in a config."""

OLD_NAMES = {*IMPORT_MAPPING, *(module for module, _ in NAME_MAPPING)}
"""Modules of Python 2: a pickle of protocol 2, which torch writes, calls subprocess `commands`."""

NOT_CONFIGS = sys.stdlib_module_names | {"numpy", "torch"} | OLD_NAMES
"""Packages whose classes are no configs."""

DATA = frozenset(
    {
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
    }
)
"""Names that a config's values may have all the same: paths and numbers, which become inert too."""


class Inert:
    """What stands for an object of any class that a checkpoint names. Only its fields are kept."""

    __slots__ = ("fields",)

    def __new__(cls, *_arguments: object) -> "Inert":
        made = super().__new__(cls)
        made.fields = {}
        return made

    def __init__(self, *_arguments: object) -> None:
        """Uses none of its arguments."""

    def __setstate__(self, state: object) -> None:
        """Keeps the plain fields of a plain object; what else a state may be is no config."""
        if type(state) is dict:
            self.fields = plain_fields(state)

    def __repr__(self) -> str:
        return "an object"

    fields: dict[str, Any]


def plain_fields(fields: Mapping[Any, Any], deep: bool = True) -> dict[str, Any]:
    """The fields as numbers, words and mappings of such. A value of any other kind, which may hold
    itself or a world, becomes an empty `Inert`, that no reader takes for anything.
    """
    plain: dict[str, Any] = {}
    for key, value in fields.items():
        if not _is_short(key):
            continue
        if type(value) is dict and deep:
            plain[key] = plain_fields(value, deep=False)
        else:
            simple = value is None or type(value) in (bool, int, float) or _is_short(value)
            plain[key] = value if simple else Inert()
    return plain


def _is_short(value: object) -> bool:
    return type(value) is str and len(value) <= MAX_WORDS


def read_pickled(path: Path, *, limit: int = MAX_BYTES) -> Any:
    """A torch checkpoint like `read_pickle`, in which objects of the author's own classes are
    `Inert`.

    Raises what `read_pickle` does: UnsafeFile where the pickle names what is no config class.
    """
    # the lock: another thread's read must not meet these names, nor take them from this one
    with PICKLES:
        names = named_classes(path, limit)
        with safe_globals([(Inert, name) for name in names]):
            return read_pickle(path, limit=limit)


def named_classes(path: Path, limit: int = MAX_BYTES) -> list[str]:
    """The classes and functions that a checkpoint names and torch does not know, sorted. Nothing of
    it is built. Of a file from before torch 1.6, none: it is read without any.

    Raises UnsafeFile when one is no config class, or there are too many.
    """
    need_file(path)
    check_archive(path, limit)
    if not is_zip(path):
        return []
    try:
        size = _pickle_bytes(path)
        if size > MAX_PICKLE:
            raise UnsafeFile(f"{path}: its pickle has {size:,} bytes, more than the {MAX_PICKLE:,}")
        names = sorted(get_unsafe_globals_in_checkpoint(path))
    except UnsafeFile:
        raise
    except pickle.UnpicklingError as error:
        raise UnsafeFile(
            f"{path}: this pickle wants more than tensors, so it was not read ({first_line(error)})"
        ) from None
    except BROKEN as error:
        raise FormatError(f"{path}: not a whole torch checkpoint ({first_line(error)})") from None
    for name in names:
        package = name.partition(".")[0]
        if package in NOT_CONFIGS and name not in DATA:
            raise UnsafeFile(
                f"{path}: this pickle wants more than tensors, so it was not read: it names "
                f"{name[:80]!r}, which is no config class"
            )
    if len(names) > MAX_NAMES:
        raise UnsafeFile(f"{path}: names {len(names)} classes, more than the {MAX_NAMES} expected")
    return names


def read_config(value: object, what: str, where: Path) -> dict[str, Any]:
    """The fields of a pickled config, an object or a mapping. Raises FormatError for others."""
    if isinstance(value, Inert):
        return dict(value.fields)
    if isinstance(value, Mapping):
        return plain_fields(value)
    raise FormatError(f"{where}: {what} is {type(value).__name__}, expected a config object")


def read_state(saved: object, where: Path, inside: str = "state_dict") -> dict[str, Any]:
    """The state dict of a checkpoint {cfg, state_dict}. Raises FormatError where it has none."""
    if not isinstance(saved, Mapping):
        raise FormatError(f"{where}: holds {type(saved).__name__}, expected cfg and {inside}")
    if lacking := [key for key in ("cfg", inside) if key not in saved]:
        raise FormatError(f"{where}: has no {' and no '.join(lacking)}")
    if not isinstance(saved[inside], Mapping):
        raise FormatError(f"{where}: {inside} is {type(saved[inside]).__name__}")
    return dict(saved[inside])


def tensor_names(path: Path) -> set[str] | None:
    """The names in a checkpoint, also those one level down and the fields of a config object, as
    `plain_name` has them; None where it cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        raw = read_pickled(path)
    except (FormatError, SafetensorError, OSError, ValueError, RuntimeError, TypeError):
        return None
    if not isinstance(raw, Mapping):
        return set()
    inside = [value.fields if isinstance(value, Inert) else value for value in raw.values()]
    parts = (raw, *(value for value in inside if isinstance(value, Mapping)))
    return {plain_name(key) for part in parts for key in part if isinstance(key, str)}


def _pickle_bytes(path: Path) -> int:
    """All of an archive but its tensors."""
    with zipfile.ZipFile(path) as archive:
        return sum(item.file_size for item in archive.infolist() if "/data/" not in item.filename)
