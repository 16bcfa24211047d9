"""Llamascopium's cross-layer transcoders and crosscoders: `config.json` with `sae_type` clt or
crosscoder, and `sae_weights.safetensors` (or .pt).

Source: models/clt.py, models/crosscoder.py, models/sparse_dictionary.py and activation_functions.py
of OpenMOSS's Language-Model-SAEs. With s the factor sqrt(d_model) / dataset_average_activation_norm
of a hook point where norm_activation is dataset-wise (in inference mode the norms that are in the
file are not applied), and c the norm of a feature's decoders where sparsity_include_decoder_norm:

CLT: W_E (L, d, n), b_E (L, n), W_D.{m} (m + 1, n, d): the decoders of layers 0 to m to layer m;
b_D.{m} (d,).
    h_l = s_l x_l W_E[l] + b_E[l];   f_l = act(h_l c_l) / c_l, c_l over all targets together
    y_m = (sum over l <= m of f_l W_D.m[l] + b_D.m) / s_m
act is ReLU, jumprelu with threshold exp(log_jumprelu_threshold) (L, n), topk (k of each layer, by
ReLU) or layertopk (k of all layers). (Their encode_single_layer uses other norms and divides by
none; encode is what is meant here.)

Crosscoder: W_E (H, d, n), b_E (H, n), W_D (H, n, d), b_D (H, d).
    h = sum over heads of s_h x_h W_E[h] + b_E[h];   f_h = act(h |W_D[h]|) / |W_D[h]|
    y_h = (f_h W_D[h] + b_D[h]) / s_h
so features are (…, heads, n). Its topk has no ReLU. token-wise normalises each token of each head.

What depends on the whole batch (batchtopk, batchlayertopk, batch-wise) is refused.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saezoo.config import Site
from saezoo.config_multi import CLTConfig, CrosscoderConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError, MissingFile
from saezoo.formats import Weights, split_layer
from saezoo.formats._hooks import site_of_hook
from saezoo.formats._layers import chosen, sites_for, stated_site
from saezoo.formats._tensors import (
    expect_facts,
    join_rows,
    read_pickle,
    read_safetensors,
    refuse_rest,
    take,
    whole_number,
    yes_or_no,
)

CONFIG = "config.json"
WEIGHTS = ("sae_weights.safetensors", "sae_weights.pt")
THRESHOLD = "activation_function.log_jumprelu_threshold"
NORMS = "dataset_average_activation_norm."
RANK = "sparsity_include_decoder_norm"

ACTS: dict[str, dict[str, dict[str, Any]]] = {
    "clt": {
        "relu": {"architecture": "relu"},
        "jumprelu": {"architecture": "jumprelu", "relu_after": False},
        "topk": {"architecture": "topk"},
        "layertopk": {"architecture": "topk", "k_over": "layers"},
    },
    "crosscoder": {
        "relu": {"architecture": "relu"},
        "jumprelu": {"architecture": "jumprelu", "relu_after": False},
        "topk": {"architecture": "topk", "relu_after": False},
    },
}
MODES = {
    "clt": ("dataset-wise", "inference"),
    "crosscoder": ("dataset-wise", "inference", "token-wise"),
}


@dataclass(frozen=True)
class Source:
    """What was read before it is known which kind it is."""

    file: Path
    raw: dict[str, Tensor]
    norms: dict[str, Tensor]
    """By the tensor's name: average norms of activations."""
    config: dict[str, Any]
    spec: dict[str, Any]
    mode: str
    """norm_activation"""
    entry: Entry | None

    @property
    def where(self) -> Path:
        """The config, for errors."""
        return self.file.with_name(CONFIG)


