"""Adam, its learning rate over time, and what it holds as tensors that a checkpoint can keep."""

import torch
from torch import Tensor, nn

from saezoo_train.config import Optimiser


def make_adam(model: nn.Module, settings: Optimiser) -> torch.optim.Adam:
    """Fused Adam over all parameters. settings: resolved."""
    assert settings.lr is not None
    assert settings.beta1 is not None
    assert settings.beta2 is not None
    return torch.optim.Adam(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def rate_at(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Share of the full learning rate: linear up, flat, linear down to zero."""
    decay = max(1, round(steps * decay_share))
    return min(1.0, (step + 1) / max(warmup, 1), (steps - step) / decay)


def adam_tensors(model: nn.Module, adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What Adam keeps of each parameter, by `parameter/quantity`."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in adam.state.get(parameter, {}).items()
    }


def load_adam(model: nn.Module, adam: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `adam_tensors` gave."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        parameter = parameters[name]
        adam.state[parameter][quantity] = value.to(parameter.device)
