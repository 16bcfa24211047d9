"""What is measured on the first activations of a stream before training: who is an outlier, the
mean, the variance, the scale.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saezoo_train.activations import Chunk, Position, Source
from saezoo_train.architectures import Setting
from saezoo_train.config import Recipe

MEASURED = 65_536
"""Activations that are measured, or a whole pass where it has fewer."""
SAMPLE = 16_384
"""Of these, how many are shown to the architecture."""


@dataclass(frozen=True)
class Moments:
    """In raw units, outliers left out."""

    mean_D: Tensor
    median_norm: float
    """Of all that were measured, outliers too."""
    mean_norm: float
    variance: float
    """Mean squared distance from the mean."""
    tokens: int
    outliers: int
    sample_SD: Tensor

    @property
    def scale(self) -> float:
        """Brings activations to unit mean norm (as in Conerly et al. 2024, who choose sqrt(d_in)
        for one).
        """
        return 1 / self.mean_norm

    def parts(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Plain numbers and tensors, for a checkpoint."""
        numbers = {key: value for key, value in vars(self).items() if not isinstance(value, Tensor)}
        return numbers, {"mean_D": self.mean_D, "sample_SD": self.sample_SD}

    @classmethod
    def of(cls, numbers: dict[str, Any], tensors: dict[str, Any]) -> "Moments":
        """Put together what `parts` gave."""
        return cls(**numbers, **tensors)

    def max_norm(self, factor: float | None) -> float:
        """The largest norm that is no outlier's."""
        return self.median_norm * factor if factor else float("inf")


def first_chunks(
    source: Source, progress: Callable[[int], None] = lambda _tokens: None
) -> tuple[list[Chunk], Iterator[Chunk]]:
    """The chunks that `measure_moments` wants, and the stream that follows them."""
    stream = source.chunks(Position())
    taken: list[Chunk] = []
    tokens = 0
    for chunk in stream:
        taken.append(chunk)
        tokens += len(chunk.x)
        progress(tokens)
        if tokens >= MEASURED or chunk.after.epoch:
            break
    return taken, stream


def measure_moments(
    x_SD: Tensor, max_norm_factor: float | None, median_norm: float | None, seed: int
) -> Moments:
    """Moments of raw activations x (tokens, d). The median norm decides who is an outlier (it is
    measured unless given); sums are float64.
    """
    x_SD = x_SD.float().cpu()
    norms = x_SD.norm(dim=-1)
    median = float(norms.median()) if median_norm is None else median_norm
    kept = norms <= (median * max_norm_factor if max_norm_factor else float("inf"))
    seen, x_SD, norms = len(norms), x_SD[kept], norms[kept]
    tokens = len(x_SD)
    mean = sum_of(x_SD) / tokens
    squares = float(sum_of(x_SD, power=2).sum())
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:SAMPLE]
    return Moments(
        mean_D=mean.float(),
        median_norm=median,
        mean_norm=float(norms.double().mean()),
        variance=squares / tokens - float(mean.pow(2).sum()),
        tokens=tokens,
        outliers=seen - tokens,
        sample_SD=x_SD[order],
    )


def sum_of(x_SD: Tensor, power: int = 1) -> Tensor:
    """Column sums of x ** power, float64, without a float64 copy of all of x."""
    return torch.stack([part.double().pow(power).sum(0) for part in x_SD.split(8192)]).sum(0)


def to_setting(moments: Moments, recipe: Recipe) -> Setting:
    """What an architecture is told before its first step, in scaled units."""
    return Setting(
        mean_D=moments.mean_D * moments.scale,
        variance=moments.variance * moments.scale**2,
        scale=moments.scale,
        sample_SD=moments.sample_SD * moments.scale,
        steps=recipe.steps,
        batch=recipe.batch,
        seed=recipe.seed,
    )
