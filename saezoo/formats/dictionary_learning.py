"""saprmarks dictionary_learning: `ae.pt` (a state dict) and, mostly, `config.json` beside it, read
and written.

Seven classes, from dictionary_learning's dictionary.py and trainers/, W an encoder, D a decoder:
    AutoEncoder            f = ReLU(W (x - bias) + b), y = D f + bias
    AutoEncoderNew         f = ReLU(W x + b), y = D f + decoder.bias
    GatedAutoEncoder       p = W (x - c); f = [p + gate_bias > 0] ReLU(exp(r_mag) p + mag_bias); y =
                           D f + c
    JumpReluAutoEncoder    p = x W + b; f = ReLU(p [p > threshold]), y = f D + b_dec
    AutoEncoderTopK        the k largest of ReLU(W (x - b_dec) + b), y = D f + b_dec
    BatchTopKSAE, MatryoshkaBatchTopKSAE
                           p = ReLU(W (x - b_dec) + b), f = p [p > threshold], y = D f + b_dec
The raw weights are used: `AutoEncoder.from_pretrained` would rescale them to unit decoder columns,
which changes features by a factor and no output. Activation scaling was folded in at save.
Written is the class that computes the same. Of BatchTopKSAE, k concerns training alone; where it is
not known, d_sae is written, which cuts nothing.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._fold import fold, refuse, shared_reasons
from saezoo.formats._tensors import (
    expect_facts,
    read_json,
    read_pickle,
    refuse_rest,
    take,
    whole_number,
)

LINEAR = {"encoder.weight": "W_enc_rows", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
PLAIN = {"W_enc": "W_enc_rows.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}

CLASSES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "AutoEncoder": (LINEAR | {"bias": "b_dec"}, {"architecture": "relu", "subtract_b_dec": True}),
    "AutoEncoderNew": (LINEAR | {"decoder.bias": "b_dec"}, {"architecture": "relu"}),
    "GatedAutoEncoder": (
        {
            "encoder.weight": "W_enc_rows",
            "decoder.weight": "W_dec.T",
            "decoder_bias": "b_dec",
            "gate_bias": "b_gate",
            "r_mag": "r_mag",
            "mag_bias": "b_mag",
        },
        {"architecture": "gated", "subtract_b_dec": True},
    ),
    "JumpReluAutoEncoder": (PLAIN | {"threshold": "threshold"}, {"architecture": "jumprelu"}),
    "AutoEncoderTopK": (
        LINEAR | {"b_dec": "b_dec"},
        {"architecture": "topk", "subtract_b_dec": True},
    ),
    "BatchTopKSAE": (
        LINEAR | {"b_dec": "b_dec"},
        {"architecture": "jumprelu", "subtract_b_dec": True},
    ),
    "MatryoshkaBatchTopKSAE": (PLAIN, {"architecture": "jumprelu", "subtract_b_dec": True}),
}
"""Class -> (tensor in the file -> canonical one, .T where it is stored the other way; the spec)."""

BUFFERS = {
    "AutoEncoderTopK": {"k", "threshold"},
    "BatchTopKSAE": {"k", "threshold"},
    "MatryoshkaBatchTopKSAE": {"k", "threshold", "group_sizes"},
}
"""Further tensors of a class. TopK ignores its stored threshold, as its authors' code does."""

WEIGHTS, CONFIG = "ae.pt", "config.json"

STACKS = {"pythia": "gpt_neox.layers", "gpt-neox": "gpt_neox.layers", "gpt2": "transformer.h"}
"""Where a host's layers are, by a part of its name; `model.layers` for all others."""

