"""Who makes the updates, the Triton kernels or torch ops: chosen once, before the first one."""

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from saezoo.errors import ConfigError
from saezoo.gpu import why_no_triton
from saezoo_train.architectures import BatchTopK, Gated, JumpReLU, TopK
from saezoo_train.config import Recipe
from saezoo_train.kernels import LONGEST, WIDEST
from saezoo_train.own import find_architecture

logger = logging.getLogger(__name__)

HAVE_KERNELS = (TopK, BatchTopK, JumpReLU, Gated)


@dataclass(frozen=True)
class Backend:
    """What was chosen."""

    kernels: bool
    words: str
    """For the run's first lines and the notes of its result."""

    def kit(self) -> ModuleType | None:
        """The kernels, imported; None where torch ops were chosen."""
        if not self.kernels:
            return None
        from saezoo_train.kernels import kit

        return kit


def choose_backend(recipe: Recipe, device: torch.device) -> Backend:
    """The kernels where device, Triton and recipe allow it, else torch ops; these also where
    `run.triton` is false. A GPU that cannot run the kernels is worth one warning.

    Raises ConfigError where `run.triton` is true and they cannot run.
    """
    if recipe.run.triton is False:
        return Backend(False, "steps are made by torch ops: run.triton is false")
    no_device = why_no_triton(device)
    reason = no_device or why_no_formula(recipe)
    if reason is None:
        reason = no_device = why_no_launch(device)
    if reason is None:
        return Backend(True, "steps are made by Triton kernels, products in bfloat16")
    if recipe.run.triton:
        raise ConfigError(f"run.triton=true, but {reason}; leave it out to train with torch ops")
    if no_device and device.type == "cuda":
        logger.warning("training goes on with torch ops, without Triton kernels: %s", reason)
    return Backend(False, f"steps are made by torch ops: {reason}")


def why_no_launch(device: torch.device) -> str | None:
    """Why a first small kernel failed there, such as a driver that is too old for what Triton
    compiles; None where it ran.
    """
    from saezoo_train.kernels.centre import centre

    try:
        centre(torch.ones(2, 8, device=device), None, torch.bfloat16).sum().item()
    except Exception as error:  # noqa: BLE001 compilers and drivers fail in their own ways
        said = str(error).strip().splitlines()
        return f"a first kernel failed ({type(error).__name__}: {said[0] if said else ''})"
    return None


def why_no_formula(recipe: Recipe) -> str | None:
    """What of a recipe the kernels do not compute; None where there is nothing."""
    options: Any = recipe.sae
    if find_architecture(recipe.architecture) not in HAVE_KERNELS:
        return f"there are no kernels for architecture {recipe.architecture}"
    if recipe.optimiser.clip_norm is not None:
        return "the kernels never hold the whole gradient that optimiser.clip_norm is about"
    if getattr(options, "multi_k", None) is not None:
        return "there are no kernels for Multi-TopK (sae.multi_k)"
    if getattr(options, "pre_act_coefficient", 0):
        return "there are no kernels for sae.pre_act_coefficient"
    if options.d_sae > WIDEST:
        return f"the kernels hold at most {WIDEST:,} latents, sae.d_sae is {options.d_sae:,}"
    most = max(getattr(options, "k", 0), getattr(options, "k_start", None) or 0)
    if most > LONGEST:
        return f"the kernels hold at most {LONGEST} latents a token, sae.k is {most}"
    return None
