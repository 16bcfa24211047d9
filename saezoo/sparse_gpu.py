"""Sums of decoder rows on a GPU, in Triton: what `SAE.decode` of sparse features runs there, and
half of a training step. Imported only where `saezoo.gpu` says that it can run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# B tokens, D d_out, M d_sae, K slots of a token

SLOTS = 32
"""Rows that are held at a time."""
COLUMNS = 128
"""Columns of them that are."""


@triton.jit
def read_slots(values, idx, base, slots, K, M, SKIP: tl.constexpr):
    """Latents and values of some slots, and which are in use: those with a latent below M, and with
    SKIP only those of another value than 0.
    """
    used = slots < K
    latents = tl.load(idx + base + slots, mask=used, other=M).to(tl.int64)
    used = used & (latents < M)
    numbers = tl.load(values + base + slots, mask=used, other=0.0).to(tl.float32)
    if SKIP:
        used = used & (numbers != 0)
    return latents, numbers, used


@triton.jit
def read_rows(W, latents, columns, used, inside, D):
    """W[latents, columns] as float32, 0 where a slot is not in use."""
    places = latents[:, None] * D + columns[None, :]
    return tl.load(W + places, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def sum_rows(values, idx, W, base, columns, inside, M, D, K, KB: tl.constexpr):
    """sum_k values[k] * W[idx[k], columns] of one token, float32; KB slots at a time."""
    sums = tl.zeros_like(columns).to(tl.float32)
    for first in range(0, K, KB):
        slots = first + tl.arange(0, KB)
        latents, numbers, used = read_slots(values, idx, base, slots, K, M, True)
        rows = read_rows(W, latents, columns, used, inside, D)
        sums += tl.sum(numbers[:, None] * rows, axis=0)
    return sums


@triton.jit
def decode_kernel(
    values, idx, W, bias, out, M, D, K, KB: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr
):
    """One token a program, some columns after others."""
    token = tl.program_id(0).to(tl.int64)
    for begin in range(0, D, BD):
        columns = begin + tl.arange(0, BD)
        inside = columns < D
        sums = sum_rows(values, idx, W, token * K, columns, inside, M, D, K, KB)
        if BIAS:
            sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * D + columns, sums.to(out.dtype.element_ty), mask=inside)


def decode(
    values_BK: Tensor, idx_BK: Tensor, W_dec_MD: Tensor, bias_D: Tensor | None = None
) -> Tensor:
    """out[b] = sum_k values[b, k] * W_dec[idx[b, k]] (+ bias), (B, D) in W_dec's dtype, summed in
    float32. All contiguous; idx int32 or int64, M or more at unused slots (or any with value 0).
    """
    (tokens, k), (d_sae, d_out) = values_BK.shape, W_dec_MD.shape
    out = torch.empty(tokens, d_out, dtype=W_dec_MD.dtype, device=W_dec_MD.device)
    if tokens:
        decode_kernel[(tokens,)](
            values_BK,
            idx_BK,
            W_dec_MD,
            W_dec_MD if bias_D is None else bias_D,
            out,
            d_sae,
            d_out,
            k,
            KB=min(SLOTS, triton.next_power_of_2(max(k, 1))),
            BD=COLUMNS,
            BIAS=bias_D is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
