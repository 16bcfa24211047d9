"""Open files that strangers wrote: safetensors, pickles without code, JSON and YAML, all of bounded
size.

Nothing here runs what a file says. A file that claims more than it holds, or more than anyone
expects, is refused before memory is spent on it.
"""

import json
import logging
import pickle
import reprlib
import stat
import struct
import sys
import threading
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saezoo.entry import Entry
from saezoo.errors import FormatError, MissingFile, NotFinite, UnsafeFile

logger = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**30
"""The most that tensors may take where neither a config nor the registry says how large they
are.
"""

MAX_TEXT = 4 * 2**20
"""The largest JSON or YAML config."""

BLOCK = 2**24
"""Numbers that are looked at at a time."""

MAX_YAML = 256 * 2**10
"""The largest YAML config: it is parsed in plain Python, which does not crash on deep nesting."""

PICKLES = threading.RLock()
"""Held while torch reads a pickle: which classes it may meet is a setting of the whole process."""

BROKEN = (
    *(RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError),
    *(AssertionError, MemoryError, OverflowError, zipfile.BadZipFile, struct.error),
)
"""What torch raises over a checkpoint that is damaged, or made to look so."""

BIG_ARRAY, MAX_DEFLATION = 64 * 2**20, 20
"""An array of more bytes than the first may not be compressed more than the second many times."""


SHOWN = reprlib.Repr()
"""How a value that a stranger's file has is shown: one that holds each thing twice, many levels
deep, would else be a message without end.
"""
SHOWN.maxlevel, SHOWN.maxstring, SHOWN.maxother = 2, 200, 200


