"""circuit-tracer's transcoders of one layer (PLT): `config.yaml` and `layer_{i}.safetensors`, read
and written; a layer is loaded by its file's name, or as `…/layer_3`.

Arithmetic, from circuit_tracer/transcoder/single_layer_transcoder.py and activation_functions.py:
    p = x W_enc^T + b_enc, and no bias is subtracted from x
    f = ReLU(p)                                     activation relu, or none and no threshold
        p where p > threshold, without ReLU         a tensor activation_function.threshold
        the k largest p, without ReLU               activation topk
    y = f W_dec + b_dec, and + x W_skip^T where there is one
The set's attribution also zeroes the features of position 0: that is not of the transcoder.
k is the config's, or the file's tensor `k` (which to_safetensors writes and the loader refuses), or
the registry's; that of facebook/crv-8b-instruct-transcoders is 128 in the code itself. Those that
are there must agree. The Qwen3 sets of mwhanna have wandb-config.yaml (or wanb-…) with the sizes,
and one of them no config.yaml: then the tensors decide, as they do in circuit-tracer.
The loader of circuit-tracer 0.5.0, the one on PyPI, does not look at `activation` and would take
topk for relu; those that know Meta's set do look.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.config import SAEConfig, Site
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import FORMATS, Weights
from saezoo.formats._fold import fold, refuse
from saezoo.formats._hooks import site_of_hook
from saezoo.formats._stream import stream_safetensors
from saezoo.formats._tensors import (
    SHOWN,
    expect_facts,
    expect_sizes,
    read_safetensors,
    read_yaml,
    refuse_rest,
    take,
    whole_number,
)
from saezoo.formats.gemma_scope import prefer

logger = logging.getLogger(__name__)

ACTIVATIONS = ("relu", "topk", "jumprelu")
CONFIG, WANDB = "config.yaml", ("wandb-config.yaml", "wanb-config.yaml")
THRESHOLD = "activation_function.threshold"
FILE = re.compile(r"layer_(\d{1,6})\.safetensors")

K_IN_CODE = {"hf://facebook/crv-8b-instruct-transcoders": 128}
"""Source -> k, where circuit-tracer's code has it and the files do not."""


def read(path: Path, entry: Entry | None) -> Weights:
    """Read one layer's file, or the folder that holds but one.

    W_enc (d_sae, d_in), W_dec (d_sae, d_in), biases and threshold are as stored, W_skip becomes a
    view. Raises FormatError for an activation that is not known, topk of which nothing says k, and
    where config, tensors and registry contradict.
    """
    file = path if path.is_file() else _only_file(path)
    config = file.with_name(CONFIG)
    data = read_yaml(config) if config.is_file() else {}
    _refuse_others(data, config)
    raw = read_safetensors(file)
    tensors = {
        "W_enc_rows": take(raw, "W_enc", file, dims=2),
        "b_enc": take(raw, "b_enc", file, dims=1),
        "W_dec": take(raw, "W_dec", file, dims=2),
        "b_dec": take(raw, "b_dec", file, dims=1),
    }
    d_sae, d_in = tensors["W_enc_rows"].shape
    if "W_skip" in raw:
        tensors["W_skip"] = take(raw, "W_skip", file, dims=2).T
    if THRESHOLD in raw:
        tensors["threshold"] = take(raw, THRESHOLD, file, dims=1)
    stored = {"k": raw.pop("k")} if "k" in raw else {}
    refuse_rest(raw, file, "circuit-tracer's format")
    spec: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "skip": "W_skip" in tensors}
    spec |= _activation(data, stored, "threshold" in tensors, entry, file)
    _expect_wandb(file, {"d_model": d_in, "d_feature": d_sae})
    expect_facts(entry, {key: spec.get(key) for key in ("d_in", "d_sae", "k")}, file)
    spec["site"], spec["out_site"] = sites_of(data, file, entry)
    return Weights(SAEConfig.from_json(spec, where=str(file)), tensors)


