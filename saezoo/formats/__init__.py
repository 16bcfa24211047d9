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

import fnmatch
import importlib
import json
from collections.abc import Collection
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
    one_of: tuple[str, ...] = ()
    """A folder must have one of these too; the first that it has is the one that is read. Of a
    pattern, such as `layer_*.safetensors`, it must have one alone.
    """
    optional: tuple[str, ...] = ()
    """File names that are fetched too where they exist; {stem} is the name of the one file without
    its ending.
    """
    suffixes: tuple[str, ...] = ()
    """Where one SAE is one file: how its name may end; `*` stands for anything."""
    marker: tuple[str, str] | None = None
    """(file, JSON key): tells apart formats whose file names are alike; {stem} as in `optional`."""
    holds: tuple[str, ...] = ()
    """Tensors that the weights must have: tells apart formats whose file names are alike. `*`
    stands for anything.
    """
    parts: bool = False
    """Whether one file may hold several SAEs: FILE/NAME is one of them."""
    writable: bool = False

    def one_of_in(self, names: Collection[str]) -> list[str]:
        """Those of these file names that `one_of` asks for, the first choice first."""
        return [
            name
            for wanted in self.one_of
            for name in fnmatch.filter(sorted(names), wanted)
            if name.count("/") == wanted.count("/")
        ]

    def is_called(self, name: str) -> str:
        """The longest of `suffixes` that a file name ends like; empty: none."""
        fitting = [end for end in self.suffixes if fnmatch.fnmatchcase(name, f"*{end}")]
        return max(fitting, key=len, default="")

    def optional_of(self, one_file: str) -> tuple[str, ...]:
        """The optional files of a folder (""), or those beside one file."""
        stem = one_file.rpartition(".")[0]
        return tuple(name.replace("{stem}", stem) for name in self.optional)


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
    "llama_scope": Format(
        "OpenMOSS Llama Scope (Llama 3.1 8B)",
        files=("hyperparams.json",),
        one_of=(
            "sae_weights.safetensors",
            "sae_weights.pt",
            "checkpoints/pruned.safetensors",
            "checkpoints/pruned.pt",
            "checkpoints/final.safetensors",
            "checkpoints/final.pt",
        ),
        optional=("lm_config.json",),
    ),
    "llama_scope_r1": Format(
        "OpenMOSS Llama Scope R1 Distill",
        files=("config.json",),
        one_of=("sae_weights.safetensors", "sae_weights.pt"),
        holds=("encoder.weight",),
    ),
    "llamascopium": Format(
        "OpenMOSS Llamascopium (Llama Scope 2)",
        files=("config.json",),
        one_of=("sae_weights.safetensors", "sae_weights.pt", "sae_weights.dcp/.metadata"),
    ),
    "goodfire": Format(
        "Goodfire",
        suffixes=(".pt", ".pth"),
        holds=("encoder_linear.weight", "decoder_linear.weight"),
    ),
    "deepseek_r1": Format(
        "qresearch",
        suffixes=(".pt", ".pth"),
        holds=("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
    ),
    "evo2": Format(
        "Goodfire's tied BatchTopK SAE (Evo 2)",
        suffixes=(".pt", ".pth"),
        holds=("W", "b_enc", "b_dec"),
    ),
    "qwen_scope": Format(
        "Qwen-Scope", suffixes=(".sae.pt",), optional=("config.json",), holds=("W_enc", "W_dec")
    ),
    "kissane_attn": Format(
        "Connor Kissane's attention SAEs",
        suffixes=(".pt",),
        optional=("{stem}_cfg.json",),
        marker=("{stem}_cfg.json", "act_size"),
        holds=("W_enc", "b_enc", "W_dec", "b_dec"),
    ),
    "mlsae": Format(
        "Tim Lawson's multi-layer SAE",
        files=("config.json", "model.safetensors"),
        marker=("config.json", "n_latents"),
    ),
    "interplm": Format("InterPLM", suffixes=("ae_normalized.pt", "ae_unnormalized.pt")),
    "esmc": Format(
        "Biohub ESM-C",
        suffixes=(".safetensors",),
        optional=("config.json",),
        holds=("W_enc", "W_dec", "b_dec", "idf", "max"),
    ),
    "circuit_tracer": Format(
        "circuit-tracer's transcoders of one layer",
        files=("config.yaml",),
        one_of=("layer_*.safetensors",),
        optional=("config.yaml", "wandb-config.yaml", "wanb-config.yaml"),
        suffixes=("layer_*.safetensors",),
        holds=("W_enc", "W_dec", "b_dec"),
        writable=True,
    ),
    "e2e": Format(
        "Apollo Research e2e_sae",
        suffixes=(".pt",),
        optional=("final_config.yaml",),
        holds=("*.encoder.0.weight", "*.decoder.weight"),
        parts=True,
    ),
    "dunefsky": Format(
        "Jacob Dunefsky's transcoders",
        suffixes=(".pt",),
        holds=("cfg", "state_dict", "hook_point", "W_dec", "b_dec"),
    ),
    "prisma": Format(
        "Prisma (vision models)",
        files=("config.json",),
        one_of=("weights.pt", "n_images_*.pt"),
        optional=("config.json",),
        suffixes=(".pt",),
        marker=("config.json", "activation_fn_str"),
        holds=("W_enc", "W_dec", "b_dec"),
    ),
}


