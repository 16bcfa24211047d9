"""ReLU with L1 times decoder norm (Conerly, Templeton, Bricken, Marcus, Henighan, "Update on how we
train SAEs", Transformer Circuits, April 2024).
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from saezoo.config import SAEConfig, Spec
from saezoo_train.architectures.base import Setting, StepOutput
from saezoo_train.architectures.penalty import PenaltyDictionary, PenaltyOptions
from saezoo_train.ops import Active, at_latents, decode_at, encode_at, select_above

# B batch, D d_in, M d_sae, N pairs of a token and a latent that is on


class ReLUOptions(PenaltyOptions):
    """A ReLU SAE whose decoder rows may have any length."""

    b_dec_init: Literal["mean", "median", "zero"] = "zero"
    """As the update has it; b_dec is not subtracted from the input."""
    decoder_norm: PositiveFloat = 0.1
    """Length of the decoder's rows at the start, and so of the encoder's (the update: 0.05 to
    1).
    """
    l1_coefficient: float = Field(default=0.4, ge=0)
    """Weight of sum_i f_i ‖W_dec_i‖: loss in units of FVU for activations in units of inputs of
    mean norm 1. The update's lambda = 5, for inputs of mean squared norm d_in and an unscaled
    squared error, is 5 / (sqrt(d_in) * variance) here, the variance of inputs of mean norm 1: some
    0.4 for d_in = 576. Decides the sparsity.
    """


class ReLU(PenaltyDictionary):
    """f = ReLU(W_enc x + b_enc); x_hat = W_decᵀ f + b_dec; no constraint on any row.

    Loss: FVU + l1_coefficient * sum_i f_i ‖W_dec_i‖. The update also clips the gradient's norm at
    1: that is the optimiser's option.
    """

    Options: ClassVar[type[Spec]] = ReLUOptions
    unit_rows: ClassVar[bool] = False

    def __init__(self, options: ReLUOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.b_enc = nn.Parameter(torch.zeros(options.d_sae))
        self.W_dec.data *= options.decoder_norm
        self.W_enc.data *= options.decoder_norm
        self.match_norm()

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """See Dictionary."""
        return self._forward(x_BD)[0]

    def _forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor, Active]:
        """The reconstruction (B, D); the activations that are on, (N,), and whose they are."""
        pre_N, token_N, latent_N = select_above(x_BD, self.W_enc, self.b_enc, x_BD.new_zeros(()))
        active = Active.from_pairs(token_N, latent_N, len(x_BD), len(self.W_enc))
        acts_N = encode_at(pre_N, x_BD, self.W_enc, self.b_enc, active)
        return decode_at(acts_N, self.W_dec, active) + self.b_dec, acts_N, active

    def training_step(self, x_BD: Tensor, step: int) -> StepOutput:
        """See Architecture."""
        out_BD, acts_N, active = self._forward(x_BD)
        fvu = self.fvu(x_BD, out_BD)
        l1 = (acts_N * at_latents(self.W_dec.norm(dim=-1), active)).sum() / len(x_BD)
        share = self.share_at(step)
        loss = fvu + self.penalty_weight(share) * l1
        self.count_silence(active.latent_N, len(x_BD))
        logs = {"l1": l1} | self.search(x_BD.new_tensor(len(active.latent_N) / len(x_BD)), share)
        return self.output(loss, fvu, active.latent_N, x_BD, logs)

    def to_native(self, facts: dict[str, Any]) -> tuple[SAEConfig, dict[str, Tensor]]:
        """A ReLU SAE."""
        return self.native(facts, "relu", {"b_enc": self.b_enc})
