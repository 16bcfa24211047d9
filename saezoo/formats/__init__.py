"""The formats that saezoo reads, as one literal table, and how files say which of them they are.

Each format is a module of this package with
    read(path: Path, entry: Entry | None) -> Weights     the canonical form of the files at `path`
and, where it can be written,
    write(cfg: SAEConfig, tensors: dict[str, Tensor], folder: Path) -> None     raises CannotConvert
                                                                                with the reason
    origin_output(folder: Path, x: Tensor) -> Tensor     the authors' own formula on the written
                                                         files, for the proof
This file imports none of them, nor torch: a table is cheap to look at.
"""

import importlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from saezoo.errors import FormatError, MissingFile

if TYPE_CHECKING:
    from torch import Tensor

    from saezoo.config_multi import AnyConfig


@dataclass(frozen=True)
class Weights:
    """What a reader returns: the spec, and the tensors it requires under their canonical names and
    shapes.
    """

    cfg: "AnyConfig"
    tensors: dict[str, "Tensor"]


@dataclass(frozen=True)
class Format:
    """How the files of one publisher look."""

    title: str
    files: tuple[str, ...] = ()
    """File names that a folder of this format must have."""
    optional: tuple[str, ...] = ()
    """File names that are fetched too where they exist."""
    suffixes: tuple[str, ...] = ()
    """Where one SAE is one file: how its name may end."""
    marker: tuple[str, str] | None = None
    """(file, JSON key): tells apart formats whose file names are alike."""
    writable: bool = False
    layer_files: tuple[str, ...] = ()
    """Where several layers belong together: the files of each, with {layer} for its number."""
    layered: bool = False
    """Whether one layer can be had by name: `FOLDER/layer_3`."""

    def layer_files_in(self, names: Collection[str], layer: int | None = None) -> list[str]:
        """Those of these names that are files of a layer, or of the one layer."""
        found = []
        for template in self.layer_files:
            start, _, end = template.partition("{layer}")
            pattern = re.compile(rf"{re.escape(start)}(\d+){re.escape(end)}")
            numbered = [
                (int(match[1]), match[0]) for match in map(pattern.fullmatch, names) if match
            ]
            found += [name for number, name in sorted(numbered) if layer in (None, number)]
        return found

    def shared_files(self) -> tuple[str, ...]:
        """The required files that belong to no one layer."""
        return tuple(name for name in self.files if not self.layer_files_in([name]))


FORMATS: dict[str, Format] = {
    "native": Format(
        "saezoo's own folder",
        files=("config.json", "sae.safetensors"),
        optional=("golden.safetensors", "stats.safetensors", "README.md"),
        marker=("config.json", "saezoo_format"),
        writable=True,
        layer_files=("layer_{layer}.safetensors",),
        layered=True,
    ),
    "openai": Format("OpenAI sparse_autoencoder (gpt2-small)", suffixes=(".pt",)),
    "sparsify": Format("EleutherAI sparsify", files=("cfg.json", "sae.safetensors"), writable=True),
    "dictionary_learning": Format(
        "saprmarks dictionary_learning",
        files=("ae.pt",),
        optional=("config.json",),
        suffixes=("ae.pt",),
    ),
    "saelens": Format("SAELens", files=("cfg.json", "sae_weights.safetensors"), writable=True),
    "gemma_scope": Format(
        "Google DeepMind Gemma Scope (Gemma 2)", files=("params.npz",), suffixes=("params.npz",)
    ),
    "gemma_scope_2": Format(
        "Google DeepMind Gemma Scope 2 (Gemma 3)",
        files=("params.safetensors",),
        optional=("config.json",),
        suffixes=("params.safetensors",),
    ),
    "gemma_scope_2_multi": Format(
        "Google DeepMind Gemma Scope 2, cross-layer transcoders and crosscoders",
        files=("params_layer_0.safetensors",),
        optional=("config.json",),
        layer_files=("params_layer_{layer}.safetensors",),
        layered=True,
    ),
    "mntss_clt": Format(
        "circuit-tracer's cross-layer transcoders",
        files=("config.yaml", "W_enc_0.safetensors", "W_dec_0.safetensors"),
        layer_files=("W_enc_{layer}.safetensors", "W_dec_{layer}.safetensors"),
        layered=True,
    ),
    "finetuning_crosscoder": Format(
        "science-of-finetuning's crosscoders",
        files=("config.json", "model.safetensors"),
        marker=("config.json", "dict_size"),
    ),
    "kissane_crosscoder": Format(
        "Connor Kissane's crosscoders", files=("cfg.json", "cc_weights.pt")
    ),
}

FAMILIES: dict[str, tuple[str, ...]] = {
    "clt": ("mntss_clt", "gemma_scope_2_multi", "llamascopium"),
    "crosscoder": (
        "gemma_scope_2_multi",
        "finetuning_crosscoder",
        "kissane_crosscoder",
        "llamascopium",
    ),
}
"""Names that the registry uses for several formats: the files decide for which."""

LAYER_NAME = re.compile(r"(?:layer_)?(\d{1,4})")
"""What one layer of what spans several is called, below its folder."""