def read_safetensors(path: Path, *, limit: int = MAX_BYTES) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory: nothing is read before it is used."""
    size = need_file(path)
    if size > limit:
        raise UnsafeFile(f"{path}: {size:,} bytes, more than the {limit:,} expected")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
    except FileNotFoundError:
        raise _missing(path) from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        if "No such file" in str(error):
            # safetensors has an error of its own for a file that is being replaced
            raise _missing(path) from None
        raise FormatError(
            f"{path}: not a whole safetensors file ({first_line(error)}); download it again"
        ) from None


def read_pickle(path: Path, *, limit: int = MAX_BYTES) -> Any:
    """A torch checkpoint, by `weights_only=True`: tensors and plain values, never code.

    Raises UnsafeFile when the pickle names anything else, when a tensor claims more elements than
    its storage holds, or when the archive unpacks to far more than it is.
    """
    need_file(path)
    check_archive(path, limit)
    try:
        with PICKLES, warnings.catch_warnings():
            # what torch thinks of a stranger's pickle ends in one of the errors below, or is fine
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except pickle.UnpicklingError as error:
        raise UnsafeFile(
            f"{path}: this pickle wants more than tensors, so it was not read ({_cause(error)})"
        ) from None
    except BROKEN as error:
        raise FormatError(f"{path}: not a whole torch checkpoint ({first_line(error)})") from None
    _check_storages(path, value, limit)
    return value


def read_state_dict(path: Path, *, inside: str | None = None) -> dict[str, Any]:
    """What a `.safetensors` or a torch checkpoint holds, by name. inside: the entry of a checkpoint
    that holds it. Raises what `read_safetensors` and `read_pickle` do.
    """
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path))
    value = read_pickle(path)
    if inside is not None and isinstance(value, Mapping):
        value = value.get(inside)
    if not isinstance(value, Mapping):
        what = f"{inside} that is " if inside is not None else ""
        raise FormatError(f"{path}: holds {what}{type(value).__name__}, expected a state dict")
    return dict(value)


def plain_name(name: str) -> str:
    """A tensor's name without what torch.compile and parallel training put before it."""
    for prefix in ("_orig_mod.", "module."):
        name = name.replace(prefix, "")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    size = need_file(path)
    if size > MAX_TEXT:
        raise UnsafeFile(f"{path}: {size:,} bytes is too much for a config")
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file of bounded size, without aliases, which make much of little, and
    tags.
    """
    import yaml

    size = need_file(path)
    if size > MAX_YAML:
        raise UnsafeFile(f"{path}: {size:,} bytes is too much for a config")
    try:
        text = path.read_text(encoding="utf-8-sig")
        banned = yaml.AliasToken, yaml.TagToken
        if any(isinstance(token, banned) for token in yaml.scan(text, yaml.SafeLoader)):
            raise UnsafeFile(f"{path}: a config has no use for YAML aliases and tags")
        data = yaml.load(text, yaml.SafeLoader)  # noqa: S506 a safe loader
    except FileNotFoundError:
        raise _missing(path) from None
    except UnsafeFile:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not YAML ({first_line(error)})") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path}: expected a YAML mapping, got {type(data).__name__}")
    return data


def take(raw: dict[str, Tensor], key: str, where: Path, *, dims: int | None = None) -> Tensor:
    """Remove and return a tensor that the format requires. Raises FormatError when it is missing or
    has other dims.
    """
    if key not in raw:
        raise FormatError(
            f"{where}: has no tensor {key!r}. It has: {', '.join(sorted(map(str, raw))) or 'none'}"
        )
    value = raw.pop(key)
    if not isinstance(value, Tensor):
        raise FormatError(f"{where}: {key} is {type(value).__name__}, expected a tensor")
    if dims is not None and value.dim() != dims:
        raise FormatError(f"{where}: {key} is {tuple(value.shape)}, expected {dims} dimensions")
    return value


def join_rows(rows: Sequence[Tensor], where: Path, name: str) -> Tensor:
    """Small tensors of each layer as one. Raises FormatError unless they have one shape."""
    if len({(row.shape, row.dtype) for row in rows}) > 1:
        shapes = ", ".join(sorted({f"{tuple(row.shape)} {row.dtype}" for row in rows}))
        raise FormatError(f"{where}: {name} differs among the layers: {shapes}")
    return torch.stack(list(rows))


def whole_number(data: Mapping[str, Any], key: str, where: Path) -> int:
    """A positive whole number of a config. Raises FormatError for anything else."""
    value = data.get(key)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(
            f"{where}: {key} is {SHOWN.repr(value)}, expected a positive whole number"
        )
    return value


def yes_or_no(data: Mapping[str, Any], key: str, where: Path) -> bool:
    """A flag of a config, False where it is not there. Raises FormatError for anything else."""
    value = data.get(key, False)
    if not isinstance(value, bool):
        raise FormatError(f"{where}: {key} is {SHOWN.repr(value)}, expected true or false")
    return value


def positive(value: object, what: str, where: Path) -> float:
    """A finite number above 0, also one that is stored as a tensor. Raises FormatError for anything
    else.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise FormatError(f"{where}: {what} is {SHOWN.repr(value)}, expected a positive number")
    return float(value)  # type: ignore[arg-type]


def expect_facts(entry: Entry | None, found: Mapping[str, object], where: Path) -> None:
    """Raise FormatError when the registry states another d_in, d_sae or k than the files have."""
    for key, value in found.items():
        stated = getattr(entry, key, None) if entry is not None else None
        if stated is not None and value is not None and stated != value:
            raise FormatError(f"{where}: {key} is {value}, but the registry states {stated}")


def expect_sizes(data: Mapping[str, Any], found: Mapping[str, int], where: Path) -> None:
    """Raise FormatError when a config states another size than the tensors have."""
    for key, value in found.items():
        if data.get(key) is not None and whole_number(data, key, where) != value:
            raise FormatError(f"{where}: {key} is {data[key]}, but the tensors have {value}")


def tell_unknown(data: Mapping[str, Any], known: Collection[str], where: Path) -> None:
    """Log the keys of a config that no arithmetic reads, so that a new one can be noticed."""
    if unknown := sorted(data.keys() - set(known)):
        logger.info("%s: keys that are not read: %s", where, unknown)


