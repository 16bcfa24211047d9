"""An L1 penalty whose weight is given, or searched for while training: that with which a wanted
number of latents is on.
"""

from typing import Any

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from saezoo_train.architectures.base import Setting
from saezoo_train.architectures.dictionary import Dictionary, DictionaryOptions, warm_up

RATE, MEMORY = 0.01, 0.9
"""The weight moves by RATE times how far the mean L0 is off, as a logarithm, each step; how much of
that mean stays at a step. So the weight can rise or fall by 1 % a step at most.
"""


class PenaltyOptions(DictionaryOptions):
    """Options of architectures whose sparsity follows from the weight of a penalty."""

    l1_coefficient: float = Field(default=0.3, ge=0)
    """The weight at the start, and throughout where target_l0 is None."""
    target_l0: PositiveFloat | None = None
    """Mean latents on per token to aim at. The weight then rises where more are on and falls where
    fewer are, after the warm-up. None: as the papers have it, l1_coefficient decides.
    """
    sparsity_warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps over which that weight rises from 0 (Conerly et al. 2024: 5 %)."""


class PenaltyDictionary(Dictionary):
    """A Dictionary with such a penalty."""

    log_factor: Tensor
    mean_l0: Tensor

    def __init__(self, options: PenaltyOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        if options.target_l0 is not None:
            # the state of the search, so that a resumed run goes on with it
            self.register_buffer("log_factor", torch.tensor(0.0))
            self.register_buffer("mean_l0", torch.tensor(-1.0))

    def share_at(self, step: int) -> float:
        """How much of the penalty is in force at a step."""
        options: Any = self.options
        return warm_up(step, self.setting.steps, options.sparsity_warmup)

    def penalty_weight(self, share: float | Tensor) -> float | Tensor:
        """The weight where this share of it is in force."""
        options: Any = self.options
        weight = options.l1_coefficient * share
        return weight if options.target_l0 is None else weight * self.log_factor.exp()

    @torch.no_grad()
    def search(self, l0: Tensor, share: float | Tensor) -> dict[str, Tensor]:
        """Bring the weight nearer to what target_l0 needs, once all of it is in force; l0: that of
        the batch. What is worth a curve. Waits for no device.
        """
        options: Any = self.options
        if options.target_l0 is None:
            return {}
        l0 = l0.to(self.mean_l0)
        mean = MEMORY * self.mean_l0 + (1 - MEMORY) * l0
        self.mean_l0.copy_(torch.where(self.mean_l0 < 0, l0, mean))
        off = (self.mean_l0.clamp_min(1e-3) / options.target_l0).log()
        self.log_factor += RATE * off.clamp(-1, 1) * (share >= 1)
        return {"l1_coefficient": options.l1_coefficient * self.log_factor.exp()}
