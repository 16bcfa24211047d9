"""What every origin of several layers or models gives: a tiny checkpoint as its authors would write
it, and their own outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saezoo.build import build
from saezoo.formats._tensors import read_json
from saezoo.formats.llamascopium_multi import read_multi
from saezoo.load import load_sae

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

    def load(self, path, **options):
        """The module of what `write` returned, or of one layer of it."""
        if self.format != "llamascopium":
            return load_sae(path, **options)
        folder = path if path.is_dir() else path.parent
        weights = read_multi(path, None, read_json(folder / "config.json"))
        return build(weights.cfg, weights.tensors, where=str(path), **options)


def draw(generator, *shape, scale=1.0):
    """Normal numbers, so that no bias is zero and no decoder row of unit length."""
    return torch.randn(*shape, generator=generator) * scale
