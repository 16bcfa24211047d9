"""The lists of the tokens turned round: for each latent, the slots that name it, in rising order.
A weight's gradient is then a sum over one stretch, always taken in the same order.

A stable radix sort by latent, 6 bits a pass. Each pass counts the digits of every block of slots,
sums the counts up over digits and blocks, and writes each slot to its place: the sum before it and
its rank among the equal digits of its own block. No atomics, nothing that depends on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo_train.kernels._launch import OPTIONS, checked, empty, interpreted

# B tokens, K slots of a token, N = B K slots, M d_sae

BITS = 6
"""Of a digit: a block's slots against all digits must fit into registers."""


def csc(idx_BK: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """The slots by latent: their places in the flat list, (N,) int32, within one latent rising,
    those of unused slots (index d_sae) last; and where each latent's stretch begins, (M + 1,)
    int32, the last being where the unused ones begin.
    """
    checked(idx=idx_BK)
    N = idx_BK.numel()
    block = 1024 if interpreted() else 256
    blocks = max(triton.cdiv(N, block), 1)
    keys, order = idx_BK.view(-1), idx_BK.view(-1)
    for shift in range(0, d_sae.bit_length(), BITS):
        counts = empty((1 << BITS, blocks), idx_BK, torch.int32)
        _count[(blocks,)](
            keys, counts, N, blocks, shift, BLOCK=block, DIGITS=1 << BITS, num_warps=4, **OPTIONS
        )
        before = counts.view(-1).cumsum(0, dtype=torch.int32) - counts.view(-1)
        next_keys, next_order = empty((N,), idx_BK), empty((N,), idx_BK)
        _scatter[(blocks,)](
            keys, order, before, next_keys, next_order, N, blocks, shift,
            FIRST=shift == 0, BLOCK=block, DIGITS=1 << BITS, num_warps=4, **OPTIONS,
        )  # fmt: skip
        keys, order = next_keys, next_order
    starts_M1 = empty((d_sae + 1,), idx_BK)
    wide = 1024 if interpreted() else 256
    _find_starts[(triton.cdiv(d_sae + 1, wide),)](
        keys, starts_M1, N, d_sae, N.bit_length(), WIDE=wide, num_warps=4, **OPTIONS
    )
    return order, starts_M1


@triton.jit
def _digits(keys, n, N, shift, DIGITS: tl.constexpr):
    """Whether each of the block's slots has each digit: (slots, digits), 0 or 1; and the keys."""
    key = tl.load(keys + n, mask=n < N, other=0)
    digit = (key >> shift) & (DIGITS - 1)
    has = (digit[:, None] == tl.arange(0, DIGITS)[None, :]) & (n < N)[:, None]
    return key, has.to(tl.int32)


@triton.jit
def _count(keys, counts, N, blocks, shift, BLOCK: tl.constexpr, DIGITS: tl.constexpr):
    block = tl.program_id(0)
    _, has = _digits(keys, block * BLOCK + tl.arange(0, BLOCK), N, shift, DIGITS)
    tl.store(counts + tl.arange(0, DIGITS) * blocks + block, tl.sum(has, 0))


@triton.jit
def _scatter(
    keys, order, before, next_keys, next_order, N, blocks, shift,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    key, has = _digits(keys, n, N, shift, DIGITS)
    start = tl.load(before + tl.arange(0, DIGITS) * blocks + block)
    place = tl.sum(has * (start[None, :] + tl.cumsum(has, 0) - 1), 1)
    tl.store(next_keys + place, key, mask=n < N)
    slot = n if FIRST else tl.load(order + n, mask=n < N, other=0)
    tl.store(next_order + place, slot, mask=n < N)


@triton.jit
def _find_starts(keys, starts, N, M, halvings, WIDE: tl.constexpr):
    """For each latent the first place whose key is not below it, by halving."""
    latent = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    low = tl.zeros((WIDE,), tl.int32)
    high = tl.zeros((WIDE,), tl.int32) + N
    for _ in range(halvings):
        middle = (low + high) // 2
        key = tl.load(keys + middle, mask=low < high, other=0)
        below = (low < high) & (key < latent)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    tl.store(starts + latent, low, mask=latent <= M)
