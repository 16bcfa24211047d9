"""What of an SAE's weights goes into memory: which features, in which dtype, on which device. Each
tensor goes there by itself, some rows at a time, so that no second full copy is made on the way.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from saezoo.errors import InputError

MATRICES = ("W_enc_rows", "W_dec", "W_skip")
"""Tensors that follow the dtype asked for; all others stay float32, because a 16-bit threshold
flips features.
"""

DTypes = torch.dtype | Mapping[str, torch.dtype] | None
"""One for all matrices, or by name (W_enc, W_dec, W_skip); None: as stored, where that is fast."""

LARGE = 4 * 2**30
"""16-bit matrices stay as they are stored on a CPU where they would take more bytes as float32."""

BLOCK = 2**23
"""Numbers that are converted, gathered or moved at a time."""


def feature_rows(features: Iterable[int] | Tensor, d_sae: int) -> Tensor:
    """Feature numbers as (n,) int64, in the order given. Raises InputError for what is no number
    from 0 to d_sae - 1, for none, and for one given twice.
    """
    given = features.tolist() if isinstance(features, Tensor) else list(features)
    if not isinstance(given, list) or not given:
        raise InputError("features: expected the numbers of one or more features")
    rows = [_number(item) for item in given]
    if wrong := [given[at] for at, row in enumerate(rows) if row is None or not 0 <= row < d_sae]:
        raise InputError(f"features: {wrong[0]!r} is no feature; there are 0 to {d_sae - 1:,}")
    if len(set(rows)) < len(rows):
        twice = next(row for at, row in enumerate(rows) if row in rows[:at])
        raise InputError(f"features: {twice} is given twice")
    return torch.tensor(rows, dtype=torch.int64)


def _number(item: object) -> int | None:
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        return None
    return int(item.__index__())


def choose_dtypes(
    stored: Mapping[str, torch.dtype], numbers: int, device: torch.device, dtype: DTypes
) -> tuple[dict[str, torch.dtype], torch.dtype]:
    """The dtype of each matrix, and that of the products. stored: of each matrix; numbers: how many
    they have together.

    One dtype is for both. By name, or None: products of 16-bit matrices are float32 on a CPU, whose
    16-bit products are slow; the matrices are then converted once, or, where they are named or
    LARGE, kept as they are and converted a part at a time. Raises InputError for another name.
    """
    wide = torch.float32
    for value in stored.values():
        wide = torch.promote_types(wide, value)
    if isinstance(dtype, torch.dtype):
        _need_float(dtype)
        return dict.fromkeys(stored, dtype), dtype
    asked = _by_name(dtype or {}, stored)
    widest = _promoted(stored.values())
    as_stored = device.type != "cpu" or numbers * wide.itemsize > LARGE
    kept = {
        name: asked.get(name, value if as_stored else wide)
        if device.type == "cpu"
        else asked.get(name, widest)
        for name, value in stored.items()
    }
    computed = _promoted(kept.values())
    return kept, torch.promote_types(computed, wide) if device.type == "cpu" else computed


def _by_name(
    dtype: Mapping[str, torch.dtype], stored: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    asked = {("W_enc_rows" if name == "W_enc" else name): value for name, value in dtype.items()}
    if other := sorted(asked.keys() - set(MATRICES)):
        raise InputError(
            f"dtype: {other[0]} has none to choose; W_enc, W_dec and W_skip have. Biases and "
            "thresholds stay float32"
        )
    for value in asked.values():
        _need_float(value)
    return {name: value for name, value in asked.items() if name in stored}


def _need_float(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype: {dtype} is no float dtype of torch")


def _promoted(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    first, *rest = dtypes
    for value in rest:
        first = torch.promote_types(first, value)
    return first


def place(
    value: Tensor, device: torch.device, dtype: torch.dtype, rows: Tensor | None = None
) -> Tensor:
    """A tensor, or some rows of it, on a device in a dtype: itself where nothing changes, so that
    what is mapped stays mapped; else a new one, filled a block at a time.
    """
    if rows is None and value.dtype == dtype and value.device == device:
        return value
    shape = value.shape if rows is None else (len(rows), *value.shape[1:])
    out = torch.empty(shape, dtype=dtype, device=device)
    step = max(1, BLOCK * len(out) // max(out.numel(), 1))
    for start in range(0, len(out), step):
        block = slice(start, start + step)
        out[block].copy_(value[block] if rows is None else value[rows[block]])
    return out
