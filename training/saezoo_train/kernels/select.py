"""Which pre-activations are kept, read through the maxima of their groups: of each token only the
groups that can hold one are read again.

The k groups with the largest maxima hold the k largest elements: one that is in none of them has k
larger ones, or equal ones of lower index, above it. All is exact for the pre-activations as they
are stored; of equal ones the lower index is first.

Lists hold a token's entries by rising index; unused slots have value 0 and index d_sae.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo.errors import InputError
from saezoo_train.kernels import LONGEST, WIDEST
from saezoo_train.kernels._launch import (
    OPTIONS,
    checked,
    empty,
    interpreted,
    next_power,
    refuse_longer,
    rows_a_program,
)
from saezoo_train.kernels._order import LOWEST, candidates, first_k, key_of, kth_largest
from saezoo_train.kernels.encode import GROUP

# B tokens, M d_sae, G groups of latents, C listed groups of a token, K slots of a token

CHUNK = 2048
"""Candidates of a token that are looked at together when lists are written."""


def select_top_k(
    pre_BM: Tensor, maxima_BG: Tensor, k: int, *, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """The k largest of each token, of equal ones the lower index first: values (B, k) float32, 0
    instead of what is negative where `relu`, and indices (B, k) int32, rising.

    Raises InputError for k over 512 or over d_sae.
    """
    (B, M), G = pre_BM.shape, maxima_BG.shape[1]
    refuse(pre_BM, maxima_BG, k=k)
    if k > M:
        raise InputError(f"k={k} is more than d_sae={M}")
    C = min(k, G)
    groups_BC = empty((B, C), pre_BM, torch.int32)
    rows = rows_a_program(B, interpreted_rows=32)
    grid = (triton.cdiv(B, rows),)
    width = next_power(G)
    _best_groups[grid](
        bits(maxima_BG), groups_BC, B, G, C,
        BITS=8 * maxima_BG.element_size(), WIDTH=width, ROWS=rows, num_warps=warps(width),
        **OPTIONS,
    )  # fmt: skip
    keys_B, ties_B = empty((B,), groups_BC), empty((B,), groups_BC)
    width = next_power(C)
    _thresholds[grid](
        bits(pre_BM), groups_BC, keys_B, ties_B, B, M, C, k,
        BITS=8 * pre_BM.element_size(), GROUP=GROUP, WIDTH=width, ROWS=rows,
        num_warps=warps(width * GROUP), **OPTIONS,
    )  # fmt: skip
    values_BK, idx_BK, _ = emit(pre_BM, groups_BC, k, keys=keys_B, ties_B=ties_B, relu=relu)
    return values_BK, idx_BK


def select_above(
    pre_BM: Tensor, maxima_BG: Tensor, bound_M: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What exceeds its latent's bound: values (B, capacity) float32 and indices (B, capacity)
    int32, rising; how many of each token, (B,) int32; and by how many slots the lists were too
    short, () int32: 0 says that nothing is missing, and then the counts are whole.

    maxima: those of `encode` with offset_M=bound, or without where bound is 0.
    """
    G = maxima_BG.shape[1]
    refuse(pre_BM, maxima_BG, capacity=capacity)
    checked(pre=pre_BM, bound=bound_M)
    # a listed group has something above its bound, so there are no more of them than slots
    C = min(capacity, G)
    least = torch.ones((), dtype=torch.int32, device=pre_BM.device)
    groups_BC, groups_B = list_groups(maxima_BG, least, C)
    values_BK, idx_BK, counts_B = emit(pre_BM, groups_BC, capacity, bound_M=bound_M)
    return values_BK, idx_BK, counts_B, lacking(counts_B, capacity, groups_B, C)