def refuse_rest(raw: Mapping[str, object], where: Path, title: str) -> None:
    """Raise FormatError if tensors are left that the format does not have."""
    if raw:
        raise FormatError(
            f"{where}: tensors that {title} does not have: {', '.join(sorted(map(str, raw)))}"
        )


def refuse_not_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise NotFinite if any tensor holds NaN or infinity. Reads every weight."""
    for name, value in tensors.items():
        bad = sum(_not_finite(block) for block in _blocks(value.detach()))
        if bad:
            raise NotFinite(
                f"{where}: {name} has {bad:,} values that are NaN or infinite, of {value.numel():,}"
            )


def same_tensors(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values, compared some rows at a time."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return all(torch.equal(*pair) for pair in zip(_blocks(one), _blocks(other), strict=True))


def _blocks(value: Tensor) -> Iterator[Tensor]:
    """A tensor some rows at a time: one of a mapped file may be larger than memory."""
    if not value.dim() or not value.numel():
        yield value
        return
    rows = max(1, BLOCK * len(value) // value.numel())
    for start in range(0, len(value), rows):
        yield value[start : start + rows]


def _not_finite(block: Tensor) -> int:
    """How many values are NaN or infinite."""
    # the sum of finite values is finite unless it overflows; so the costly look is rarely needed
    if torch.isfinite(block.float().sum()):
        return 0
    return int((~torch.isfinite(block)).sum())


def need_file(path: Path) -> int:
    """The bytes of a file. Raises MissingFile unless `path` is one."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    if not stat.S_ISREG(status.st_mode):
        raise _missing(path)
    return status.st_size


def _missing(path: Path) -> MissingFile:
    # also for a file that was there a moment ago: another process may be replacing its folder
    return MissingFile(f"{path}: no such file")


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_archive(path: Path, limit: int) -> None:
    """A zip whose members deflate far, or claim more bytes than the limit, is refused unread."""
    if path.stat().st_size > limit:
        raise UnsafeFile(f"{path}: {path.stat().st_size:,} bytes, more than the {limit:,} expected")
    if not is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FormatError(f"{path}: a broken zip archive ({first_line(error)})") from None
    total = sum(member.file_size for member in members)
    if total > limit:
        raise UnsafeFile(f"{path}: unpacks to {total:,} bytes, more than the {limit:,} expected")
    for member in members:
        if member.file_size > BIG_ARRAY and member.file_size > MAX_DEFLATION * max(
            member.compress_size, 1
        ):
            raise UnsafeFile(f"{path}: {member.filename} deflates more than {MAX_DEFLATION} times")


def _check_storages(path: Path, value: object, limit: int) -> None:
    """Every tensor must own what it shows: strides of 0 make terabytes of one number."""
    total, seen, stack, met = 0, set(), [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping | list | tuple):
            # one that holds itself, or each twice the one before, would never end
            if id(item) in met:
                continue
            met.add(id(item))
        if isinstance(item, Mapping):
            stack += item.values()
        elif isinstance(item, list | tuple):
            stack += item
        elif isinstance(item, Tensor):
            held = item.untyped_storage().nbytes()
            if item.layout != torch.strided or item.numel() * item.element_size() > held:
                raise UnsafeFile(
                    f"{path}: a tensor claims {item.numel():,} elements, its storage holds fewer"
                )
            if item.untyped_storage().data_ptr() not in seen:
                seen.add(item.untyped_storage().data_ptr())
                total += held
    if total > limit:
        raise UnsafeFile(
            f"{path}: its tensors take {total:,} bytes, more than the {limit:,} expected"
        )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _cause(error: BaseException) -> str:
    for line in str(error).splitlines():
        if "GLOBAL" in line or "Unsupported" in line or "instruction" in line:
            return line.strip()[:160]
    return first_line(error)
