"""TopK with AuxK and Multi-TopK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders",
arXiv 2406.04093).
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from saezoo.config import SAEConfig, Spec
from saezoo_train.architectures.auxk import auxk_loss
from saezoo_train.architectures.base import Setting, StepOutput
from saezoo_train.architectures.dictionary import Dictionary, DictionaryOptions
from saezoo_train.ops import Active, decode_at, encode_at, select_top_k

# B batch, D d_in, M d_sae, K latents per token


class AuxKOptions(DictionaryOptions):
    """Options of architectures that revive dead latents by AuxK."""

    auxk: PositiveInt | None = None
    """How many dead latents of each token try to explain what is left. None: d_in / 2, rounded up
    (Gao et al. 2024, appendix B.1: a power of two about there).
    """
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of that loss (Gao et al. 2024, appendix A.2). 0: none."""


class KOptions(AuxKOptions):
    """Options of architectures whose sparsity is a number of latents."""

    k: PositiveInt = 32
    """Latents on per token (BatchTopK, Matryoshka: on average)."""
    k_start: PositiveInt | None = None
    """k at the first step; falls linearly to k. None: k throughout. Annealing k is common practice
    to keep latents alive early, such as in Bussmann et al.'s and Marks et al.'s trainers.
    """
    k_steps: int = Field(default=0, ge=0)
    """Steps until k is reached."""

    @model_validator(mode="after")
    def _k_fits(self) -> "KOptions":
        most = max(self.k, self.k_start or 0)
        if most > self.d_sae:
            raise ValueError(f"k={most} is more than d_sae={self.d_sae}")
        return self

    def k_at(self, step: int) -> int:
        """k at this step, counted from 0."""
        if self.k_start is None or step >= self.k_steps:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * step / self.k_steps)


class TopKOptions(KOptions):
    """A TopK SAE with unit-norm decoder rows, AuxK and, if wanted, Multi-TopK."""

    multi_k: PositiveInt | None = None
    """Multi-TopK: the reconstruction with this many latents is trained too (the paper, section 5.3:
    4 k). None: not.
    """
    multi_coefficient: float = Field(default=1 / 8, ge=0)
    """Weight of that loss (the paper: L(k) + L(4 k) / 8)."""

    @model_validator(mode="after")
    def _multi_k_fits(self) -> "TopKOptions":
        if self.multi_k is not None and not max(self.k, self.k_start or 0) < self.multi_k:
            raise ValueError(f"multi_k={self.multi_k} is not more than k={self.k}")
        if self.multi_k is not None and self.multi_k > self.d_sae:
            raise ValueError(f"multi_k={self.multi_k} is more than d_sae={self.d_sae}")
        return self


class AuxKDictionary(Dictionary):
    """A Dictionary with AuxK for its dead latents."""

    def auxk(self, x_BD: Tensor, out_BD: Tensor, dead_M: Tensor) -> Tensor:
        """The auxiliary loss of a batch, before its coefficient; 0 where nothing is dead."""
        if not self.options.auxk_coefficient or not bool(dead_M.any()):
            return x_BD.new_zeros(())
        k = self.options.auxk or -(-x_BD.shape[1] // 2)
        weights = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        return auxk_loss(x_BD - out_BD.detach(), x_BD, *weights, dead_M, k)


class TopK(AuxKDictionary):
    """x_hat = W_decᵀ ReLU(top_k(W_enc (x - b_dec) + b_enc)) + b_dec.

    Loss: FVU + auxk_coefficient * AuxK (+ multi_coefficient * FVU with multi_k latents).
    """

    Options: ClassVar[type[Spec]] = TopKOptions

    def __init__(self, options: TopKOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.match_norm()

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """The reconstruction (B, D) of scaled activations."""
        return self._forward(x_BD, self.options.k)[0][0]

    def _forward(self, x_BD: Tensor, *ks: int) -> tuple[list[Tensor], Tensor]:
        """Reconstructions with each of these rising numbers of latents, and the latents on with the
        first.
        """
        centred_BD = (x_BD - self.b_dec).detach()
        pre_BK, idx_BK = select_top_k(centred_BD, self.W_enc, self.b_enc, ks[-1])
        # each k adds the latents between it and the one before: the bags of its group
        edges = [0, *ks]
        outs: list[Tensor] = []
        out_BD: Tensor = self.b_dec
        fired = idx_BK.new_empty(0)
        for start, end in zip(edges, edges[1:], strict=False):
            active = Active.from_chosen(idx_BK[:, start:end], len(self.W_enc))
            pre_N = encode_at(
                pre_BK[:, start:end].flatten(),
                centred_BD,
                self.W_enc,
                self.b_enc,
                active,
                self.b_dec,
            )
            acts_N = F.relu(pre_N)
            out_BD = out_BD + decode_at(acts_N, self.W_dec, active)
            outs.append(out_BD)
            if not start:
                fired = active.latent_N[acts_N.detach() > 0]
        return outs, fired

    def training_step(self, x_BD: Tensor, step: int) -> StepOutput:
        """See Architecture."""
        options = self.options
        ks = [options.k_at(step), *([options.multi_k] if options.multi_k else [])]
        outs, fired = self._forward(x_BD, *ks)
        self.count_silence(fired, len(x_BD))
        dead_M = self.dead
        fvu = self.fvu(x_BD, outs[0])
        auxk = self.auxk(x_BD, outs[0], dead_M)
        loss, logs = fvu + options.auxk_coefficient * auxk, {"auxk": auxk.detach()}
        if options.multi_k:
            multi = self.fvu(x_BD, outs[1])
            loss, logs["multi"] = loss + options.multi_coefficient * multi, multi.detach()
        return StepOutput(
            loss,
            fvu.detach(),
            x_BD.new_tensor(len(fired) / len(x_BD)),
            dead_M.to(x_BD.dtype).mean(),
            logs,
        )

    def to_native(self, facts: dict[str, Any]) -> tuple[SAEConfig, dict[str, Tensor]]:
        """A top-k SAE."""
        return self.native(facts, "topk", k=self.options.k, subtract_b_dec=True)
