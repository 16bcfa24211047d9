"""One sparse step of a TopK SAE in plain torch ops: the reference for faster ones.

Shapes: B batch, D d_in, M d_sae, K active latents. Only the encoder's forward product is dense;
everything else touches the K rows that are on. No gradient of shape (B, M) is made, and no sum
depends on timing: runs repeat bitwise.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.sparse import top_k


class TopKReconstruct(torch.autograd.Function):
    """x_hat = sum_k v_k W_dec[i_k] + b_dec, with (v, i) the K largest of W_enc (x - b_dec) + b_enc,
    after ReLU.

    Returns (x_hat (B, D), v (B, K), i (B, K)); only x_hat is differentiable, with respect to all
    four parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        W_dec_MD: Tensor,
        b_dec_D: Tensor,
        k: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred_BD = x_BD - b_dec_D
        pre_BM = F.linear(centred_BD, W_enc_MD, b_enc_M)
        idx_BK = top_k(pre_BM, k)
        acts_BK = F.relu(pre_BM.gather(-1, idx_BK))
        out_BD = F.embedding_bag(idx_BK, W_dec_MD, mode="sum", per_sample_weights=acts_BK) + b_dec_D
        ctx.save_for_backward(centred_BD, acts_BK, idx_BK, W_enc_MD, W_dec_MD)
        ctx.mark_non_differentiable(acts_BK, idx_BK)
        return out_BD, acts_BK, idx_BK

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        centred_BD, acts_BK, idx_BK, W_enc_MD, W_dec_MD = ctx.saved_tensors
        d_sae, k = W_enc_MD.shape[0], idx_BK.shape[1]
        grad_BD = grad_BD.contiguous()
        grad_acts_BK = sampled_products(grad_BD, W_dec_MD, idx_BK) * (acts_BK > 0)
        # the (token, latent) pairs grouped by latent: each weight row is then one bag of token rows
        latent, order = idx_BK.flatten().sort(stable=True)
        offsets_M = torch.searchsorted(latent, torch.arange(d_sae))
        token = order // k
        grad_W_dec = F.embedding_bag(
            token, grad_BD, offsets_M, mode="sum", per_sample_weights=acts_BK.flatten()[order]
        )
        grad_W_enc = F.embedding_bag(
            token,
            centred_BD,
            offsets_M,
            mode="sum",
            per_sample_weights=grad_acts_BK.flatten()[order],
        )
        grad_b_enc = torch.zeros(d_sae).index_add_(0, idx_BK.flatten(), grad_acts_BK.flatten())
        # b_dec is subtracted before the encoder: summed over the batch first, that path is one mat-
        # vec
        grad_b_dec = grad_BD.sum(0) - grad_b_enc @ W_enc_MD
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None


def sampled_products(g_BD: Tensor, W_MD: Tensor, idx_BK: Tensor, rows: int = 64) -> Tensor:
    """out[b, k] = g[b] . W[idx[b, k]], some tokens at a time to stay within the processor's
    cache.
    """
    parts = [
        torch.bmm(W_MD[index.flatten()].view(*index.shape, -1), g.unsqueeze(-1)).squeeze(-1)
        for g, index in zip(g_BD.split(rows), idx_BK.split(rows), strict=True)
    ]
    return torch.cat(parts)


@torch.no_grad()
def remove_parallel_gradient(W_dec_MD: Tensor, grad_MD: Tensor) -> None:
    """Take out of the gradient of unit rows, in place, the part that would only change their
    length.
    """
    along = (grad_MD * W_dec_MD).sum(-1, keepdim=True)
    grad_MD.addcmul_(along, W_dec_MD, value=-1)


@torch.no_grad()
def normalise_rows(W_dec_MD: Tensor) -> None:
    """Bring every row to length 1, in place."""
    W_dec_MD.div_(W_dec_MD.norm(dim=-1, keepdim=True).clamp_min(1e-12))
