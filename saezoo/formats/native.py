"""saezoo's own folder: config.json (the spec) and sae.safetensors (the canonical tensors), read and
written.

What spans several layers has a `kind` in its config, which saezoo before it refuses. Of a
cross-layer transcoder, sae.safetensors holds what belongs to no one layer, and
layer_0.safetensors, layer_1.safetensors … a layer each.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from saezoo.config import SAEConfig
from saezoo.config_multi import AnyConfig, CLTConfig, config_from_json
from saezoo.entry import Entry
from saezoo.errors import CannotConvert, FormatError, MissingFile
from saezoo.formats import FORMATS, Weights, split_layer
from saezoo.formats._stream import NAMES, stream_safetensors
from saezoo.formats._tensors import read_json, read_safetensors

VERSION = 1
CONFIG, WEIGHTS = "config.json", "sae.safetensors"


def read(path: Path, _entry: Entry | None) -> Weights:
    """Read a native folder. Raises ConfigError for a spec that is wrong, FormatError for files that
    are.
    """
    folder, layer = split_layer(path)
    cfg = read_config(folder)
    if isinstance(cfg, CLTConfig):
        return _read_layers(cfg, folder, layer)
    if layer is not None:
        raise MissingFile(f"{path}: no such folder, and what is in {folder} has no layers")
    return Weights(cfg, read_safetensors(folder / WEIGHTS, limit=_room(cfg.tensor_shapes())))


def read_config(path: Path) -> AnyConfig:
    """The spec in a native folder. Raises FormatError when it is of a newer version than this
    saezoo knows.
    """
    where = path / CONFIG
    return _checked_config(read_json(where), str(where))


def parse_config(text: str, where: str) -> AnyConfig:
    """The spec of the text of a config.json; raises what `read_config` does."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(f"{where}: not JSON") from None
    if not isinstance(data, dict):
        raise FormatError(f"{where}: is no JSON object")
    return _checked_config(data, where)


def _checked_config(data: dict[str, Any], where: str) -> AnyConfig:
    version = data.pop("saezoo_format", None)
    if version is None:
        raise FormatError(f"{where}: has no saezoo_format, so it is not a native saezoo config")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"{where}: saezoo_format is {version!r}, expected {VERSION}")
    if version > VERSION:
        raise FormatError(
            f"{where}: saezoo_format {version} is newer than the {VERSION} that this saezoo reads: "
            "upgrade saezoo"
        )
    return config_from_json(data, where)


def _read_layers(cfg: CLTConfig, folder: Path, layer: int | None) -> Weights:
    """A cross-layer transcoder: the layers that its spec has, or one of them."""
    whole = cfg.model_copy(update={"layer": None})
    if layer is not None and cfg.layer not in (None, layer):
        raise MissingFile(f"{folder} has layer {cfg.layer} only, not {layer}")
    if layer is not None:
        cfg = cfg.alone(layer, str(folder / CONFIG))
    elif cfg.layer is None:
        _refuse_more_layers(cfg, folder)
    tensors: dict[str, Tensor] = {}
    for at in cfg.held:
        limit = _room(whole.layer_shapes(at))
        raw = read_safetensors(folder / f"layer_{at}.safetensors", limit=limit)
        if cfg.layer is not None:
            raw.pop("W_skip", None)
        tensors |= {f"layers.{at}.{name}": value for name, value in raw.items()}
    shared = {"b_dec": (cfg.layers, cfg.width_out)}
    if cfg.layer is None:
        tensors |= read_safetensors(folder / WEIGHTS, limit=_room(shared))
    return Weights(cfg, tensors)


def _refuse_more_layers(cfg: CLTConfig, folder: Path) -> None:
    form = FORMATS["native"]
    there = set(form.layer_files_in([item.name for item in folder.iterdir()]))
    if more := there - {f"layer_{at}.safetensors" for at in cfg.held}:
        raise FormatError(
            f"{folder}: its config has {cfg.layers} layers, but there is {', '.join(sorted(more))}"
        )


def _room(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How large a file of these tensors may be: the widest dtype, and a megabyte for the header."""
    return sum(8 * math.prod(shape) for shape in shapes.values()) + 2**20


def write(cfg: AnyConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the config and the weights into an existing folder; tensors keep their dtypes. Those of
    a layer are streamed into its own file, a few rows at a time.
    """
    if isinstance(cfg, SAEConfig):
        _write_one(tensors, folder)
    else:
        _write_layers(tensors, folder)
    write_config(cfg, folder)


def _write_one(tensors: Mapping[str, Tensor], folder: Path) -> None:
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if {"W_dec", "W_enc_rows"} <= plain.keys() and plain["W_dec"].is_set_to(plain["W_enc_rows"]):
        # safetensors wants each tensor to have memory of its own
        plain["W_dec"] = plain["W_dec"].clone()
    save_file(plain, folder / WEIGHTS)


def _write_layers(tensors: Mapping[str, Tensor], folder: Path) -> None:
    files: dict[str, dict[str, Tensor]] = {WEIGHTS: {}}
    for name, value in tensors.items():
        numbered = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        file = f"layer_{numbered[1]}.safetensors" if numbered else WEIGHTS
        if value.dtype not in NAMES:
            raise CannotConvert(f"{name} is {value.dtype}, which the native folder does not hold")
        files.setdefault(file, {})[numbered[2] if numbered else name] = value.detach()
    for file, held in files.items():
        stream_safetensors({name: value.cpu() for name, value in held.items()}, folder / file)


def write_config(cfg: AnyConfig, folder: Path) -> None:
    """Write config.json; it comes last, since its presence says that the weights are there."""
    text = json.dumps({"saezoo_format": VERSION} | cfg.to_json(), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