def read_multi(path: Path, entry: Entry | None, config: dict[str, Any]) -> Weights:
    """Read a folder whose config (already read) has sae_type clt or crosscoder, or one layer of a
    clt (`FOLDER/layer_3`). Everything stays mapped.

    Raises FormatError for what has no exact form here, and where config, tensors and registry
    contradict each other.
    """
    folder, layer = split_layer(path)
    where, kind = folder / CONFIG, config.get("sae_type")
    if not isinstance(kind, str) or kind not in ACTS:
        raise FormatError(f"{where}: sae_type is {kind!r}, expected clt or crosscoder")
    if kind == "crosscoder" and layer is not None:
        raise MissingFile(f"{path}: no such folder, and a crosscoder has no layers")
    act = config.get("act_fn", "relu")
    spec = ACTS[kind].get(act.lower()) if isinstance(act, str) else None
    if spec is None:
        raise FormatError(
            f"{where}: act_fn {act!r} of a {kind} has no form here, where each token is by itself; "
            f"{', '.join(ACTS[kind])} have"
        )
    mode = config.get("norm_activation", "dataset-wise")
    if mode not in MODES[kind]:
        raise FormatError(
            f"{where}: norm_activation {mode!r} of a {kind} has no form here; "
            f"{', '.join(MODES[kind])} have"
        )
    if config.get("use_decoder_bias", True) is not True:
        raise FormatError(f"{where}: use_decoder_bias is {config['use_decoder_bias']!r}")
    raw, file = _weights(folder)
    d_in = whole_number(config, "d_model", where)
    spec = spec | {"d_in": d_in, "d_sae": _d_sae(config, d_in, where)}
    if spec["architecture"] == "topk":
        spec["k"] = whole_number({"top_k": 50} | config, "top_k", where)
    norms = {name: raw.pop(name) for name in list(raw) if name.startswith(NORMS)}
    expect_facts(entry, {key: spec.get(key) for key in ("d_in", "d_sae", "k")}, file)
    source = Source(file, raw, norms, config, spec, mode, entry)
    rank = yes_or_no({RANK: True} | config, RANK, where)
    if kind == "clt":
        return _read_clt(source, rank, layer)
    if not rank:
        raise FormatError(f"{where}: {RANK} is false, which a crosscoder of theirs may not have")
    return _read_crosscoder(source)


def _read_clt(source: Source, rank: bool, layer: int | None) -> Weights:
    raw, file, where = source.raw, source.file, source.where
    into, out = (_hooks(source.config, key, where) for key in ("hook_points_in", "hook_points_out"))
    if len(into) != len(out):
        raise FormatError(f"{where}: {len(into)} hook points in, but {len(out)} out")
    count = len(into)
    W_enc, b_enc = take(raw, "W_E", file, dims=3), take(raw, "b_E", file, dims=2)
    decoders = [take(raw, f"W_D.{at}", file, dims=3) for at in range(count)]
    biases = [take(raw, f"b_D.{at}", file, dims=1) for at in range(count)]
    threshold = _threshold(source, dims=2)
    refuse_rest(raw, file, "a cross-layer transcoder of Llamascopium")
    _expect_layers(count, file, W_E=W_enc, b_E=b_enc, threshold=threshold)
    for at, decoder in enumerate(decoders):
        _expect_layers(at + 1, file, **{f"W_D.{at}": decoder})
    tensors: dict[str, Tensor] = {}
    for at in range(count) if layer is None else [layer]:
        if at >= count:
            raise MissingFile(f"{file}: has layers 0 to {count - 1}, not {at}")
        start = f"layers.{at}."
        tensors |= {f"{start}W_enc_rows": W_enc[at].T, f"{start}b_enc": b_enc[at]}
        tensors |= {f"{start}W_dec.{to}": decoders[to][at] for to in range(at, count)}
        if threshold is not None:
            tensors[f"{start}threshold"] = threshold[at]
    if layer is None:
        tensors["b_dec"] = join_rows(biases, file, "b_D")
    spec = source.spec | {
        "layers": count,
        "decoder_norm": "rank" if rank else "none",
        "sites": _sites(into, source, "site"),
        "out_sites": _sites(out, source, "out_site"),
    }
    if source.mode == "dataset-wise":
        spec["input_scale"] = _scales(source, into)
        spec["output_scale"] = _scales(source, out)
    return Weights(chosen(CLTConfig.from_json(spec, str(file)), layer, str(file)), tensors)


