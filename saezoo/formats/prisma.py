"""Prisma (ViT-Prisma), SAEs and transcoders of vision models: `config.json` with `weights.pt` or
`n_images_N.pt`, in which a pickled config object lies beside the state dict, or which is the state
dict alone.

Arithmetic, from vit_prisma/sae/sae.py and transcoders/transcoder.py:
    z = x, or by normalize_activations
        constant_norm_rescale   x sqrt(d) / |x|
        layer_norm              (x - mean) / (std + 1e-5), std unbiased
    f = act((z - b_dec) W_enc + b_enc), act ReLU, or ReLU of the k largest
    gated:  q = (z - b_dec) W_enc; f = [q + b_gate > 0] ReLU(exp(r_mag) q + b_mag); b_enc is unused
    y = f W_dec + b_dec, and z's normalisation undone, without eps
    transcoders: y = f W_dec + b_dec_out instead, and with a skip + x W_skip^T before it is undone
The authors' code has had two skips: x W_skip^T, and later x (1 + W_skip^T). No file says which it
was trained with, so the entry must (`skip_identity`); and a skip under a normalisation has no form
here. An early version left the normalised x unused on the way in; today's code, which loads all of
them, is what counts. Fields that a pickled config lacks would take today's defaults there, which
normalise: of such a file nothing is known, and it is refused.
Which images' tokens an SAE is of (the class token alone, or all others) is in the notes.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.config import SAEConfig, Site
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import FORMATS, Weights
from saezoo.formats._hooks import site_of_hook
from saezoo.formats._pickled import plain_fields, read_config, read_pickled, read_state
from saezoo.formats._tensors import (
    SHOWN,
    expect_facts,
    expect_sizes,
    need_file,
    read_json,
    refuse_rest,
    take,
    whole_number,
    yes_or_no,
)
from saezoo.formats.dunefsky import take_biases
from saezoo.formats.gemma_scope import prefer

CONFIG = "config.json"

NORMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "constant_norm_rescale": {"kind": "constant_norm"},
    "layer_norm": {"kind": "layer_norm", "eps": 1e-5, "ddof": 1},
}
DEFAULTS: dict[str, Any] = {
    "architecture": "standard",
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "is_transcoder": False,
    "transcoder_with_skip_connection": False,
}
"""What a config that lacks a field means: the only thing that the code could do before it was."""

MODEL = re.compile(r"(?:open-clip:)?([\w.-]+/[\w.-]+)")
IN = ("hook_point", "hook_point_layer", "layer_subtype")
OUT = ("out_hook_point", "out_hook_point_layer", "layer_out_subtype")
"""Fields of the whole hook's name, or of its layer and its last part."""

DECIDE = ("normalize_activations", *DEFAULTS)
TOKENS = {"cls_token_only": "the class token alone", "use_patches_only": "all but the class token"}


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a folder, or its weights' file. W_enc (d_in, d_sae) becomes a view by rows; W_dec
    (d_sae, d_out) and biases are as stored.

    Raises UnsafeFile for a pickle that names more than config classes; FormatError for values that
    are not known of what decides arithmetic, and where both configs, tensors and registry
    contradict.
    """
    file = path if path.is_file() else _weights_of(path)
    where = file.with_name(CONFIG)
    raw, data = _open(file, where)
    gated = data["architecture"] == "gated"
    tensors = {
        "W_enc_rows": take(raw, "W_enc", file, dims=2).T,
        "W_dec": take(raw, "W_dec", file, dims=2),
    }
    d_sae, d_in = tensors["W_enc_rows"].shape
    spec: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    spec |= take_biases(raw, tensors, file) | _activation(data, where)
    for name in ("b_gate", "r_mag", "b_mag") if gated else ("b_enc",):
        tensors[name] = take(raw, name, file, dims=1)
    if gated:
        raw.pop("b_enc", None)
    spec["input_norm"] = _norm(data, where)
    if "W_skip" in raw:
        spec["skip"] = True
        tensors["W_skip"] = _skip(take(raw, "W_skip", file, dims=2), spec, entry, file)
    refuse_rest(raw, file, "Prisma's format")
    _expect_kind(data, spec, where)
    expect_sizes(data, {"d_in": d_in, "d_sae": d_sae}, where)
    if spec["input_bias"]:
        expect_sizes(data, {"d_out": tensors["W_dec"].shape[1]}, where)
    expect_facts(entry, {key: spec.get(key) for key in ("d_in", "d_sae", "k")}, file)
    only = [words for key, words in TOKENS.items() if data.get(key) is True]
    spec["notes"] = {"tokens": f"of {only[0]}"} if only else None
    spec["site"], spec["out_site"] = _sites(data, entry, transcoder=spec["input_bias"])
    return Weights(SAEConfig.from_json(spec, where=str(file)), tensors)


def _weights_of(folder: Path) -> Path:
    names = FORMATS["prisma"].one_of_in([item.name for item in folder.iterdir()])
    if len(names) > 1 and names[0] != "weights.pt":
        raise FormatError(f"{folder}: holds {', '.join(names[:3])}: name one of them")
    file = folder / (names[0] if names else "weights.pt")
    need_file(file)
    return file


def _open(file: Path, where: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, config) of the pickled config and the one beside, which must agree in what decides
    arithmetic.
    """
    beside = plain_fields(read_json(where)) if where.is_file() else {}
    saved = read_pickled(file)
    inside: dict[str, Any] = {}
    if isinstance(saved, dict) and "state_dict" in saved:
        raw = read_state(saved, file)
        inside = read_config(saved["cfg"], "cfg", file)
    elif isinstance(saved, dict):
        raw = dict(saved)
    else:
        raise FormatError(f"{file}: holds {type(saved).__name__}, expected a state dict")
    if not inside and not beside:
        raise FormatError(f"{file}: has no config in it, and there is no {where}")
    for key in DECIDE:
        if key in inside and key in beside and inside[key] != beside[key]:
            raise FormatError(
                f"{file}: its own config says {key} {SHOWN.repr(inside[key])}, {where.name} says "
                f"{SHOWN.repr(beside[key])}"
            )
    return raw, DEFAULTS | beside | inside


