"""Read recipes: files, bundled ones by name, changes as key=value; write them as YAML. Keys that
nobody knows are refused with the nearest that there is.
"""

import difflib
import os
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from saezoo.config import Spec, one_line
from saezoo.errors import ConfigError
from saezoo_train.architectures import ARCHITECTURES
from saezoo_train.config import Recipe
from saezoo_train.own import find_architecture

BUNDLED = Path(__file__).parent / "recipes"


def bundled_recipes() -> dict[str, str]:
    """The recipes that come with saezoo: name and first comment line, in the order of names."""
    found = {}
    for path in sorted(BUNDLED.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = first.lstrip("# ").rstrip(".")
    return found


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """A recipe's file: a path, or the name of a bundled one. Raises ConfigError naming the
    closest.
    """
    path = Path(name)
    if path.is_file():
        return path
    bundled = BUNDLED / f"{name}.yaml"
    names = bundled_recipes()
    if str(name) in names:
        return bundled
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name the recipe's file")
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"no recipe {str(name)!r}.{hint} Bundled are {', '.join(names)}")


def read_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """A recipe from a file, a bundled name or plain values; `changes` maps dotted keys to new
    values.

    Raises ConfigError in one line that names each wrong key and value.
    """
    if isinstance(source, Recipe) and not changes:
        return source
    if isinstance(source, Recipe):
        where, data, near = "recipe", source.model_dump(mode="json"), None
    elif isinstance(source, Mapping):
        where, data, near = "recipe", dict(source), None
    else:
        path = find_recipe(source)
        where, data, near = str(path), _read_yaml(path), path.resolve().parent
        if near == BUNDLED.resolve():
            # a class of one's own for a bundled recipe lies where one works
            where, near = f"recipe {path.stem}", Path.cwd()
    for key, value in (changes or {}).items():
        _change(data, key, value)
    try:
        architecture = find_architecture(str(data.get("architecture") or "topk"), near)
        known = [*_known_keys(Recipe), *_known_keys(architecture.Options)]
        _refuse_others(data, known, str(data.get("architecture") or "topk"))
        _refuse_unknown(data, known)
        return Recipe.model_validate(_numbers(data), context={"near": near})
    except ValidationError as error:
        raise ConfigError(f"{where}: {one_line(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def parse_change(item: str) -> tuple[str, Any]:
    """`key=value` from a command line, the value read as YAML. Raises ConfigError for anything
    else.
    """
    key, sign, value = item.partition("=")
    if not sign or not key:
        raise ConfigError(f"{item!r} is neither a recipe nor key=value, such as optimiser.lr=5e-4")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{item!r}: the value is no YAML") from None


def to_yaml(recipe: Recipe) -> str:
    """Every field, as YAML that is itself a valid recipe."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two recipes as plain values, `run` left out: `key was a, is now b`."""
    old, new = dict(_flat(before)), dict(_flat(after))
    keys = [key for key in {**old, **new} if not key.startswith("run.")]
    return [
        f"{key} was {old.get(key)}, is now {new.get(key)}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _flat(data: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is keys and values, this is {type(data).__name__}")
    return data


def _change(data: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        below = data.get(group)
        if below is None:
            data[group] = {}
        elif not isinstance(below, dict):
            raise ConfigError(f"unknown key {key!r}: {group!r} is a value, not a group")
        else:
            data[group] = dict(below)
        data = data[group]
    data[last] = value


def _known_keys(spec: type[Spec], before: str = "") -> Iterator[str]:
    """Dotted keys of a spec and of all below it. Options of architectures stand under `sae`."""
    before = before or ("" if spec is Recipe else "sae.")
    for name, field in spec.model_fields.items():
        yield f"{before}{name}"
        inner = _spec_of(field.annotation)
        if inner is not None and inner is not Spec:
            yield from _known_keys(inner, f"{before}{name}.")


def _spec_of(annotation: Any) -> type[Spec] | None:
    """The Spec of an annotation such as `Origin | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for item in get_args(annotation) if (found := _spec_of(item))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Spec) else None


def _refuse_others(data: Mapping[str, Any], known: list[str], architecture: str) -> None:
    """Raises ConfigError for an option of another architecture, as where a recipe's is changed."""
    given = data.get("sae")
    for key in [f"sae.{name}" for name in given] if isinstance(given, Mapping) else []:
        whose = [name for name, kind in ARCHITECTURES.items() if key in _known_keys(kind.Options)]
        if key not in known and whose:
            raise ConfigError(
                f"{key!r} is an option of {', '.join(whose)}, not of {architecture}: give all "
                "options anew, such as sae='{d_sae: 4096}'"
            )


def _refuse_unknown(data: Mapping[str, Any], known: list[str], before: str = "") -> None:
    """Raises ConfigError for the first key that is not known, with the nearest."""
    groups = {key.rpartition(".")[0] for key in known}
    for name, value in data.items():
        key = f"{before}{name}"
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{_nearest(key, known)}")
        if isinstance(value, Mapping) and key in groups:
            _refuse_unknown(value, known, f"{key}.")


def _nearest(key: str, known: list[str]) -> str:
    """A key that is spelled alike, or that has the same name in another group."""
    last = key.rpartition(".")[2]
    same = [item for item in known if item.rpartition(".")[2] == last]
    close = same or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        names = {item.rpartition(".")[2]: item for item in known}
        close = [names[item] for item in difflib.get_close_matches(last, names, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _numbers(value: Any) -> Any:
    """Numbers that YAML 1.1 takes for words, such as 1e6 and 5e-4."""
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value
