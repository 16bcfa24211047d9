"""What the trainer asks of an architecture, and what it gives it.

Everything that changes during training is a parameter or a buffer, so that `state_dict` is the
whole state and a resumed run goes on bitwise. Inputs are scaled: x * setting.scale has mean norm 1;
`to_native` folds the scale away.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from saezoo.config import SAEConfig, Spec


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
    """The settings that a recipe may give under `sae:`; every field has a default."""

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
