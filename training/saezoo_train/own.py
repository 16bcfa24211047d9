"""Find an architecture by the name in a recipe: one of ours, or a class in one's own file; and use
an SAE of one's own where one of ours is expected.
"""

import difflib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.config import SAEConfig
from saezoo.errors import ConfigError
from saezoo.sae import SAE, build_sae
from saezoo.sparse import SparseFeatures, pack_active
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
        return load_architecture(name, near or _imported_from(name) or Path.cwd())
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    close = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"no architecture {name!r}.{hint} There are {', '.join(ARCHITECTURES)}, and module:Class "
        "for one of your own"
    )


def _imported_from(name: str) -> Path | None:
    """The folder of a module that was imported already: when its recipe was read."""
    module = sys.modules.get(name.partition(":")[0])
    file = getattr(module, "__file__", None)
    return Path(file).parent if file else None


class OwnSAE(nn.Module):
    """A trained architecture of one's own that has `encode` and `decode` of raw activations, with
    the methods by which SAEs are measured.
    """

    def __init__(self, module: Any, cfg: SAEConfig) -> None:
        super().__init__()
        self.module, self.cfg, self.d_in, self.d_sae = module, cfg, cfg.d_in, cfg.d_sae

    def encode(self, x: Tensor) -> Tensor:
        """Features (…, d_sae) of x (…, d_in)."""
        features: Tensor = self.module.encode(x)
        return features

    def encode_sparse(self, x: Tensor) -> SparseFeatures:
        """The same as the active ones only."""
        return pack_active(self.encode(x))

    def decode(self, features: Tensor | SparseFeatures, _x: Tensor | None = None) -> Tensor:
        """The reconstruction (…, d_in)."""
        dense = features.to_dense() if isinstance(features, SparseFeatures) else features
        out: Tensor = self.module.decode(dense)
        return out

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
