"""What the trainer asks of an architecture, and what it gives it.

Everything that changes during training is a parameter or a buffer, so that `state_dict` is the
whole state and a resumed run goes on bitwise. Inputs are scaled: x * setting.scale has mean norm 1;
`to_native` folds the scale away.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from saezoo.config import SAEConfig, Spec, one_line
from saezoo.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """What is known before the first step, in scaled units."""

    mean_D: Tensor
    """Mean activation."""
    variance: float
    """Mean of ‖x - mean‖²: dividing an error by it makes it an FVU."""
    scale: float
    """Scaled activations are raw ones times this."""
    sample_SD: Tensor
    """Some thousands of activations, for initialisations that look at the data."""
    steps: int
    """Updates in the whole run, for schedules."""
    batch: int
    """Tokens a step."""
    seed: int


@dataclass(frozen=True)
class StepOutput:
    """One forward pass over a batch. All are scalars; only `loss` carries a gradient."""

    loss: Tensor
    """What is minimised."""
    fvu: Tensor
    """The batch's squared error over setting.variance."""
    l0: Tensor
    """Mean number of active latents per token."""
    dead: Tensor
    """Share of latents that count as dead."""
    logs: dict[str, Tensor] = field(default_factory=dict)
    """Other numbers worth a curve: auxiliary losses, sparsity penalties, thresholds."""


class Architecture(nn.Module):
    """An SAE while it is trained. Subclass this in one's own file to train something new."""

    Options: ClassVar[type[Spec]]
    """The settings that a recipe may give under `sae:`; every field has a default, and one is
    `d_sae`.
    """

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__()
        self.options, self.setting = options, setting

    def training_step(self, x_BD: Tensor, step: int) -> StepOutput:
        """The loss of a batch of scaled activations, step counted from 0."""
        raise NotImplementedError

    def before_update(self) -> None:
        """Between backward and the optimiser: change gradients in place."""

    def after_update(self) -> None:
        """After the optimiser: put parameters back where they must be."""

    def to_native(self, facts: dict[str, Any]) -> tuple[SAEConfig, dict[str, Tensor]]:
        """Spec and tensors that read raw activations; `facts` are further fields of the spec.

        An architecture that has no exact named form leaves this out: its folder then says `custom`.
        """
        raise NotImplementedError

    def export(self, facts: dict[str, Any]) -> tuple[SAEConfig, dict[str, Tensor]]:
        """What `to_native` says; where it is left out, spec and tensors of architecture `custom`:
        the whole state, which `load_sae(folder, custom=TheClass)` gives to `from_native`.
        """
        if type(self).to_native is not Architecture.to_native:
            return self.to_native(facts)
        tensors = {name: value.detach() for name, value in self.state_dict().items()}
        custom = {
            "name": f"{type(self).__module__}:{type(self).__qualname__}",
            "tensors": {name: tuple(value.shape) for name, value in tensors.items()},
            "options": self.options.model_dump(mode="json") | {"scale": self.setting.scale},
        }
        given: dict[str, Any] = {
            "architecture": "custom",
            "d_in": self.setting.mean_D.shape[0],
            "d_sae": self.options.d_sae,
            "custom": custom,
        }
        return SAEConfig(**given | facts), tensors

    @classmethod
    def from_native(cls, cfg: SAEConfig, tensors: dict[str, Tensor]) -> "Architecture":
        """The trained module again, from what `export` wrote without a `to_native`: frozen and in
        eval mode. Its setting knows the scale and the sizes; mean and sample are zeros.
        """
        if cfg.custom is None:
            raise ConfigError(f"architecture {cfg.architecture}: not one of {cls.__name__}'s own")
        options = dict(cfg.custom.options)
        scale = options.pop("scale", None)
        if not isinstance(scale, int | float):
            raise ConfigError(f"custom.options has no number `scale` (got {scale!r})")
        zeros = torch.zeros(cfg.d_in)
        setting = Setting(zeros, 1.0, float(scale), zeros.expand(2, -1), 1, 1, 0)
        try:
            module = cls(cls.Options(**options), setting)
            module.load_state_dict(tensors, assign=True)
        except (ValidationError, RuntimeError) as error:
            problem = one_line(error) if isinstance(error, ValidationError) else str(error)
            raise ConfigError(
                f"not what {cls.__name__} wrote: {' '.join(problem.split())}"
            ) from None
        return module.requires_grad_(False).eval()