POINTS = {
    "resid_post": ("resid_post", "", "hook_resid_post"),
    "mlp_out": ("mlp_out", ".mlp", "hook_mlp_out"),
    "mlp": ("mlp_out", ".mlp", "hook_mlp_out"),
    "attn_out": ("attn_out", "", "hook_attn_out"),
}
"""Word before `_layer_N` in submodule_name -> (point, submodule of the layer, TransformerLens
hook).
"""


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a folder with `ae.pt`, or the file itself; the class is the config's, else the tensors'.

    Raises FormatError for an unknown class, or when config, registry and tensors contradict.
    """
    file = path if path.is_file() else path / WEIGHTS
    config = file.with_name(CONFIG)
    data = read_json(config) if config.is_file() else {}
    trainer, buffer = _section(data, "trainer", config), _section(data, "buffer", config)
    loaded = read_pickle(file)
    if not isinstance(loaded, Mapping):
        raise FormatError(f"{file}: holds {type(loaded).__name__}, expected a state dict")
    raw = dict(loaded)
    name = _class_of(trainer, raw, config, file)
    table, spec = CLASSES[name]
    tensors = {
        canonical.removesuffix(".T"): _as_stored(take(raw, key, file), canonical)
        for key, canonical in table.items()
    }
    buffers = {key: raw.pop(key) for key in BUFFERS.get(name, set()) & raw.keys()}
    refuse_rest(raw, file, name)
    if tensors["W_enc_rows"].dim() != 2:
        raise FormatError(f"{file}: the encoder is {tuple(tensors['W_enc_rows'].shape)}")
    d_sae, d_in = tensors["W_enc_rows"].shape
    found: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    notes = {"dict_class": name}
    if name == "AutoEncoderTopK":
        found["k"] = _k(buffers, trainer, config, file)
    elif "threshold" in BUFFERS.get(name, set()):
        tensors["threshold"] = _threshold(buffers, d_sae, file, notes)
        if "k" in buffers:
            notes["k"] = str(_k(buffers, trainer, config, file))
    _expect_config(trainer, found, config)
    expect_facts(entry, found, file)
    spec = spec | found | {"notes": notes, "site": _site(trainer, buffer)}
    return Weights(SAEConfig.from_json(spec, where=str(file)), tensors)


def write(cfg: SAEConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write ae.pt and config.json. Raises CannotConvert with what no class expresses."""
    cfg, tensors = fold(cfg, tensors)
    name = _class_for(cfg, tensors)
    table, _ = CLASSES[name]
    state = {
        key: tensors[ours.removesuffix(".T")].T if ours.endswith(".T") else tensors[ours]
        for key, ours in table.items()
    }
    trainer: dict[str, Any] = {
        "dict_class": name,
        "activation_dim": cfg.d_in,
        "dict_size": cfg.d_sae,
    }
    if "k" in BUFFERS.get(name, set()):
        told = (cfg.notes or {}).get("k", "")
        trainer["k"] = cfg.k or (int(told) if told.isdecimal() else 0) or cfg.d_sae
        state["k"] = torch.tensor(trainer["k"], dtype=torch.int)
        # one number; TopK stores one too, and does not look at it
        state["threshold"] = tensors["threshold"][0] if cfg.k is None else torch.tensor(-1.0)
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    torch.save({key: _alone(value) for key, value in plain.items()}, folder / WEIGHTS)
    data = {"trainer": trainer | _site_words(cfg), "buffer": {"io": _io(cfg)}}
    (folder / CONFIG).write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")


def _class_for(cfg: SAEConfig, tensors: dict[str, Tensor]) -> str:
    """The class that computes what a folded spec says. Raises CannotConvert."""
    name = {
        ("relu", True): "AutoEncoder",
        ("relu", False): "AutoEncoderNew",
        ("gated", True): "GatedAutoEncoder",
        ("topk", True): "AutoEncoderTopK",
        ("jumprelu", False): "JumpReluAutoEncoder",
        ("jumprelu", True): "BatchTopKSAE",
    }.get((cfg.architecture, cfg.subtract_b_dec))
    minus = "with" if cfg.subtract_b_dec else "without"
    thresholds = tensors.get("threshold")
    several = thresholds is not None and bool((thresholds != thresholds[0]).any())
    reasons = [
        (name is None, f"the architecture {cfg.architecture} {minus} b_dec subtracted"),
        (cfg.signed, "a choice by magnitude"),
        (cfg.skip, "a skip connection"),
        (cfg.out_site is not None, "a transcoder, whose output belongs elsewhere than its input"),
        (
            name == "BatchTopKSAE" and several,
            "a threshold for each feature together with b_dec subtracted",
        ),
        *shared_reasons(cfg),
    ]
    refuse("dictionary_learning", reasons)
    assert name is not None
    return name


def origin_output(folder: Path, x: Tensor) -> Tensor:
    """What dictionary_learning computes from the files in `folder` for x (…, d_in)."""
    name = read_json(folder / CONFIG)["trainer"]["dict_class"]
    raw = {
        key: value.to(x.dtype) if value.is_floating_point() else value
        for key, value in read_pickle(folder / WEIGHTS).items()
    }
    if name == "JumpReluAutoEncoder":
        pre = x @ raw["W_enc"] + raw["b_enc"]
        return torch.relu(pre * (pre > raw["threshold"])) @ raw["W_dec"] + raw["b_dec"]
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
    bias = "decoder_bias" if name == "GatedAutoEncoder" else bias
    pre = (x if name == "AutoEncoderNew" else x - raw[bias]) @ raw["encoder.weight"].T
    match name:
        case "GatedAutoEncoder":
            acts = torch.relu(raw["r_mag"].exp() * pre + raw["mag_bias"])
            acts = acts * (pre + raw["gate_bias"] > 0)
        case "AutoEncoderTopK":
            positive = torch.relu(pre + raw["encoder.bias"])
            index = positive.topk(int(raw["k"])).indices
            acts = torch.zeros_like(positive).scatter(-1, index, positive.gather(-1, index))
        case "BatchTopKSAE":
            positive = torch.relu(pre + raw["encoder.bias"])
            acts = positive * (positive > raw["threshold"])
        case _:
            acts = torch.relu(pre + raw["encoder.bias"])
    return acts @ raw["decoder.weight"].T + raw[bias]


