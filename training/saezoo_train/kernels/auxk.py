"""AuxK in a step of static shapes: the dead latents' rows are gathered into matrices of a capacity
that is known beforehand, and all else is dense products of those.

Where nothing is dead a step does not come here. Formula: `saezoo_train.architectures.auxk`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo_train.kernels import _launch
from saezoo_train.kernels.encode import encode
from saezoo_train.kernels.rows import Extra

# B tokens, D d_in, M d_sae, A room for dead latents

WIDEST = 8_192
"""Columns of which one program can find the largest."""
LOWEST = {torch.float16: 13, torch.bfloat16: 16}
"""The lowest bit of a float32 that a number of this dtype can set."""


@triton.jit
def keep_largest_kernel(
    pre, out, B, A, k, R: tl.constexpr, WIDTH: tl.constexpr, LOWEST: tl.constexpr
):
    """One row a program. The k-th largest is found bit by bit: as an integer, a positive float is
    as large as it is. LOWEST: no number sets a lower bit.
    """
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    places = row[:, None] * A + columns[None, :]
    mask = (row < B)[:, None] & (columns < A)[None, :]
    value = tl.load(pre + places, mask=mask, other=0.0).to(tl.float32)
    value = tl.maximum(value, 0.0)
    key = value.to(tl.int32, bitcast=True)
    bound = tl.zeros_like(row).to(tl.int32)
    for down in range(0, 31 - LOWEST):
        higher = bound | (1 << (30 - down))
        count = tl.sum((key >= higher[:, None]).to(tl.int32), axis=1)
        bound = tl.where(count >= k, higher, bound)
    above = key > bound[:, None]
    equal = (key == bound[:, None]).to(tl.int32)
    left = k - tl.sum(above.to(tl.int32), axis=1)
    kept = above | ((equal > 0) & (tl.cumsum(equal, axis=1) <= left[:, None]))
    value = tl.where(kept, value, 0.0)
    tl.store(out + places, value.to(out.dtype.element_ty), mask=mask)


def keep_largest(pre_BA: Tensor, k: int) -> Tensor:
    """ReLU of what is among the k largest of its row, of equal ones the lower index first, else 0.
    In pre's dtype.
    """
    _launch.checked(pre_BA=pre_BA)
    tokens, width = pre_BA.shape
    if width > WIDEST:
        values_BK, idx_BK = pre_BA.topk(k, dim=-1, sorted=False)
        return torch.zeros_like(pre_BA).scatter_(-1, idx_BK, values_BK.relu())
    out = _launch.empty((tokens, width), pre_BA)
    some = _launch.rows_a_program(tokens)
    keep_largest_kernel[(triton.cdiv(tokens, some),)](
        pre_BA,
        out,
        tokens,
        width,
        k,
        R=some,
        WIDTH=_launch.next_power(width),
        LOWEST=LOWEST.get(pre_BA.dtype, 0),
        num_warps=warps(width),
        **_launch.OPTIONS,
    )
    return out


def warps(width: int) -> int:
    """Warps of a program: with more, the widest rows do not fit into their registers."""
    return 4 if width <= 4096 else 8


def dead_rows(silent_M: Tensor, after: int, capacity: int) -> Tensor:
    """The latents that were silent for more than `after` tokens, rising, (capacity,) int32; M where
    there are no more. Those that find no room are left out. Waits for nothing.
    """
    d_sae = len(silent_M)
    dead_M = silent_M > after
    rank_M = dead_M.cumsum(0) - 1
    # what has no place goes to a last one, which is cut off
    place_M = rank_M.where(dead_M & (rank_M < capacity), capacity)
    latents_M = torch.arange(d_sae, device=silent_M.device, dtype=torch.int32)
    room = torch.full((capacity + 1,), d_sae, device=silent_M.device, dtype=torch.int32)
    return room.scatter_(0, place_M, latents_M)[:capacity]


def auxk(
    xc_BD: Tensor,
    grad_BD: Tensor,
    scale: float,
    W_enc_c: Tensor,
    b_enc_M: Tensor,
    W_dec_c: Tensor,
    dead_A: Tensor,
    k: int,
    coefficient: float,
) -> tuple[Tensor, Extra]:
    """The auxiliary loss, (), before its coefficient, and the gradients of coefficient * loss.

    xc: what the encoder reads; grad, scale: of `decode_loss`, whose error is held fixed. k: kept of
    each token, or all where fewer are dead. Loss and gradients are 0 where the error has no spread,
    or nothing is dead after all.
    """
    d_sae = len(W_enc_c)
    unused_A = dead_A >= d_sae
    safe_A = dead_A.clamp_max(d_sae - 1).long()
    enc_AD, dec_AD = W_enc_c[safe_A], W_dec_c[safe_A]
    bias_A = b_enc_M.float()[safe_A].masked_fill(unused_A, -torch.inf)
    acts_BA = keep_largest(encode(xc_BD, enc_AD, bias_A)[0], min(k, len(dead_A)))

    error_BD = grad_BD.float() / -scale
    missed_BD = (acts_BA @ dec_AD).float() - error_BD
    missed = missed_BD.pow(2).sum(-1).mean()
    spread = (error_BD - error_BD.mean(0)).pow(2).sum(-1).mean()
    inverse = spread.reciprocal().where((spread > 0) & ~unused_A[0], 0)

    dout_BD = (missed_BD * (2 * coefficient / len(xc_BD) * inverse)).to(xc_BD.dtype)
    dpre_BA = (dout_BD @ dec_AD.T) * (acts_BA > 0)
    slots_A = torch.arange(len(dead_A), device=dead_A.device, dtype=torch.int32)
    slot_M = torch.full((d_sae + 1,), -1, device=dead_A.device, dtype=torch.int32)
    slot_M = slot_M.scatter_(0, dead_A.long(), slots_A)[:d_sae].contiguous()
    db_A = dpre_BA.sum(0, dtype=torch.float32)
    return missed * inverse, Extra(slot_M, dpre_BA.T @ xc_BD, acts_BA.T @ dout_BD, db_A)
