"""Gemma Scope 1 (Gemma 2): `layer_20/width_16k/average_l0_71/params.npz`, and no config; read and
written.

Arithmetic, from the authors' tutorial (JumpReLUSAE), arXiv:2408.05147:
    p = x W_enc + b_enc, and no b_dec is subtracted from x
    f = ReLU(p) where p > threshold, else 0
    y = f W_dec + b_dec
Where x comes from is in the repo's and the folders' names alone, or in the registry, which wins:
    res          what a layer gives
    att          the heads' outputs, concatenated, before the output projection: (…, heads * d_head)
    mlp          what the MLP adds to the residual stream, after post_feedforward_layernorm
    transcoders  from x / RMS(x) before the MLP, *without* the norm's gain, to what `mlp` reads
    embedding/   below res: rows of the embedding table. They were trained on bare rows e; a model's
                 residual stream starts with x = e sqrt(d). So f is that of x / sqrt(d), and y is
                 sqrt(d) (f W_dec + b_dec). SAELens (gemma_2_sae_huggingface_loader) folds the same
                 into W_enc and W_dec, but leaves b_dec out
A bare params.npz that says none of this is read as it is, with no site.
Written is params.npz alone: a ReLU SAE with thresholds of 0, and nothing of where it belongs.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.config import Point, SAEConfig, Site
from saezoo.entry import Entry
from saezoo.formats import Weights
from saezoo.formats._fold import fold, refuse, shared_reasons
from saezoo.formats._npz import read_npz, write_npz
from saezoo.formats._tensors import expect_facts, refuse_rest, take

WEIGHTS = "params.npz"

SPELLINGS = {"w_enc": "W_enc", "w_dec": "W_dec"}
"""Some files spell the matrices small."""

REPO = re.compile(r"gemma-scope-(?P<size>2b|9b|27b)-(?P<kind>pt|it)-(?P<what>\w+)")
FOLDER = re.compile(
    r"(?:layer_(?P<layer>\d+)|(?P<embedding>embedding))/width_\w+(?:/average_l0_(?P<l0>\d+))?"
)

SITES: dict[str, tuple[Point, str, str, str]] = {
    "res": ("resid_post", "", "output", "hook_resid_post"),
    "att": ("attn_z", ".self_attn.o_proj", "input", "attn.hook_z"),
    "mlp": ("mlp_out", ".post_feedforward_layernorm", "output", "hook_mlp_out"),
}
"""Last word of the repo -> point, submodule of the layer and its side, TransformerLens hook."""


def read(path: Path, entry: Entry | None) -> Weights:
    """Read `params.npz`, or the folder that holds it.

    W_enc (d_in, d_sae) becomes a view by rows; W_dec (d_sae, d_out), biases and threshold (d_sae,)
    are as stored. Raises FormatError for missing, unknown and misshapen arrays, and where the
    registry states other sizes.
    """
    file = path if path.is_file() else path / WEIGHTS
    raw = read_npz(file)
    for theirs, ours in SPELLINGS.items():
        if theirs in raw and ours not in raw:
            raw[ours] = raw.pop(theirs)
    tensors = {
        "W_enc_rows": take(raw, "W_enc", file, dims=2).T,
        "b_enc": take(raw, "b_enc", file, dims=1),
        "W_dec": take(raw, "W_dec", file, dims=2),
        "b_dec": take(raw, "b_dec", file, dims=1),
        "threshold": take(raw, "threshold", file, dims=1),
    }
    refuse_rest(raw, file, "Gemma Scope")
    d_sae, d_in = tensors["W_enc_rows"].shape
    found = {"d_in": d_in, "d_sae": d_sae}
    expect_facts(entry, found, file)
    site, out_site = sites_of(file, entry)
    spec: dict[str, Any] = {"architecture": "jumprelu", **found, "site": site, "out_site": out_site}
    if out_site is not None and tensors["W_dec"].shape[1] != d_in:
        spec["d_out"] = tensors["W_dec"].shape[1]
    if site is not None and site.point == "embed":
        spec["input_norm"] = {"kind": "scale", "factor": d_in**-0.5}
    else:
        # the paper, on its data: no activations of BOS, EOS or padding tokens were collected
        spec["tokens"] = {"prepend_bos": True, "skip_special": True}
    if (l0 := _search(FOLDER, file, entry, "l0")) is not None:
        spec["metrics"] = {"l0": int(l0)}
    return Weights(SAEConfig.from_json(spec, where=str(file)), tensors)


def write(cfg: SAEConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write params.npz. Raises CannotConvert with what Gemma Scope's JumpReLU cannot express."""
    cfg, tensors = fold(cfg, tensors)
    positive = cfg.architecture in ("relu", "jumprelu")
    reasons = [
        (not positive, f"the architecture {cfg.architecture}"),
        # folded into b_enc it would lose digits, so it is not
        (cfg.subtract_b_dec, "b_dec subtracted from the input"),
        (cfg.skip, "a skip connection"),
        *shared_reasons(cfg),
    ]
    refuse("Gemma Scope", reasons)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    if cfg.architecture == "relu":
        # ReLU(p) where p > 0 is ReLU(p)
        tensors = tensors | {"threshold": torch.zeros_like(tensors["b_enc"])}
    out = tensors | {"W_enc": tensors["W_enc_rows"].T}
    write_npz(folder / WEIGHTS, {name: out[name] for name in names})


