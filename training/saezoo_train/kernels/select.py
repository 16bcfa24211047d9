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
from saezoo_train.kernels import LONGEST
from saezoo_train.kernels._launch import (
    OPTIONS,
    checked,
    empty,
    next_power,
    refuse_longer,
    rows_a_program,
)
from saezoo_train.kernels._order import LOWEST, candidates, first_k, key_of
from saezoo_train.kernels.encode import GROUP

# B tokens, M d_sae, G groups of latents, C listed groups of a token, K slots of a token

MOST_GROUPS = 2**15
"""Maxima of one token that a program can hold: latents up to a million."""


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
    values_BK, idx_BK = empty((B, k), pre_BM, torch.float32), empty((B, k), pre_BM, torch.int32)
    rows = rows_a_program(B, interpreted_rows=32)
    grid = (triton.cdiv(B, rows),)
    width = next_power(G)
    _best_groups[grid](
        bits(maxima_BG), groups_BC, B, G, C,
        BITS=8 * maxima_BG.element_size(), WIDTH=width, ROWS=rows, num_warps=_warps(width),
        **OPTIONS,
    )  # fmt: skip
    width = next_power(C)
    _best_elements[grid](
        pre_BM, bits(pre_BM), groups_BC, values_BK, idx_BK, B, M, C, k,
        RELU=relu, BITS=8 * pre_BM.element_size(), GROUP=GROUP, WIDTH=width, ROWS=rows,
        num_warps=_warps(width * GROUP), **OPTIONS,
    )  # fmt: skip
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
    (B, M), G = pre_BM.shape, maxima_BG.shape[1]
    if maxima_BG.shape != (B, triton.cdiv(M, GROUP)) or G > MOST_GROUPS:
        raise InputError(
            f"maxima {tuple(maxima_BG.shape)} for pre-activations {tuple(pre_BM.shape)}: one for "
            f"each {GROUP} latents is wanted, of at most {MOST_GROUPS * GROUP} latents"
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
        num_warps=_warps(width), **OPTIONS,
    )  # fmt: skip
    return groups_BC, groups_B


def emit(
    pre_BM: Tensor,
    groups_BC: Tensor,
    capacity: int,
    *,
    bound_M: Tensor | None = None,
    key: Tensor | None = None,
    ties_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of what is above `bound_M` in the listed groups; or of what has more than the key, and
    of those that have it the first ties_B of each token. Values, indices, and how many there were.
    """
    (B, M), C = pre_BM.shape, groups_BC.shape[1]
    values_BK = empty((B, capacity), pre_BM, torch.float32)
    idx_BK, counts_B = empty((B, capacity), groups_BC), empty((B,), groups_BC)
    rows, width = rows_a_program(B, interpreted_rows=32), next_power(C)
    _emit[(triton.cdiv(B, rows),)](
        pre_BM, bits(pre_BM), groups_BC, pre_BM if bound_M is None else bound_M,
        groups_BC if key is None else key, groups_BC if ties_B is None else ties_B,
        values_BK, idx_BK, counts_B, B, M, C, capacity,
        BY_BOUND=bound_M is not None, BITS=8 * pre_BM.element_size(), GROUP=GROUP, WIDTH=width,
        SLOTS=next_power(capacity), ROWS=rows, num_warps=_warps(width * GROUP), **OPTIONS,
    )  # fmt: skip
    return values_BK, idx_BK, counts_B


def lacking(counts_B: Tensor, capacity: int, groups_B: Tensor, C: int) -> Tensor:
    """By how many slots the lists of elements or of groups were too short, () int32."""
    return torch.maximum(counts_B.amax() - capacity, groups_B.amax() - C).clamp_min(0)


def most_groups(G: int, capacity: int) -> int:
    """Groups to list of each token where some may hold nothing that is kept."""
    return min(G, 2 * capacity, LONGEST)


def _warps(width: int) -> int:
    """So that a thread holds at most 64 of a row's numbers."""
    return min(max(width // 2048, 1), 16)


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
def _best_elements(
    pre, pre_bits, groups, values, idx, B, M, C, k,
    RELU: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    latent, inside = candidates(groups, row, row < B, M, C, GROUP, WIDTH)
    key = key_of(tl.load(pre_bits + row[:, None] * M + latent, mask=inside, other=0), BITS)
    chosen = first_k(tl.where(inside, key, LOWEST), inside, k, BITS)
    place = row[:, None] * k + tl.cumsum(chosen.to(tl.int32), 1) - 1
    value = tl.load(pre + row[:, None] * M + latent, mask=chosen, other=0.0).to(tl.float32)
    if RELU:
        # written so that NaN stays
        value = tl.where(value <= 0.0, 0.0, value)
    tl.store(values + place, value, mask=chosen)
    tl.store(idx + place, latent, mask=chosen)


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
    pre, pre_bits, groups, bound, tau, ties, values, idx, counts, B, M, C, K,
    BY_BOUND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    latent, inside = candidates(groups, row, row < B, M, C, GROUP, WIDTH)
    value = tl.load(pre + row[:, None] * M + latent, mask=inside, other=0.0).to(tl.float32)
    if BY_BOUND:
        chosen = inside & (value > tl.load(bound + latent, mask=inside, other=0.0))
    else:
        key = key_of(tl.load(pre_bits + row[:, None] * M + latent, mask=inside, other=0), BITS)
        kth = tl.load(tau)
        equal = inside & (key == kth) & (key > 0)
        rank = tl.cumsum(equal.to(tl.int32), 1)
        allowed = tl.load(ties + row, mask=row < B, other=0)
        chosen = (inside & (key > kth) & (key > 0)) | (equal & (rank <= allowed[:, None]))
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    rows = row[:, None] * K
    kept = chosen & (place < K)
    tl.store(values + rows + place, value, mask=kept)
    tl.store(idx + rows + place, latent, mask=kept)
    count = tl.sum(chosen.to(tl.int32), 1)
    slot = tl.arange(0, SLOTS)[None, :]
    unused = (row < B)[:, None] & (slot < K) & (slot >= count[:, None])
    tl.store(values + rows + slot, tl.zeros_like(slot).to(tl.float32), mask=unused)
    tl.store(idx + rows + slot, tl.zeros_like(slot) + M, mask=unused)
    tl.store(counts + row, count, mask=row < B)
