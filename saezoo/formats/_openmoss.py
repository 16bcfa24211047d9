"""What OpenMOSS' three formats have in common: a factor for activations of a known mean norm, hook
points, and biases that may be left out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.config import Site
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats._hooks import site_of_hook
from saezoo.formats._tensors import positive
from saezoo.formats.gemma_scope import prefer

AGREE = 1e-3
"""Relative difference up to which a file's factor and the registry's are one: some are rounded."""


def hook_points(data: Mapping[str, Any], where: Path) -> tuple[str, str]:
    """The TransformerLens hooks that are read and written; the same for an SAE."""
    into, out = data.get("hook_point_in"), data.get("hook_point_out")
    out = into if out is None else out
    if not isinstance(into, str) or not isinstance(out, str):
        raise FormatError(
            f"{where}: hook_point_in and hook_point_out are {into!r} and {out!r}, expected names"
        )
    return into, out


def sites_of(
    hooks: tuple[str, str], model: str | None, entry: Entry | None
) -> tuple[Site | None, Site | None]:
    """Input site, and output site of a transcoder; what the registry states wins."""
    model = entry.model if entry is not None and entry.model else model
    site = site_of_hook(hooks[0], model)
    out_site = site_of_hook(hooks[1], model) if hooks[1] != hooks[0] else None
    return prefer(entry.site if entry else None, site), prefer(
        entry.out_site if entry else None, out_site
    )


def factor_of(norm: object, d: int, what: str, where: Path) -> float:
    """sqrt(d) / norm: what makes activations of this mean norm those that were trained on."""
    return positive(math.sqrt(d) / positive(norm, what, where), f"sqrt(d) / {what}", where)


def expect_factor(factor: float, entry: Entry | None, where: Path, agree: float = AGREE) -> None:
    """Raise FormatError when the registry states another factor for the input than the file has."""
    stated = entry.norm_scaling_factor if entry is not None else None
    if stated is not None and abs(stated - factor) > agree * abs(factor):
        raise FormatError(
            f"{where}: its activations are scaled by {factor:.6g}, but the registry states "
            f"norm_scaling_factor {stated:.6g}"
        )


def refuse_glu(data: Mapping[str, Any], raw: Mapping[str, Any], where: Path) -> None:
    """A gated linear unit multiplies two products, which no architecture here does."""
    there = any("glu" in str(name) for name in raw)
    if data.get("use_glu_encoder") not in (None, False) or there:
        raise FormatError(
            f"{where}: use_glu_encoder: its pre-activations are a product times the sigmoid of "
            "another (GLU), which has no exact form here"
        )


def scaled(matrix: Tensor, factor: float) -> Tensor:
    """matrix * factor in float32 or wider, with one copy and no other temporary."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return matrix if factor == 1 else matrix.to(wide, copy=True).mul_(factor)