def refuse(pre_BM: Tensor, maxima_BG: Tensor, **lengths: int) -> None:
    """Raises InputError for what the selections cannot take."""
    checked(pre=pre_BM, maxima=maxima_BG)
    for name, number in lengths.items():
        refuse_longer(name, number)
    B, M = pre_BM.shape
    if maxima_BG.shape != (B, triton.cdiv(M, GROUP)) or M > WIDEST:
        raise InputError(
            f"maxima {tuple(maxima_BG.shape)} for pre-activations {tuple(pre_BM.shape)}: one for "
            f"each {GROUP} latents is wanted, of at most {WIDEST} latents"
        )


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def list_groups(maxima_BG: Tensor, least: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Each token's groups whose maximum has at least the key `least`, () int32: (B, C) int32,
    rising, unused ones G; and how many there are, (B,) int32.
    """
    B, G = maxima_BG.shape
    groups_BC, groups_B = empty((B, C), least), empty((B,), least)
    rows, width = rows_a_program(B, interpreted_rows=32), next_power(G)
    _groups_from[(triton.cdiv(B, rows),)](
        bits(maxima_BG), groups_BC, groups_B, least, B, G, C,
        BITS=8 * maxima_BG.element_size(), WIDTH=width, SLOTS=next_power(C), ROWS=rows,
        num_warps=warps(width), **OPTIONS,
    )  # fmt: skip
    return groups_BC, groups_B


def emit(
    pre_BM: Tensor,
    groups_BC: Tensor,
    capacity: int,
    *,
    bound_M: Tensor | None = None,
    keys: Tensor | None = None,
    ties_B: Tensor | None = None,
    positive: bool = False,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of what is above `bound_M` in the listed groups; or of what is above a key, one for all
    tokens or one a token, and of what has that key the first ties_B of each token. positive: only
    of what is above 0. Values, 0 instead of negative ones where `relu`, indices, and how many there
    were.
    """
    (B, M), C = pre_BM.shape, groups_BC.shape[1]
    values_BK = empty((B, capacity), pre_BM, torch.float32)
    idx_BK, counts_B = empty((B, capacity), groups_BC), empty((B,), groups_BC)
    rows = rows_a_program(B, interpreted_rows=32)
    chunk = next_power(C) * GROUP if interpreted() else min(next_power(C) * GROUP, CHUNK)
    _emit[(triton.cdiv(B, rows),)](
        pre_BM, bits(pre_BM), groups_BC, pre_BM if bound_M is None else bound_M,
        groups_BC if keys is None else keys, groups_BC if ties_B is None else ties_B,
        values_BK, idx_BK, counts_B, B, M, C, capacity,
        BY_BOUND=bound_M is not None, EACH=keys is not None and keys.numel() == B > 1,
        POSITIVE=positive, RELU=relu, BITS=8 * pre_BM.element_size(), GROUP=GROUP, WIDTH=chunk,
        SLOTS=next_power(capacity), ROWS=rows, num_warps=warps(2 * chunk), **OPTIONS,
    )  # fmt: skip
    return values_BK, idx_BK, counts_B


def lacking(counts_B: Tensor, capacity: int, groups_B: Tensor, C: int) -> Tensor:
    """By how many slots the lists of elements or of groups were too short, () int32."""
    return torch.maximum(counts_B.amax() - capacity, groups_B.amax() - C).clamp_min(0)


def most_groups(G: int, capacity: int) -> int:
    """Groups to list of each token where some may hold nothing that is kept."""
    return min(G, 2 * capacity, LONGEST)


def warps(width: int) -> int:
    """So that a thread holds at most 32 of a row's numbers: more of them spill."""
    return min(max(width // 1024, 1), 16)


@triton.jit
def _best_groups(
    maxima, groups, B, G, C,
    BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    g = tl.arange(0, WIDTH)[None, :]
    inside = (row < B)[:, None] & (g < G)
    key = key_of(tl.load(maxima + row[:, None] * G + g, mask=inside, other=0), BITS)
    chosen = first_k(tl.where(inside, key, LOWEST), inside, C, BITS)
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(groups + row[:, None] * C + place, g + tl.zeros_like(place), mask=chosen)


@triton.jit
def _thresholds(
    pre_bits, groups, keys, ties, B, M, C, k,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The k-th largest key of each token's listed groups, and how many of those that have it are
    among the k largest.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH * GROUP)[None, :]
    latent, inside = candidates(groups, row, row < B, column, M, C, GROUP)
    key = key_of(tl.load(pre_bits + row[:, None] * M + latent, mask=inside, other=0), BITS)
    key = tl.where(inside, key, LOWEST)
    kth = kth_largest(key, k, BITS)
    above = tl.sum((key > kth[:, None]).to(tl.int32), 1)
    tl.store(keys + row, kth, mask=row < B)
    tl.store(ties + row, k - above, mask=row < B)


@triton.jit
def _groups_from(
    maxima, groups, counts, least, B, G, C,
    BITS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    g = tl.arange(0, WIDTH)[None, :]
    inside = (row < B)[:, None] & (g < G)
    key = key_of(tl.load(maxima + row[:, None] * G + g, mask=inside, other=0), BITS)
    chosen = inside & (key >= tl.load(least))
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    rows = row[:, None] * C
    tl.store(groups + rows + place, g + tl.zeros_like(place), mask=chosen & (place < C))
    count = tl.sum(chosen.to(tl.int32), 1)
    slot = tl.arange(0, SLOTS)[None, :]
    unused = (row < B)[:, None] & (slot < C) & (slot >= count[:, None])
    tl.store(groups + rows + slot, tl.zeros_like(slot) + G, mask=unused)
    tl.store(counts + row, count, mask=row < B)


@triton.jit
def _emit(
    pre, pre_bits, groups, bound, keys, ties, values, idx, counts, B, M, C, K,
    BY_BOUND: tl.constexpr, EACH: tl.constexpr, POSITIVE: tl.constexpr, RELU: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if not BY_BOUND:
        kth = tl.load(keys + (row if EACH else row * 0), mask=row < B, other=0)[:, None]
        left = tl.load(ties + row, mask=row < B, other=0)
    count = tl.zeros((ROWS,), tl.int32)
    for start in range(0, C * GROUP, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        latent, inside = candidates(groups, row, row < B, column, M, C, GROUP)
        value = tl.load(pre + row[:, None] * M + latent, mask=inside, other=0.0).to(tl.float32)
        if BY_BOUND:
            chosen = inside & (value > tl.load(bound + latent, mask=inside, other=0.0))
        else:
            key = key_of(tl.load(pre_bits + row[:, None] * M + latent, mask=inside, other=0), BITS)
            if POSITIVE:
                inside = inside & (key > 0)
            equal = inside & (key == kth)
            chosen = inside & (key > kth)
            chosen = chosen | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))
            left -= tl.sum(equal.to(tl.int32), 1)
        place = count[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        kept = chosen & (place < K)
        if RELU:
            # written so that NaN stays
            value = tl.where(value <= 0.0, 0.0, value)
        tl.store(values + row[:, None] * K + place, value, mask=kept)
        tl.store(idx + row[:, None] * K + place, latent, mask=kept)
        count += tl.sum(chosen.to(tl.int32), 1)
    slot = tl.arange(0, SLOTS)[None, :]
    unused = (row < B)[:, None] & (slot < K) & (slot >= count[:, None])
    rows = row[:, None] * K
    tl.store(values + rows + slot, tl.zeros_like(slot).to(tl.float32), mask=unused)
    tl.store(idx + rows + slot, tl.zeros_like(slot) + M, mask=unused)
    tl.store(counts + row, count, mask=row < B)
