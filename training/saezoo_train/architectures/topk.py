"""TopK with AuxK and Multi-TopK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders",
arXiv 2406.04093).
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from saezoo.config import SAEConfig, Spec
from saezoo_train.architectures.auxk import AuxKDictionary, AuxKOptions
from saezoo_train.architectures.base import Setting, StepOutput
from saezoo_train.ops import Active, decode_at, encode_at, select_top_k

# B batch, D d_in, M d_sae, K latents per token


class KOptions(AuxKOptions):
    """Options of architectures whose sparsity is a number of latents."""

    k: PositiveInt = 32
    """Latents on per token (BatchTopK and Matryoshka: on average)."""
    k_start: PositiveInt | None = None
    """k at the first step; falls linearly to k. None: k throughout. Annealed so that many latents
    learn something early (as in SAELens' and dictionary_learning's k annealing).
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
    """Multi-TopK: the reconstruction with this many latents is trained too (the paper: 4 k). None:
    it is not.
    """
    multi_coefficient: float = Field(default=1 / 8, ge=0)
    """Weight of that loss (the paper: L(k) + L(4 k) / 8)."""

    @model_validator(mode="after")
    def _multi_k_fits(self) -> "TopKOptions":
        most = max(self.k, self.k_start or 0)
        if self.multi_k is not None and not most < self.multi_k <= self.d_sae:
            raise ValueError(
                f"multi_k={self.multi_k} is not between k={most} and d_sae={self.d_sae}"
            )
        return self


class TopK(AuxKDictionary):
    """x_hat = W_decᵀ ReLU(top_k(W_enc (x - b_dec) + b_enc)) + b_dec.

    Loss: FVU + auxk_coefficient * AuxK (+ multi_coefficient * FVU with multi_k latents).
    """

    Options: ClassVar[type[Spec]] = TopKOptions

    def __init__(self, options: TopKOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.match_norm()

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """See Dictionary."""
        return self._forward(x_BD, [self.options.k])[0][0]

    def _forward(self, x_BD: Tensor, ks: list[int]) -> tuple[list[Tensor], Tensor]:
        """Reconstructions with each of these rising numbers of latents; the latents that are on
        with the first.
        """
        centred_BD = (x_BD - self.b_dec).detach()
        pre_BK, idx_BK = select_top_k(centred_BD, self.W_enc, self.b_enc, ks[-1])
        outs: list[Tensor] = []
        fired = idx_BK.new_empty(0)
        out_BD: Tensor = self.b_dec
        for start, end in zip([0, *ks], ks, strict=False):
            active = Active.from_chosen(idx_BK[:, start:end], len(self.W_enc))
            pre_N = pre_BK[:, start:end].flatten()
            pre_N = encode_at(pre_N, centred_BD, self.W_enc, self.b_enc, active, self.b_dec)
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
        outs, fired_N = self._forward(x_BD, ks)
        self.count_silence(fired_N, len(x_BD))
        fvu, auxk = self.fvu(x_BD, outs[0]), self.auxk(x_BD, outs[0])
        loss, logs = fvu + options.auxk_coefficient * auxk, {"auxk": auxk}
        if options.multi_k:
            logs["multi"] = self.fvu(x_BD, outs[1])
            loss = loss + options.multi_coefficient * logs["multi"]
        return self.output(loss, fvu, fired_N, x_BD, logs)

    def to_native(self, facts: dict[str, Any]) -> tuple[SAEConfig, dict[str, Tensor]]:
        """A top-k SAE."""
        return self.native(
            facts, "topk", {"b_enc": self.b_enc}, k=self.options.k, subtract_b_dec=True
        )
