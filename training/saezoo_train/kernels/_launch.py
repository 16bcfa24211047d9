"""What every launch of a kernel shares: options, memory for results, checks of what it is given."""

import torch
import triton
from torch import Tensor

from saezoo.errors import InputError
from saezoo_train.kernels import LONGEST

OPTIONS = {"enable_fp_fusion": True}
"""Passed at every launch: Triton 3.10 changes what it does without."""

POISON = False
"""Tests set it: results start as NaN, so that an element that no program writes is seen."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU. There bf16 arithmetic is silently
    wrong, so kernels upcast before any, and time goes by operations on tiles, so tiles are few and
    large.
    """
    return bool(triton.knobs.runtime.interpret)


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result on the device of `like`."""
    out = torch.empty(shape, device=like.device, dtype=dtype or like.dtype)
    if POISON:
        out.fill_(float("nan") if out.is_floating_point() else -77_777)
    return out


def checked(**tensors: Tensor | None) -> None:
    """Raises InputError, naming the tensor, where one is not contiguous or not on the device of the
    first: kernels compute addresses from shapes alone.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.device != device:
            raise InputError(f"{name} is on {tensor.device}, the other tensors are on {device}")
        if not tensor.is_contiguous():
            raise InputError(
                f"{name} of shape {tuple(tensor.shape)} is not contiguous: give .contiguous()"
            )


def refuse_longer(name: str, number: int) -> None:
    """Raises InputError for lists that are longer than the kernels can hold."""
    if not 0 < number <= LONGEST:
        raise InputError(
            f"{name}={number}: the kernels hold 1 to {LONGEST} latents a token; train with "
            "--no-triton for more"
        )


def next_power(number: int) -> int:
    """The least power of two that is not below a number: what a tile's side must be."""
    return 1 << max(0, number - 1).bit_length()


def rows_a_program(rows: int, on_gpu: int = 1, interpreted_rows: int = 256) -> int:
    """How many rows (tokens, latents) one program takes: a power of two."""
    return min(next_power(rows), interpreted_rows) if interpreted() else on_gpu
