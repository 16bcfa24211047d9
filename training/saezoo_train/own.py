"""Find an architecture by the name in a recipe: one of ours, or a class in one's own file."""

import difflib
from pathlib import Path

from saezoo.errors import ConfigError
from saezoo_train.architectures import ARCHITECTURES, Architecture
from saezoo_train.architectures.custom import load_architecture


def find_architecture(name: str, near: Path | None = None) -> type[Architecture]:
    """The class behind a recipe's `architecture`. near: the recipe's folder, where `module:Class`
    is looked for first.

    Raises ConfigError when there is none, or when `module:Class` stands in a recipe that lies in a
    model's folder: nothing that was downloaded names an import.
    """
    if ":" in name:
        return _own(name, near)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    close = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"no architecture {name!r}.{hint} There are {', '.join(ARCHITECTURES)}, and module:Class "
        "for one of your own"
    )


def _own(name: str, near: Path | None) -> type[Architecture]:
    if near is not None and any((near / file).exists() for file in MODEL_FILES):
        raise ConfigError(
            f"architecture {name!r}: the recipe lies in a model's folder ({near}), and no code is "
            "run from there; copy both files elsewhere if you trust them"
        )
    return load_architecture(name, near)


MODEL_FILES = ("config.json", "sae.safetensors")
"""By which a model's folder is known."""
