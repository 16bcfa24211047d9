"""The sparse products as differentiable functions: gradients of pairs and of weights, none of shape
(tokens, d_sae).
"""

from typing import Any

import torch
from torch import Tensor

from saezoo_train.ops.active import Active
from saezoo_train.ops.products import decode, latent_sums, pair_products, weight_gradient

# N pairs, B tokens, D d_in, M d_sae


def encode_at(
    pre_N: Tensor,
    x_BD: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor | None,
    active: Active,
    b_dec_D: Tensor | None = None,
) -> Tensor:
    """The pre-activations pre_N = W_enc[latent] . x[token] + b_enc[latent] of the pairs, computed
    when they were selected, as a function of W_enc and b_enc. b_enc_M None: pre_N is without it.

    b_dec_D: where x_BD is activations - b_dec, a function of b_dec too. x itself is data and gets
    no gradient.
    """
    assert not x_BD.requires_grad, "x is data: give b_dec apart"
    return _EncodeAt.apply(pre_N, x_BD, W_enc_MD, b_enc_M, b_dec_D, active)


def decode_at(values_N: Tensor, W_dec_MD: Tensor, active: Active) -> Tensor:
    """The sum of each bag's decoder rows, (bags, D), as a function of the pairs' values and
    W_dec.
    """
    return _DecodeAt.apply(values_N, W_dec_MD, active)


def at_latents(parameter_M: Tensor, active: Active) -> Tensor:
    """parameter[latent[n]] of each pair, (N,). torch's own indexing sums gradients in an order that
    depends on timing.
    """
    return _AtLatents.apply(parameter_M, active)


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre_N: Tensor,
        x_BD: Tensor,
        W_enc_MD: Tensor,
        _b_enc_M: Tensor | None,
        _b_dec_D: Tensor | None,
        active: Active,
    ) -> Tensor:
        ctx.save_for_backward(x_BD, W_enc_MD)
        ctx.active = active
        return pre_N.view_as(pre_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, W_enc_MD = ctx.saved_tensors
        active: Active = ctx.active
        grad_b_M = latent_sums(grad_N, active)
        grad_W_MD = weight_gradient(grad_N, x_BD, active)
        # summed over the tokens first, what reaches b_dec is one product with a vector
        grad_b_dec_D = -(grad_b_M @ W_enc_MD) if ctx.needs_input_grad[4] else None
        grad_b_enc_M = grad_b_M if ctx.needs_input_grad[3] else None
        return None, None, grad_W_MD, grad_b_enc_M, grad_b_dec_D, None


class _DecodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_N: Tensor, W_dec_MD: Tensor, active: Active) -> Tensor:
        ctx.save_for_backward(values_N, W_dec_MD)
        ctx.active = active
        return decode(values_N, active, W_dec_MD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values_N, W_dec_MD = ctx.saved_tensors
        active, grad = ctx.active, grad.contiguous()
        grad_values, grad_W = None, None
        if ctx.needs_input_grad[0]:
            grad_values = pair_products(grad, W_dec_MD, active)
        if ctx.needs_input_grad[1]:
            grad_W = weight_gradient(values_N, grad, active)
        return grad_values, grad_W, None


class _AtLatents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter_M: Tensor, active: Active) -> Tensor:
        ctx.active = active
        return parameter_M[active.latent_N]

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        return latent_sums(grad_N, ctx.active), None
