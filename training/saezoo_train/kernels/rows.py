"""The tensors that an update reads and changes."""

from dataclasses import dataclass

import torch
from torch import Tensor

# D d_in, M d_sae, A dead latents


@dataclass(frozen=True)
class Rows:
    """Both matrices while they are trained, (M, D) each, a contiguous row a latent. Changed in
    place.
    """

    W_enc: Tensor
    """float32, as the optimiser sees it."""
    W_dec: Tensor
    enc_m: Tensor
    """Adam's first moment, float32 or bfloat16; all four have the same dtype."""
    enc_v: Tensor
    dec_m: Tensor
    dec_v: Tensor
    W_enc_c: Tensor
    """In the dtype that products are computed in; in float32 it may be W_enc itself."""
    W_dec_c: Tensor


@dataclass(frozen=True)
class Extra:
    """Gradients of some latents beside those of their lists: the dense ones of AuxK."""

    slot_M: Tensor
    """Each latent's row in the others, int32; -1: none."""
    dW_enc_AD: Tensor
    dW_dec_AD: Tensor
    db_A: Tensor
    """Sums of what reached these latents' pre-activations, float32."""


def adam_rates(lr: float, betas: tuple[float, float], step: int) -> tuple[float, float]:
    """What `rates`, a float32 tensor (2,), holds at the step-th update, counted from 1: the step
    size lr / (1 - beta1^step) and sqrt(1 - beta2^step), as in torch.optim.Adam. A tensor, because a
    captured graph reads its numbers from memory.
    """
    return lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5


def make_rows(
    W_enc: Tensor, W_dec: Tensor, compute: torch.dtype, moments: torch.dtype = torch.float32
) -> Rows:
    """A state before the first update. The matrices are taken as they are, not copied; the copies
    are `compute`'s, or the matrices themselves where they have that dtype.
    """
    W_enc, W_dec = W_enc.detach(), W_dec.detach()
    enc_m, enc_v, dec_m, dec_v = (torch.zeros_like(W_enc, dtype=moments) for _ in range(4))
    copies = W_enc.to(compute), W_dec.to(compute)
    return Rows(W_enc, W_dec, enc_m, enc_v, dec_m, dec_v, *copies)
