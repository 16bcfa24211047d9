"""What every origin of several layers or models gives: a tiny checkpoint as its authors would write
it, and their own outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

L, D, N = 3, 5, 16
"""Layers or models, all three and not all of one size, so that no axis can be taken for another."""


@dataclass(frozen=True)
class MultiOrigin:
    """One variant of a format."""

    name: str
    format: str
    write: Callable[[Path, dict[str, Tensor]], Path]
    """Write a checkpoint below a folder; returns what `load_sae` is given."""
    tensors: Callable[[torch.Generator], dict[str, Tensor]]
    encode: Callable[[dict[str, Tensor], Tensor], Tensor]
    """The authors' features of x (tokens, L, D)."""
    forward: Callable[[dict[str, Tensor], Tensor], Tensor]
    """The authors' reconstruction (tokens, L, D)."""
    mistakes: tuple[Callable[[dict[str, Tensor], Tensor], Tensor], ...] = ()
    """Reconstructions as other loaders got them wrong: each must differ, or the test is blind."""
    layered: bool = True
    """Whether one layer can be had by name."""
    sources: int = L

    def __str__(self) -> str:
        return f"{self.format}: {self.name}"


def draw(generator, *shape, scale=1.0):
    """Normal numbers, so that no bias is zero and no decoder row of unit length."""
    return torch.randn(*shape, generator=generator) * scale