def origin_output(folder: Path, x: Tensor) -> Tensor:
    """What the authors' JumpReLUSAE computes from params.npz in `folder` for x (…, d_in)."""
    raw = {name: value.to(x.dtype) for name, value in read_npz(folder / WEIGHTS).items()}
    pre = x @ raw["W_enc"] + raw["b_enc"]
    return ((pre > raw["threshold"]) * torch.relu(pre)) @ raw["W_dec"] + raw["b_dec"]


def sites_of(file: Path, entry: Entry | None) -> tuple[Site | None, Site | None]:
    """Input site, and output site of a transcoder, by the names of repo and folders; what the
    registry states wins.
    """
    size, kind, what = (_search(REPO, file, entry, key) for key in ("size", "kind", "what"))
    model = f"google/gemma-2-{size}{'-it' if kind == 'it' else ''}" if size else None
    layer = _search(FOLDER, file, entry, "layer")
    site: Site | None = None
    out_site: Site | None = None
    if _search(FOLDER, file, entry, "embedding"):
        # the input of layer 0 is scaled in every version of transformers; what embed_tokens gives
        # is not
        site = _site(model, None, "embed", "model.layers.0", "input", "hook_embed")
    elif layer is not None and what in SITES:
        site = _layer_site(model, int(layer), what)
    elif layer is not None and what == "transcoders":
        out_site = _layer_site(model, int(layer), "mlp")
        # no module of the HuggingFace model gives the normalised stream without the gain
        hook = f"blocks.{layer}.ln2.hook_normalized"
        site = Site(model=model, layer=int(layer), point="mlp_in", hook_name=hook, rms_gain=False)
    elif layer is not None or model is not None:
        site = Site(model=model, layer=int(layer) if layer else None)
    return prefer(entry.site if entry else None, site), prefer(
        entry.out_site if entry else None, out_site
    )


def prefer(stated: Site | None, found: Site | None) -> Site | None:
    """What the registry states of a site, completed by what was found, if both mean the same
    place.
    """
    if stated is None or found is None:
        return stated or found
    for key in ("layer", "point"):
        both = getattr(stated, key), getattr(found, key)
        if None not in both and both[0] != both[1]:
            return stated
    return found.model_copy(update=stated.model_dump(exclude_unset=True, exclude_none=True))


def names_of(file: Path, entry: Entry | None) -> list[str]:
    """Where a file lies, in the words of the registry or Hub first, then on this machine."""
    told = [f"{entry.source}/{entry.path}"] if entry is not None else []
    # not resolved: in the Hub's cache files are links to blobs without a telling name
    return [*told, file.absolute().as_posix()]


def _search(pattern: re.Pattern[str], file: Path, entry: Entry | None, group: str) -> str | None:
    for name in names_of(file, entry):
        if found := pattern.search(name):
            return found[group]
    return None


def _layer_site(model: str | None, layer: int, what: str) -> Site:
    point, submodule, side, hook = SITES[what]
    module = f"model.layers.{layer}{submodule}"
    return _site(model, layer, point, module, side, f"blocks.{layer}.{hook}")


def _site(
    model: str | None, layer: int | None, point: Point, module: str, side: str, hook: str
) -> Site:
    return Site.model_validate(
        {
            "model": model,
            "layer": layer,
            "point": point,
            "module": module,
            "side": side,
            "hook_name": hook,
        }
    )