KNOWN_OF = (
    "llama_scope",
    "llama_scope_r1",
    "llamascopium",
    "circuit_tracer",
    "goodfire",
    "deepseek_r1",
    "qwen_scope",
    "kissane_attn",
    "temporal",
    "evo2",
    "e2e",
    "dunefsky",
    "mlsae",
    "prisma",
    "interplm",
    "esmc",
)
"""Formats that the registry may name though nothing here reads them yet; one in FORMATS is read."""


def is_read(name: str | None) -> bool:
    """Whether files of this format can be loaded; None: the files decide."""
    return name is None or name in FORMATS or name in FAMILIES


def among(key: str | None, found: list[str]) -> list[str]:
    """Of the formats that some files may be, those that `key` allows: itself, or its family."""
    if key is None:
        return found
    return [name for name in found if name in FAMILIES[key]] if key in FAMILIES else [key]


def may_have_layers(name: str | None) -> bool:
    """Whether one layer of this format, or of some of this family, can be had by name."""
    return any(key in FORMATS and FORMATS[key].layered for key in FAMILIES.get(name or "", (name,)))


def split_layer(path: Path) -> tuple[Path, int | None]:
    """(folder, number) where `path` is no file or folder, but names one layer of the folder it
    would be in, as `FOLDER/layer_3` or `FOLDER/3`; else (path, None).
    """
    found = LAYER_NAME.fullmatch(path.name)
    if found is None or path.exists() or not path.parent.is_dir():
        return path, None
    return path.parent, int(found[1])


def unread_format(name: str, where: str) -> FormatError:
    """What to say of a format that is not in FORMATS. where: whose format it is."""
    if name in KNOWN_OF:
        return FormatError(f"{where}: its format {name} is known but not read yet")
    return FormatError(f"no format {name!r}. There are: {', '.join(FORMATS)}")


def format_module(name: str) -> ModuleType:
    """The module that reads (and perhaps writes) a format. Raises FormatError for a name not in
    FORMATS.
    """
    if name not in FORMATS:
        raise unread_format(name, "these files")
    return importlib.import_module(f"saezoo.formats.{name}")


def match_names(names: list[str] | set[str]) -> list[str]:
    """Formats whose required files are all among these file names of a folder, the most specific
    first.
    """
    found = [key for key, form in FORMATS.items() if form.files and set(form.files) <= set(names)]
    return sorted(found, key=lambda key: (-len(FORMATS[key].files), list(FORMATS).index(key)))


def match_file(name: str) -> list[str]:
    """Formats of which one SAE is one file that ends like this, the longest suffix first."""
    scored = [
        (max(len(suffix) for suffix in form.suffixes if name.endswith(suffix)), key)
        for key, form in FORMATS.items()
        if any(name.endswith(suffix) for suffix in form.suffixes)
    ]
    return [key for _, key in sorted(scored, key=lambda item: -item[0])]


def detect(path: Path) -> str:
    """The format of a local folder or file, decided by the files. Raises FormatError that says what
    was looked for.
    """
    path, layer = split_layer(Path(path))
    try:
        found = _detect(path, layer)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file or folder") from None
    if layer is not None and not FORMATS[found].layered:
        raise MissingFile(
            f"{path}/layer_{layer}: no such file or folder, and the format {found} has no layers"
        )
    return found


def _detect(path: Path, layer: int | None = None) -> str:
    path.stat()  # raises where there is nothing
    if path.is_file():
        found = match_file(path.name)
        expected = ", ".join(
            f"*{suffix} ({key})" for key, form in FORMATS.items() for suffix in form.suffixes
        )
    else:
        found = [
            key for key in match_names(_with_layer(_names_in(path), layer)) if _marked(path, key)
        ]
        expected = ", ".join(
            f"{' + '.join(form.files)} ({key})" for key, form in FORMATS.items() if form.files
        )
    if not found:
        raise FormatError(
            f"{path}: no known format. Looked for {expected}. Give format=… (--from) if you know it"
        )
    return found[0]


def _with_layer(names: set[str], layer: int | None) -> set[str]:
    """Names of a folder as if the files of one layer were those of layer 0, which formats require:
    one layer may be all that was fetched.
    """
    for form in FORMATS.values() if layer is not None else ():
        own = {template.replace("{layer}", str(layer)) for template in form.layer_files}
        if own and own <= names:
            names = names | {template.replace("{layer}", "0") for template in form.layer_files}
    return names


def _names_in(folder: Path) -> set[str]:
    """The file names of a folder, all of one moment, even while another process replaces it."""
    while True:
        before = folder.stat().st_ino
        names = {item.name for item in folder.iterdir()}
        if folder.stat().st_ino == before:
            return names


def _marked(folder: Path, key: str) -> bool:
    marker = FORMATS[key].marker
    if marker is None:
        return True
    try:
        data = json.loads((folder / marker[0]).read_bytes())
    except (ValueError, RecursionError):
        # a broken config is for the reader to complain about, by name and place
        return True
    return isinstance(data, dict) and marker[1] in data