def _read_crosscoder(source: Source) -> Weights:
    raw, file = source.raw, source.file
    hooks = _hooks(source.config, "hook_points", source.where)
    count = len(hooks)
    biases = take(raw, "b_E", file, dims=2)
    tensors = {
        "W_enc_rows": take(raw, "W_E", file, dims=3).mT,
        # in float64, so that the sum loses nothing that the file has
        "b_enc": biases.double().sum(0),
        "W_dec": take(raw, "W_D", file, dims=3).transpose(0, 1),
        "b_dec": take(raw, "b_D", file, dims=2),
    }
    threshold = _threshold(source, dims=1)
    refuse_rest(raw, file, "a crosscoder of Llamascopium")
    _expect_layers(count, file, b_E=biases)
    if threshold is not None:
        tensors["threshold"] = threshold.expand(count, -1).contiguous()
    spec = source.spec | {
        "sources": count,
        "code_norm": "each",
        "sites": _sites(hooks, source, "site"),
    }
    if source.mode == "dataset-wise":
        spec["input_norm"] = {"kind": "scale", "factors": _scales(source, hooks)}
    elif source.mode == "token-wise":
        spec["input_norm"] = {"kind": "constant_norm"}
    return Weights(CrosscoderConfig.from_json(spec, str(file)), tensors)


def _weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The state dict, and the file it is from."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise MissingFile(f"{folder}: has no {' or '.join(WEIGHTS)}")
    if file.suffix == ".safetensors":
        return read_safetensors(file), file
    raw = read_pickle(file)
    inner = raw.get("sae") if isinstance(raw, dict) else None
    if not isinstance(inner, dict):
        raise FormatError(f"{file}: has no state dict called 'sae'")
    return dict(inner), file


def _d_sae(config: dict[str, Any], d_in: int, where: Path) -> int:
    """d_model times expansion_factor, which must come out whole."""
    factor = config.get("expansion_factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e9:
        raise FormatError(f"{where}: expansion_factor is {factor!r}, expected a positive number")
    if not math.isclose(d_in * factor, round(d_in * factor), rel_tol=0.0, abs_tol=1e-6):
        raise FormatError(f"{where}: d_model {d_in} times expansion_factor {factor} is not whole")
    return round(d_in * factor)


def _hooks(config: dict[str, Any], key: str, where: Path) -> list[str]:
    hooks = config.get(key)
    whole = isinstance(hooks, list) and all(isinstance(item, str) for item in hooks)
    if not whole or not hooks:
        raise FormatError(f"{where}: {key} is {str(hooks)[:60]!r}, expected a list of hook points")
    return list(hooks)


def _threshold(source: Source, *, dims: int) -> Tensor | None:
    """exp of what is stored, of a jumprelu."""
    if source.spec["architecture"] != "jumprelu":
        return None
    return take(source.raw, THRESHOLD, source.file, dims=dims).double().exp()


def _expect_layers(count: int, file: Path, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.shape[0] != count:
            raise FormatError(f"{file}: {name} is {tuple(value.shape)}, expected {count} first")


def _scales(source: Source, hooks: list[str]) -> list[float]:
    """sqrt(d_model) / average norm at each hook point."""
    found = []
    for hook in hooks:
        norm = source.norms.get(f"{NORMS}{hook}")
        value = float(norm) if norm is not None and norm.numel() == 1 else math.nan
        if not 0 < value < math.inf:
            raise FormatError(
                f"{source.file}: its mode is dataset-wise, but the average norm at {hook} is "
                f"{'not there' if norm is None else value}"
            )
        found.append(math.sqrt(source.spec["d_in"]) / value)
    return found


def _sites(hooks: list[str], source: Source, key: str) -> tuple[Site, ...] | None:
    named, entry = source.config.get("model_name"), source.entry
    model = named if isinstance(named, str) else (entry.model if entry else None)
    return sites_for(stated_site(entry, key), [site_of_hook(hook, model) for hook in hooks])
