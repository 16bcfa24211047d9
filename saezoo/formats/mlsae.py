"""Tim Lawson's multi-layer SAEs: `config.json` and `model.safetensors`, one SAE for all layers.

Arithmetic, from mlsae/model/autoencoder.py (MLSAE):
    mu = mean(x), s = std(x) unbiased, z = (x - mu) / (s + 1e-5) if standardize, else x
    f = the k largest of (z - pre_encoder_bias) W^T, and ReLU of them
    y = (f D^T + pre_encoder_bias) s + mu                        (no eps on the way back)
Its `encode` returns the k values before ReLU, `forward` decodes them after; here features are what
is decoded. There is no encoder bias. x is the residual stream after any layer. last_nonzero and the
auxk and dead_… keys concern training. A repo that ends in -tfm holds the whole transformer besides:
it is refused, and the one without -tfm is the same SAE.
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

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KNOWN = ("n_inputs", "n_latents", "k", "standardize")


def read(path: Path, entry: Entry | None) -> Weights:
    """Read the folder. Raises FormatError for a whole transformer, and where config, registry and
    tensors contradict.
    """
    where, file = path / CONFIG, path / WEIGHTS
    data, raw = read_json(where), read_safetensors(file)
    tell_unknown(data, KNOWN, where)
    if any(name.startswith("autoencoder.") for name in raw):
        raise FormatError(
            f"{file}: a whole transformer with its SAE (MLSAETransformer); take the repo of the "
            "same name without -tfm"
        )
    tensors: dict[str, Tensor] = {
        "W_enc_rows": take(raw, "encoder.weight", file, dims=2),
        "W_dec": take(raw, "decoder.weight", file, dims=2).T,
        "b_dec": take(raw, "pre_encoder_bias", file, dims=1),
    }
    raw.pop("last_nonzero", None)
    refuse_rest(raw, file, "mlsae")
    d_sae, d_in = tensors["W_enc_rows"].shape
    tensors["b_enc"] = torch.zeros(d_sae)
    found: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    expect_sizes(data, {"n_inputs": d_in, "n_latents": d_sae}, where)
    found["k"] = whole_number(data, "k", where)
    expect_facts(entry, found, where)
    spec = {"architecture": "topk", **found, "subtract_b_dec": True}
    if yes_or_no({"standardize": True} | data, "standardize", where):
        spec["input_norm"] = {"kind": "layer_norm", "eps": 1e-5, "ddof": 1}
    return Weights(SAEConfig.from_json(spec, where=str(where)), tensors)