KNOWN_OF = (
    "clt",
    "temporal",
    "crosscoder",
)
"""Formats that the registry may name though nothing here reads them yet; one in FORMATS is read."""

REFUSED = {
    "temporal": "its codes come out of attention over the whole context, so they are not those of "
    "one token, which is all that an SAE here is given",
}
"""Formats of which the arithmetic has no exact form here, and why."""


def is_read(name: str | None) -> bool:
    """Whether files of this format can be loaded; None: the files decide."""
    return name is None or name in FORMATS


def unread_format(name: str, where: str) -> FormatError:
    """What to say of a format that is not in FORMATS. where: whose format it is."""
    if name in REFUSED:
        return FormatError(f"{where}: its format {name} cannot be read: {REFUSED[name]}")
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
    names = set(names)
    found = [
        key
        for key, form in FORMATS.items()
        if form.files and names >= set(form.files) and (not form.one_of or form.one_of_in(names))
    ]
    return sorted(found, key=_most_specific)


def _most_specific(key: str) -> tuple[int, int, int]:
    form = FORMATS[key]
    return -len(form.files) - bool(form.one_of), -len(form.holds), list(FORMATS).index(key)


def match_file(name: str) -> list[str]:
    """Formats of which one SAE is one file that ends like this, the longest suffix first, and among
    equal ones those that say most of what is in it.
    """
    ends = {key: form.is_called(name).rpartition("*")[2] for key, form in FORMATS.items()}

    def rank(key: str) -> tuple[int, bool, int]:
        form = FORMATS[key]
        return -len(ends[key]), form.marker is None, -len(form.holds)

    return sorted((key for key in ends if ends[key]), key=rank)


def detect(path: Path) -> str:
    """The format of a local folder or file (or FILE/PART), decided by the files. Raises FormatError
    that says what was looked for.
    """
    whole, part = split_part(Path(path))
    try:
        found = _detect(whole)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file or folder") from None
    if part and not FORMATS[found].parts:
        raise MissingFile(f"{whole}: is one SAE of the format {found}: there is no {part!r} in it")
    return found


def _detect(path: Path) -> str:
    path.stat()  # raises where there is nothing
    if path.is_file():
        candidates, expected = match_file(path.name), what_files()
    else:
        candidates, expected = match_names(_names_in(path)), what_folders()
    marked = {key: holds_tensors(path, key) for key in candidates if _marked(path, key)}
    # a broken file is for a reader to complain about
    found = [key for key in marked if marked[key]] or [key for key in marked if marked[key] is None]
    if not found:
        raise FormatError(
            f"{path}: no known format. Looked for {expected}.{_files_in(path)} "
            "Give format=… (--from) if you know it"
        )
    return found[0]


def _files_in(path: Path) -> str:
    """A hint at the files of a folder of which each may be an SAE."""
    names = sorted(_names_in(path)) if path.is_dir() else []
    single = [name for name in names if match_file(name)]
    more = " …" if len(single) > 3 else ""
    return (
        f" It holds {', '.join(single[:3])}{more}: name a file, not the folder." if single else ""
    )


def what_files() -> str:
    """The formats of which an SAE is one file, in words."""
    return ", ".join(
        f"*{suffix} ({key})" for key, form in FORMATS.items() for suffix in form.suffixes
    )


def what_folders() -> str:
    """The formats of which an SAE is a folder, in words."""
    return ", ".join(
        f"{' + '.join([*form.files, *form.one_of[:1]])} ({key})"
        for key, form in FORMATS.items()
        if form.files
    )


def _names_in(folder: Path) -> set[str]:
    """The file names of a folder, and below it those that formats ask for, all of one moment, even
    while another process replaces it.
    """
    needed = {name for form in FORMATS.values() for name in (*form.files, *form.one_of)}
    deep = {name for name in needed if "/" in name}
    while True:
        before = folder.stat().st_ino
        names = {item.name for item in folder.iterdir()}
        names |= {name for name in deep if (folder / name).is_file()}
        if folder.stat().st_ino == before:
            return names


def _marked(path: Path, key: str) -> bool:
    """Whether the config that tells this format from others is there and says so."""
    marker = FORMATS[key].marker
    if marker is None:
        return True
    config = path / marker[0]
    if path.is_file():
        config = path.with_name(marker[0].replace("{stem}", path.stem))
        if not config.is_file():
            return False
    try:
        data = json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        # a broken config is for the reader to complain about, by name and place
        return True
    return isinstance(data, dict) and marker[1] in data


def holds_tensors(path: Path, key: str) -> bool | None:
    """Whether the weights have the tensors that tell this format from others; None where they
    cannot be read.
    """
    form = FORMATS[key]
    if not form.holds:
        return True
    if path.is_dir():
        names = _names_in(path)
        path = next(path / name for name in (*form.one_of_in(names), *form.files) if name in names)
    from saezoo.formats._pickled import tensor_names

    held = tensor_names(path)
    return None if held is None else all(fnmatch.filter(held, wanted) for wanted in form.holds)


def split_part(path: Path) -> tuple[Path, str]:
    """(file, part) of FILE/PART, one of several SAEs in a file; (path, "") of all others."""
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return path, ""
