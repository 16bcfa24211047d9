"""What every origin gives: a tiny checkpoint as its authors would write it, and their own
outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

D, N, K = 6, 24, 3


@dataclass(frozen=True)
class Origin:
    """One variant of a format."""

    name: str
    format: str
    write: Callable[[Path, dict[str, Tensor]], Path]
    """Write a checkpoint below a folder from the tensors; returns what `load_sae` is given."""
    tensors: Callable[[torch.Generator], dict[str, Tensor]]
    encode: Callable[[dict[str, Tensor], Tensor], Tensor]
    """The authors' features (tokens, N) of x (tokens, D)."""
    forward: Callable[[dict[str, Tensor], Tensor], Tensor]
    """The authors' reconstruction (tokens, D)."""
    mistakes: tuple[Callable[[dict[str, Tensor], Tensor], Tensor], ...] = ()
    """Reconstructions as other loaders got them wrong: each must differ, or the test is blind."""

    def __str__(self) -> str:
        return f"{self.format}: {self.name}"


def draw(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, so that no bias is zero and no decoder row of unit length."""
    return torch.randn(*shape, generator=generator) * scale


def keep_k(values: Tensor, by: Tensor, k: int = K) -> Tensor:
    """values where `by` is among the k largest of its row, else 0."""
    out = torch.zeros_like(values)
    index = by.topk(k, dim=-1).indices
    return out.scatter(-1, index, values.gather(-1, index))
