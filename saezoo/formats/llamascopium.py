"""OpenMOSS Llamascopium (Llama Scope 2): `config.json` and `sae_weights.safetensors` (or `.pt`), an
SAE, or a transcoder where hook_point_out is another than hook_point_in. Where sae_type is clt or
crosscoder, llamascopium_multi.py reads it.

Arithmetic, from Llamascopium's models/sae.py and models/sparse_dictionary.py; |D_j| is the norm of
a feature's row of W_D:
    z = s_in x
    p = z W_E + b_E, and b_D is not subtracted from z
    f = act(p |D|) / |D| where sparsity_include_decoder_norm, else act(p)
    y = (f W_D + b_D) / s_out
act is relu; jumprelu (p where p > exp(log_jumprelu_threshold)); topk; batchtopk, the top_k * tokens
largest of ReLU(p) over all tokens of a call (tensor_topk). norm_activation decides s:
    dataset-wise    s = sqrt(d) / dataset_average_activation_norm.<hook>, from the weights file
    inference       s = 1: the norms were folded. They may still be in the file; they are not used
    token-wise      s = sqrt(d) / |x|; of a transcoder, the output's norm is not known: refused
    batch-wise      depends on the batch: refused
Where s_out is another than s_in, the spec's scale is s_out and W_E is multiplied by s_in / s_out.
The code of 2025 (llama_scope_r1.py) names the tensors otherwise, and may subtract b_D.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError, MissingFile
from saezoo.formats import FORMATS, Weights, split_layer
from saezoo.formats._openmoss import (
    AGREE,
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
from saezoo.formats.llamascopium_multi import read_multi

logger = logging.getLogger(__name__)

CONFIG, NORM = "config.json", "dataset_average_activation_norm."

NAMES = {"W_E": "W_enc_rows.T", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
"""Tensor in the file -> canonical one, .T where it is stored the other way."""

THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {"architecture": "relu"},
    "jumprelu": {"architecture": "jumprelu", "relu_after": False},
    "topk": {"architecture": "topk"},
    "batchtopk": {"architecture": "tensor_topk"},
}
KNOWN = {
    "sae_type",
    "d_model",
    "expansion_factor",
    "hook_point_in",
    "hook_point_out",
    "act_fn",
    "top_k",
    "norm_activation",
    "sparsity_include_decoder_norm",
    "use_decoder_bias",
    "use_glu_encoder",
    "apply_decoder_bias_to_pre_encoder",
}
NORMS = ("dataset-wise", "inference", "token-wise")

WHY_NOT = {
    "crosscoder": "of the code of 2025, crosscoders had another form",
    "clt": "of the code of 2025, cross-layer transcoders had another form",
    "lorsa": "sparse attention reads a whole context, not one token",
    "molt": "its features are linear maps of low rank, not directions",
}
"""sae_type -> why it is not read here."""


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a folder, or one layer of a cross-layer transcoder (`FOLDER/layer_3`).

    Raises FormatError for kinds that have no exact form, for unknown values of what decides
    arithmetic, and where config, registry and tensors contradict; MissingFile for a layer of what
    has none.
    """
    folder, layer = split_layer(path)
    config = read_json(folder / CONFIG)
    if config.get("sae_type") in ("clt", "crosscoder"):
        return read_multi(path, entry, config)
    if layer is not None:
        raise MissingFile(f"{path}: no such folder, and what is in {folder} has no layers")
    return read_named(path, entry, NAMES, ACTIVATIONS)


def read_named(
    path: Path,
    entry: Entry | None,
    names: dict[str, str],
    activations: dict[str, dict[str, Any]],
) -> Weights:
    """The same of files whose tensors have these names, and whose act_fn is one of these."""
    where, file = path / CONFIG, weights_of(path)
    found = {key: value for key, value in read_json(where).items() if value is not None}
    tell_unknown(found, KNOWN, where)
    data = {"use_decoder_bias": True, "sparsity_include_decoder_norm": True} | found
    _refuse_kind(data, where)
    hooks = hook_points(data, where)
    raw = read_state_dict(file, inside="sae")
    refuse_glu(data, raw, where)
    name = data.get("act_fn", "relu")
    name = name.lower() if isinstance(name, str) else str(name)
    if name not in activations:
        known = ", ".join(activations)
        raise FormatError(f"{where}: act_fn {name[:80]!r} cannot be read here; there are {known}")
    norms = {str(key): raw.pop(key) for key in list(raw) if str(key).startswith(NORM)}
    tensors = _tensors(raw, names, data, file, jumps=name == "jumprelu")
    d_sae, d_in = tensors["W_enc_rows"].shape
    expect_sizes(data, {"d_model": d_in}, where)
    times = positive(data.get("expansion_factor"), "expansion_factor", where)
    if not d_sae <= d_in * times < d_sae + 1:
        raise FormatError(f"{where}: expansion_factor is {times}, but the tensors have {d_sae}")
    by_norm = yes_or_no(data, "sparsity_include_decoder_norm", where)
    spec: dict[str, Any] = activations[name] | {
        "d_in": d_in,
        "d_sae": d_sae,
        "decoder_norm": "rank" if by_norm else "none",
        "subtract_b_dec": yes_or_no(data, "apply_decoder_bias_to_pre_encoder", where)
        and yes_or_no(data, "use_decoder_bias", where),
    }
    if spec["architecture"] in ("topk", "tensor_topk"):
        spec["k"] = whole_number(data, "top_k", where)
    expect_facts(entry, {key: spec.get(key) for key in ("d_in", "d_sae", "k")}, where)
    spec |= _input_norm(data, norms, tensors, hooks, entry, where, subtracts=spec["subtract_b_dec"])
    spec["site"], spec["out_site"] = sites_of(hooks, None, entry)
    return Weights(SAEConfig.from_json(spec, where=str(where)), tensors)


