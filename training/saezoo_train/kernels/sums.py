"""Sums over the slots of each latent: of numbers, and of numbers times the rows of their tokens,
which is a weight's gradient. No atomics: a latent's slots are taken in the order of its list.

Lists may be very unequal. So blocks of 128 places that lie within one latent's stretch are summed
beforehand, each by a program of its own, and the latent's own program takes what is left at both
ends, at most 254 slots, and the sums of the blocks. Which places form a block does not depend on
timing either: results repeat bitwise.

Formulas: `reference.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo_train.kernels import _launch

# B tokens, D d_in, M d_sae, K slots of a token, N = B K places

SPLIT = 128
"""Places of a block."""


@triton.jit
def _ends(first, last, SPLIT: tl.constexpr):
    """Between which places a stretch consists of whole blocks."""
    head = tl.minimum(last, tl.cdiv(first, SPLIT) * SPLIT)
    return head, tl.maximum(head, last // SPLIT * SPLIT)


@triton.jit
def list_sums(
    weights,
    rows,
    order,
    partial,
    first,
    last,
    columns1,
    columns2,
    D,
    K,
    TWO: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """sum of weights[place] * rows[token of place] over order[first:last] of some latents, at two
    stretches of columns, of which the second counts only with TWO: (R, columns) each, float32.
    partial: sums of whole blocks.
    """
    inside1, inside2 = (columns1 < D)[None, :], (columns2 < D)[None, :]
    sums1 = tl.zeros_like(first).to(tl.float32)[:, None] + tl.zeros_like(columns1)[None, :]
    sums2 = tl.zeros_like(first).to(tl.float32)[:, None] + tl.zeros_like(columns2)[None, :]
    head, tail = _ends(first, last, SPLIT)
    before = head - first
    alone = before + (last - tail)
    for at in range(0, tl.max(alone, axis=0), UNROLL):
        # unrolled, so that several rows are on their way at once
        for more in tl.static_range(UNROLL):
            step = at + more
            on = step < alone
            position = first + step + tl.where(step < before, 0, tail - head)
            place = tl.load(order + position, mask=on, other=0)
            weight = tl.load(weights + place, mask=on, other=0.0).to(tl.float32)[:, None]
            row = rows + (place // K).to(tl.int64)[:, None] * D
            some = tl.load(row + columns1[None, :], mask=on[:, None] & inside1, other=0.0)
            sums1 += weight * some.to(tl.float32)
            if TWO:
                some = tl.load(row + columns2[None, :], mask=on[:, None] & inside2, other=0.0)
                sums2 += weight * some.to(tl.float32)
    blocks = (tail - head) // SPLIT
    for block in range(0, tl.max(blocks, axis=0)):
        on = (block < blocks)[:, None]
        row = partial + (head // SPLIT + block).to(tl.int64)[:, None] * D
        sums1 += tl.load(row + columns1[None, :], mask=on & inside1, other=0.0)
        if TWO:
            sums2 += tl.load(row + columns2[None, :], mask=on & inside2, other=0.0)
    return sums1, sums2


@triton.jit
def block_sums_kernel(
    weights,
    rows,
    idx,
    order,
    partial,
    M,
    D,
    K,
    SPLIT: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
):
    """The sum of a block of places, where they are all of one latent; E of them at a time."""
    block = tl.program_id(0)
    begin = block * SPLIT
    latent = tl.load(idx + tl.load(order + begin))
    if (latent < M) & (latent == tl.load(idx + tl.load(order + begin + SPLIT - 1))):
        columns = tl.program_id(1) * BD + tl.arange(0, BD)
        inside = columns < D
        sums = tl.zeros([E, BD], dtype=tl.float32)
        for at in range(0, SPLIT, E):
            place = tl.load(order + begin + at + tl.arange(0, E))
            weight = tl.load(weights + place).to(tl.float32)
            token = (place // K).to(tl.int64)
            row = tl.load(
                rows + token[:, None] * D + columns[None, :],
                mask=inside[None, :],
                other=0.0,
            )
            sums += weight[:, None] * row.to(tl.float32)
        place = block.to(tl.int64) * D + columns
        tl.store(partial + place, tl.sum(sums, axis=0), mask=inside)


@triton.jit
def block_numbers_kernel(values, order, out, SPLIT: tl.constexpr):
    """The sum of a block's numbers, of however many latents."""
    block = tl.program_id(0)
    place = tl.load(order + block * SPLIT + tl.arange(0, SPLIT))
    tl.store(out + block, tl.sum(tl.load(values + place).to(tl.float32), axis=0))


