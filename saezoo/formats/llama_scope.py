"""OpenMOSS Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors` below it.

Arithmetic, from Language-Model-SAEs at 16ca67a6, src/lm_saes/sae.py: from_config folds, then encode
and decode compute. With s_in = sqrt(d) / dataset_average_activation_norm.in, s_out likewise,
r = s_in / s_out and |D_j| the norm of a feature's column of the stored decoder:
    norm_activation dataset-wise:      b_enc / s_in, b_dec / s_out, D r
    sparsity_include_decoder_norm:     then D's columns to length 1; the encoder's rows and b_enc
                                       times the length that they had
    p = (x - b_dec if apply_decoder_bias_to_pre_encoder else x) W^T + b_enc
    f = p where p > jump_relu_threshold (jumprelu, and topk with a threshold, which was converted);
        ReLU(p); or ReLU of the top_k largest p
    y = f D^T + b_dec
So features are in units of x and, with unit columns, of the reconstruction, and the one threshold
is in those units. Here the columns stay as stored and the spec says decoder_norm: scale, which is
the same: f is p |D_j|, and y takes f / |D_j|. Nothing is copied unless r is not 1 (a transcoder).
norm_activation token-wise is undone on the output; batch-wise depends on the batch and is refused.
Keys that are missing have the defaults of that code.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import FORMATS, Weights
from saezoo.formats._openmoss import (
    expect_factor,
    factor_of,
    hook_points,
    refuse_glu,
    scaled,
    sites_of,
)
from saezoo.formats._tensors import (
    expect_facts,
    expect_sizes,
    need_file,
    positive,
    read_json,
    read_state_dict,
    refuse_rest,
    take,
    tell_unknown,
    whole_number,
    yes_or_no,
)

CONFIG, MODEL = "hyperparams.json", "lm_config.json"

DEFAULTS: dict[str, Any] = {
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": True,
    "sparsity_include_decoder_norm": True,
    "norm_activation": "token-wise",
    "act_fn": "relu",
    "jump_relu_threshold": 0.0,
    "top_k": 50,
}
"""SAEConfig of that commit; its own files have all of them."""

KNOWN = {*DEFAULTS, "d_model", "d_sae", "hook_point_in", "hook_point_out", "use_glu_encoder"} | {
    "dataset_average_activation_norm"
}
NORMS = ("none", "inference", "token-wise", "dataset-wise")


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a Llama Scope folder. Raises FormatError for unknown values of what decides arithmetic,
    and where config, registry and tensors contradict.
    """
    where, file = path / CONFIG, weights_of(path)
    found = read_json(where)
    tell_unknown(found, KNOWN, where)
    data = DEFAULTS | {key: value for key, value in found.items() if value is not None}
    hooks = hook_points(data, where)
    raw = read_state_dict(file, inside="sae")
    refuse_glu(data, raw, where)
    bias = yes_or_no(data, "use_decoder_bias", where)
    by_norm = yes_or_no(data, "sparsity_include_decoder_norm", where)
    tensors = {
        "W_enc_rows": take(raw, "encoder.weight", file, dims=2),
        "b_enc": take(raw, "encoder.bias", file, dims=1),
        "W_dec": take(raw, "decoder.weight", file, dims=2).T,
    }
    d_sae, d_in = tensors["W_enc_rows"].shape
    tensors["b_dec"] = take(raw, "decoder.bias", file, dims=1) if bias else torch.zeros(d_in)
    refuse_rest(raw, file, "Llama Scope")
    expect_sizes(data, {"d_model": d_in, "d_sae": d_sae}, where)
    spec: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "decoder_norm": "scale" if by_norm else "none",
        "subtract_b_dec": bias and yes_or_no(data, "apply_decoder_bias_to_pre_encoder", where),
    }
    spec |= _activation(data, tensors, where)
    expect_facts(entry, {key: spec.get(key) for key in ("d_in", "d_sae", "k")}, where)
    match _norm(data, hooks, where):
        case "token-wise":
            spec["input_norm"] = {"kind": "constant_norm"}
        case "dataset-wise":
            tensors |= _unscaled(data, tensors, entry, where, by_norm=by_norm)
    spec["site"], spec["out_site"] = sites_of(hooks, _model(path), entry)
    return Weights(SAEConfig.from_json(spec, where=str(where)), tensors)


def weights_of(path: Path) -> Path:
    """The first of the weights' files that the authors' code would take."""
    names = FORMATS["llama_scope"].one_of
    found = next((path / name for name in names if (path / name).is_file()), path / names[-2])
    need_file(found)
    return found


def _norm(data: dict[str, Any], hooks: tuple[str, str], where: Path) -> str:
    """norm_activation, where it has an exact form."""
    norm = data["norm_activation"]
    if norm not in NORMS:
        why = " depends on the batch" if norm == "batch-wise" else " is not known"
        raise FormatError(f"{where}: norm_activation {norm!r}{why}; there are {', '.join(NORMS)}")
    if norm == "token-wise" and hooks[0] != hooks[1]:
        raise FormatError(
            f"{where}: norm_activation {norm!r} of a transcoder: the norm of its output is not "
            "known"
        )
    return str(norm)


def _activation(data: dict[str, Any], tensors: dict[str, Tensor], where: Path) -> dict[str, Any]:
    name, threshold = data["act_fn"], data["jump_relu_threshold"]
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not abs(threshold) <= sys.float_info.max:
        raise FormatError(f"{where}: jump_relu_threshold is {threshold!r}, expected a number")
    name = name.lower() if isinstance(name, str) else name
    if name == "jumprelu" or (name == "topk" and threshold > 0):
        n = len(tensors["W_enc_rows"])
        tensors["threshold"] = torch.full((n,), float(threshold), dtype=torch.float64)
        return {"architecture": "jumprelu", "relu_after": False}
    if name == "topk":
        return {"architecture": "topk", "k": whole_number(data, "top_k", where)}
    if name != "relu":
        raise FormatError(f"{where}: act_fn {name!r} is not known; there are relu, jumprelu, topk")
    return {"architecture": "relu"}


def _unscaled(
    data: dict[str, Any],
    tensors: dict[str, Tensor],
    entry: Entry | None,
    where: Path,
    *,
    by_norm: bool,
) -> dict[str, Tensor]:
    """The tensors that take raw x and give raw y; the small ones in float64, so that nothing is
    lost.
    """
    key, d_in = "dataset_average_activation_norm", tensors["W_enc_rows"].shape[1]
    norms = data.get(key)
    if not isinstance(norms, dict):
        raise FormatError(f"{where}: norm_activation 'dataset-wise' needs {key}, not {norms!r}")
    into = factor_of(norms.get("in"), d_in, f"{key}.in", where)
    out = factor_of(norms.get("out"), d_in, f"{key}.out", where)
    expect_factor(into, entry, where)
    ratio = positive(norms["out"] / norms["in"], f"{key}.out / {key}.in", where)
    scale = "W_enc_rows" if by_norm else "W_dec"
    return {
        "b_enc": tensors["b_enc"].double() / (out if by_norm else into),
        "b_dec": tensors["b_dec"].double() / out,
        scale: scaled(tensors[scale], ratio),
    }


def _model(path: Path) -> str | None:
    """The host's name, where the authors' lm_config.json lies beside."""
    if not (path / MODEL).is_file():
        return None
    name = read_json(path / MODEL).get("model_name")
    return name if isinstance(name, str) and name else None
