"""Biohub's SAEs on ESM-C: one `layer_{n}.safetensors` a layer, and the repo's `config.json` beside.

Arithmetic, from Biohub's modeling_esmc_sae.py (_ESMCSAELayer.forward):
    mu = mean(x), s = std(x) unbiased, z = (x - mu) / (s + 1e-5)
    f = the k largest of ReLU((z - b_dec) W_enc); there is no encoder bias
    y = f W_dec + b_dec, which is in units of z: here it is times s and plus mu, in units of x
k is in config.json, or in the registry. Their features come as f: only with normalize_sae=True are
they f / max * idf, by two tensors of the file, so that is not applied here, and the notes say so.
With use_residual_update_instead_of_states, x is what a block adds: the difference of the states
after and before it. Layer n of theirs is what n blocks give.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._tensors import (
    expect_facts,
    expect_sizes,
    read_json,
    read_safetensors,
    refuse_rest,
    take,
    tell_unknown,
    whole_number,
    yes_or_no,
)

STATISTICS = ("idf", "max")
UPDATE = "use_residual_update_instead_of_states"
KNOWN = ("k", "d_model", "codebook_dim", UPDATE)


def read(path: Path, entry: Entry | None) -> Weights:
    """Read one layer's file. Raises FormatError where nothing says k, and where file, config and
    registry contradict.
    """
    config = path.with_name("config.json")
    data = read_json(config) if config.is_file() else {}
    tell_unknown(data, KNOWN, config)
    raw = read_safetensors(path)
    tensors: dict[str, Tensor] = {
        "W_enc_rows": take(raw, "W_enc", path, dims=2).T,
        "W_dec": take(raw, "W_dec", path, dims=2),
        "b_dec": take(raw, "b_dec", path, dims=1),
    }
    d_sae, d_in = tensors["W_enc_rows"].shape
    tensors["b_enc"] = torch.zeros(d_sae)
    found: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    expect_sizes(data, {"d_model": d_in, "codebook_dim": d_sae}, config)
    found["k"] = _k(data, config, path, entry)
    notes = _notes(raw, data, path, config)
    refuse_rest(raw, path, "ESM-C's format")
    expect_facts(entry, found, path)
    spec = {
        "architecture": "topk",
        **found,
        "subtract_b_dec": True,
        "input_norm": {"kind": "layer_norm", "eps": 1e-5, "ddof": 1},
        "notes": notes or None,
    }
    return Weights(SAEConfig.from_json(spec, where=str(path)), tensors)


def _k(data: dict[str, Any], config: Path, path: Path, entry: Entry | None) -> int:
    if "k" in data:
        return whole_number(data, "k", config)
    if entry is None or entry.k is None:
        raise FormatError(
            f"{path}: nothing says k: it is in the repo's config.json; put that beside, or load it "
            "by its name in the registry"
        )
    return entry.k


def _notes(
    raw: dict[str, Tensor], data: dict[str, Any], path: Path, config: Path
) -> dict[str, str]:
    notes: dict[str, str] = {}
    for name in STATISTICS:
        if name in raw and not torch.all(take(raw, name, path, dims=1) == 1):
            notes["normalize_sae"] = "f / max * idf is not applied: features are in raw units"
    if yes_or_no(data, UPDATE, config):
        notes["input"] = "what a block adds: the state after it minus the state before it"
    return notes
