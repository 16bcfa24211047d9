"""Is what lies here what was published? Files, hashes, shapes, finite weights, golden outputs."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from saezoo.build import build, check_weights
from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError, NotFinite, SaezooError
from saezoo.fetched import Fetched
from saezoo.files import sha256_of
from saezoo.find import find_sae
from saezoo.formats import format_of, split_layer, split_part
from saezoo.formats._tensors import read_safetensors, refuse_not_finite
from saezoo.hub import fetch
from saezoo.load import read_weights
from saezoo.numerics import TOLERANCE, largest_difference
from saezoo.sae import SAE

GOLDEN = "golden.safetensors"
GOLDEN_TOKENS = 32
NOISE = (1e-3, 1e-4, 1e-5)
"""Sizes of disturbances, as a share of an activation's norm, that must not change which features
are on for golden inputs.
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ok is None where there was nothing to compare with."""

    what: str
    ok: bool | None
    detail: str


def check_sae(
    name: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> list[Finding]:
    """Look at everything that can be looked at without the host model, in order; stops where going
    on makes no sense.

    Raises only what finding and fetching raise; what is wrong with the files is a Finding.
    """
    entry = find_sae(name, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    fetched = fetch(
        entry,
        format=format,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        extras=True,
    )
    files = _files(fetched)
    size = sum(path.stat().st_size for path in files)
    findings = [
        Finding(
            "files",
            True,
            f"{fetched.format}: {_names(files)} ({size:,} bytes)",
        ),
        *_hashes(files, entry),
    ]
    try:
        weights = read_weights(fetched, entry, keep=False)
        check_weights(weights.cfg, weights.tensors, entry.name)
        custom = isinstance(weights.cfg, SAEConfig) and weights.cfg.custom
        model = None if custom else build(weights.cfg, weights.tensors, where=entry.name)
    except SaezooError as error:
        return [*findings, Finding("shapes", False, str(error))]
    findings.append(Finding("shapes", True, _shapes(weights.tensors)))
    try:
        refuse_not_finite(weights.tensors, entry.name)
        findings.append(
            Finding(
                "finite",
                True,
                f"{sum(value.numel() for value in weights.tensors.values()):,} weights",
            )
        )
    except NotFinite as error:
        findings.append(Finding("finite", False, str(error)))
    if isinstance(model, SAE):
        findings.append(_golden(model, fetched))
    elif custom:
        what = f"what it computes only its author's class knows: {custom.name}"
        findings.append(Finding("golden", None, what))
    return findings


def write_golden(sae: SAE, x: Tensor, folder: Path) -> None:
    """Keep what `sae` makes of x (tokens, d_in), float32, so that any later copy can be compared
    with it.
    """
    features = sae.encode_sparse(x)
    save_file(
        {
            "x": x.contiguous(),
            "values": features.values.contiguous(),
            "indices": features.indices.contiguous(),
            "out": sae(x).contiguous(),
        },
        folder / GOLDEN,
    )


def decided_tokens(sae: SAE, x: Tensor, draws: int = 4) -> Tensor:
    """The rows of x (tokens, d_in) on which a small disturbance changes no feature from off to on:
    on another machine's arithmetic a near-tie may fall the other way, and that would be no fault of
    the file. ReLU features have no such ties: they grow from 0.
    """
    if sae.cfg.architecture == "relu":
        return x
    generator = torch.Generator().manual_seed(0)
    on = sae.encode(x) != 0
    unit = x.norm(dim=-1, keepdim=True) / x.shape[1] ** 0.5
    decided = x[:0]
    for size in NOISE:
        same = torch.ones(len(x), dtype=torch.bool)
        for _ in range(draws):
            noise = torch.randn(x.shape, generator=generator) * unit * size
            same &= ((sae.encode(x + noise) != 0) == on).all(-1)
        decided = x[same]
        if len(decided) >= GOLDEN_TOKENS:
            break
    return decided


def golden_difference(sae: SAE, path: Path) -> float:
    """Largest difference of features and reconstruction from the golden ones. Raises FormatError
    for a broken file.
    """
    golden = read_safetensors(path, limit=2**30)
    if missing := {"x", "values", "indices", "out"} - golden.keys():
        raise FormatError(f"{path}: has no {', '.join(sorted(missing))}")
    x, indices = golden["x"], golden["indices"]
    if (
        x.dim() != 2
        or x.shape[1] != sae.d_in
        or indices.shape != golden["values"].shape
        or len(indices) != len(x)
    ):
        raise FormatError(f"{path}: its shapes do not fit an SAE with d_in={sae.d_in}")
    if indices.dtype != torch.int64 or (
        indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < sae.d_sae
    ):
        raise FormatError(f"{path}: feature numbers outside 0 to {sae.d_sae - 1}")
    expected = torch.zeros(len(x), sae.d_sae).scatter_add(-1, indices, golden["values"].float())
    return max(
        largest_difference(sae.encode(x).float(), expected),
        largest_difference(sae(x).float(), golden["out"].float()),
    )


def _files(fetched: Fetched) -> list[Path]:
    form, (path, _) = format_of(fetched.format), split_part(fetched.path)
    if path.is_file():
        return [path]
    folder, layer = split_layer(path)
    present = [item.name for item in folder.iterdir()]
    shared = form.files if layer is None else form.shared_files()
    own = (*form.layer_files_in(present, layer), *form.one_of, *form.one_of_in(present))
    names = dict.fromkeys([*shared, *own, *form.optional])
    return [folder / name for name in names if (folder / name).is_file()]


def _hashes(files: list[Path], entry: Entry) -> list[Finding]:
    stated = entry.sha256
    if stated is None:
        return [Finding("hash", None, "the registry states none")]
    if isinstance(stated, str):
        weights = max(files, key=lambda path: path.stat().st_size)
        stated = {weights.name: stated}
    findings = []
    for path in files:
        if path.name in stated:
            got = sha256_of(path)
            same = got == stated[path.name]
            detail = f"{path.name} sha256 {got[:12]}…" + (
                "" if same else f", stated {stated[path.name][:12]}…"
            )
            findings.append(Finding("hash", same, detail))
    return findings


def _golden(sae: SAE, fetched: Fetched) -> Finding:
    path = fetched.path / GOLDEN
    if fetched.path.is_file() or not path.is_file():
        return Finding("golden", None, f"there is no {GOLDEN}")
    try:
        difference = golden_difference(sae, path)
    except SaezooError as error:
        return Finding("golden", False, str(error))
    limit = TOLERANCE[torch.float32]
    return Finding(
        "golden", difference <= limit, f"largest difference {difference:.1e}, tolerance {limit:.0e}"
    )


def _names(files: list[Path]) -> str:
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return ", ".join(path.name for path in files[:8]) + more


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    """Names, shapes and dtypes, those of many layers in one: `layers.0 to 25: b_enc (16,) …`."""
    groups: dict[str, list[str]] = {}
    for key, value in tensors.items():
        numbered = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
        said = f"{numbered[2] if numbered else key} {tuple(value.shape)} {_dtype(value)}"
        groups.setdefault(said, []).append(numbered[1] if numbered else "")
    parts = []
    for said, layers in groups.items():
        span = layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
        parts.append(f"layers.{span}: {said}" if layers[0] else said)
    return ", ".join(parts)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
