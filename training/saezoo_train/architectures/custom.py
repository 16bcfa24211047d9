"""An architecture of one's own: a class in one's own file, named `module:Class` in one's own
recipe.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

from saezoo.config import Spec
from saezoo.errors import ConfigError
from saezoo_train.architectures.base import Architecture

NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def load_architecture(name: str, folder: Path | None) -> type[Architecture]:
    """The class `Class` of the module `module` for the name `module:Class`; the module is looked
    for in `folder`, the recipe's own, and then where Python looks. None: there alone.

    This runs the module. So the name must be what the user wrote in a recipe of theirs: never one
    from a downloaded file, nor from a recipe in a model's folder. Raises ConfigError in one line.
    What the module itself raises, other than failing imports and syntax errors, is left as it is.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"architecture {name!r}: write module:Class, such as my_module:MySAE")
    module = _import(match[1], folder, name)
    found = getattr(module, match[2], None)
    if found is None:
        classes = [
            key
            for key, value in vars(module).items()
            if _is_architecture(value) and value.__module__ == module.__name__
        ]
        has = f"it has {', '.join(classes)}" if classes else "it has no Architecture at all"
        raise ConfigError(f"architecture {name!r}: no {match[2]} in {module.__file__}; {has}")
    if not _is_architecture(found):
        raise ConfigError(
            f"architecture {name!r}: {match[2]} is no subclass of "
            "saezoo_train.architectures.Architecture"
        )
    options = getattr(found, "Options", None)
    if not (isinstance(options, type) and issubclass(options, Spec)):
        raise ConfigError(
            f"architecture {name!r}: give {match[2]} a class Options, a subclass of "
            "saezoo.config.Spec, with a default for every option"
        )
    if found.training_step is Architecture.training_step:
        raise ConfigError(f"architecture {name!r}: {match[2]} has no training_step")
    return found


def _is_architecture(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Architecture) and value is not Architecture


def _import(module_name: str, folder: Path | None, name: str) -> ModuleType:
    """Import a module, from the folder where it has it."""
    top = module_name.partition(".")[0]
    if folder is not None:
        folder = folder.resolve()
    ours = folder is not None and ((folder / f"{top}.py").exists() or (folder / top).is_dir())
    if ours and str(folder) not in sys.path:
        # it stays there: the module may import its neighbours later
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except SyntaxError as error:
        raise ConfigError(
            f"architecture {name!r}: {error.filename}, line {error.lineno}: {error.msg}"
        ) from None
    except ImportError as error:
        if error.name == module_name:
            beside = f"beside the recipe in {folder}, or " if folder else ""
            raise ConfigError(
                f"architecture {name!r}: there is no {module_name}; {top}.py should lie {beside}"
                "where Python finds modules"
            ) from None
        raise ConfigError(f"architecture {name!r}: importing it fails: {error}") from None
    file = Path(module.__file__).resolve() if module.__file__ else None
    if ours and (file is None or folder not in file.parents):
        raise ConfigError(
            f"architecture {name!r}: a module {module_name} is there already ({file}); "
            f"rename the one in {folder}"
        )
    return module
