"""InterPLM's SAEs on ESM-2: `layer_L/ae_normalized.pt` and `ae_unnormalized.pt`, without a config.

Arithmetic, from interplm/sae/dictionary.py (ReLUSAE, before version 1.0 AutoEncoder):
    z = x, or sqrt(d) x / |x| where the file says normalize_to_sqrt_d
    f = ReLU((z - bias) W^T + b_enc)
    y = f D^T + bias, times |x| / sqrt(d) where z was normalised (unnormalize=True of their forward,
        without which they leave y in units of z)
In the published ae_normalized.pt each feature was divided by the largest value it was seen to take,
and its column of D multiplied by it, so columns of features that were never on are 0. Since version
1.0 such a file has the plain weights and those values as activation_rescale_factor, which their
encode applies only with normalize_features=True: so it is not applied here, and the notes say so.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._tensors import expect_facts, read_state_dict, refuse_rest, take

FACTOR, NORMALISED = "activation_rescale_factor", "normalize_to_sqrt_d"


def read(path: Path, entry: Entry | None) -> Weights:
    """Read one file. Raises FormatError for missing, unknown and misshapen tensors, as InterPLM's
    other classes have, and where the registry states other sizes.
    """
    raw = read_state_dict(path)
    tensors: dict[str, Tensor] = {
        "W_enc_rows": take(raw, "encoder.weight", path, dims=2),
        "b_enc": take(raw, "encoder.bias", path, dims=1),
        "W_dec": take(raw, "decoder.weight", path, dims=2).T,
        "b_dec": take(raw, "bias", path, dims=1),
    }
    d_sae, d_in = tensors["W_enc_rows"].shape
    found = {"d_in": d_in, "d_sae": d_sae}
    spec: dict[str, Any] = {"architecture": "relu", **found, "subtract_b_dec": True}
    if _flag(raw.pop(NORMALISED, False), path):
        spec["input_norm"] = {"kind": "constant_norm"}
    if FACTOR in raw:
        factor = take(raw, FACTOR, path, dims=1)
        if len(factor) != d_sae:
            raise FormatError(f"{path}: {FACTOR} is {tuple(factor.shape)}, expected {(d_sae,)}")
        if not torch.equal(factor, torch.ones_like(factor)):
            spec["notes"] = {FACTOR: "in the file and not applied: features are in raw units"}
    refuse_rest(raw, path, "InterPLM's ReLUSAE")
    expect_facts(entry, found, path)
    return Weights(SAEConfig.from_json(spec, where=str(path)), tensors)


def _flag(value: Any, path: Path) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype == torch.bool:
        return bool(value)
    if not isinstance(value, bool):
        raise FormatError(f"{path}: {NORMALISED} is not true or false")
    return value
