"""circuit-tracer's cross-layer transcoders, such as mntss/clt-gemma-2-2b-2.5M: `config.yaml`
(`model_kind: cross_layer_transcoder`) and, for each layer i, `W_enc_{i}.safetensors` and
`W_dec_{i}.safetensors`.

W_enc_i (n, d), b_enc_i (n,), b_dec_i (d,), threshold_i (n,) where it is a jumprelu, W_skip_i (d, d)
where there is a skip; W_dec_i (n, layers - i, d), whose place t writes to layer i + t. Arithmetic
(cross_layer_transcoder.py: encode, decode, compute_skip):
    p_i = x_i W_enc_i^T + b_enc_i
    f_i = ReLU(p_i), or p_i where p_i > threshold_i
    y_m = sum over i <= m of f_i W_dec_i[:, m - i] + b_dec_m, and + x_m W_skip_m (no transpose)
A layer by name is its encoder and all of its decoders. (SAELens adds a layer's decoders up and
adds b_dec_i: a transcoder that its authors' code does not have.)
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saezoo.config_multi import CLTConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights, split_layer
from saezoo.formats._hooks import site_of_hook
from saezoo.formats._layers import (
    chosen,
    expect_layers,
    layers_there,
    sites_for,
    stated_site,
)
from saezoo.formats._tensors import (
    expect_facts,
    join_rows,
    read_safetensors,
    read_yaml,
    refuse_rest,
    take,
)

KEY, CONFIG = "mntss_clt", "config.yaml"
ENCODER, DECODER = "W_enc_{layer}.safetensors", "W_dec_{layer}.safetensors"
ACTIVATIONS = {"relu": "relu", "jump_relu": "jumprelu", "jumprelu": "jumprelu"}


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a folder, or one layer of it (`FOLDER/layer_3`). Everything stays mapped.

    Raises MissingFile for a layer that is not there, FormatError for unknown values of what decides
    arithmetic, and where files, config and registry contradict each other.
    """
    folder, layer = split_layer(path)
    data = _config(folder / CONFIG)
    there = layers_there(folder, KEY, ENCODER) if layer is None else [layer]
    tensors: dict[str, Tensor] = {}
    biases, kinds = [], set()
    for at in there:
        own, bias = _layer_tensors(folder, at)
        count = at + own["W_dec"].shape[1]
        if layer is None:
            expect_layers(there, count, folder)
        biases.append(bias)
        kinds.add(("threshold" in own, "W_skip" in own))
        tensors |= {f"layers.{at}.{name}": value for name, value in own.items()}
    if len(kinds) > 1:
        raise FormatError(f"{folder}: some layers have a threshold or skip, and others have none")
    jumps, skip = kinds.pop()
    _expect_activation(data, jumps, folder / CONFIG)
    if layer is None:
        tensors["b_dec"] = join_rows(biases, folder, "b_dec")
    else:
        tensors.pop(f"layers.{layer}.W_skip", None)
    d_sae, d_in = own["W_enc_rows"].shape
    expect_facts(entry, {"d_in": d_in, "d_sae": d_sae}, folder)
    spec = {
        "architecture": "jumprelu" if jumps else "relu",
        "relu_after": not jumps,
        "layers": count,
        "d_in": d_in,
        "d_sae": d_sae,
        "d_out": own["W_dec"].shape[2] if own["W_dec"].shape[2] != d_in else None,
        "skip": skip,
        **_sites(data, folder / CONFIG, entry, count),
    }
    where = str(folder)
    return Weights(chosen(CLTConfig.from_json(spec, where), layer, where), tensors)


def _config(file: Path) -> dict[str, Any]:
    data = read_yaml(file)
    kind = data.get("model_kind")
    if kind != "cross_layer_transcoder":
        raise FormatError(f"{file}: model_kind is {kind!r}, expected cross_layer_transcoder")
    return data


def _layer_tensors(folder: Path, at: int) -> tuple[dict[str, Tensor], Tensor]:
    """One layer's tensors under their canonical names, and the bias of what it receives."""
    file = folder / ENCODER.replace("{layer}", str(at))
    raw = read_safetensors(file)
    own = {
        "W_enc_rows": take(raw, f"W_enc_{at}", file, dims=2),
        "b_enc": take(raw, f"b_enc_{at}", file, dims=1),
    }
    bias = take(raw, f"b_dec_{at}", file, dims=1)
    for theirs, ours, dims in ((f"threshold_{at}", "threshold", 1), (f"W_skip_{at}", "W_skip", 2)):
        if theirs in raw:
            own[ours] = take(raw, theirs, file, dims=dims)
    refuse_rest(raw, file, "the encoder of a layer")
    file = folder / DECODER.replace("{layer}", str(at))
    raw = read_safetensors(file)
    own["W_dec"] = take(raw, f"W_dec_{at}", file, dims=3)
    refuse_rest(raw, file, "the decoders of a layer")
    return own, bias


def _expect_activation(data: dict[str, Any], jumps: bool, config: Path) -> None:
    """The thresholds decide; a config that says otherwise is refused."""
    stated = data.get("activation")
    if stated is None:
        return
    named = ACTIVATIONS.get(stated) if isinstance(stated, str) else None
    if named != ("jumprelu" if jumps else "relu"):
        having = "have thresholds" if jumps else "have no thresholds"
        raise FormatError(f"{config}: activation is {stated!r}, but the layers {having}")


def _sites(data: dict[str, Any], config: Path, entry: Entry | None, count: int) -> dict[str, Any]:
    """The hooks that the config names, in each layer."""
    model = data.get("model_name")
    if model is not None and not isinstance(model, str):
        raise FormatError(f"{config}: model_name is {model!r}, expected a model's name")
    model = model or (entry.model if entry else None)
    sites: dict[str, Any] = {}
    for key, ours in (("feature_input_hook", "sites"), ("feature_output_hook", "out_sites")):
        hook = data.get(key)
        if hook is None:
            continue
        if not isinstance(hook, str) or not re.fullmatch(r"[\w.]{1,80}", hook):
            raise FormatError(f"{config}: {key} is {hook!r}, expected such as hook_resid_mid")
        stated = stated_site(entry, "site" if ours == "sites" else "out_site")
        made = [site_of_hook(f"blocks.{at}.{hook}", model) for at in range(count)]
        sites[ours] = sites_for(stated, made)
    return sites
