"""The update of a matrix in one pass over its rows: gradient, removal of the part along the row,
Adam, length 1 again, and the copy that the products read. A row's gradient lives in registers only:
there is none of shape (M, D).

One latent a program. Rows are as wide as they are: a row of 768 is one piece of 512 and one of 256.

Formulas: `reference.py`; Adam as in torch.optim.Adam.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo_train.kernels import _launch
from saezoo_train.kernels.adam import adam
from saezoo_train.kernels.rows import Extra, Rows
from saezoo_train.kernels.sums import (
    SPLIT,
    block_sums,
    latent_sums,
    list_sums,
    unroll,
    weighted_rows,
)

# B tokens, D d_in, M d_sae, K slots of a token, A dead latents


@dataclass(frozen=True)
class AdamStep:
    """What Adam is told: see `update_rows`."""

    rates_2: Tensor
    betas: tuple[float, float]
    eps: float
    seed: Tensor | None


@triton.jit
def _add_extra(sums, extra, slot, columns, D):
    places = slot.to(tl.int64)[:, None] * D + columns[None, :]
    mask = (slot >= 0)[:, None] & (columns < D)[None, :]
    return sums + tl.load(extra + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def update_kernel(
    W,
    m,
    v,
    copy,
    weights,
    rows,
    order,
    starts,
    partial,
    slots,
    extra,
    pull,
    norms,
    rates,
    seed,
    M,
    D,
    K,
    R: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    UNIT: tl.constexpr,
    EXTRA: tl.constexpr,
    PULL: tl.constexpr,
    NORMS: tl.constexpr,
    CHANCE: tl.constexpr,
):
    """The whole of R rows: columns below D1, and D2 further ones."""
    latent = tl.program_id(0) * R + tl.arange(0, R)
    valid = latent < M
    first = tl.load(starts + latent, mask=valid, other=0)
    last = tl.load(starts + latent + 1, mask=valid, other=0)
    base = latent.to(tl.int64)[:, None] * D
    columns1 = tl.arange(0, D1)
    columns2 = D1 + tl.arange(0, D2) if D2 > 0 else columns1
    places1, places2 = base + columns1[None, :], base + columns2[None, :]
    mask1 = valid[:, None] & (columns1 < D)[None, :]
    mask2 = valid[:, None] & (columns2 < D)[None, :]

    g1, g2 = list_sums(
        weights, rows, order, partial, first, last, columns1, columns2, D, K, D2 > 0, SPLIT, UNROLL
    )
    if EXTRA:
        slot = tl.load(slots + latent, mask=valid, other=-1)
        g1 = _add_extra(g1, extra, slot, columns1, D)
        if D2 > 0:
            g2 = _add_extra(g2, extra, slot, columns2, D)
    w1 = tl.load(W + places1, mask=mask1, other=0.0)
    along, square = tl.sum(g1 * w1, axis=1), tl.sum(w1 * w1, axis=1)
    if D2 > 0:
        w2 = tl.load(W + places2, mask=mask2, other=0.0)
        along += tl.sum(g2 * w2, axis=1)
        square += tl.sum(w2 * w2, axis=1)

    # what is added to the gradient along the row
    factor = tl.zeros_like(along)
    if PULL:
        norm = tl.maximum(tl.sqrt(square), 1e-12)
        factor = tl.load(pull + latent, mask=valid, other=0.0) / norm
    if UNIT:
        factor = -along
    g1 += factor[:, None] * w1
    w1 = adam(w1, g1, m, v, places1, mask1, rates, seed, BETA1, BETA2, EPS, CHANCE)
    square = tl.sum(tl.where(mask1, w1 * w1, 0.0), axis=1)
    if D2 > 0:
        g2 += factor[:, None] * w2
        w2 = adam(w2, g2, m, v, places2, mask2, rates, seed, BETA1, BETA2, EPS, CHANCE)
        square += tl.sum(tl.where(mask2, w2 * w2, 0.0), axis=1)

    norm = tl.sqrt(square)
    if UNIT:
        length = tl.maximum(norm, 1e-12)
        norm = norm / length
        w1 = w1 / length[:, None]
        if D2 > 0:
            w2 = w2 / length[:, None]
    if NORMS:
        tl.store(norms + latent, norm, mask=valid)
    tl.store(W + places1, w1, mask=mask1)
    tl.store(copy + places1, w1.to(copy.dtype.element_ty), mask=mask1)
    if D2 > 0:
        tl.store(W + places2, w2, mask=mask2)
        tl.store(copy + places2, w2.to(copy.dtype.element_ty), mask=mask2)


def update_rows(
    rows: Rows,
    x_BD: Tensor,
    grad_BD: Tensor,
    values_BK: Tensor,
    dpre_BK: Tensor,
    idx_BK: Tensor,
    order_N: Tensor,
    starts_M1: Tensor,
    rates_2: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    unit_rows: bool = True,
    extra: Extra | None = None,
    pull_M: Tensor | None = None,
    norms_M: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One update of both matrices, their moments and copies, in place. Returns gb, (M,) float32,
    the sum of what reached each latent's pre-activation, and sum_m gb[m] * W_enc_c[m], (D,)
    float32, with the rows as they were: what b_dec gets through the encoder, negated.

    x: what the encoder read; grad: dL/dout. Gradient of row m of W_enc: sum of dpre * x over the
    latent's slots; of W_dec: sum of values * grad; plus what `extra` has. order, starts: of `csc`.
    unit_rows: the decoder's rows have length 1 and keep it. pull_M: added times the row's
    direction to the decoder's gradient, without unit_rows only: for L1 norms times the row's
    length. norms_M: written with the decoder's new norms. seed: int32 (1,), another number each
    step, needed where moments are bfloat16.
    """
    assert pull_M is None or not unit_rows, "a pull along unit rows would be removed again"
    lists = {"values_BK": values_BK, "dpre_BK": dpre_BK, "idx_BK": idx_BK, "order_N": order_N}
    _launch.checked(x_BD=x_BD, grad_BD=grad_BD, **lists, starts_M1=starts_M1, **vars(rows))
    gb_M = latent_sums(dpre_BK, order_N, starts_M1)
    if extra is not None:
        added_M = extra.db_A[extra.slot_M.clamp_min(0).long()]
        gb_M += added_M.where(extra.slot_M >= 0, 0)
    enc_part_D = weighted_rows(gb_M, rows.W_enc_c)
    places, step = (idx_BK, order_N, starts_M1), AdamStep(rates_2, betas, eps, seed)
    _update(
        (rows.W_enc, rows.enc_m, rows.enc_v, rows.W_enc_c), dpre_BK, x_BD, *places, step,
        extra=None if extra is None else (extra.slot_M, extra.dW_enc_AD),
    )  # fmt: skip
    _update(
        (rows.W_dec, rows.dec_m, rows.dec_v, rows.W_dec_c), values_BK, grad_BD, *places, step,
        extra=None if extra is None else (extra.slot_M, extra.dW_dec_AD),
        unit_rows=unit_rows, pull_M=pull_M, norms_M=norms_M,
    )  # fmt: skip
    return gb_M, enc_part_D