def _alone(value: Tensor) -> Tensor:
    """A tensor that owns its storage: torch.save writes the whole storage of a view."""
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


def _io(cfg: SAEConfig) -> str:
    return "in" if cfg.site is not None and cfg.site.side == "input" else "out"


def _site_words(cfg: SAEConfig) -> dict[str, Any]:
    """What the config's trainer says of the site: lm_name, layer, submodule_name."""
    if cfg.site is None:
        return {}
    site = cfg.site
    words = {point: word for word, (point, _, _) in reversed(POINTS.items())}
    known = site.point in words and site.layer is not None and site.side == "output"
    name = f"{words[site.point]}_layer_{site.layer}" if known and site.point else site.module
    found = {"lm_name": site.model, "layer": site.layer, "submodule_name": name}
    return {key: value for key, value in found.items() if value is not None}


def _section(data: dict[str, Any], key: str, where: Path) -> dict[str, Any]:
    section = data.get(key) or {}
    if not isinstance(section, dict):
        raise FormatError(f"{where}: {key} is {type(section).__name__}, expected an object")
    return section


def _class_of(trainer: dict[str, Any], raw: dict[str, Any], config: Path, file: Path) -> str:
    name = trainer.get("dict_class")
    if name is not None:
        if not isinstance(name, str) or name not in CLASSES:
            known = ", ".join(CLASSES)
            raise FormatError(f"{config}: dict_class {name!r} is not known; there are {known}")
        return name
    keys = {str(key) for key in raw}
    if "group_sizes" in keys:
        return "MatryoshkaBatchTopKSAE"
    fitting = [key for key, (table, _) in CLASSES.items() if set(table) <= keys <= _all(key)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        # TopK and BatchTopK store the same tensors and compute different things
        raise FormatError(
            f"{file}: could be {' or '.join(fitting)}; trainer.dict_class of a config.json decides"
        )
    raise FormatError(
        f"{file}: no class of dictionary_learning has tensors {', '.join(sorted(keys))}"
    )


def _all(name: str) -> set[str]:
    return set(CLASSES[name][0]) | BUFFERS.get(name, set())


def _as_stored(value: Tensor, canonical: str) -> Tensor:
    return value.T if canonical.endswith(".T") and value.dim() == 2 else value


def _k(buffers: dict[str, Any], trainer: dict[str, Any], config: Path, file: Path) -> int:
    if "k" not in buffers:
        return whole_number(trainer, "k", config)
    k = whole_number(buffers, "k", file)
    if trainer.get("k", k) != k:
        raise FormatError(f"{file}: k is {k}, but {config.name} says {trainer['k']!r}")
    return k


def _threshold(buffers: dict[str, Any], d_sae: int, file: Path, notes: dict[str, str]) -> Tensor:
    """One threshold for all features. An unset one (-1) cuts nothing, as in the authors' code:
    ReLU(p) [ReLU(p) > -1] is ReLU(p).
    """
    if "threshold" not in buffers:
        raise FormatError(
            f"{file}: has no threshold, so it is of an early version, whose features depend on "
            "what else is in the batch"
        )
    value = buffers["threshold"]
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise FormatError(f"{file}: threshold is not one number")
    if float(value) < 0:
        notes["threshold"] = "unset in the file: every positive pre-activation is a feature"
    return value.reshape(1).float().repeat(d_sae)


def _expect_config(trainer: dict[str, Any], found: dict[str, Any], config: Path) -> None:
    for key, ours in (("activation_dim", "d_in"), ("dict_size", "d_sae")):
        if trainer.get(key) is not None and trainer[key] != found[ours]:
            raise FormatError(
                f"{config}: {key} is {trainer[key]!r}, but the tensors have {found[ours]}"
            )


def _site(trainer: dict[str, Any], buffer: dict[str, Any]) -> dict[str, Any] | None:
    """The site in the words of the config: model, layer, `submodule_name`, and `io` of the
    buffer.
    """
    model, layer, where = (trainer.get(key) for key in ("lm_name", "layer", "submodule_name"))
    side = {"in": "input", "out": "output"}.get(str(buffer.get("io", "out")), "output")
    site: dict[str, Any] = {"side": side}
    if isinstance(model, str):
        site["model"] = model
    if isinstance(layer, int) and layer >= 0:
        site["layer"] = layer
    found = re.fullmatch(r"(\w+?)_layer_?(\d+)", where) if isinstance(where, str) else None
    if found and found[1] in POINTS and model:
        point, submodule, hook = POINTS[found[1]]
        number = int(found[2])
        stack = next((path for key, path in STACKS.items() if key in str(model)), "model.layers")
        site |= {"layer": number}
        if point != "attn_out":  # its module's name differs from host to host
            site["module"] = f"{stack}.{number}{submodule}"
        if side == "output":
            site |= {"point": point, "hook_name": f"blocks.{number}.{hook}"}
    elif isinstance(where, str) and "." in where:
        site["module"] = where
    return site if len(site) > 1 else None