def _activation(data: dict[str, Any], where: Path) -> dict[str, Any]:
    architecture, name = data["architecture"], data["activation_fn_str"]
    if architecture not in ("standard", "gated"):
        raise FormatError(
            f"{where}: architecture {SHOWN.repr(architecture)} is not known; there are standard "
            "and gated"
        )
    if name not in ("relu", "topk") or (architecture == "gated" and name != "relu"):
        raise FormatError(
            f"{where}: activation_fn_str {SHOWN.repr(name)} of a {architecture} SAE is not read; "
            "relu is, and topk of standard ones"
        )
    if name == "relu":
        return {"architecture": "gated" if architecture == "gated" else "relu"}
    words = data["activation_fn_kwargs"]
    if not isinstance(words, dict) or words.keys() - {"k"}:
        raise FormatError(f"{where}: activation_fn_kwargs is {SHOWN.repr(words)}, expected k alone")
    return {"architecture": "topk", "k": whole_number(words, "k", where)}


def _norm(data: dict[str, Any], where: Path) -> dict[str, Any] | None:
    if "normalize_activations" not in data:
        raise FormatError(f"{where}: nothing says normalize_activations; add it to {CONFIG}")
    name = data["normalize_activations"]
    name = "none" if name is None else name
    if not isinstance(name, str) or name not in NORMS:
        raise FormatError(
            f"{where}: normalize_activations {SHOWN.repr(name)} is not known; there are "
            f"{', '.join(NORMS)}"
        )
    return NORMS[name]


def _skip(stored: Tensor, spec: dict[str, Any], entry: Entry | None, file: Path) -> Tensor:
    """W_skip (d_in, d_out) of the stored (d_out, d_in)."""
    if spec["input_norm"] is not None:
        raise FormatError(
            f"{file}: a skip under a normalisation, which is undone on it too, has no form here"
        )
    if entry is None or entry.skip_identity is None:
        raise FormatError(
            f"{file}: has a skip, of which Prisma's code has had two, x W_skip^T and "
            "x (1 + W_skip^T), and the file does not say which: state `skip_identity: false` or "
            "`true` in the registry or a saezoo.yaml"
        )
    if not entry.skip_identity:
        return stored.T
    if stored.shape[0] != stored.shape[1]:
        raise FormatError(f"{file}: W_skip is {tuple(stored.shape)}, expected a square")
    return stored.T + torch.eye(len(stored), dtype=stored.dtype)


def _expect_kind(data: dict[str, Any], spec: dict[str, Any], where: Path) -> None:
    for key, there in (
        ("is_transcoder", spec["input_bias"]),
        ("transcoder_with_skip_connection", spec.get("skip", False)),
    ):
        said = yes_or_no(data, key, where)
        # the flag of a skip is true in SAEs' configs too
        if said != there and not (key != "is_transcoder" and not spec["input_bias"]):
            raise FormatError(f"{where}: {key} is {said}, but the tensors say otherwise")


def _sites(
    data: dict[str, Any], entry: Entry | None, *, transcoder: bool
) -> tuple[Site | None, Site | None]:
    """Hooks are those of Prisma's HookedViT, which are called like TransformerLens' own. No module
    of a HuggingFace model is named.
    """
    stated = entry.site if entry is not None else None
    name = data.get("model_name")
    found = MODEL.fullmatch(name) if isinstance(name, str) else None
    model = stated.model if stated and stated.model else found[1] if found else None
    site = _site(data, IN, model)
    out = _site(data, OUT, model) if transcoder else None
    return prefer(stated, site), prefer(entry.out_site if entry else None, out)


def _site(data: dict[str, Any], keys: tuple[str, str, str], model: str | None) -> Site | None:
    hook, layer, kind = (data.get(key) for key in keys)
    if not isinstance(hook, str):
        if type(layer) is not int or not isinstance(kind, str):
            return None
        hook = f"blocks.{layer}.{kind}"
    return site_of_hook(hook, model)
