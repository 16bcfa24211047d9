"""AuxK: the dead latents are asked to explain what the live ones leave (Gao et al. 2024, appendix
A.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.sparse import top_k

# B batch, D d_in, M d_sae, A dead latents


def auxk_loss(
    error_BD: Tensor,
    x_BD: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    W_dec_MD: Tensor,
    b_dec_D: Tensor,
    dead_M: Tensor,
    k: int,
) -> Tensor:
    """‖e - e_hat‖² / ‖e - mean(e)‖², e the error x - x_hat held fixed, e_hat what the k strongest
    dead latents of each token make of x (no b_dec added). Scalar.

    dead_M: bool; at least one is. Gradients reach the dead rows of W_enc, b_enc and W_dec, and
    b_dec through the encoder. 0 where the error has no spread (OpenAI's train.py: nan_to_num).
    """
    dead_A = dead_M.nonzero().flatten()
    error_BD = error_BD.detach()
    # the dead are few: dense products of their rows alone
    pre_BA = F.linear(x_BD - b_dec_D, W_enc_MD[dead_A], b_enc_M[dead_A])
    acts_BA = F.relu(pre_BA)
    if k < len(dead_A):
        kept = torch.zeros_like(pre_BA, dtype=torch.bool)
        kept.scatter_(-1, top_k(pre_BA.detach(), k), True)
        acts_BA = acts_BA * kept
    missed = (acts_BA @ W_dec_MD[dead_A] - error_BD).pow(2).sum(-1).mean()
    spread = (error_BD - error_BD.mean(0)).pow(2).sum(-1).mean()
    return (missed / spread).nan_to_num(0.0, posinf=0.0)
