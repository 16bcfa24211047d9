"""OpenAI's sparse_autoencoder for gpt2-small: one `.pt` a layer, no config file.

Arithmetic, from openai/sparse_autoencoder model.py, for activation TopK (v5):
    mu = mean(x), s = std(x) unbiased, z = (x - mu) / (s + 1e-5)
    f = ReLU(topk((z - pre_bias) W_enc^T + latent_bias, k))
    x_hat = (f W_dec^T + pre_bias) * s + mu                    (no eps on the way back)
For activation ReLU (v1, v4) there is no normalisation. Activations are those of a plain HuggingFace
GPT-2: in TransformerLens, `center_writing_weights=False`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._tensors import expect_facts, read_pickle, refuse_rest, take, whole_number

BUFFERS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
"""Training statistics: no arithmetic reads them."""


def read(path: Path, entry: Entry | None) -> Weights:
    """Read one `.pt`. Raises FormatError for an activation that OpenAI's code does not have."""
    raw = read_pickle(path)
    if not isinstance(raw, Mapping):
        raise FormatError(f"{path}: holds {type(raw).__name__}, expected a state dict")
    raw = dict(raw)
    activation, state = raw.pop("activation", None), raw.pop("activation_state_dict", None) or {}
    for name in BUFFERS:
        raw.pop(name, None)
    tensors: dict[str, Tensor] = {
        "b_dec": take(raw, "pre_bias", path, dims=1),
        "W_enc_rows": take(raw, "encoder.weight", path, dims=2),
        "b_enc": take(raw, "latent_bias", path, dims=1),
        "W_dec": take(raw, "decoder.weight", path, dims=2).T,
    }
    refuse_rest(raw, path, "OpenAI's format")
    d_sae, d_in = tensors["W_enc_rows"].shape
    spec: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "subtract_b_dec": True}
    match activation:
        case "ReLU":
            spec |= {"architecture": "relu"}
        case "TopK":
            spec |= {"architecture": "topk", "k": _k(state, path), "relu_after": _relu(state, path)}
            spec |= {"input_norm": {"kind": "layer_norm", "eps": 1e-5, "ddof": 1}}
        case _:
            raise FormatError(f"{path}: activation {activation!r}; only ReLU and TopK are known")
    expect_facts(entry, {key: spec.get(key) for key in ("d_in", "d_sae", "k")}, path)
    return Weights(SAEConfig.from_json(spec, where=str(path)), tensors)


def _k(state: Any, path: Path) -> int:
    if not isinstance(state, Mapping):
        raise FormatError(f"{path}: activation_state_dict is {type(state).__name__}")
    return whole_number(state, "k", path)


def _relu(state: Mapping[str, Any], path: Path) -> bool:
    after = state.get("postact_fn", "ReLU")
    if after not in ("ReLU", "Identity"):
        raise FormatError(f"{path}: postact_fn {after!r}; only ReLU and Identity are known")
    return bool(after == "ReLU")
