"""The formats that saezoo reads: one literal table (`_table.py`), how files say which of them they
are (`_detect.py`), and a module for each.

Each format is a module of this package with
    read(path: Path, entry: Entry | None) -> Weights     the canonical form of the files at `path`
and, where it can be written,
    write(cfg: SAEConfig, tensors: dict[str, Tensor], folder: Path) -> None     raises CannotConvert
                                                                                with the reason
    origin_output(folder: Path, x: Tensor) -> Tensor     the authors' own formula on the written
                                                         files, for the proof
This file imports none of them, nor torch: a table is cheap to look at. Other packages can bring
formats too (`_plugins.py`); they are asked when one of theirs is named, or none of these fits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from saezoo.formats._detect import (
    LAYER_NAME,
    detect,
    holds_tensors,
    match_file,
    match_names,
    names_in,
    split_layer,
    split_part,
    what_files,
    what_folders,
)
from saezoo.formats._lookup import (
    among,
    format_module,
    format_of,
    format_tables,
    is_read,
    may_have_layers,
    unread_format,
    writable_formats,
)
from saezoo.formats._table import (
    FAMILIES,
    FORMATS,
    REFUSED,
    Format,
)

if TYPE_CHECKING:
    from torch import Tensor

    from saezoo.config_multi import AnyConfig

__all__ = [
    "FAMILIES",
    "FORMATS",
    "Format",
    "LAYER_NAME",
    "REFUSED",
    "Weights",
    "among",
    "detect",
    "format_module",
    "format_of",
    "format_tables",
    "holds_tensors",
    "is_read",
    "match_file",
    "match_names",
    "may_have_layers",
    "names_in",
    "split_layer",
    "split_part",
    "unread_format",
    "what_files",
    "what_folders",
    "writable_formats",
]


@dataclass(frozen=True)
class Weights:
    """What a reader returns: the spec, and the tensors it requires under their canonical names and
    shapes.
    """

    cfg: "AnyConfig"
    tensors: dict[str, "Tensor"]
