"""Gated (Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders",
arXiv 2404.16014): one affine map decides which latents are on, another how much.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from saezoo.config import SAEConfig, Spec
from saezoo_train.architectures.base import Setting, StepOutput
from saezoo_train.architectures.penalty import PenaltyDictionary, PenaltyOptions
from saezoo_train.ops import Active, at_latents, decode_at, encode_at, select_above

# B batch, D d_in, M d_sae, N pairs of a token and a latent whose gate is open


class GatedOptions(PenaltyOptions):
    """A Gated SAE with unit-norm decoder rows."""

    encoder_init: Literal["decoder", "matched"] = "matched"
    """See DictionaryOptions. Where half of the gates are open at the start (initial_l0 null), a
    plain copy begins at many times the length of the data.
    """
    initial_l0: PositiveFloat | None = 64
    """Mean latents on per token at the start: each b_gate begins so that its gate is open for
    initial_l0 / d_sae of the sample. None: all at 0, as in the authors' code; half of the gates are
    then open at first, and of 8,192 latents two in three were silent after 200 steps, against 8 %
    (both with beta1 0.9).
    """
    l1_coefficient: float = Field(default=0.3, ge=0)
    """Weight of the L1 norm of the gates' pre-activations (lambda in the paper's equation 8): loss
    in units of FVU for gates in units of inputs of mean norm 1. Decides the sparsity.
    """


class Gated(PenaltyDictionary):
    """gate = W_enc (x - b_dec) + b_gate; magnitude = exp(r_mag) W_enc (x - b_dec) + b_mag; f is
    ReLU(magnitude) where gate > 0.

    Loss: FVU + l1_coefficient * |ReLU(gate)|_1 + FVU of what ReLU(gate) decodes to with W_dec and
    b_dec held fixed (equation 8). All of it needs open gates only.
    """

    Options: ClassVar[type[Spec]] = GatedOptions

    def __init__(self, options: GatedOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.b_gate = nn.Parameter(torch.zeros(options.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(options.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(options.d_sae))
        if options.initial_l0 is not None:
            self.b_gate.data = -self.thresholds_for(options.initial_l0)
        self.match_norm()

    def scale_encoder(self, factor: Tensor) -> None:
        """See Dictionary."""
        super().scale_encoder(factor)
        self.b_gate.mul_(factor)

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """See Dictionary."""
        return self._forward(x_BD)[0]

    def _forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor, Active]:
        """The reconstruction (B, D); features and gates of the pairs, (N,) each; the pairs."""
        centred_BD = (x_BD - self.b_dec).detach()
        pre_N, token_N, latent_N = select_above(
            centred_BD, self.W_enc, self.b_gate, x_BD.new_zeros(())
        )
        active = Active.from_pairs(token_N, latent_N, len(x_BD), len(self.W_enc))
        b_gate_N = at_latents(self.b_gate, active)
        projected_N = encode_at(
            pre_N - b_gate_N.detach(), centred_BD, self.W_enc, None, active, self.b_dec
        )
        gate_N = F.relu(projected_N + b_gate_N)
        scale_N, b_mag_N = at_latents(self.r_mag.exp(), active), at_latents(self.b_mag, active)
        features_N = F.relu(scale_N * projected_N + b_mag_N)
        out_BD = decode_at(features_N, self.W_dec, active) + self.b_dec
        return out_BD, features_N, gate_N, active

    def training_step(self, x_BD: Tensor, step: int) -> StepOutput:
        """See Architecture."""
        out_BD, features_N, gate_N, active = self._forward(x_BD)
        frozen_BD = decode_at(gate_N, self.W_dec.detach(), active) + self.b_dec.detach()
        fvu, auxiliary = self.fvu(x_BD, out_BD), self.fvu(x_BD, frozen_BD)
        l1 = gate_N.sum() / len(x_BD)
        share = self.share_at(step)
        loss = fvu + self.penalty_weight(share) * l1 + auxiliary
        fired_N = active.latent_N[features_N.detach() > 0]
        self.count_silence(fired_N, len(x_BD))
        logs = {"l1": l1, "auxiliary": auxiliary}
        logs |= self.search(x_BD.new_tensor(len(fired_N) / len(x_BD)), share)
        return self.output(loss, fvu, fired_N, x_BD, logs)

    def to_native(self, facts: dict[str, Any]) -> tuple[SAEConfig, dict[str, Tensor]]:
        """A gated SAE."""
        added = {"b_gate": self.b_gate, "b_mag": self.b_mag}
        cfg, tensors = self.native(facts, "gated", added, subtract_b_dec=True)
        return cfg, tensors | {"r_mag": self.r_mag.data}
