"""Sums of decoder rows, and what a loss on them gives back to each slot.

`decode_loss` does it all in one pass: the rows of a token's latents are read once, summed to the
reconstruction, and, still in registers, multiplied with the gradient of the squared error. One
program a token; no atomics. `decode` is the library's own kernel.

Formulas: `reference.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saezoo.sparse_gpu import COLUMNS, SLOTS, read_rows, read_slots, sum_rows
from saezoo.sparse_gpu import decode as library_decode
from saezoo_train.kernels import _launch

# B tokens, D d_in or d_out, M d_sae, K slots of a token

FUSED_SLOTS = 64
"""Up to so many slots the rows of a token stay in registers; with more they are read twice."""


@triton.jit
def write_error(out, x, grad, place, inside, scale):
    """out - x of some columns; and scale times that, as it was rounded and written."""
    error = out - tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    error = tl.where(inside, error, 0.0)
    rounded = (scale * error).to(grad.dtype.element_ty)
    tl.store(grad + place, rounded, mask=inside)
    return error, rounded.to(tl.float32)


@triton.jit
def decode_loss_kernel(
    values,
    idx,
    W,
    bias,
    x,
    grad,
    loss,
    dvalues,
    scale,
    M,
    D,
    K,
    KB: tl.constexpr,
    BD: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Reconstruction, squared error, its gradient and that of the values; with RELU, values of 0
    get none. K <= KB.
    """
    token = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, KB)
    latents, numbers, used = read_slots(values, idx, token * K, slots, K, M, RELU)
    squares = tl.zeros([BD], dtype=tl.float32)
    back = tl.zeros([KB], dtype=tl.float32)
    for begin in range(0, D, BD):
        columns = begin + tl.arange(0, BD)
        inside = columns < D
        rows = read_rows(W, latents, columns, used, inside, D)
        sums = tl.sum(numbers[:, None] * rows, axis=0)
        if BIAS:
            sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        error, rounded = write_error(sums, x, grad, token * D + columns, inside, scale)
        squares += error * error
        back += tl.sum(rows * rounded[None, :], axis=1)
    tl.store(loss + token, tl.sum(squares, axis=0))
    tl.store(dvalues + token * K + slots, back, mask=slots < K)


@triton.jit
def decode_error_kernel(
    values,
    idx,
    W,
    bias,
    x,
    grad,
    loss,
    scale,
    M,
    D,
    K,
    KB: tl.constexpr,
    BD: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The same without the gradient of the values, for any K."""
    token = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BD], dtype=tl.float32)
    for begin in range(0, D, BD):
        columns = begin + tl.arange(0, BD)
        inside = columns < D
        sums = sum_rows(values, idx, W, token * K, columns, inside, M, D, K, KB)
        if BIAS:
            sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        error, _ = write_error(sums, x, grad, token * D + columns, inside, scale)
        squares += error * error
    tl.store(loss + token, tl.sum(squares, axis=0))


@triton.jit
def pair_products_kernel(
    rows, values, idx, W, out, M, D, K, KB: tl.constexpr, BD: tl.constexpr, RELU: tl.constexpr
):
    """rows[token] . W[latent] of some slots of a token; RELU: 0 where their value is 0, else values
    is not looked at.
    """
    token = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * KB + tl.arange(0, KB)
    latents, _, used = read_slots(values, idx, token * K, slots, K, M, RELU)
    back = tl.zeros([KB], dtype=tl.float32)
    for begin in range(0, D, BD):
        columns = begin + tl.arange(0, BD)
        inside = columns < D
        row = tl.load(rows + token * D + columns, mask=inside, other=0.0).to(tl.float32)
        back += tl.sum(read_rows(W, latents, columns, used, inside, D) * row[None, :], axis=1)
    tl.store(out + token * K + slots, back, mask=slots < K)


def decode(
    values_BK: Tensor, idx_BK: Tensor, W_dec_MD: Tensor, bias_D: Tensor | None = None
) -> Tensor:
    """out[b] = sum_k values[b, k] * W_dec[idx[b, k]] (+ bias), (B, D) in W_dec's dtype, summed in
    float32.
    """
    _launch.checked(values_BK=values_BK, idx_BK=idx_BK, W_dec_MD=W_dec_MD, bias_D=bias_D)
    return library_decode(values_BK, idx_BK, W_dec_MD, bias_D)


def decode_loss(
    values_BK: Tensor,
    idx_BK: Tensor,
    W_dec_MD: Tensor,
    x_BD: Tensor,
    scale: float,
    bias_D: Tensor | None = None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """With e = decode(values) (+ bias) - x: scale * e in x's dtype, (B, D), the gradient of
    L = scale / 2 * sum e²; ‖e‖² of each token, (B,) float32; and dL/dvalues, (B, K) float32.

    relu: the values are those of a ReLU, and dL/dvalues that of what it was taken of.
    """
    tensors = {"values_BK": values_BK, "idx_BK": idx_BK, "W_dec_MD": W_dec_MD, "x_BD": x_BD}
    _launch.checked(**tensors, bias_D=bias_D)
    (tokens, k), (d_sae, d) = values_BK.shape, W_dec_MD.shape
    grad_BD = _launch.empty((tokens, d), x_BD)
    loss_B = _launch.empty((tokens,), x_BD, torch.float32)
    bias = W_dec_MD if bias_D is None else bias_D
    shared = (values_BK, idx_BK, W_dec_MD, bias, x_BD, grad_BD, loss_B)
    sizes = (scale, d_sae, d, k)
    options = {"BIAS": bias_D is not None, "num_warps": 4, **_launch.OPTIONS}
    if k > FUSED_SLOTS:
        decode_error_kernel[(tokens,)](*shared, *sizes, KB=SLOTS, BD=COLUMNS, **options)
        products = _pair_products(grad_BD, values_BK if relu else None, idx_BK, W_dec_MD)
        return grad_BD, loss_B, products
    dvalues_BK = _launch.empty((tokens, k), x_BD, torch.float32)
    decode_loss_kernel[(tokens,)](
        *shared,
        dvalues_BK,
        *sizes,
        KB=_launch.next_power(k),
        BD=COLUMNS if k <= SLOTS else COLUMNS // 2,
        RELU=relu,
        **options,
    )
    return grad_BD, loss_B, dvalues_BK


def pair_products(rows_BD: Tensor, idx_BK: Tensor, W_MD: Tensor) -> Tensor:
    """out[b, k] = rows[b] . W[idx[b, k]], (B, K) float32: what `decode` gives back to its values.
    0 at unused slots.
    """
    _launch.checked(rows_BD=rows_BD, idx_BK=idx_BK, W_MD=W_MD)
    return _pair_products(rows_BD, None, idx_BK, W_MD)


def _pair_products(
    rows_BD: Tensor, values_BK: Tensor | None, idx_BK: Tensor, W_MD: Tensor
) -> Tensor:
    (tokens, k), (d_sae, d) = idx_BK.shape, W_MD.shape
    out = _launch.empty((tokens, k), rows_BD, torch.float32)
    width = min(SLOTS, _launch.next_power(k))
    pair_products_kernel[(tokens, triton.cdiv(k, width))](
        rows_BD,
        idx_BK if values_BK is None else values_BK,
        idx_BK,
        W_MD,
        out,
        d_sae,
        d,
        k,
        KB=width,
        BD=COLUMNS,
        RELU=values_BK is not None,
        num_warps=4,
        **_launch.OPTIONS,
    )
    return out
