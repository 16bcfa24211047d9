"""The encoder's product, with the maxima of groups of latents from the same registers: the
pre-activations are written once, and the selection reads little more than the maxima.

The tile is computed from pointers on any GPU, and through the tensor memory accelerator of sm_90
where shapes allow: there programs stay and take tile after tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo.errors import InputError
from saezoo_train.kernels._launch import OPTIONS, checked, empty, interpreted, next_power

# B tokens, D d_in, M d_sae, G groups of latents

GROUP = 32
"""Latents that one maximum stands for."""


@dataclass(frozen=True)
class Tile:
    """How a product is cut: tokens, latents and d_in of a tile; tiles of tokens that follow each
    other, so that the weights' tiles stay in the L2 cache; warps and stages.
    """

    tokens: int
    latents: int
    inner: int
    along: int
    warps: int
    stages: int


HOPPER = Tile(128, 256, 64, 8, 8, 3)
AMPERE = Tile(128, 128, 32, 8, 4, 4)
FLOAT32 = Tile(64, 64, 32, 8, 4, 2)
"""For who wants exact products: any GPU has room for it."""


def encode(
    x_BD: Tensor,
    W_enc_MD: Tensor,
    b_M: Tensor,
    *,
    offset_M: Tensor | None = None,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """pre = x W_encᵀ + b, rounded once to x's dtype, (B, M); and the maxima of every 32 latents of
    the rounded values, (B, ceil(M / 32)), in that dtype.

    b: float32. offset: maxima are then those of pre - offset, float32: positive exactly where a
    latent of the group is above its offset. tma None: where the GPU and the shapes allow it.
    Raises InputError for tensors that do not fit together.
    """
    (B, D), M = x_BD.shape, len(W_enc_MD)
    x_BD = x_BD.contiguous()
    checked(x=x_BD, W_enc=W_enc_MD, b=b_M, offset=offset_M)
    if W_enc_MD.shape != (M, D) or W_enc_MD.dtype != x_BD.dtype or b_M.shape != (M,):
        raise InputError(
            f"x {tuple(x_BD.shape)} {x_BD.dtype}, W_enc {tuple(W_enc_MD.shape)} {W_enc_MD.dtype} "
            f"and b {tuple(b_M.shape)} do not fit together"
        )
    pre_BM = empty((B, M), x_BD)
    maxima_BG = empty(
        (B, triton.cdiv(M, GROUP)), x_BD, torch.float32 if offset_M is not None else None
    )
    if not B:
        return pre_BM, maxima_BG
    tma = _fits_tma(x_BD, W_enc_MD, pre_BM) if tma is None else tma
    tile = tile or _tile(x_BD, M)
    (_launch_tma if tma else _launch_pointers)(
        x_BD, W_enc_MD, b_M, b_M if offset_M is None else offset_M, pre_BM, maxima_BG,
        tile, offset_M is not None,
    )  # fmt: skip
    return pre_BM, maxima_BG


def _tile(x_BD: Tensor, d_sae: int) -> Tile:
    if interpreted():
        sides = len(x_BD), max(d_sae, GROUP), x_BD.shape[1]
        tokens, latents, inner = (min(next_power(side), 256) for side in sides)
        return Tile(tokens, latents, inner, 2, 4, 1)
    if x_BD.element_size() == 4:
        return FLOAT32
    return HOPPER if torch.cuda.get_device_capability(x_BD.device) >= (9, 0) else AMPERE


def _fits_tma(*tensors: Tensor) -> bool:
    """Descriptors want rows and addresses that are multiples of 16 bytes, and sm_90."""
    if interpreted() or torch.cuda.get_device_capability(tensors[0].device) < (9, 0):
        return False
    return all(
        tensor.element_size() == 2
        and tensor.shape[1] * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def _launch_pointers(
    x: Tensor, w: Tensor, b: Tensor, offset: Tensor, pre: Tensor, maxima: Tensor, tile: Tile,
    has_offset: bool,
) -> None:  # fmt: skip
    (B, D), M = x.shape, len(w)
    grid = (triton.cdiv(B, tile.tokens) * triton.cdiv(M, tile.latents),)
    _encode[grid](
        x, w, b, offset, pre, maxima, B, D, M, maxima.shape[1],
        HAS_OFFSET=has_offset, EVEN=D % tile.inner == 0, UPCAST=interpreted(), GROUP=GROUP,
        BB=tile.tokens, BM=tile.latents, BD=tile.inner, ALONG=tile.along,
        num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip


def _launch_tma(
    x: Tensor, w: Tensor, b: Tensor, offset: Tensor, pre: Tensor, maxima: Tensor, tile: Tile,
    has_offset: bool,
) -> None:  # fmt: skip
    from triton.tools.tensor_descriptor import TensorDescriptor

    (B, D), M = x.shape, len(w)
    tiles = triton.cdiv(B, tile.tokens) * triton.cdiv(M, tile.latents)
    programs = 3 if interpreted() else _processors(x.device)
    _encode_tma[(min(programs, tiles),)](
        TensorDescriptor.from_tensor(x, [tile.tokens, tile.inner]),
        TensorDescriptor.from_tensor(w, [tile.latents, tile.inner]),
        b, offset,
        TensorDescriptor.from_tensor(pre, [tile.tokens, tile.latents // 2]),
        maxima, B, D, M, maxima.shape[1], min(programs, tiles),
        HAS_OFFSET=has_offset, UPCAST=interpreted(), GROUP=GROUP,
        BB=tile.tokens, BM=tile.latents, BD=tile.inner, ALONG=tile.along,
        num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip


def _processors(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)


@triton.jit
def _place(program, B, M, BB: tl.constexpr, BM: tl.constexpr, ALONG: tl.constexpr):
    """Which tile a program takes: ALONG tiles of tokens for one of latents, then the next of
    latents.
    """
    tiles_b = tl.cdiv(B, BB)
    of_band = ALONG * tl.cdiv(M, BM)
    first = program // of_band * ALONG
    rows = tl.minimum(tiles_b - first, ALONG)
    within = program % of_band
    return first + within % rows, within // rows


@triton.jit
def _maxima(value, m, M, offset, HAS_OFFSET: tl.constexpr, GROUP: tl.constexpr):
    """(tokens, groups) of rounded pre-activations (tokens, latents); m: their latents."""
    value = value.to(tl.float32)
    if HAS_OFFSET:
        value -= tl.load(offset + m, mask=m < M, other=0.0)[None, :]
    value = tl.where((m < M)[None, :], value, float("-inf"))
    return tl.max(tl.reshape(value, (value.shape[0], value.shape[1] // GROUP, GROUP)), axis=2)


@triton.jit
def _encode(
    x, w, bias, offset, pre, maxima, B, D, M, G,
    HAS_OFFSET: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    at_b, at_m = _place(tl.program_id(0), B, M, BB, BM, ALONG)
    b = at_b * BB + tl.arange(0, BB)
    m = at_m * BM + tl.arange(0, BM)
    # rows past the end read the last one again: only the inner dimension needs a mask
    x_rows = x + tl.minimum(b, B - 1).to(tl.int64)[:, None] * D
    w_rows = w + tl.minimum(m, M - 1).to(tl.int64)[None, :] * D
    acc = tl.zeros((BB, BM), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        if EVEN:
            x_tile = tl.load(x_rows + d[None, :])
            w_tile = tl.load(w_rows + d[:, None])
        else:
            x_tile = tl.load(x_rows + d[None, :], mask=(d < D)[None, :], other=0.0)
            w_tile = tl.load(w_rows + d[:, None], mask=(d < D)[:, None], other=0.0)
        if UPCAST:
            x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    acc += tl.load(bias + m, mask=m < M, other=0.0)[None, :]
    value = acc.to(pre.dtype.element_ty)
    inside = (b < B)[:, None] & (m < M)[None, :]
    tl.store(pre + b.to(tl.int64)[:, None] * M + m[None, :], value, mask=inside)
    best = _maxima(value, m, M, offset, HAS_OFFSET, GROUP)
    g = at_m * (BM // GROUP) + tl.arange(0, BM // GROUP)
    tl.store(
        maxima + b.to(tl.int64)[:, None] * G + g[None, :],
        best.to(maxima.dtype.element_ty),
        mask=(b < B)[:, None] & (g < G)[None, :],
    )


@triton.jit
def _encode_tma(
    x, w, bias, offset, pre, maxima, B, D, M, G, programs,
    HAS_OFFSET: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    BB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BM // 2
    tiles = tl.cdiv(B, BB) * tl.cdiv(M, BM)
    for tile in tl.range(tl.program_id(0), tiles, programs):
        at_b, at_m = _place(tile, B, M, BB, BM, ALONG)
        acc = tl.zeros((BB, BM), tl.float32)
        # what lies outside of a tensor is read as 0 and not written
        for start in range(0, D, BD):
            x_tile = x.load([at_b * BB, start])
            w_tile = w.load([at_m * BM, start])
            if UPCAST:
                x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
            acc = tl.dot(x_tile, tl.trans(w_tile), acc)
        b = at_b * BB + tl.arange(0, BB)
        # one half at a time: less shared memory for what is written
        left, right = tl.split(tl.permute(tl.reshape(acc, (BB, 2, HALF)), (0, 2, 1)))
        for half in tl.static_range(2):
            part = left if half == 0 else right
            m = at_m * BM + half * HALF + tl.arange(0, HALF)
            part += tl.load(bias + m, mask=m < M, other=0.0)[None, :]
            value = part.to(pre.dtype)
            pre.store([at_b * BB, at_m * BM + half * HALF], value)
            best = _maxima(value, m, M, offset, HAS_OFFSET, GROUP)
            g = (at_m * BM + half * HALF) // GROUP + tl.arange(0, HALF // GROUP)
            tl.store(
                maxima + b.to(tl.int64)[:, None] * G + g[None, :],
                best.to(maxima.dtype.element_ty),
                mask=(b < B)[:, None] & (g < G)[None, :],
            )
