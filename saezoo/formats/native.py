"""saezoo's own folder: config.json (the spec) and sae.safetensors (the canonical tensors), read and
written.
"""

import json
import math
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._tensors import read_json, read_safetensors

VERSION = 1
CONFIG, WEIGHTS = "config.json", "sae.safetensors"


def read(path: Path, _entry: Entry | None) -> Weights:
    """Read a native folder. Raises ConfigError for a spec that is wrong, FormatError for files that
    are.
    """
    cfg = read_config(path)
    # the spec says how large the file may be: the widest dtype, and a megabyte for the header
    need = sum(8 * math.prod(shape) for shape in cfg.tensor_shapes().values())
    return Weights(cfg, read_safetensors(path / WEIGHTS, limit=need + 2**20))


def read_config(path: Path) -> SAEConfig:
    """The spec in a native folder. Raises FormatError when it is of a newer version than this
    saezoo knows.
    """
    where = path / CONFIG
    data = read_json(where)
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
    return SAEConfig.from_json(data, where=str(where))


def write(cfg: SAEConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write config.json and sae.safetensors into an existing folder; tensors keep their dtypes."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if cfg.custom is None and plain["W_dec"].is_set_to(plain["W_enc_rows"]):
        # safetensors wants each tensor to have memory of its own
        plain["W_dec"] = plain["W_dec"].clone()
    save_file(plain, folder / WEIGHTS)
    write_config(cfg, folder)


def write_config(cfg: SAEConfig, folder: Path) -> None:
    """Write config.json; it comes last, since its presence says that the weights are there."""
    text = json.dumps({"saezoo_format": VERSION} | cfg.to_json(), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
