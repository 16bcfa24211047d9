"""Gemma Scope 2 (Gemma 3): `resid_post/layer_12_width_16k_l0_small/params.safetensors`, mostly with
`config.json` beside it.

Arithmetic, from the authors' tutorial (JumpReLUSAE):
    p = x w_enc + b_enc, and no b_dec is subtracted from x
    f = ReLU(p) where p > threshold, else 0
    y = f w_dec + b_dec, and + x affine_skip_connection where there is one (no transpose)
Sites, from hf_hook_point_in and hf_hook_point_out, else from the folders' names as SAELens reads
them: resid_post is what a layer gives, attn_out the input of o_proj, mlp_out the output of
post_feedforward_layernorm, transcoder from the output of pre_feedforward_layernorm (with its gain;
no hook of TransformerLens carries it) to that of post_feedforward_layernorm.
Cross-layer transcoders and crosscoders (clt/, crosscoder/) are refused here: one tensor of theirs
belongs to many layers; gemma_scope_2_multi reads them.
"""

import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saezoo.config import Point, SAEConfig, Site
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._tensors import (
    expect_facts,
    read_json,
    read_safetensors,
    refuse_rest,
    take,
    whole_number,
    yes_or_no,
)
from saezoo.formats.gemma_scope import names_of, prefer

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, SKIP = "config.json", "params.safetensors", "affine_skip_connection"

KNOWN = {
    "architecture",
    "affine_connection",
    "hf_hook_point_in",
    "hf_hook_point_out",
    "l0",
    "model_name",
    "type",
    "width",
}
KINDS = ("sae", "transcoder")
CROSS_LAYER = ("clt", "crosscoder")

REPO = re.compile(r"gemma-scope-2-(?P<size>\d+[mb])-(?P<kind>pt|it)\b")
FOLDER = re.compile(
    r"(?P<what>resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(?P<layer>\d+)_width_"
)
HOOK = re.compile(
    r"(?P<module>[\w.]*layers\.(?P<layer>\d+)(?P<part>[\w.]*))\.(?P<side>input|output)"
)

