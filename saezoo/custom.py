"""SAEs whose arithmetic is not ours: the caller passes the class, and no file ever names one to
import.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saezoo.config import SAEConfig
from saezoo.errors import ConfigError


def needs_class(cfg: SAEConfig, where: str) -> str:
    """What to say where an SAE is of an architecture of its own and no class was passed."""
    name = cfg.custom.name if cfg.custom else ""
    return (
        f"{where} is of an architecture of its own ({name!r}): saezoo imports nothing that a file "
        "names, so pass its class if you have and trust it: load_sae(…, custom=TheClass)"
    )


def build_custom(
    cfg: SAEConfig,
    tensors: Mapping[str, Tensor],
    custom: type[Any] | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
    where: str,
) -> Any:
    """What `custom.from_native(cfg, tensors)` makes of an SAE of architecture `custom`, its tensors
    on the device, those of floats in `dtype` (None: as stored).

    Raises ConfigError when there is no class, it has no from_native, or the SAE needs none.
    """
    if cfg.custom is None:
        raise ConfigError(
            f"{where}: its architecture is {cfg.architecture}, which saezoo computes itself: leave "
            "out custom="
        )
    if custom is None:
        raise ConfigError(needs_class(cfg, where))
    if not callable(getattr(custom, "from_native", None)):
        raise ConfigError(
            f"{where}: {custom!r} has no classmethod from_native(cfg, tensors) to make it with"
        )
    placed = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in tensors.items()
    }
    return custom.from_native(cfg, placed)
