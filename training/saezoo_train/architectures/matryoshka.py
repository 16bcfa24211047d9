"""Matryoshka BatchTopK (Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv 2503.17547): the first
latents alone must reconstruct too, so general features stay general.
"""

from typing import ClassVar

from pydantic import model_validator
from torch import Tensor

from saezoo.config import Spec
from saezoo_train.architectures.batchtopk import BatchTopK, BatchTopKOptions

# B batch, D d_in, G groups


class MatryoshkaOptions(BatchTopKOptions):
    """A Matryoshka BatchTopK SAE with unit-norm decoder rows and AuxK."""

    group_shares: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """Sizes of the groups as shares of d_sae, first to last; the last takes what is left (the
    paper's 2048, 4096, 8192, 16384 and 34816 of 65536).
    """
    group_weights: tuple[float, ...] | None = None
    """Weight of each nested reconstruction's loss. None: all the same, 1 / groups."""

    @model_validator(mode="after")
    def _groups_fit(self) -> "MatryoshkaOptions":
        if any(share <= 0 for share in self.group_shares):
            raise ValueError(f"group_shares={self.group_shares} are not all above 0")
        if abs(sum(self.group_shares) - 1) > 1e-6:
            raise ValueError(f"group_shares={self.group_shares} do not sum to 1")
        if self.group_weights is not None and len(self.group_weights) != len(self.group_shares):
            raise ValueError(
                f"{len(self.group_weights)} group_weights for {len(self.group_shares)} groups"
            )
        if min(self.group_sizes()) < 1:
            raise ValueError(f"d_sae={self.d_sae} is too small for these groups: one is empty")
        return self

    def group_sizes(self) -> list[int]:
        """Latents in each group."""
        sizes = [int(share * self.d_sae) for share in self.group_shares[:-1]]
        return [*sizes, self.d_sae - sum(sizes)]


class Matryoshka(BatchTopK):
    """BatchTopK over all latents; x_hat_g decodes those of the first g groups.

    Loss: mean over g of FVU(x_hat_g) + auxk_coefficient * AuxK of the last. That is the paper's sum
    up to a factor. The authors' code also averages in the loss of b_dec alone; the paper does not.
    """

    Options: ClassVar[type[Spec]] = MatryoshkaOptions

    @property
    def group_ends(self) -> list[int]:
        """Where each nested group ends."""
        sizes = self.options.group_sizes()
        return [sum(sizes[: at + 1]) for at in range(len(sizes))]

    def losses(self, x_BD: Tensor, outs_GBD: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss of all nested reconstructions, and the FVU of the whole."""
        fvus_G = (outs_GBD - x_BD).pow(2).sum(-1).mean(-1) / self.setting.variance
        weights = self.options.group_weights
        loss = fvus_G.mean() if weights is None else fvus_G @ fvus_G.new_tensor(weights)
        return loss, fvus_G[-1]