def _update(
    matrix: tuple[Tensor, Tensor, Tensor, Tensor],
    weights_BK: Tensor,
    rows_BD: Tensor,
    idx_BK: Tensor,
    order_N: Tensor,
    starts_M1: Tensor,
    step: AdamStep,
    *,
    extra: tuple[Tensor, Tensor] | None,
    unit_rows: bool = False,
    pull_M: Tensor | None = None,
    norms_M: Tensor | None = None,
) -> None:
    """A matrix, its moments and its copy."""
    d_sae, d = matrix[0].shape
    by_chance = matrix[1].dtype == torch.bfloat16
    assert step.seed is not None or not by_chance, "moments in bfloat16 need a seed"
    first, rest = pieces(d)
    some = _launch.rows_a_program(d_sae)
    update_kernel[(triton.cdiv(d_sae, some),)](
        *matrix,
        weights_BK,
        rows_BD,
        order_N,
        starts_M1,
        block_sums(weights_BK, rows_BD, idx_BK, order_N, d_sae),
        *(extra or (starts_M1, rows_BD)),
        starts_M1 if pull_M is None else pull_M,
        step.rates_2 if norms_M is None else norms_M,
        step.rates_2,
        starts_M1 if step.seed is None else step.seed,
        d_sae,
        d,
        weights_BK.shape[1],
        R=some,
        D1=first,
        D2=rest,
        SPLIT=SPLIT,
        UNROLL=unroll(first),
        BETA1=step.betas[0],
        BETA2=step.betas[1],
        EPS=step.eps,
        UNIT=unit_rows,
        EXTRA=extra is not None,
        PULL=pull_M is not None,
        NORMS=norms_M is not None,
        CHANCE=by_chance,
        num_warps=warps(d, by_chance),
        **_launch.OPTIONS,
    )


def pieces(d: int) -> tuple[int, int]:
    """A row's width as two powers of two, the second 0 where one is enough: a single one would be
    1,024 for 768.
    """
    first = 1 << d.bit_length() - 1
    return first, _launch.next_power(d - first) if d > first else 0


def warps(d: int, by_chance: bool) -> int:
    """Warps of a program: as few as need no memory for registers."""
    return 16 if d >= 3072 else 8 if d > 1536 or by_chance else 4
