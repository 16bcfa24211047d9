"""AuxK: the dead latents are asked to explain what the live ones leave (Gao et al. 2024, arXiv
2406.04093, appendix A.2).
"""

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from saezoo.sparse import largest
from saezoo_train.architectures.base import Setting
from saezoo_train.architectures.dictionary import Dictionary, DictionaryOptions

# B batch, D d_in, M d_sae, A dead latents


class AuxKOptions(DictionaryOptions):
    """Options of architectures that revive dead latents by AuxK."""

    auxk: PositiveInt | None = None
    """How many dead latents of each token try to explain what is left. None: half of d_in, rounded
    up (Gao et al. 2024, appendix B.1: a power of two about there).
    """
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of that loss (Gao et al. 2024, appendix A.2). 0: none."""


class AuxKDictionary(Dictionary):
    """A Dictionary with an encoder bias, and AuxK for its dead latents."""

    def __init__(self, options: AuxKOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.b_enc = nn.Parameter(torch.zeros(options.d_sae))

    def auxk(self, x_BD: Tensor, out_BD: Tensor) -> Tensor:
        """The auxiliary loss of a batch, before its coefficient; 0 where nothing is dead."""
        dead_M = self.dead
        if not self.options.auxk_coefficient or not bool(dead_M.any()):
            return x_BD.new_zeros(())
        k = self.options.auxk or -(-x_BD.shape[1] // 2)
        weights = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        return auxk_loss(x_BD - out_BD.detach(), x_BD, *weights, dead_M, k)


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
    b_dec through the encoder. 0 where the error has no spread (as OpenAI's train.py has it).
    """
    dead_A = dead_M.nonzero().flatten()
    error_BD = error_BD.detach()
    # the dead are few: dense products of their rows alone
    pre_BA = F.linear(x_BD - b_dec_D, W_enc_MD.index_select(0, dead_A), b_enc_M[dead_A])
    acts_BA = F.relu(pre_BA)
    if k < len(dead_A):
        kept = torch.zeros_like(pre_BA, dtype=torch.bool)
        kept.scatter_(-1, largest(pre_BA.detach(), k)[1], True)
        acts_BA = acts_BA * kept
    missed = (acts_BA @ W_dec_MD.index_select(0, dead_A) - error_BD).pow(2).sum(-1).mean()
    spread = (error_BD - error_BD.mean(0)).pow(2).sum(-1).mean()
    return missed / spread if spread > 0 else missed * 0
