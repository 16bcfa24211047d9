"""JumpReLU with an L0 penalty (Rajamanoharan et al. 2024, "Jumping ahead", arXiv 2407.14435): the
threshold learns through straight-through estimators.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from saezoo.config import SAEConfig, Spec
from saezoo_train.architectures.base import Setting, StepOutput
from saezoo_train.architectures.dictionary import Dictionary, DictionaryOptions, warm_up
from saezoo_train.ops import Active, at_latents, decode_at, encode_at, select_above

# B batch, D d_in, M d_sae, N pairs of a token and a latent that is on or near its threshold


class JumpReLUOptions(DictionaryOptions):
    """A JumpReLU SAE with unit-norm decoder rows. Activations are in units of inputs of mean norm
    1, the loss in units of FVU.
    """

    encoder_init: Literal["decoder", "matched"] = "matched"
    """See DictionaryOptions. Where half of the latents are on at the start (threshold_init), a
    plain copy begins at many times the length of the data.
    """
    initial_l0: PositiveFloat = 64
    """Mean latents on per token at the start: each threshold begins where its latent is on for
    initial_l0 / d_sae of the sample. With all at 0.01 instead, half of the latents are on at first,
    and of 8,192 two in three were dead after a million tokens.
    """
    threshold_init: PositiveFloat | None = None
    """All thresholds at the start, instead of initial_l0 (the paper, appendix I: 0.001 for inputs
    of mean squared norm 1, in runs of billions of tokens).
    """
    bandwidth: PositiveFloat = 0.03
    """Width of the rectangle kernel about a threshold in which activations move it (same place:
    0.001; with it 250 steps reach L0 64 instead of a target of 32).
    """
    ste_to_input: bool = False
    """Whether the straight-through gradient reaches the pre-activation too, and so the encoder:
    no in the paper and in dictionary_learning; yes in Conerly et al., Transformer Circuits, January
    2025 (SAELens: jumprelu_ste_to_input).
    """
    target_l0: PositiveFloat | None = 32
    """Mean latents on per token to aim at: the penalty is target_coefficient * (L0 / target - 1)²
    (dictionary_learning; Gemma Scope 2 has its like). None: the paper's l0_coefficient * L0.
    """
    target_coefficient: float = Field(default=1.0, ge=0)
    """See target_l0."""
    l0_coefficient: float = Field(default=1e-3, ge=0)
    """Weight of each latent that is on, where target_l0 is None (lambda in the paper)."""
    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps over which the penalty rises from 0 (Gemma Scope: 10,000 steps)."""
    pre_act_coefficient: float = Field(default=0.0, ge=0)
    """Weight of sum ReLU(threshold - pre-activation) ‖W_dec‖ over dead latents, which draws them up
    again (Conerly et al., January 2025: 3e-6, over all latents; over the dead as in SAELens).
    """
    subtract_b_dec: bool = False
    """Whether b_dec is subtracted before the encoder (the paper's `use_pre_enc_bias`; Gemma Scope:
    no).
    """


