"""BatchTopK (Bussmann, Leask, Nanda 2024, arXiv 2412.06410): the k B largest activations of a batch
of B tokens stay on, so that a token gets as many as it needs; afterwards one threshold decides.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from saezoo.config import SAEConfig, Spec
from saezoo_train.architectures.auxk import AuxKDictionary
from saezoo_train.architectures.base import Setting, StepOutput
from saezoo_train.architectures.topk import KOptions
from saezoo_train.ops import Active, decode_at, encode_at, select_batch_top_k

# B batch, D d_in, M d_sae, N pairs of a token and a latent, G groups

GUESS = 0.8
"""Share of a batch's smallest kept activation above which the next batch is looked through
first.
"""


class BatchTopKOptions(KOptions):
    """A BatchTopK SAE with unit-norm decoder rows and AuxK."""

    threshold_beta: float = Field(default=0.99, ge=0, lt=1)
    """The threshold is a running mean of each batch's smallest kept activation: how much of it
    stays at a step (0.99 in the authors' Matryoshka code, 0.999 in dictionary_learning). It begins
    as the first batch's.
    """


class BatchTopK(AuxKDictionary):
    """x_hat = W_decᵀ BatchTopK(ReLU(W_enc (x - b_dec) + b_enc)) + b_dec.

    Loss: FVU + auxk_coefficient * AuxK, AuxK as in Gao et al. 2024 (the paper, section 3).
    `threshold` estimates the expected smallest activation that is kept (the paper, equation 8), -1
    before the first step; at inference, activations > threshold are on (strictly, as in
    dictionary_learning and the authors' code).
    """

    Options: ClassVar[type[Spec]] = BatchTopKOptions
    threshold: Tensor
    smallest: Tensor

    def __init__(self, options: BatchTopKOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        self.register_buffer("threshold", torch.tensor(-1.0))
        # the last batch's smallest kept activation: a hint for speed, but one that ties could hang
        # on, so it is part of the state
        self.register_buffer("smallest", torch.tensor(0.0))
        self.match_norm()

    @property
    def group_ends(self) -> list[int]:
        """Where each nested group of latents ends; the last is d_sae."""
        return [len(self.W_enc)]

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """See Dictionary."""
        return self._forward(x_BD, self.options.k)[0][-1]

    def _forward(self, x_BD: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions (G, B, D) by the latents up to each group's end; the activations kept and
        their latents, (N,).
        """
        centred_BD, tokens, ends = (x_BD - self.b_dec).detach(), len(x_BD), self.group_ends
        pre_N, bag_N, latent_N = select_batch_top_k(
            centred_BD, self.W_enc, self.b_enc, k * tokens, GUESS * self.smallest
        )
        if len(ends) > 1:
            group_N = torch.bucketize(latent_N, latent_N.new_tensor(ends), right=True)
            bag_N, order_N = (group_N * tokens + bag_N).sort(stable=True)
            pre_N, latent_N = pre_N[order_N], latent_N[order_N]
        active = Active.from_pairs(bag_N, latent_N, tokens, len(self.W_enc), len(ends))
        pre_N = encode_at(pre_N, centred_BD, self.W_enc, self.b_enc, active, self.b_dec)
        acts_N = F.relu(pre_N)
        parts_GBD = decode_at(acts_N, self.W_dec, active).view(len(ends), *x_BD.shape)
        return parts_GBD.cumsum(0) + self.b_dec, acts_N.detach(), latent_N

    def losses(self, x_BD: Tensor, outs_GBD: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the reconstructions, and the FVU of the last."""
        fvu = self.fvu(x_BD, outs_GBD[-1])
        return fvu, fvu

    def training_step(self, x_BD: Tensor, step: int) -> StepOutput:
        """See Architecture."""
        outs_GBD, acts_N, latent_N = self._forward(x_BD, self.options.k_at(step))
        self._watch(acts_N)
        self.count_silence(latent_N, len(x_BD))
        loss, fvu = self.losses(x_BD, outs_GBD)
        auxk = self.auxk(x_BD, outs_GBD[-1])
        logs = {"auxk": auxk, "threshold": self.threshold.clone()}
        return self.output(loss + self.options.auxk_coefficient * auxk, fvu, latent_N, x_BD, logs)

    @torch.no_grad()
    def _watch(self, acts_N: Tensor) -> None:
        """Let a batch's smallest activation into the threshold."""
        if not len(acts_N):
            return
        self.smallest.copy_(acts_N.min())
        if self.threshold < 0:
            self.threshold.copy_(self.smallest)
        else:
            self.threshold.lerp_(self.smallest, 1 - self.options.threshold_beta)

    def to_native(self, facts: dict[str, Any]) -> tuple[SAEConfig, dict[str, Tensor]]:
        """A JumpReLU SAE, the threshold the same for all latents."""
        threshold_M = self.threshold.expand(len(self.W_enc)).clone()
        added = {"b_enc": self.b_enc, "threshold": threshold_M}
        return self.native(facts, "jumprelu", added, subtract_b_dec=True)
