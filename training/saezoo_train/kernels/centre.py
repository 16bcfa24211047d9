"""Activations as the step reads them: scaled, about b_dec, in the dtype of products. One pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo_train.kernels._launch import OPTIONS, checked, empty, interpreted, next_power

# B tokens, D d_in


def centre(x_BD: Tensor, b_dec_D: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x - b_dec, computed in float32 and rounded once, (B, D). b_dec_D None: x alone."""
    (B, D), x_BD = x_BD.shape, x_BD.contiguous()
    checked(x=x_BD, b_dec=b_dec_D)
    out_BD = empty((B, D), x_BD, dtype)
    rows, width = (64, next_power(D)) if interpreted() else (4, 1024)
    grid = (triton.cdiv(B, rows), triton.cdiv(D, width))
    _centre[grid](
        x_BD, x_BD if b_dec_D is None else b_dec_D, out_BD, B, D,
        SHIFT=b_dec_D is not None, ROWS=rows, WIDTH=width, num_warps=4, **OPTIONS,
    )  # fmt: skip
    return out_BD


@triton.jit
def _centre(
    x, b, out, B, D, SHIFT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < B)[:, None] & (d < D)[None, :]
    place = row[:, None] * D + d[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        value -= tl.load(b + d, mask=d < D, other=0.0)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
