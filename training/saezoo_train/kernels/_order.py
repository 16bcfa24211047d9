"""Numbers as integers that are ordered as they are, and finding the k-th largest of them bit by
bit: what all selections are made of.
"""

import triton
import triton.language as tl

# R rows, C candidates of a row

LOWEST = tl.constexpr(-(2**31))
"""Below every key: what is masked."""


@triton.jit
def key_of(bits, BITS: tl.constexpr):
    """int32 keys of floats, given their bits: rising as these do, 0 for both zeros."""
    bits = bits.to(tl.int32)
    key = tl.where(bits < 0, bits ^ (0x7FFF if BITS == 16 else 0x7FFFFFFF), bits)
    return tl.where(key == -1, 0, key)


@triton.jit
def kth_largest(key_RC, k, BITS: tl.constexpr):
    """The k-th largest key of each row, (R,). Raised bit by bit, as long as k keys reach it."""
    kth = tl.where(tl.sum((key_RC >= 0).to(tl.int32), 1) >= k, 0, -(1 << (BITS - 1)))
    for bit in range(BITS - 1):
        raised = kth + (1 << (BITS - 2 - bit))
        reach = tl.sum((key_RC >= raised[:, None]).to(tl.int32), 1)
        kth = tl.where(reach >= k, raised, kth)
    return kth


@triton.jit
def first_k(key_RC, inside_RC, k, BITS: tl.constexpr):
    """Which are the k largest of each row, of equal ones the first: (R, C) bool."""
    kth = kth_largest(key_RC, k, BITS)
    above = key_RC > kth[:, None]
    equal = (key_RC == kth[:, None]) & inside_RC
    left = k - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))


@triton.jit
def candidates(groups, row, inside_R, column, M, C, GROUP: tl.constexpr):
    """The latents at these places (1, columns) of each row's listed groups, rising: (R, columns);
    and which of the places hold one.
    """
    listed = (column // GROUP < C) & inside_R[:, None]
    group = tl.load(groups + row[:, None] * C + column // GROUP, mask=listed, other=0)
    latent = group * GROUP + column % GROUP
    return latent, listed & (latent < M)
