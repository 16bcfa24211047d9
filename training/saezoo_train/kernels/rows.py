"""The tensors that a step of kernels reads and changes."""

from dataclasses import dataclass

import torch
from torch import Tensor

# D d_in, M d_sae, A dead latents


@dataclass(frozen=True)
class Rows:
    """Both matrices while they are trained, a contiguous row a latent. Changed in place."""

    W_enc_MD: Tensor
    """float32, as the optimiser sees it."""
    W_dec_MD: Tensor
    m_enc_MD: Tensor
    """Adam's first moment, float32 or bfloat16; so are the other three."""
    v_enc_MD: Tensor
    m_dec_MD: Tensor
    v_dec_MD: Tensor
    W_enc_c_MD: Tensor
    """In the dtype that products are computed in; in float32 it may be W_enc_MD itself."""
    W_dec_c_MD: Tensor
    c_M: Tensor
    """What the encoder adds, float32: bias - <W_enc_c row, b_dec>, so that x is never centred."""


@dataclass(frozen=True)
class Dead:
    """Gradients of some latents' rows beside those of their lists: dense ones of AuxK."""

    slot_M: Tensor
    """Each latent's row in the two below, int32; -1: none."""
    dW_enc_AD: Tensor
    """Without what b_dec takes away: that follows from gb."""
    dW_dec_AD: Tensor


def adam_rates(lr: float, betas: tuple[float, float], step: int) -> list[float]:
    """What `rates`, a float32 tensor (2,), holds at the step-th update, counted from 1: the step
    size lr / (1 - beta1^step) and sqrt(1 - beta2^step), as in torch.optim.Adam. A tensor, because a
    captured graph reads its numbers from memory.
    """
    return [lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5]


def make_rows(
    W_enc_MD: Tensor,
    W_dec_MD: Tensor,
    bias_M: Tensor,
    b_dec_D: Tensor | None,
    compute: torch.dtype,
    moments: torch.dtype = torch.float32,
) -> Rows:
    """A state before the first update: moments are 0; copies and c follow from the weights.
    b_dec_D None: it is not subtracted from the input. The matrices are taken as they are, not
    copied.
    """
    zeros = [torch.zeros_like(W_enc_MD, dtype=moments) for _ in range(4)]
    copy_enc, copy_dec = W_enc_MD.detach().to(compute), W_dec_MD.detach().to(compute)
    c_M = bias_M.detach().float().clone()
    if b_dec_D is not None:
        c_M -= copy_enc.float() @ b_dec_D.detach().float()
    return Rows(W_enc_MD.detach(), W_dec_MD.detach(), *zeros, copy_enc, copy_dec, c_M)
