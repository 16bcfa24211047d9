"""The formats that saezoo reads, as one literal table, and how files say which of them they are.

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

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from saezoo.errors import FormatError, MissingFile

if TYPE_CHECKING:
    from torch import Tensor

    from saezoo.config import SAEConfig


@dataclass(frozen=True)
class Weights:
    """What a reader returns: the spec, and the tensors it requires under their canonical names and
    shapes.
    """

    cfg: "SAEConfig"
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


FORMATS: dict[str, Format] = {
    "native": Format(
        "saezoo's own folder",
        files=("config.json", "sae.safetensors"),
        optional=("golden.safetensors", "stats.safetensors", "README.md"),
        marker=("config.json", "saezoo_format"),
        writable=True,
    ),
    "openai": Format("OpenAI sparse_autoencoder (gpt2-small)", suffixes=(".pt",)),
    "sparsify": Format("EleutherAI sparsify", files=("cfg.json", "sae.safetensors"), writable=True),
    "dictionary_learning": Format(
        "saprmarks dictionary_learning",
        files=("ae.pt",),
        optional=("config.json",),
        suffixes=("ae.pt",),
        writable=True,
    ),
    "saelens": Format("SAELens", files=("cfg.json", "sae_weights.safetensors"), writable=True),
    "gemma_scope": Format(
        "Google DeepMind Gemma Scope (Gemma 2)",
        files=("params.npz",),
        suffixes=("params.npz",),
        writable=True,
    ),
    "gemma_scope_2": Format(
        "Google DeepMind Gemma Scope 2 (Gemma 3)",
        files=("params.safetensors",),
        optional=("config.json",),
        suffixes=("params.safetensors",),
    ),
}


def writable_formats() -> list[str]:
    """Formats of the table that `saezoo convert --to` writes."""
    return [key for key, form in FORMATS.items() if form.writable]


KNOWN_OF = (
    "llama_scope",
    "llama_scope_r1",
    "llamascopium",
    "circuit_tracer",
    "clt",
    "goodfire",
    "deepseek_r1",
    "qwen_scope",
    "kissane_attn",
    "temporal",
    "evo2",
    "e2e",
    "dunefsky",
    "mlsae",
    "crosscoder",
    "prisma",
    "interplm",
    "esmc",
)
"""Formats that the registry may name though nothing here reads them yet; one in FORMATS is read."""


def is_read(name: str | None) -> bool:
    """Whether files of this format can be loaded; None: the files decide."""
    return name is None or name in FORMATS or name in _others().plugin_points()


def unread_format(name: str, where: str) -> FormatError:
    """What to say of a format that nothing reads. where: whose format it is."""
    if name in _others().plugin_points():
        return FormatError(f"{where}: the package that has the format {name} cannot be used")
    if name in KNOWN_OF:
        return FormatError(f"{where}: its format {name} is known but not read yet")
    return FormatError(
        f"no format {name!r}. There are: {', '.join([*FORMATS, *_others().plugin_points()])}"
    )


def format_of(name: str) -> Format:
    """How the files of a format look. Raises FormatError for a name that nothing reads."""
    if name in FORMATS:
        return FORMATS[name]
    form: Format = format_module(name).FORMAT
    return form


def format_module(name: str) -> ModuleType:
    """The module that reads (and perhaps writes) a format. Raises FormatError for a name that
    nothing reads.
    """
    if name in FORMATS:
        return importlib.import_module(f"saezoo.formats.{name}")
    module: ModuleType | None = _others().plugin_module(name)
    if module is None:
        raise unread_format(name, "these files")
    return module


def format_tables() -> Iterator[Mapping[str, Format]]:
    """saezoo's own formats first; those of other packages where none of these was taken."""
    yield FORMATS
    yield _others().plugin_formats()


def match_names(names: list[str] | set[str]) -> list[str]:
    """Formats whose required files are all among these file names of a folder, the most specific
    first.
    """
    return next(filter(None, (_fitting(set(names), formats) for formats in format_tables())), [])


def match_file(name: str) -> list[str]:
    """Formats of which one SAE is one file that ends like this, the longest suffix first."""
    for formats in format_tables():
        scored = [
            (max(len(suffix) for suffix in form.suffixes if name.endswith(suffix)), key)
            for key, form in formats.items()
            if any(name.endswith(suffix) for suffix in form.suffixes)
        ]
        if scored:
            return [key for _, key in sorted(scored, key=lambda item: -item[0])]
    return []


def _others() -> ModuleType:
    # imported when asked for: the metadata of installed packages takes time to import and to read
    return importlib.import_module("saezoo.formats._plugins")


def detect(path: Path) -> str:
    """The format of a local folder or file, decided by the files. Raises FormatError that says what
    was looked for.
    """
    path = Path(path)
    try:
        return _detect(path)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file or folder") from None


def _detect(path: Path) -> str:
    path.stat()  # raises where there is nothing
    if path.is_file():
        found = match_file(path.name)
        expected = ", ".join(
            f"*{suffix} ({key})" for key, form in FORMATS.items() for suffix in form.suffixes
        )
    else:
        names = _names_in(path)
        found = next(
            filter(None, (_fitting(names, formats, path) for formats in format_tables())), []
        )
        expected = ", ".join(
            f"{' + '.join(form.files)} ({key})" for key, form in FORMATS.items() if form.files
        )
    if not found:
        raise FormatError(
            f"{path}: no known format. Looked for {expected}. Give format=… (--from) if you know it"
        )
    return found[0]


def _fitting(
    names: set[str], formats: Mapping[str, Format], folder: Path | None = None
) -> list[str]:
    """Formats of a table that file names fit, and markers where there is a folder to look into, the
    most specific first.
    """
    found = [
        key
        for key, form in formats.items()
        if form.files and set(form.files) <= names and (folder is None or _marked(folder, form))
    ]
    return sorted(found, key=lambda key: -len(formats[key].files))


def _names_in(folder: Path) -> set[str]:
    """The file names of a folder, all of one moment, even while another process replaces it."""
    while True:
        before = folder.stat().st_ino
        names = {item.name for item in folder.iterdir()}
        if folder.stat().st_ino == before:
            return names


def _marked(folder: Path, form: Format) -> bool:
    marker = form.marker
    if marker is None:
        return True
    try:
        data = json.loads((folder / marker[0]).read_bytes())
    except (ValueError, RecursionError):
        # a broken config is for the reader to complain about, by name and place
        return True
    return isinstance(data, dict) and marker[1] in data
