"""Adam in registers, and the update of a vector by it. The arithmetic is torch.optim.Adam's.

Moments may be bfloat16. Then they are rounded up or down by chance: to the nearest, a second moment
that should shrink by a thousandth a step would not change at all.

Formulas: `reference.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from saezoo_train.kernels import _launch


@triton.jit
def _round_by_chance(value, bits):
    """float32 to what bfloat16 can hold, up or down so that the mean is kept; bits: 16 random
    ones.
    """
    whole = (value.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
    return whole.to(tl.float32, bitcast=True)


@triton.jit
def adam(
    p,
    g,
    m_at,
    v_at,
    places,
    mask,
    rates,
    seed,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CHANCE: tl.constexpr,
):
    """p after a step; writes both moments. CHANCE: they are bfloat16."""
    m = tl.load(m_at + places, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_at + places, mask=mask, other=0.0).to(tl.float32)
    m = m + (g - m) * (1 - BETA1)
    v = v * BETA2 + g * g * (1 - BETA2)
    kept_m, kept_v = m, v
    if CHANCE:
        # a hash of the place and of a number that changes every step
        noise = places.to(tl.uint32) * 0x9E3779B1 + tl.load(seed).to(tl.uint32)
        noise = (noise ^ (noise >> 16)) * 0x7FEB352D
        noise = (noise ^ (noise >> 15)) * 0x846CA68B
        noise = noise ^ (noise >> 16)
        kept_m = _round_by_chance(m, noise & 0xFFFF)
        kept_v = _round_by_chance(v, noise >> 16)
    tl.store(m_at + places, kept_m.to(m_at.dtype.element_ty), mask=mask)
    tl.store(v_at + places, kept_v.to(v_at.dtype.element_ty), mask=mask)
    return p - tl.load(rates) * m / (tl.sqrt(v) / tl.load(rates + 1) + EPS)


@triton.jit
def update_vector_kernel(
    p,
    m,
    v,
    g,
    rates,
    least,
    N,
    BLOCK: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LEAST: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < N
    old = tl.load(p + places, mask=mask, other=0.0)
    grad = tl.load(g + places, mask=mask, other=0.0).to(tl.float32)
    new = adam(old, grad, m, v, places, mask, rates, rates, BETA1, BETA2, EPS, False)
    if LEAST:
        new = tl.maximum(new, least)
    tl.store(p + places, new, mask=mask)


def update_vector(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    rates_2: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    least: float | None = None,
) -> None:
    """Adam on a vector, in place; all float32. rates_2: see `adam_rates`. least: what p is kept at
    or above afterwards.
    """
    _launch.checked(p=p, m=m, v=v, grad=grad, rates_2=rates_2)
    update_vector_kernel[(triton.cdiv(p.numel(), 1024),)](
        p,
        m,
        v,
        grad,
        rates_2,
        least or 0.0,
        p.numel(),
        BLOCK=1024,
        BETA1=betas[0],
        BETA2=betas[1],
        EPS=eps,
        LEAST=least is not None,
        num_warps=4,
        **_launch.OPTIONS,
    )