def weights_of(path: Path) -> Path:
    """The weights' file. Raises FormatError for a distributed checkpoint."""
    names = FORMATS["llamascopium"].one_of
    found = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if ".dcp" in found.parent.suffix:
        raise FormatError(
            f"{found.parent}: a distributed checkpoint (.dcp), which only its own code reads: load "
            "it with Llamascopium without a device mesh and save_pretrained it, as .safetensors"
        )
    need_file(found)
    return found


def _refuse_kind(data: dict[str, Any], where: Path) -> None:
    kind = data.get("sae_type", "sae")
    if kind != "sae":
        why = WHY_NOT.get(str(kind), f"there are sae, {', '.join(WHY_NOT)}")
        raise FormatError(f"{where}: sae_type {kind!r} cannot be read here: {why}")


def _tensors(
    raw: dict[str, Any], names: dict[str, str], data: dict[str, Any], file: Path, *, jumps: bool
) -> dict[str, Tensor]:
    bias = yes_or_no(data, "use_decoder_bias", file.with_name(CONFIG))
    tensors: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        if ours == "b_dec" and not bias:
            continue
        value = take(raw, theirs, file, dims=2 if ours.startswith("W_") else 1)
        tensors[ours.removesuffix(".T")] = value.T if ours.endswith(".T") else value
    if not bias:
        tensors["b_dec"] = torch.zeros(tensors["W_dec"].shape[1])
    if jumps:
        key = next((key for key in THRESHOLDS if key in raw), THRESHOLDS[0])
        # in float64: the exponential of a 16-bit number is not one
        tensors["threshold"] = take(raw, key, file, dims=1).double().exp()
    refuse_rest(raw, file, "Llamascopium")
    return tensors


def _input_norm(
    data: dict[str, Any],
    norms: dict[str, Any],
    tensors: dict[str, Tensor],
    hooks: tuple[str, str],
    entry: Entry | None,
    where: Path,
    *,
    subtracts: bool,
) -> dict[str, Any]:
    """The spec's input_norm; scales the encoder in `tensors` where what goes in is scaled otherwise
    than what comes out.
    """
    kind, transcodes = data.get("norm_activation", "dataset-wise"), hooks[0] != hooks[1]
    if kind not in NORMS or (kind == "token-wise" and transcodes):
        why = {
            "batch-wise": "depends on the batch",
            "token-wise": "of a transcoder: the norm of its output is not known",
        }.get(str(kind), "is not known")
        raise FormatError(f"{where}: norm_activation {kind!r} {why}; there are {', '.join(NORMS)}")
    stated = entry.norm_scaling_factor if entry is not None else None
    if kind != "dataset-wise":
        if stated is not None:
            logger.info("%s: norm_activation is %s, so no factor is applied", where, kind)
        return {"input_norm": {"kind": "constant_norm"}} if kind == "token-wise" else {}
    d_in = tensors["W_enc_rows"].shape[1]
    if f"{NORM}{hooks[0]}" not in norms and stated is not None and not transcodes:
        return {"input_norm": {"kind": "scale", "factor": stated}}
    into, out = (factor_of(norms.get(NORM + hook), d_in, NORM + hook, where) for hook in hooks)
    half = getattr(norms[NORM + hooks[0]], "dtype", None) in (torch.float16, torch.bfloat16)
    expect_factor(into, entry, where, 2**-7 if half else AGREE)
    if into != out:
        if subtracts:
            raise FormatError(
                f"{where}: apply_decoder_bias_to_pre_encoder of a transcoder with two norms"
            )
        ratio = float(norms[NORM + hooks[1]]) / float(norms[NORM + hooks[0]])
        positive(ratio, f"the ratio of {NORM}*", where)
        tensors["W_enc_rows"] = scaled(tensors["W_enc_rows"], ratio)
    return {"input_norm": {"kind": "scale", "factor": out}}
