"""The losses of a TopK SAE: reconstruction, and AuxK for the dead."""

import torch.nn.functional as F
from torch import Tensor

from saezoo.sparse import top_k


def reconstruction_loss(x_BD: Tensor, out_BD: Tensor, variance: float) -> Tensor:
    """Squared error over the variance of the data about its mean: the batch's FVU. Scalar."""
    return (out_BD - x_BD).pow(2).sum(-1).mean() / variance


def auxk_loss(
    x_BD: Tensor,
    out_BD: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    W_dec_MD: Tensor,
    b_dec_D: Tensor,
    dead: Tensor,
    k: int,
) -> Tensor:
    """How badly the k strongest dead latents explain what the live ones leave, about its own
    variance. Scalar.

    Gao et al. 2024, appendix A.2: ‖e - e_hat‖² / ‖e - mean(e)‖² with e = x - x_hat, held fixed. The
    gradient reaches the encoder of the dead latents too. dead: indices (M_dead,).
    """
    error_BD = (x_BD - out_BD).detach()
    pre = F.linear(x_BD - b_dec_D.detach(), W_enc_MD[dead], b_enc_M[dead])
    idx = top_k(pre.detach(), min(k, dead.numel()))
    acts = F.relu(pre.gather(-1, idx))
    guess_BD = F.embedding_bag(idx, W_dec_MD[dead], mode="sum", per_sample_weights=acts)
    spread = (error_BD - error_BD.mean(0)).pow(2).sum(-1).mean()
    return (guess_BD - error_BD).pow(2).sum(-1).mean() / spread
