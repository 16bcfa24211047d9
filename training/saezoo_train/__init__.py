"""Train sparse autoencoders into folders that `saezoo.load_sae` opens."""

from typing import Any

__all__ = ["Recipe", "Trained", "Watch", "read_recipe", "train_sae"]

_HOME = {
    "Recipe": "saezoo_train.config",
    "Trained": "saezoo_train.run",
    "Watch": "saezoo_train.watch",
    "read_recipe": "saezoo_train.reading",
    "train_sae": "saezoo_train.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saezoo_train' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
