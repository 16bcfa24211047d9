"""EleutherAI sparsify: `<hookpoint>/cfg.json` and `<hookpoint>/sae.safetensors`, read and written.

Arithmetic, from sparsify's sparse_coder.py and fused_encoder.py:
    a = x - b_dec, or x itself if cfg.transcode
    p = ReLU(a W_enc^T + b_enc), of which the k largest (groupmax: the largest of each of k groups)
    y = sum_j p_j W_dec[j] + b_dec, and + x W_skip^T with the x that was given
Files of mid-2024 with `signed`: no ReLU, the k largest by magnitude, with their signs.
normalize_decoder and multi_topk concern training alone. The published skip transcoders of 2025 have
`skip_connection` but no `transcode`; the code of their day and today's both subtract b_dec then.
"""

import json
import logging
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from saezoo.config import Point, SAEConfig, Site
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._fold import fold, refuse, shared_reasons
from saezoo.formats._tensors import (
    expect_facts,
    read_json,
    read_safetensors,
    refuse_rest,
    take,
    whole_number,
    yes_or_no,
)

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
TRAINING_ONLY = {"expansion_factor", "normalize_decoder", "multi_topk", "d_in"}
ARITHMETIC = {"num_latents", "k", "activation", "transcode", "skip_connection", "signed"}
POINTS: dict[str, Point] = {
    "": "resid_post",
    "mlp": "mlp_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attn": "attn_out",
}
HOOKS = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a sparsify folder. Raises FormatError for unknown values of what decides arithmetic."""
    where = path / CONFIG
    data = read_json(where)
    if unknown := sorted(data.keys() - TRAINING_ONLY - ARITHMETIC):
        logger.info("%s: keys that sparsify's arithmetic does not have: %s", where, unknown)
    activation = data.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise FormatError(
            f"{where}: activation {activation!r} is not known; sparsify has topk and groupmax"
        )
    signed, transcode = yes_or_no(data, "signed", where), yes_or_no(data, "transcode", where)
    skip = yes_or_no(data, "skip_connection", where)
    if signed and activation != "topk":
        raise FormatError(f"{where}: signed with activation {activation!r} has no meaning")
    d_in, k = whole_number(data, "d_in", where), whole_number(data, "k", where)
    d_sae = (
        whole_number(data, "num_latents", where)
        if data.get("num_latents")
        else d_in * whole_number(data, "expansion_factor", where)
    )
    shapes = {"d_in": d_in, "d_sae": d_sae, "k": k}
    expect_facts(entry, shapes, where)
    site, out_site = sites_of(path.name, entry, transcode=transcode or skip)
    cfg = SAEConfig.from_json(
        {
            "architecture": activation,
            **shapes,
            "relu_after": not signed,
            "signed": signed,
            "subtract_b_dec": not transcode,
            "skip": skip,
            "site": site.to_json() if site else None,
            "out_site": out_site.to_json() if out_site else None,
        },
        where=str(where),
    )
    raw = read_safetensors(path / WEIGHTS)
    tensors = {
        "W_enc_rows": take(raw, "encoder.weight", path / WEIGHTS, dims=2),
        "b_enc": take(raw, "encoder.bias", path / WEIGHTS, dims=1),
        "W_dec": take(raw, "W_dec", path / WEIGHTS, dims=2),
        "b_dec": take(raw, "b_dec", path / WEIGHTS, dims=1),
    }
    if skip:
        tensors["W_skip"] = take(raw, "W_skip", path / WEIGHTS, dims=2).T
    refuse_rest(raw, path / WEIGHTS, "sparsify")
    return Weights(cfg, tensors)


def write(cfg: SAEConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write cfg.json and sae.safetensors. Raises CannotConvert with what sparsify cannot
    express.
    """
    cfg, tensors = fold(cfg, tensors)
    chooses = cfg.architecture in ("topk", "groupmax")
    refuse(
        "sparsify",
        [(not chooses, f"the architecture {cfg.architecture}"), *shared_reasons(cfg)],
    )
    data = {
        "activation": cfg.architecture,
        "expansion_factor": max(1, cfg.d_sae // cfg.d_in),
        "normalize_decoder": False,
        "num_latents": cfg.d_sae,
        "k": cfg.k,
        "multi_topk": False,
        "skip_connection": cfg.skip,
        "transcode": not cfg.subtract_b_dec,
        "d_in": cfg.d_in,
    }
    names = {"W_enc_rows": "encoder.weight", "b_enc": "encoder.bias"}
    out = {names.get(name, name): value for name, value in tensors.items()}
    if cfg.skip:
        out["W_skip"] = tensors["W_skip"].T
    plain = {name: value.detach().cpu().contiguous() for name, value in out.items()}
    save_file(plain, folder / WEIGHTS)
    text = json.dumps(data | ({"signed": True} if cfg.signed else {}), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def origin_output(folder: Path, x: Tensor) -> Tensor:
    """What sparsify computes from the files in `folder` for x (…, d_in), by its dense formula."""
    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    raw = {name: value.to(x.dtype) for name, value in read_safetensors(folder / WEIGHTS).items()}
    centred = x if data["transcode"] else x - raw["b_dec"]
    pre = F.linear(centred, raw["encoder.weight"], raw["encoder.bias"])
    pre = pre if data.get("signed") else pre.relu()
    if data["activation"] == "groupmax":
        grouped = pre.unflatten(-1, (data["k"], -1))
        index = grouped.argmax(-1, keepdim=True)
        acts = torch.zeros_like(grouped).scatter(-1, index, grouped.gather(-1, index)).flatten(-2)
    else:
        index = (pre.abs() if data.get("signed") else pre).topk(data["k"]).indices
        acts = torch.zeros_like(pre).scatter(-1, index, pre.gather(-1, index))
    y = acts @ raw["W_dec"] + raw["b_dec"]
    return y + x @ raw["W_skip"].T if "W_skip" in raw else y


def sites_of(
    hookpoint: str, entry: Entry | None, *, transcode: bool
) -> tuple[Site | None, Site | None]:
    """Input and output site of a folder's name, a HuggingFace module path such as `layers.3.mlp`
    relative to the base model. An SAE reads the module's output; a transcoder goes from its input
    to its output. What the registry says wins.
    """
    if entry is not None and entry.site is not None and entry.site.module:
        out = entry.out_site
        if transcode and out is None:
            out, into = (
                entry.site,
                entry.site.model_copy(
                    update={
                        "side": "input",
                        "point": _point_before(entry.site.point),
                        "hook_name": None,
                    }
                ),
            )
            return into, out
        return entry.site, out
    model = entry.site.model if entry is not None and entry.site is not None else None
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?", hookpoint)
    if found is None:
        if hookpoint not in ("embed_tokens", "wte"):
            return None, None
        return Site(model=model, point="embed", module=hookpoint, hook_name="hook_embed"), None
    layer, point = int(found[1]), POINTS.get(found[2] or "")
    hook = f"blocks.{layer}.{HOOKS[point]}" if point in HOOKS else None
    site = Site(model=model, layer=layer, point=point, module=hookpoint, hook_name=hook)
    if not transcode:
        return site, None
    into = site.model_copy(
        update={"side": "input", "point": _point_before(point), "hook_name": None}
    )
    return into, site


def _point_before(point: Point | None) -> Point | None:
    """What a module reads, by what it writes."""
    before: dict[Point, Point] = {
        "mlp_out": "mlp_in",
        "attn_out": "attn_in",
        "resid_post": "resid_pre",
    }
    return before.get(point) if point else None
