"""Gemma Scope 2: params.safetensors and mostly config.json, in folders that say site, layer, width
and L0.
"""

import json

import torch
from safetensors.torch import save_file

from tests.origins._origin import D, N, Origin, draw

HOOKS = {
    "resid_post": ("model.layers.12.output",) * 2,
    "attn_out": ("model.layers.12.self_attn.o_proj.input",) * 2,
    "mlp_out": ("model.layers.12.post_feedforward_layernorm.output",) * 2,
    "transcoder": (
        "model.layers.12.pre_feedforward_layernorm.output",
        "model.layers.12.post_feedforward_layernorm.output",
    ),
}


def config(what, *, affine):
    into, out = HOOKS[what]
    return {
        "hf_hook_point_in": into,
        "hf_hook_point_out": out,
        "width": N,
        "model_name": "google/gemma-3-1b-pt",
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": affine,
        "type": "transcoder" if what == "transcoder" else "sae",
    }


def tensors(*, affine=False, dtype=torch.float32):
    def make(g):
        made = {
            "w_enc": draw(g, D, N),
            "w_dec": draw(g, N, D),
            "b_enc": draw(g, N),
            "b_dec": draw(g, D),
            # half are below 0, where ReLU decides, not the threshold
            "threshold": draw(g, N),
        }
        # one feature is always exactly at its threshold, and so off
        made["w_enc"][:, 0] = 0
        made["b_enc"][0] = made["threshold"][0] = 0.5
        if affine:
            made["affine_skip_connection"] = draw(g, D, D)
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def writer(what="resid_post", *, every=False, affine=False, cfg=True, file=False, **changes):
    def write(root, t):
        name = f"layer_12_width_16k_l0_small{'_affine' if affine else ''}"
        folder = root / "gemma-scope-2-1b-pt" / f"{what}{'_all' if every else ''}" / name
        folder.mkdir(parents=True)
        save_file(t, folder / "params.safetensors")
        if cfg:
            data = config(what, affine=affine) | changes
            (folder / "config.json").write_text(json.dumps(data))
        return folder / "params.safetensors" if file else folder

    return write


def encode(t, x):
    p = x @ t["w_enc"].to(x.dtype) + t["b_enc"].to(x.dtype)
    return (p > t["threshold"].to(x.dtype)) * torch.relu(p)


def decode(t, f):
    return f @ t["w_dec"].to(f.dtype) + t["b_dec"].to(f.dtype)


def forward(t, x):
    y = decode(t, encode(t, x))
    return y + x @ t["affine_skip_connection"].to(x.dtype) if "affine_skip_connection" in t else y


def of_b_dec_subtracted(t, x):
    return forward(t, x - t["b_dec"])


def without_threshold(t, x):
    return forward(t | {"threshold": torch.zeros_like(t["threshold"])}, x)


def without_relu(t, x):
    p = x @ t["w_enc"] + t["b_enc"]
    return forward(t, x) - decode(t, encode(t, x)) + decode(t, p * (p > t["threshold"]))


def at_the_threshold_too(t, x):
    p = x @ t["w_enc"] + t["b_enc"]
    more = torch.relu(p) * (p >= t["threshold"])
    return forward(t, x) - decode(t, encode(t, x)) + decode(t, more)


def without_skip(t, x):
    return decode(t, encode(t, x))


def skip_transposed(t, x):
    return decode(t, encode(t, x)) + x @ t["affine_skip_connection"].mT


MISTAKES = (of_b_dec_subtracted, without_threshold, without_relu, at_the_threshold_too)


def variant(name, write, make=None, mistakes=MISTAKES):
    return Origin(
        name, "gemma_scope_2", write, make or tensors(), encode, forward, mistakes=tuple(mistakes)
    )


AFFINE = (*MISTAKES, without_skip, skip_transposed)

ORIGINS = [
    variant("residual stream", writer()),
    variant("one file", writer(file=True)),
    variant("heads' outputs", writer("attn_out", every=True)),
    variant("mlp", writer("mlp_out")),
    variant("transcoder", writer("transcoder", every=True)),
    variant(
        "affine transcoder",
        writer("transcoder", affine=True),
        tensors(affine=True),
        mistakes=AFFINE,
    ),
    variant(
        "affine transcoder without a config",
        writer("transcoder", affine=True, cfg=False),
        tensors(affine=True),
        mistakes=AFFINE,
    ),
    variant("without a config", writer("mlp_out", every=True, cfg=False)),
    variant("unknown keys of training", writer(some_new_option=3, another="x")),
    variant("bfloat16 file", writer(), tensors(dtype=torch.bfloat16)),
]