class JumpReLU(Dictionary):
    """z = W_enc x + b_enc, f = z where z > threshold, else 0; x_hat = W_decᵀ f + b_dec.

    Loss: FVU + penalty on L0 = number of z > threshold. The estimators are those of the paper's
    equations 11 and 12, on pre-activations: with K the rectangle of width 1,
    df/dthreshold = -(threshold / bandwidth) K((z - threshold) / bandwidth) and
    dL0/dthreshold = -(1 / bandwidth) K((z - threshold) / bandwidth). (dictionary_learning counts L0
    on f, whose values below the threshold are 0: it sees only the window's upper half.)

    `threshold` is a float32 parameter itself: the paper's log(threshold) moves by at most lr *
    threshold a step. It is kept at 0 or above.
    """

    Options: ClassVar[type[Spec]] = JumpReLUOptions

    def __init__(self, options: JumpReLUOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.b_enc = nn.Parameter(torch.zeros(options.d_sae))
        if not options.subtract_b_dec:
            # as if b_dec were subtracted: the mean is most of many an activation, and would have
            # half of the latents on all tokens and the others on none
            self.b_enc.data = -(self.W_enc.data @ self.b_dec.data)
        first = options.threshold_init
        threshold_M = (
            self.thresholds_for(options.initial_l0)
            if first is None
            else torch.full_like(self.b_enc, first)
        )
        self.threshold = nn.Parameter(threshold_M)
        self.match_norm()

    def scale_encoder(self, factor: Tensor) -> None:
        """See Dictionary."""
        super().scale_encoder(factor)
        self.b_enc.mul_(factor)
        if self.options.threshold_init is None:
            self.threshold.mul_(factor)

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """See Dictionary."""
        return self._forward(x_BD)[0]

    def _input(self, x_BD: Tensor) -> Tensor:
        return x_BD - self.b_dec if self.options.subtract_b_dec else x_BD

    def _forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor, Active]:
        """The reconstruction (B, D); pre-activations and thresholds of the pairs, (N,) each; the
        pairs.
        """
        inward_BD = self._input(x_BD).detach()
        width, ste = self.options.bandwidth, self.options.ste_to_input
        pre_N, token_N, latent_N = select_above(
            inward_BD, self.W_enc, self.b_enc, self.threshold - width / 2
        )
        active = Active.from_pairs(token_N, latent_N, len(x_BD), len(self.W_enc))
        b_dec_D = self.b_dec if self.options.subtract_b_dec else None
        pre_N = encode_at(pre_N, inward_BD, self.W_enc, self.b_enc, active, b_dec_D)
        threshold_N = at_latents(self.threshold, active)
        features_N = _Jump.apply(pre_N, threshold_N, width, ste)
        out_BD = decode_at(features_N, self.W_dec, active) + self.b_dec
        return out_BD, pre_N, threshold_N, active

    def training_step(self, x_BD: Tensor, step: int) -> StepOutput:
        """See Architecture."""
        options = self.options
        out_BD, pre_N, threshold_N, active = self._forward(x_BD)
        fvu = self.fvu(x_BD, out_BD)
        on_N = _Step.apply(pre_N, threshold_N, options.bandwidth, options.ste_to_input)
        l0 = on_N.sum() / len(x_BD)
        if options.target_l0 is None:
            penalty = options.l0_coefficient * l0
        else:
            penalty = options.target_coefficient * (l0 / options.target_l0 - 1).pow(2)
        penalty = penalty * warm_up(step, self.setting.steps, options.sparsity_warmup)
        fired_N = active.latent_N[on_N.detach() > 0]
        self.count_silence(fired_N, len(x_BD))
        pull = self._pre_act_loss(x_BD)
        logs = {"penalty": penalty, "threshold": self.threshold.mean(), "pre_act": pull}
        return self.output(fvu + penalty + pull, fvu, fired_N, x_BD, logs)

    def _pre_act_loss(self, x_BD: Tensor) -> Tensor:
        """What draws dead latents up, with its coefficient. Scalar."""
        dead_A = self.dead.nonzero().flatten()
        if not self.options.pre_act_coefficient or not len(dead_A):
            return x_BD.new_zeros(())
        rows_AD = self.W_enc.index_select(0, dead_A)
        pre_BA = F.linear(self._input(x_BD), rows_AD, self.b_enc[dead_A])
        norm_A = self.W_dec.index_select(0, dead_A).norm(dim=-1)
        short_BA = F.relu(self.threshold[dead_A] - pre_BA) * norm_A
        return self.options.pre_act_coefficient * short_BA.sum(-1).mean()

    def after_update(self) -> None:
        """Unit rows, and no threshold below 0: there negative activations would pass."""
        super().after_update()
        self.threshold.data.clamp_(min=0)

    def to_native(self, facts: dict[str, Any]) -> tuple[SAEConfig, dict[str, Tensor]]:
        """A JumpReLU SAE."""
        added = {"b_enc": self.b_enc, "threshold": self.threshold}
        return self.native(facts, "jumprelu", added, subtract_b_dec=self.options.subtract_b_dec)


def _window(z_N: Tensor, threshold_N: Tensor, width: float) -> Tensor:
    """Whether z is within half a width of its threshold, as 0 or 1."""
    return ((z_N - threshold_N).abs() < width / 2).to(z_N.dtype)


class _Jump(torch.autograd.Function):
    """z where z > threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, z_N: Tensor, threshold_N: Tensor, width: float, ste: bool) -> Tensor:
        ctx.save_for_backward(z_N, threshold_N)
        ctx.width, ctx.ste = width, ste
        return z_N * (z_N > threshold_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        z_N, threshold_N = ctx.saved_tensors
        through_N = grad_N * threshold_N / ctx.width * _window(z_N, threshold_N, ctx.width)
        grad_z_N = grad_N * (z_N > threshold_N)
        return grad_z_N + through_N if ctx.ste else grad_z_N, -through_N, None, None


class _Step(torch.autograd.Function):
    """1 where z > threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, z_N: Tensor, threshold_N: Tensor, width: float, ste: bool) -> Tensor:
        ctx.save_for_backward(z_N, threshold_N)
        ctx.width, ctx.ste = width, ste
        return (z_N > threshold_N).to(z_N.dtype)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        z_N, threshold_N = ctx.saved_tensors
        through_N = grad_N / ctx.width * _window(z_N, threshold_N, ctx.width)
        return through_N if ctx.ste else None, -through_N, None, None
