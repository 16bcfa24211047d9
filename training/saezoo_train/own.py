"""Find an architecture by the name in a recipe: one of ours, or a class in one's own file; and use
an SAE of one's own where one of ours is expected.
"""

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.config import SAEConfig
from saezoo.errors import ConfigError
from saezoo.sae import SAE, build_sae
from saezoo_train.architectures import ARCHITECTURES, Architecture
from saezoo_train.architectures.custom import load_architecture

MODEL_FILES = ("config.json", "sae.safetensors")
"""By which a model's folder is known."""


def find_architecture(name: str, near: Path | None = None) -> type[Architecture]:
    """The class behind a recipe's `architecture`. near: the recipe's folder, where `module:Class`
    is looked for first.

    Raises ConfigError when there is none, or when `module:Class` stands in a recipe that lies in a
    model's folder: nothing that was downloaded names an import.
    """
    if ":" in name:
        if near is not None and any((near / file).exists() for file in MODEL_FILES):
            raise ConfigError(
                f"architecture {name!r}: the recipe lies in a model's folder ({near}), and no code "
                "is run from there; copy both files elsewhere if you trust them"
            )
        return load_architecture(name, near)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    close = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"no architecture {name!r}.{hint} There are {', '.join(ARCHITECTURES)}, and module:Class "
        "for one of your own"
    )


class OwnSAE(nn.Module):
    """A trained architecture of one's own that has `encode` and `decode` of raw activations, with
    the methods by which SAEs are measured.
    """

    def __init__(self, module: Any, cfg: SAEConfig) -> None:
        super().__init__()
        self.module, self.cfg = module, cfg
        self.d_in, self.d_sae, self.d_out = cfg.d_in, cfg.d_sae, cfg.d_in

    def encode(self, x: Tensor) -> Tensor:
        """Features (…, d_sae) of x (…, d_in)."""
        return self.module.encode(x)

    def decode(self, features: Tensor, _x: Tensor | None = None) -> Tensor:
        """The reconstruction (…, d_in)."""
        return self.module.decode(features)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode."""
        return self.module.decode(self.module.encode(x))


def to_measure(
    cfg: SAEConfig,
    tensors: dict[str, Tensor],
    kind: type[Architecture],
    device: torch.device | str = "cpu",
) -> SAE | OwnSAE | None:
    """What was exported, on a device, as it can be measured; None for an architecture of one's own
    that has no `encode` and `decode`.
    """
    placed = {name: value.to(device) for name, value in tensors.items()}
    if cfg.custom is None:
        return build_sae(cfg, placed)
    module = kind.from_native(cfg, placed)
    if not (hasattr(module, "encode") and hasattr(module, "decode")):
        return None
    return OwnSAE(module, cfg)
