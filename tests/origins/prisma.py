"""Prisma: config.json and weights.pt with a pickled config, or a bare state dict; encode, decode
and forward of StandardSparseAutoencoder, GatedSparseAutoencoder and Transcoder.
"""

import json

import torch

from tests.origins._classes import classes_of, filled
from tests.origins._origin import D, K, N, Origin, draw, keep_k

CLASS = "vit_prisma.sae.config.VisionModelSAERunnerConfig"
VIT = "vit_prisma.configs.HookedViTConfig.HookedViTConfig"
CONFIG = {
    "architecture": "standard",
    "model_class_name": "HookedViT",
    "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "hook_point_layer": 9,
    "layer_subtype": "hook_resid_post",
    "context_size": 50,
    "d_in": D,
    "d_sae": N,
    "expansion_factor": N // D,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "cls_token_only": False,
    "use_patches_only": False,
    "normalize_activations": "layer_norm",
    "is_transcoder": False,
    "transcoder_with_skip_connection": True,
    "out_hook_point_layer": 9,
    "layer_out_subtype": "hook_mlp_out",
    "d_out": 768,
    "lr": 0.001,
}
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
TRANSCODER = {
    "is_transcoder": True,
    "transcoder_with_skip_connection": False,
    "layer_subtype": "ln2.hook_normalized",
    "d_out": D,
}
PICKLED_TOO = {"dtype": torch.float32, "device": torch.device("cpu"), "hook_point": None}


def tensors(*, transcoder=False, gated=False, skip=False, out=D):
    def make(g):
        made = {
            "W_enc": draw(g, D, N),
            "b_enc": draw(g, N),
            "W_dec": draw(g, N, out),
            "b_dec": draw(g, D),
        }
        if gated:
            made |= {"b_gate": draw(g, N), "r_mag": draw(g, N, scale=0.5), "b_mag": draw(g, N)}
        if transcoder:
            made["b_dec_out"] = draw(g, out)
        return made | ({"W_skip": draw(g, D, D)} if skip else {})

    return make


def writer(file="weights.pt", *, pickled=True, beside=True, **changes):
    def write(root, t):
        folder = root / "sae-clip-layer-9"
        folder.mkdir(parents=True)
        data = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
        shown = data | {"dtype": {"__type__": "torch.dtype", "value": "torch.float32"}}
        if beside:
            (folder / "config.json").write_text(json.dumps(shown))
        if not pickled:
            torch.save(t, folder / file)
            return folder
        hook = f"blocks.{data['hook_point_layer']}.{data['layer_subtype']}"
        with classes_of(CLASS, VIT) as (kind, vit):
            more = PICKLED_TOO | {
                "hook_point": hook,
                "vit_model_cfg": filled(vit, {"n_layers": 12}),
            }
            torch.save({"cfg": filled(kind, data | more), "state_dict": t}, folder / file)
        return folder if beside else folder / file

    return write


def inward(x, norm):
    """(normalised x, the way back)."""
    if norm == "constant_norm_rescale":
        scale = D**0.5 / x.norm(dim=-1, keepdim=True)
        return x * scale, lambda y: y / scale
    if norm == "layer_norm":
        mu = x.mean(dim=-1, keepdim=True)
        std = (x - mu).std(dim=-1, keepdim=True)
        return (x - mu) / (std + 1e-5), lambda y: y * std + mu
    return x, lambda y: y


def encode(t, x, cfg):
    z, _ = inward(x, cfg["normalize_activations"])
    if cfg["architecture"] == "gated":
        q = (z - t["b_dec"]) @ t["W_enc"]
        magnitude = (z - t["b_dec"]) @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]
        return (q + t["b_gate"] > 0).to(x.dtype) * torch.relu(magnitude)
    pre = (z - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    if cfg["activation_fn_str"] == "topk":
        return torch.relu(keep_k(pre, pre))
    return torch.relu(pre)


def forward(t, x, cfg, *, identity=False):
    _, outward = inward(x, cfg["normalize_activations"])
    y = encode(t, x, cfg) @ t["W_dec"] + t.get("b_dec_out", t["b_dec"])
    if "W_skip" in t:
        y = y + x @ (t["W_skip"].mT + identity * torch.eye(D, dtype=x.dtype))
    return outward(y)


def origin(name, make=None, wrong=({},), *, writing=None, **changes):
    cfg = CONFIG | changes
    return Origin(
        name,
        "prisma",
        writer(**(writing or {}), **changes),
        make or tensors(),
        lambda t, x: encode(t, x, cfg),
        lambda t, x: forward(t, x, cfg),
        tuple(lambda t, x, other=other: forward(t, x, cfg | other) for other in wrong),
    )


NO_NORM = {"normalize_activations": "none"}

ORIGINS = [
    origin("layer norm", wrong=[NO_NORM, TOPK]),
    origin("no norm", wrong=[{"normalize_activations": "layer_norm"}], **NO_NORM),
    origin("constant norm", wrong=[NO_NORM], normalize_activations="constant_norm_rescale"),
    origin("topk", wrong=[{"activation_fn_str": "relu"}], **TOPK),
    origin(
        "checkpoint of training, in an older repo",
        wrong=[NO_NORM],
        writing={"file": "n_images_2600058.pt"},
    ),
    origin("bare state dict", wrong=[NO_NORM], writing={"pickled": False}),
    origin("gated", tensors(gated=True), [NO_NORM], architecture="gated"),
    origin(
        "transcoder",
        tensors(transcoder=True),
        [{"normalize_activations": "layer_norm"}],
        **TRANSCODER,
        **NO_NORM,
    ),
    origin("transcoder, normalised", tensors(transcoder=True), [NO_NORM], **TRANSCODER),
    origin(
        "transcoder of another width",
        tensors(transcoder=True, out=D + 2),
        [TOPK],
        **(TRANSCODER | {"d_out": D + 2}),
        **NO_NORM,
    ),
]