@triton.jit
def latent_sums_kernel(
    values, order, starts, partial, out, M, R: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr
):
    """Sums of numbers of R latents, E slots, then E blocks, of each at a time."""
    latent = tl.program_id(0) * R + tl.arange(0, R)
    valid = latent < M
    first = tl.load(starts + latent, mask=valid, other=0)
    last = tl.load(starts + latent + 1, mask=valid, other=0)
    head, tail = _ends(first, last, SPLIT)
    before = head - first
    alone = before + (last - tail)
    blocks = (tail - head) // SPLIT
    sums = tl.zeros([R, E], dtype=tl.float32)
    for at in range(0, tl.max(alone, axis=0), E):
        step = at + tl.arange(0, E)[None, :]
        gap = tl.where(step < before[:, None], 0, (tail - head)[:, None])
        on = step < alone[:, None]
        place = tl.load(order + first[:, None] + step + gap, mask=on, other=0)
        sums += tl.load(values + place, mask=on, other=0.0).to(tl.float32)
    for at in range(0, tl.max(blocks, axis=0), E):
        block = at + tl.arange(0, E)[None, :]
        where = (head // SPLIT)[:, None] + block
        sums += tl.load(partial + where, mask=block < blocks[:, None], other=0.0)
    tl.store(out + latent, tl.sum(sums, axis=1), mask=valid)


@triton.jit
def gradient_kernel(
    weights,
    rows,
    order,
    starts,
    partial,
    out,
    M,
    D,
    K,
    R: tl.constexpr,
    BD: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums of rows of R latents, some columns of each."""
    latent = tl.program_id(0) * R + tl.arange(0, R)
    valid = latent < M
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    first = tl.load(starts + latent, mask=valid, other=0)
    last = tl.load(starts + latent + 1, mask=valid, other=0)
    sums, _ = list_sums(
        weights, rows, order, partial, first, last, columns, columns, D, K, False, SPLIT, UNROLL
    )
    places = latent.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(out + places, sums, mask=valid[:, None] & (columns < D)[None, :])


@triton.jit
def weighted_rows_kernel(weights, W, out, M, D, ROWS, E: tl.constexpr, BD: tl.constexpr):
    """sum of weights[m] * W[m] over ROWS rows, some columns of them."""
    part = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    sums = tl.zeros([E, BD], dtype=tl.float32)
    for at in range(0, ROWS, E):
        row = part * ROWS + at + tl.arange(0, E)
        weight = tl.load(weights + row, mask=row < M, other=0.0)
        places = row.to(tl.int64)[:, None] * D + columns[None, :]
        read = (weight != 0)[:, None] & inside[None, :]
        sums += weight[:, None] * tl.load(W + places, mask=read, other=0.0).to(tl.float32)
    place = part.to(tl.int64) * D + columns
    tl.store(out + place, tl.sum(sums, axis=0), mask=inside)


def latent_sums(values_BK: Tensor, order_N: Tensor, starts_M1: Tensor) -> Tensor:
    """out[m] = sum of the values in the slots of latent m: (M,) float32."""
    _launch.checked(values_BK=values_BK, order_N=order_N, starts_M1=starts_M1)
    d_sae, blocks = len(starts_M1) - 1, len(order_N) // SPLIT
    out = _launch.empty((d_sae,), values_BK, torch.float32)
    partial = _launch.empty((blocks,), values_BK, torch.float32)
    if blocks:
        block_numbers_kernel[(blocks,)](
            values_BK, order_N, partial, SPLIT=SPLIT, num_warps=1, **_launch.OPTIONS
        )
    some = _launch.rows_a_program(d_sae, on_gpu=8)
    latent_sums_kernel[(triton.cdiv(d_sae, some),)](
        values_BK,
        order_N,
        starts_M1,
        partial,
        out,
        d_sae,
        R=some,
        E=16,
        SPLIT=SPLIT,
        num_warps=4,
        **_launch.OPTIONS,
    )
    return out


def block_sums(
    values_BK: Tensor, rows_BD: Tensor, idx_BK: Tensor, order_N: Tensor, d_sae: int
) -> Tensor:
    """Sums of whole blocks of places, (N // SPLIT, D) float32, written only where a block is one
    latent's.
    """
    blocks, d = len(order_N) // SPLIT, rows_BD.shape[1]
    out = _launch.empty((blocks, d), rows_BD, torch.float32)
    if blocks:
        width = min(128, _launch.next_power(d))
        block_sums_kernel[(blocks, triton.cdiv(d, width))](
            values_BK,
            rows_BD,
            idx_BK,
            order_N,
            out,
            d_sae,
            d,
            values_BK.shape[1],
            SPLIT=SPLIT,
            E=_launch.rows_a_program(SPLIT, on_gpu=16),
            BD=width,
            num_warps=4,
            **_launch.OPTIONS,
        )
    return out


def weight_gradient(
    values_BK: Tensor, rows_BD: Tensor, idx_BK: Tensor, order_N: Tensor, starts_M1: Tensor
) -> Tensor:
    """out[m] = sum of values[b, k] * rows[b] over the slots of latent m: (M, D) float32."""
    tensors = {"values_BK": values_BK, "rows_BD": rows_BD, "idx_BK": idx_BK, "order_N": order_N}
    _launch.checked(**tensors, starts_M1=starts_M1)
    d_sae, d = len(starts_M1) - 1, rows_BD.shape[1]
    out = _launch.empty((d_sae, d), rows_BD, torch.float32)
    some, width = _launch.rows_a_program(d_sae), min(1024, _launch.next_power(d))
    gradient_kernel[(triton.cdiv(d_sae, some), triton.cdiv(d, width))](
        values_BK,
        rows_BD,
        order_N,
        starts_M1,
        block_sums(values_BK, rows_BD, idx_BK, order_N, d_sae),
        out,
        d_sae,
        d,
        values_BK.shape[1],
        R=some,
        BD=width,
        SPLIT=SPLIT,
        UNROLL=unroll(width),
        num_warps=4,
        **_launch.OPTIONS,
    )
    return out


def weighted_rows(weights_M: Tensor, W_MD: Tensor) -> Tensor:
    """sum_m weights[m] * W[m], (D,) float32, in a fixed order."""
    _launch.checked(weights_M=weights_M, W_MD=W_MD)
    d_sae, d = W_MD.shape
    rows, width = (d_sae, _launch.next_power(d)) if _launch.interpreted() else (256, 128)
    parts = triton.cdiv(d_sae, rows)
    out = _launch.empty((parts, d), W_MD, torch.float32)
    weighted_rows_kernel[(parts, triton.cdiv(d, width))](
        weights_M,
        W_MD,
        out,
        d_sae,
        d,
        rows,
        E=_launch.rows_a_program(d_sae, on_gpu=16),
        BD=width,
        num_warps=4,
        **_launch.OPTIONS,
    )
    return out.sum(0)


def unroll(columns: int) -> int:
    """Rows of a list that are read at once."""
    return 1 if _launch.interpreted() else 8 if columns <= 512 else 4 if columns <= 2048 else 2