HOOKS = {
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
"""Folder -> hook points in and out within a layer, for folders without a config."""

POINTS: dict[tuple[str, str], tuple[Point, str | None]] = {
    ("", "output"): ("resid_post", "hook_resid_post"),
    (".self_attn.o_proj", "input"): ("attn_z", "attn.hook_z"),
    (".pre_feedforward_layernorm", "output"): ("mlp_in", None),
    (".post_feedforward_layernorm", "output"): ("mlp_out", "hook_mlp_out"),
}
"""Submodule of a layer and its side -> point, TransformerLens hook."""


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a folder with `params.safetensors`, or the file itself.

    w_enc (d_in, d_sae) becomes a view by rows; w_dec (d_sae, d_out), biases, threshold (d_sae,) and
    the skip (d_in, d_out) are as stored. Raises FormatError for unknown values of what decides
    arithmetic, for what belongs to many layers, and where config, registry and tensors contradict.
    """
    file = path if path.is_file() else path / WEIGHTS
    config = file.with_name(CONFIG)
    data = read_json(config) if config.is_file() else {}
    _refuse_cross_layer(file, entry, data)
    if config.is_file():
        _refuse_unknown(data, config)
    raw = read_safetensors(file)
    tensors = _tensors(raw, file)
    d_sae, d_in = tensors["W_enc_rows"].shape
    found: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    expect_facts(entry, found, file)
    if "width" in data and whole_number(data, "width", config) != d_sae:
        raise FormatError(f"{config}: width is {data['width']}, but the tensors have {d_sae}")
    _expect_skip("W_skip" in tensors, data, config, file)
    site, out_site = sites_of(data, file, entry)
    spec = {"architecture": "jumprelu", **found, "skip": "W_skip" in tensors}
    if out_site is not None or data.get("type") == "transcoder":
        d_out = tensors["W_dec"].shape[1]
        spec["d_out"] = d_out if d_out != d_in else None
    spec |= {"site": site, "out_site": out_site}
    return Weights(SAEConfig.from_json(spec, where=str(file)), tensors)


def _tensors(raw: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    if any(name in raw and raw[name].dim() > 2 for name in ("w_enc", "w_dec", SKIP)):
        raise _cross_layer(file, "its tensors are those of many layers")
    tensors = {
        "W_enc_rows": take(raw, "w_enc", file, dims=2).T,
        "b_enc": take(raw, "b_enc", file, dims=1),
        "W_dec": take(raw, "w_dec", file, dims=2),
        "b_dec": take(raw, "b_dec", file, dims=1),
        "threshold": take(raw, "threshold", file, dims=1),
    }
    if SKIP in raw:
        tensors["W_skip"] = take(raw, SKIP, file, dims=2)
    refuse_rest(raw, file, "Gemma Scope 2")
    return tensors


def _refuse_cross_layer(file: Path, entry: Entry | None, data: dict[str, Any]) -> None:
    """What one layer of a CLT or crosscoder stores may look like an SAE: names and config tell."""
    if data.get("type") in CROSS_LAYER:
        raise _cross_layer(file, f"its config says type {data['type']!r}")
    if file.name.startswith("params_layer_") or any(file.parent.glob("params_layer_*.safetensors")):
        raise _cross_layer(file, "there is one file a layer")
    inside = entry.path.split("/")[0] if entry is not None else ""
    if inside in CROSS_LAYER or file.absolute().parent.parent.name in CROSS_LAYER:
        raise _cross_layer(file, "so its folder says")


def _cross_layer(file: Path, why: str) -> FormatError:
    return FormatError(
        f"{file}: a cross-layer transcoder or crosscoder ({why}); name its folder, whose files of "
        "every layer belong together (format gemma_scope_2_multi)"
    )


def _refuse_unknown(data: dict[str, Any], config: Path) -> None:
    if data.get("architecture") != "jump_relu":
        raise FormatError(
            f"{config}: architecture {data.get('architecture')!r} is not known; Gemma Scope 2 has "
            "jump_relu"
        )
    if data.get("type", "sae") not in KINDS:
        raise FormatError(
            f"{config}: type {data['type']!r} is not known; there are {', '.join(KINDS)}"
        )
    if unknown := sorted(data.keys() - KNOWN):
        logger.info("%s: keys that Gemma Scope 2's arithmetic does not have: %s", config, unknown)


def _expect_skip(there: bool, data: dict[str, Any], config: Path, file: Path) -> None:
    """The config, or without it the folder's name, says whether a skip belongs to the file."""
    if "affine_connection" in data:
        if yes_or_no(data, "affine_connection", config) != there:
            raise FormatError(
                f"{config}: affine_connection is {data['affine_connection']}, but {file.name} has "
                f"{SKIP if there else f'no {SKIP}'}"
            )
    elif file.absolute().parent.name.endswith("_affine") and not there:
        raise FormatError(f"{file}: has no {SKIP}, but its folder is called affine")


def sites_of(
    data: dict[str, Any], file: Path, entry: Entry | None
) -> tuple[Site | None, Site | None]:
    """Input site, and output site of a transcoder: the config's hook points, else the folders'
    names; what the registry states wins.
    """
    hooks = data.get("hf_hook_point_in"), data.get("hf_hook_point_out")
    if hooks[0] is None:
        hooks = _hooks_of_folder(file, entry)
    model = model_of(data, file, entry)
    site = site_of_point(hooks[0], model)
    # an SAE's config names the same point twice
    out_site = site_of_point(hooks[1], model) if hooks[1] != hooks[0] else None
    return prefer(entry.site if entry else None, site), prefer(
        entry.out_site if entry else None, out_site
    )


def _hooks_of_folder(file: Path, entry: Entry | None) -> tuple[str | None, str | None]:
    for name in names_of(file, entry):
        if found := FOLDER.search(name):
            start = f"model.layers.{found['layer']}."
            into, out = HOOKS[found["what"]]
            return start + into, start + out if out else None
    return None, None


def model_of(data: dict[str, Any], file: Path, entry: Entry | None) -> str | None:
    """The HuggingFace id of the host, by the config, else by the repo's name."""
    model = data.get("model_name")
    if not isinstance(model, str) or not model:
        found = next(filter(None, map(REPO.search, names_of(file, entry))), None)
        if found is None:
            return None
        model = f"gemma-3-{found['size']}-{found['kind']}"
    model = model.replace("gemma-v3", "gemma-3")
    model = model if "/" in model else f"google/{model}"
    # the one pretrained Gemma 3 that is published without the suffix
    return model.removesuffix("-pt") if model == "google/gemma-3-270m-pt" else model


def site_of_point(hook: object, model: str | None) -> Site | None:
    """The site of a hook point such as `model.layers.3.self_attn.o_proj.input`."""
    if hook is None:
        return None
    found = HOOK.fullmatch(hook) if isinstance(hook, str) else None
    if found is None:
        logger.info("a hook point that is not understood: %r", hook)
        return Site(model=model) if model else None
    point, lens = POINTS.get((found["part"], found["side"]), (None, None))
    return Site.model_validate(
        {
            "model": model,
            "layer": int(found["layer"]),
            "point": point,
            "module": found["module"],
            "side": found["side"],
            "hook_name": f"blocks.{found['layer']}.{lens}" if lens else None,
            "rms_gain": True if point == "mlp_in" else None,
        }
    )
