"""Apollo Research's e2e_sae: `samples_N.pt`, a state dict of one SAE or several, and mostly
`final_config.yaml` beside it.

Arithmetic, from e2e_sae/models/sparsifiers.py (SAE), for each hook h with its . written as -:
    f = ReLU(x W^T + b)                     W, b: h.encoder.0.weight, h.encoder.0.bias
    y = f normalize(D)^T + c                D, c: h.decoder.weight (d, n), h.decoder.bias
with each column of D divided by max(its length, 1e-12) at run time: it is stored as trained. Here
that is done once, some features at a time; nothing is subtracted from x.
A file of several hooks is `FILE/HOOK`: `samples_400000.pt/blocks.6.hook_resid_pre`. The file alone
is read where it holds one, or the registry states the hook.
The host is TransformerLens' own processed model (from_pretrained as it is), so that of GPT-2, whose
norms subtract the mean, the writing weights are centred: e2e_sae/loader.py.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.config import SAEConfig, Site
from saezoo.entry import Entry
from saezoo.errors import FormatError, MissingFile
from saezoo.formats import Weights, split_part
from saezoo.formats._hooks import site_of_hook
from saezoo.formats._tensors import (
    SHOWN,
    expect_facts,
    read_state_dict,
    read_yaml,
    refuse_rest,
    take,
)
from saezoo.formats.gemma_scope import prefer

CONFIG = "final_config.yaml"

NAMES = {
    "encoder.0.weight": "W_enc_rows",
    "encoder.0.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
EPS = 1e-12
"""Of torch.nn.functional.normalize."""

ROWS = 2**22
"""Numbers of the decoder that are normalised at a time."""

CENTRED = re.compile(r"gpt2(-small|-medium|-large|-xl)?|distilgpt2")
"""Hosts whose norms subtract the mean, and whose writing weights TransformerLens centres."""


def read(path: Path, entry: Entry | None) -> Weights:
    """Read FILE, or FILE/HOOK of a file with several. The encoder is as stored, the decoder a copy
    with rows of length 1 (0 where the stored column is 0).

    Raises MissingFile for a hook that the file does not have, FormatError where it has several and
    none is named, and where config, tensors and registry contradict.
    """
    file, part = split_part(path)
    config = file.with_name(CONFIG)
    data = read_yaml(config) if config.is_file() else {}
    raw = {str(key): value for key, value in read_state_dict(file).items()}
    hook = _chosen(raw, part, entry, file)
    prefix = f"{hook.replace('.', '-')}."
    own = {key.removeprefix(prefix): raw[key] for key in raw if key.startswith(prefix)}
    tensors = {
        ours: take(own, theirs, file, dims=2 if theirs.endswith("weight") else 1)
        for theirs, ours in NAMES.items()
    }
    refuse_rest(own, file, f"an SAE of e2e_sae ({hook})")
    d_sae, d_in = tensors["W_enc_rows"].shape
    if tensors["W_dec"].shape != (d_in, d_sae):
        shape = tuple(tensors["W_dec"].shape)
        raise FormatError(f"{file}: {prefix}decoder.weight is {shape}, expected {(d_in, d_sae)}")
    tensors["W_dec"] = unit_rows(tensors["W_dec"])
    found = {"d_in": d_in, "d_sae": d_sae}
    _expect_config(data, found, config)
    expect_facts(entry, found, file)
    site = prefer(entry.site if entry else None, _site(hook, data))
    spec = {"architecture": "relu", **found, "site": site}
    return Weights(SAEConfig.from_json(spec, where=str(file)), tensors)


def unit_rows(columns: Tensor) -> Tensor:
    """(n, d) rows of length 1, float32 at least, from the stored (d, n) columns; as
    normalize(columns, dim=0).T has them.
    """
    d, n = columns.shape
    dtype = torch.promote_types(columns.dtype, torch.float32)
    rows = torch.empty(n, d, dtype=dtype)
    step = max(1, ROWS // max(d, 1))
    for start in range(0, n, step):
        block = columns[:, start : start + step].to(dtype)
        torch.div(
            block.T, block.norm(dim=0).clamp_min(EPS)[:, None], out=rows[start : start + step]
        )
    return rows


def _chosen(raw: dict[str, Any], part: str, entry: Entry | None, file: Path) -> str:
    """The hook whose SAE is meant."""
    ends = tuple(f".{name}" for name in NAMES)
    starts = {key.removesuffix(end) for key in raw for end in ends if key.endswith(end)}
    hooks = sorted(start.replace("-", ".") for start in starts)
    known = tuple(f"{start}." for start in starts)
    if strange := [key for key in raw if not key.startswith(known)]:
        raise FormatError(
            f"{file}: tensors that e2e_sae's SAEs do not have: {', '.join(sorted(strange)[:5])}"
        )
    stated = entry.site.hook_name if entry is not None and entry.site is not None else None
    wanted = part or (stated if stated in hooks else None)
    if wanted is not None:
        if wanted not in hooks:
            raise MissingFile(f"{file}: has no SAE of {wanted}; it has those of {_some(hooks)}")
        return wanted
    if not hooks:
        raise FormatError(f"{file}: has no tensor that ends in {next(iter(NAMES))!r}")
    if len(hooks) > 1:
        raise FormatError(
            f"{file}: holds {len(hooks)} SAEs, of {_some(hooks)}: name one, as "
            f"…/{file.name}/{hooks[0]}"
        )
    return hooks[0]


def _some(hooks: list[str]) -> str:
    return ", ".join(hooks[:5]) + (" …" if len(hooks) > 5 else "")


def _expect_config(data: dict[str, Any], found: dict[str, int], config: Path) -> None:
    saes = data.get("saes") or {}
    if not isinstance(saes, dict):
        raise FormatError(f"{config}: saes is {type(saes).__name__}, expected a mapping")
    kind, ratio = saes.get("type_of_sparsifier") or "sae", saes.get("dict_size_to_input_ratio")
    if kind != "sae":
        raise FormatError(f"{config}: type_of_sparsifier {SHOWN.repr(kind)} is not read; sae is")
    if ratio is None:
        return
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1e6:
        raise FormatError(f"{config}: dict_size_to_input_ratio is {SHOWN.repr(ratio)}")
    if int(ratio * found["d_in"]) != found["d_sae"]:
        raise FormatError(
            f"{config}: dict_size_to_input_ratio is {ratio}, but the tensors have "
            f"{found['d_sae']} features of {found['d_in']}"
        )


def _site(hook: str, data: dict[str, Any]) -> Site:
    model = data.get("tlens_model_name")
    model = model if isinstance(model, str) and model else None
    site = site_of_hook(hook, model)
    centred = model is not None and site.point is not None and CENTRED.fullmatch(model) is not None
    return site.model_copy(update={"centred": True}) if centred else site
