"""The kernels as differentiable functions, for a loss of one's own:

    chosen = encode_top_k(x, W_enc, b_enc, b_dec, k)
    out = decode(chosen, W_dec, b_dec)
    my_loss(out, chosen.values_BK).backward()

Products are computed in x's dtype from weights of any, sums in float32. Gradients reach x, both
matrices and both biases; those of the matrices are dense, (M, D), and repeat bitwise. There is no
second derivative.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saezoo_train.kernels.csc import csc
from saezoo_train.kernels.decode import decode as sum_rows
from saezoo_train.kernels.decode import pair_products
from saezoo_train.kernels.encode import encode
from saezoo_train.kernels.select import select_top_k
from saezoo_train.kernels.sums import latent_sums, weight_gradient, weighted_rows

# B tokens, D d_in, M d_sae, K latents of a token


@dataclass(frozen=True)
class Chosen:
    """The latents of each token that are on."""

    values_BK: Tensor
    """float32, not negative; carries a gradient."""
    idx_BK: Tensor
    """int32, rising."""
    order_N: Tensor
    """The slots by latent: see `saezoo_train.kernels.csc`."""
    starts_M1: Tensor
    dtype: torch.dtype
    """What products are computed in."""


def encode_top_k(
    x_BD: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, b_dec_D: Tensor | None, k: int
) -> Chosen:
    """ReLU(top_k(W_enc (x - b_dec) + b_enc)), exact for the pre-activations as they are rounded to
    x's dtype, of equal ones the lower index. b_dec None: nothing is subtracted.
    """
    values_BK, idx_BK, order_N, starts_M1 = _EncodeTopK.apply(x_BD, W_enc_MD, b_enc_M, b_dec_D, k)
    return Chosen(values_BK, idx_BK, order_N, starts_M1, x_BD.dtype)


def decode(chosen: Chosen, W_dec_MD: Tensor, b_dec_D: Tensor | None = None) -> Tensor:
    """sum_k values[b, k] * W_dec[idx[b, k]] (+ b_dec), (B, D) in the dtype of products."""
    places = (chosen.idx_BK, chosen.order_N, chosen.starts_M1)
    return _Decode.apply(chosen.values_BK, W_dec_MD, b_dec_D, *places, chosen.dtype)


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, b_dec_D: Tensor | None, k: int
    ) -> tuple[Tensor, ...]:
        if b_dec_D is not None:
            x_BD = (x_BD.float() - b_dec_D.float()).to(x_BD.dtype)
        x_BD, copy_MD = x_BD.contiguous(), W_enc_MD.to(x_BD.dtype).contiguous()
        pre_BM, maxima_BG = encode(x_BD, copy_MD, b_enc_M.float().contiguous())
        values_BK, idx_BK = select_top_k(pre_BM, maxima_BG, k)
        order_N, starts_M1 = csc(idx_BK, len(W_enc_MD))
        ctx.save_for_backward(x_BD, copy_MD, values_BK, idx_BK, order_N, starts_M1)
        ctx.dtypes = W_enc_MD.dtype, b_enc_M.dtype, None if b_dec_D is None else b_dec_D.dtype
        ctx.mark_non_differentiable(idx_BK, order_N, starts_M1)
        return values_BK, idx_BK, order_N, starts_M1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BK: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, copy_MD, values_BK, idx_BK, order_N, starts_M1 = ctx.saved_tensors
        dpre_BK = (grad_BK * (values_BK > 0)).contiguous()
        places = (order_N, starts_M1)
        weight, bias, pre_bias = ctx.dtypes
        dx_BD, dW_MD, db_enc_M, db_dec_D = None, None, None, None
        if ctx.needs_input_grad[0]:
            dx_BD = sum_rows(dpre_BK, idx_BK, copy_MD)
        if ctx.needs_input_grad[1]:
            dW_MD = weight_gradient(dpre_BK, x_BD, idx_BK, *places).to(weight)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            gb_M = latent_sums(dpre_BK, *places)
            db_enc_M = gb_M.to(bias) if ctx.needs_input_grad[2] else None
            if ctx.needs_input_grad[3]:
                db_dec_D = -weighted_rows(gb_M, copy_MD).to(pre_bias)
        return dx_BD, dW_MD, db_enc_M, db_dec_D, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values_BK: Tensor,
        W_dec_MD: Tensor,
        b_dec_D: Tensor | None,
        idx_BK: Tensor,
        order_N: Tensor,
        starts_M1: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        values_BK, copy_MD = values_BK.contiguous(), W_dec_MD.to(dtype).contiguous()
        ctx.save_for_backward(values_BK, copy_MD, idx_BK, order_N, starts_M1)
        ctx.dtypes = W_dec_MD.dtype, None if b_dec_D is None else b_dec_D.dtype
        bias_D = None if b_dec_D is None else b_dec_D.float().contiguous()
        return sum_rows(values_BK, idx_BK, copy_MD, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, copy_MD, idx_BK, order_N, starts_M1 = ctx.saved_tensors
        grad_BD = grad_BD.contiguous()
        weight, bias = ctx.dtypes
        dvalues_BK, dW_MD, db_D = None, None, None
        if ctx.needs_input_grad[0]:
            dvalues_BK = pair_products(grad_BD, idx_BK, copy_MD)
        if ctx.needs_input_grad[1]:
            dW_MD = weight_gradient(values_BK, grad_BD, idx_BK, order_N, starts_M1).to(weight)
        if ctx.needs_input_grad[2]:
            db_D = grad_BD.sum(0, dtype=torch.float32).to(bias)
        return dvalues_BK, dW_MD, db_D, None, None, None, None
