"""The largest pre-activations of a whole batch, with one threshold for all tokens, found where no
element is looked at that cannot be among them.

As many groups as elements are wanted hold all of these: those with the largest maxima. So the
threshold of the maxima is found first, then that of the elements in the groups above it. Both are
radix selections over keys: the leading 8 bits are counted in 256 bins, the bin with the wanted rank
is picked on the device, then the next 8 bits among the keys that have these.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo_train.kernels._launch import (
    OPTIONS,
    empty,
    interpreted,
    next_power,
    rows_a_program,
)
from saezoo_train.kernels._order import candidates, key_of
from saezoo_train.kernels.encode import GROUP
from saezoo_train.kernels.select import bits, emit, lacking, list_groups, most_groups, refuse

# B tokens, M d_sae, G groups of latents, C listed groups of a token, K slots of a token

BINS = tl.constexpr(256)


def select_batch_top_k(
    pre_BM: Tensor, maxima_BG: Tensor, count: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `count` largest positive ones of the whole batch, of equal ones the lower place (token,
    then latent) first: values (B, capacity) float32 and indices (B, capacity) int32, a token's
    rising.

    Then the smallest value that was kept, () float32, 0 where there is none; and by how many slots
    the lists were too short, () int32: 0 says that nothing is missing.
    """
    refuse(pre_BM, maxima_BG, capacity=capacity)
    B, G = maxima_BG.shape
    flat = bits(maxima_BG).view(-1)
    groups_tau = _find(pre_BM, count, 8 * maxima_BG.element_size(), _count_flat, flat)
    C = most_groups(G, capacity)
    groups_BC, groups_B = list_groups(maxima_BG, groups_tau[0].clamp_min(1), C)
    state = _find(pre_BM, count, 8 * pre_BM.element_size(), _count_listed, pre_BM, groups_BC)
    ties_B = _ties(pre_BM, groups_BC, state)
    # what is left of the equal ones when the tokens before have taken theirs
    allowed_B = (state[1] - (ties_B.cumsum(0, dtype=torch.int32) - ties_B)).clamp_min(0)
    values_BK, idx_BK, counts_B = emit(
        pre_BM, groups_BC, capacity, keys=state[:1], ties_B=allowed_B, positive=True
    )
    used = idx_BK < pre_BM.shape[1]
    smallest = values_BK.where(used, torch.inf).amin()
    smallest = smallest.where(smallest < torch.inf, 0.0)
    return values_BK, idx_BK, smallest, lacking(counts_B, capacity, groups_B, C)


def _find(
    like: Tensor, count: int, width: int, counter: Callable[..., None], *where: Tensor
) -> Tensor:
    """The key of rank `count` among the positive ones, 0 where there are fewer; and how many of
    that key belong to the first `count`: (2,) int32.
    """
    state = torch.zeros(2, dtype=torch.int32, device=like.device)
    state[1].fill_(count)
    bins = torch.zeros(256, dtype=torch.int32, device=like.device)
    for shift in range(width - 8, -8, -8):
        counter(*where, state, bins, shift)
        _pick[(1,)](bins, state, num_warps=4, **OPTIONS)
    return state


def warps(groups: int) -> int:
    """Warps of a program that goes through so many groups of a token: with fewer, the most do not
    fit into its registers.
    """
    return 8 if groups <= 256 else 16


def _count_flat(flat: Tensor, state: Tensor, bins: Tensor, shift: int) -> None:
    N = flat.numel()
    block = 65_536 if interpreted() else 4096
    _count_bins[(triton.cdiv(N, block),)](
        flat, state, bins, N, shift,
        BITS=8 * flat.element_size(), BLOCK=block, num_warps=8, **OPTIONS,
    )  # fmt: skip


def _count_listed(pre: Tensor, groups: Tensor, state: Tensor, bins: Tensor, shift: int) -> None:
    (B, M), C = pre.shape, groups.shape[1]
    rows = rows_a_program(B, interpreted_rows=32)
    _count_candidates[(triton.cdiv(B, rows),)](
        bits(pre), groups, state, bins, B, M, C, shift, BITS=8 * pre.element_size(),
        GROUP=GROUP, WIDTH=next_power(C), ROWS=rows, num_warps=warps(C), **OPTIONS,
    )  # fmt: skip


def _ties(pre_BM: Tensor, groups_BC: Tensor, state: Tensor) -> Tensor:
    (B, M), C = pre_BM.shape, groups_BC.shape[1]
    rows = rows_a_program(B, interpreted_rows=32)
    ties_B = empty((B,), state)
    _count_equal[(triton.cdiv(B, rows),)](
        bits(pre_BM), groups_BC, state, ties_B, B, M, C, BITS=8 * pre_BM.element_size(),
        GROUP=GROUP, WIDTH=next_power(C), ROWS=rows, num_warps=warps(C), **OPTIONS,
    )  # fmt: skip
    return ties_B


@triton.jit
def _add_to_bins(key, inside, state, bins, shift):
    """Count the next 8 bits of the positive keys whose bits above these are the prefix."""
    # at the first digit the prefix is 0, and so is all that is above it
    counts = inside & (key > 0) & ((key >> shift) >> 8 == tl.load(state))
    found = tl.histogram((key >> shift) & 255, BINS, mask=counts)
    # whole numbers: their sum does not depend on the order
    tl.atomic_add(bins + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit
def _count_bins(flat, state, bins, N, shift, BITS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = key_of(tl.load(flat + n, mask=n < N, other=0), BITS)
    _add_to_bins(key, n < N, state, bins, shift)


@triton.jit
def _keys(
    pre_bits, groups, row, B, M, C, BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, WIDTH * GROUP)[None, :]
    latent, inside = candidates(groups, row, row < B, column, M, C, GROUP)
    found = tl.load(pre_bits + row[:, None] * M + latent, mask=inside, other=0)
    return key_of(found, BITS), inside


@triton.jit
def _count_candidates(
    pre_bits, groups, state, bins, B, M, C, shift,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key, inside = _keys(pre_bits, groups, row, B, M, C, BITS, GROUP, WIDTH)
    _add_to_bins(tl.ravel(key), tl.ravel(inside), state, bins, shift)


@triton.jit
def _count_equal(
    pre_bits, groups, state, ties, B, M, C,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key, inside = _keys(pre_bits, groups, row, B, M, C, BITS, GROUP, WIDTH)
    equal = inside & (key > 0) & (key == tl.load(state))
    tl.store(ties + row, tl.sum(equal.to(tl.int32), 1), mask=row < B)


@triton.jit
def _pick(bins, state):
    """The bin that holds the wanted rank joins the prefix; the rank within it is what remains. The
    bins are emptied.
    """
    at = tl.arange(0, BINS)
    found = tl.load(bins + at)
    remaining = tl.load(state + 1)
    above = tl.sum(found, 0) - tl.cumsum(found, 0)
    # too few in all: bin 0, and so on to key 0, which nothing has
    best = tl.max(tl.where(above + found >= remaining, at, 0), 0)
    tl.store(state, tl.load(state) * 256 + best)
    tl.store(state + 1, remaining - tl.sum(tl.where(at == best, above, 0), 0))
    tl.store(bins + at, tl.zeros_like(found))