def write(cfg: SAEConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write config.yaml and the one layer's file. Raises CannotConvert with what circuit-tracer
    cannot express.
    """
    import yaml

    cfg, tensors = fold(cfg, tensors)
    subtracted = tensors["b_dec" if cfg.subtract_b_dec else "b_in"] if _subtracts(cfg) else None
    reasons = [
        (cfg.architecture not in ACTIVATIONS, f"the architecture {cfg.architecture}"),
        (cfg.architecture == "topk" and cfg.relu_after, "ReLU after topk"),
        (cfg.signed, "a choice by magnitude"),
        (cfg.input_norm is not None, "a normalisation of the input"),
        (cfg.decoder_norm != "none", f"a choice by decoder norm (decoder_norm {cfg.decoder_norm})"),
        ((cfg.d_out or cfg.d_in) != cfg.d_in, f"d_out {cfg.d_out} other than d_in {cfg.d_in}"),
        # folded into b_enc it would lose digits where one activation dwarfs the others
        (
            subtracted is not None and bool(subtracted.any()),
            f"{'b_dec' if cfg.subtract_b_dec else 'an input bias'} subtracted from the input",
        ),
    ]
    refuse("circuit_tracer", reasons)
    out = {
        "W_enc": tensors["W_enc_rows"],
        **{name: tensors[name] for name in ("b_enc", "W_dec", "b_dec")},
    }
    if cfg.skip:
        out["W_skip"] = tensors["W_skip"].T
    if cfg.architecture == "jumprelu":
        # ReLU(p) where p > t is p where p > max(t, 0)
        bound = tensors["threshold"]
        out[THRESHOLD] = bound.clamp(min=0) if cfg.relu_after else bound
    layer = cfg.site.layer if cfg.site is not None and cfg.site.layer is not None else 0
    plain = {name: value.detach().cpu() for name, value in out.items()}
    stream_safetensors(plain, folder / f"layer_{layer}.safetensors")
    if cfg.architecture == "topk":
        logger.warning(
            "circuit-tracer 0.5.0 takes topk for relu: load this with a version that knows"
        )
    text = yaml.safe_dump(_config(cfg, layer), sort_keys=False)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def origin_output(folder: Path, x: Tensor) -> Tensor:
    """What circuit-tracer's SingleLayerTranscoder computes from the files in `folder` for x
    (…, d_in).
    """
    data = read_yaml(folder / CONFIG)
    stored = read_safetensors(_only_file(folder))
    raw = {name: value.to(x.dtype) for name, value in stored.items()}
    pre = F.linear(x, raw["W_enc"], raw["b_enc"])
    if data["activation"] == "topk":
        index = pre.topk(data["k"], dim=-1).indices
        acts = pre * torch.zeros_like(pre).scatter(-1, index, 1)
    elif THRESHOLD in raw:
        acts = pre * (pre > raw[THRESHOLD])
    else:
        acts = F.relu(pre)
    y = acts @ raw["W_dec"] + raw["b_dec"]
    return y + x @ raw["W_skip"].T if "W_skip" in raw else y


def sites_of(
    data: dict[str, Any], file: Path, entry: Entry | None
) -> tuple[Site | None, Site | None]:
    """Input and output site: the config's hooks in the layer that the file's name says; what the
    registry states wins. Where input and output are one, it is an SAE, without an output site.
    """
    named, model = FILE.fullmatch(file.name), data.get("model_name")
    model = model if isinstance(model, str) and model else None
    stated = entry.site if entry is not None else None
    if model is None and stated is not None:
        model = stated.model
    hooks = [data.get(f"feature_{side}_hook") for side in ("input", "output")]
    found = [_site(hook, int(named[1]), model) if named else None for hook in hooks]
    if found[0] == found[1]:
        found[1] = None
    return prefer(stated, found[0]), prefer(entry.out_site if entry else None, found[1])


def _site(hook: object, layer: int, model: str | None) -> Site | None:
    """`hook_resid_mid`, or with the layer's place in it: `layers.{layer}.mlp`."""
    if not isinstance(hook, str) or not re.fullmatch(r"[\w.{}]{1,200}", hook):
        return None
    whole = hook.replace("{layer}", str(layer)) if "{layer}" in hook else f"blocks.{layer}.{hook}"
    site = site_of_hook(whole, model)
    if hook == "mlp.hook_in":
        # circuit-tracer loads its models with fold_ln=False: the norm's gain is in
        site = site.model_copy(update={"rms_gain": True})
    return site


def _only_file(folder: Path) -> Path:
    names = FORMATS["circuit_tracer"].one_of_in([item.name for item in folder.iterdir()])
    if len(names) != 1:
        raise FormatError(
            f"{folder}: has {len(names)} files layer_*.safetensors; name one, as {folder}/layer_0"
        )
    return folder / names[0]


def _refuse_others(data: dict[str, Any], config: Path) -> None:
    kind = data.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise FormatError(
            f"{config}: model_kind {SHOWN.repr(kind)} is not that of transcoders of one layer"
        )


def _activation(
    data: dict[str, Any],
    stored: dict[str, Tensor],
    has_threshold: bool,
    entry: Entry | None,
    file: Path,
) -> dict[str, Any]:
    """The spec of what follows the encoder, by the config's `activation`, else by the tensors."""
    name = data.get("activation")
    if name is None:
        chooses = "k" in stored or (entry is not None and entry.k is not None)
        name = "topk" if chooses else "jumprelu" if has_threshold else "relu"
    if name not in ACTIVATIONS:
        raise FormatError(
            f"{file.with_name(CONFIG)}: activation {SHOWN.repr(name)} is not known; there are "
            f"{', '.join(ACTIVATIONS)}"
        )
    if has_threshold != (name == "jumprelu"):
        there = "has" if has_threshold else "has no"
        raise FormatError(f"{file}: {there} {THRESHOLD}, but its activation is {name}")
    if name == "relu" and "k" in stored:
        raise FormatError(f"{file}: has a tensor k, but its activation is relu")
    if name == "relu" and entry is not None and entry.k is not None:
        raise FormatError(f"{file}: its activation is relu, but the registry states k={entry.k}")
    if name == "topk":
        return {"architecture": "topk", "relu_after": False, "k": _k(data, stored, entry, file)}
    return {"architecture": name, "relu_after": name == "relu"}


def _k(data: dict[str, Any], stored: dict[str, Tensor], entry: Entry | None, file: Path) -> int:
    said: dict[str, int] = {}
    if data.get("k") is not None:
        said["config.yaml"] = whole_number(data, "k", file.with_name(CONFIG))
    if "k" in stored:
        said["the file"] = whole_number(stored, "k", file)
    if entry is not None and entry.k is not None:
        said["the registry"] = entry.k
    if not said and entry is not None and entry.source in K_IN_CODE:
        said["circuit-tracer"] = K_IN_CODE[entry.source]
    if not said:
        raise FormatError(f"{file}: activation topk, but nothing says k; add `k:` to {CONFIG}")
    (first, k), *others = said.items()
    for who, other in others:
        if other != k:
            raise FormatError(f"{file}: k is {k} of {first}, but {who} states {other}")
    return k


def _expect_wandb(file: Path, found: dict[str, int]) -> None:
    """Weights & Biases writes `key: {value: …}`."""
    for config in map(file.with_name, WANDB):
        if config.is_file():
            data = read_yaml(config)
            values = {key: row["value"] for key, row in data.items() if _is_row(row)}
            expect_sizes(values, found, config)


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and "value" in row


def _subtracts(cfg: SAEConfig) -> bool:
    return cfg.subtract_b_dec or cfg.input_bias


def _config(cfg: SAEConfig, layer: int) -> dict[str, Any]:
    """config.yaml as circuit-tracer reads it; what is not known of the hooks is left out."""
    data: dict[str, Any] = {"model_kind": "transcoder_set"}
    if cfg.model_name is not None:
        data["model_name"] = cfg.model_name
    out = cfg.out_site if cfg.is_transcoder else cfg.site
    for key, site in (("feature_input_hook", cfg.site), ("feature_output_hook", out)):
        hook = site.hook_name if site is not None else None
        if hook is not None and hook.startswith(f"blocks.{layer}."):
            data[key] = hook.removeprefix(f"blocks.{layer}.")
        else:
            logger.warning("circuit-tracer wants a %s, which is not known: add it", key)
    data["activation"] = cfg.architecture
    return data | ({"k": cfg.k} if cfg.architecture == "topk" else {})
