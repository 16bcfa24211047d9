"""Gemma Scope 2's cross-layer transcoders and crosscoders: params_layer_{i}.safetensors."""

import json

import torch
from safetensors.torch import save_file

from tests.origins._multi import D, L, MultiOrigin, N, draw

SKIP = "affine_skip_connection"
CLT = {
    "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
    "type": "clt",
}
CROSSCODER = {
    "hf_hook_point_in": "model.layers.{7,13,22}.output",
    "hf_hook_point_out": "model.layers.{7,13,22}.output",
    "type": "crosscoder",
}


def tensors(*, affine=False, dtype=torch.float32):
    def make(g):
        made = {
            "w_enc": draw(g, L, D, N),
            "w_dec": draw(g, L, N, L, D),
            "b_enc": draw(g, L, N),
            "b_dec": draw(g, L, D),
            # half are below 0, where ReLU decides, not the threshold
            "threshold": draw(g, L, N),
        }
        # one feature of each layer is always exactly at its threshold, and so off
        made["w_enc"][..., 0] = 0
        made["b_enc"][:, 0] = made["threshold"][:, 0] = 0.5
        if affine:
            made[SKIP] = draw(g, L, D, D)
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def writer(kind=CLT, *, name=None, cfg=True, affine=False, **changes):
    name = name or f"clt/width_262k_l0_medium{'_affine' if affine else ''}"

    def write(root, t):
        folder = root / "gemma-scope-2-1b-pt" / name
        folder.mkdir(parents=True)
        for at in range(len(t["w_enc"])):
            own = {key: value[at].contiguous() for key, value in t.items()}
            save_file(own, folder / f"params_layer_{at}.safetensors")
        if cfg:
            data = kind | {
                "width": 262144,
                "model_name": "google/gemma-3-1b-pt",
                "architecture": "jump_relu",
                "l0": 60,
                "affine_connection": affine,
            }
            (folder / "config.json").write_text(json.dumps(data | changes))
        return folder

    return write


def encode(t, x):
    p = torch.einsum("tld,ldn->tln", x, t["w_enc"]) + t["b_enc"]
    return (p > t["threshold"]) * torch.relu(p)


def decode(t, f):
    return torch.einsum("tln,lnmd->tmd", f, t["w_dec"]) + t["b_dec"]


def forward(t, x):
    y = decode(t, encode(t, x))
    return y + torch.einsum("tld,lde->tle", x, t[SKIP]) if SKIP in t else y


def only_later_layers(t, x):
    causal = torch.ones(L, L).triu()[:, None, :, None]
    return forward(t | {"w_dec": t["w_dec"] * causal}, x)


def last_layer_dropped(t, x):
    w_dec = t["w_dec"].clone()
    w_dec[-1] = 0
    return forward(t | {"w_dec": w_dec}, x)


def targets_taken_for_sources(t, x):
    return forward(t | {"w_dec": t["w_dec"].transpose(0, 2)}, x)


def a_bias_for_every_source(t, x):
    return forward(t, x) + (L - 1) * t["b_dec"]


def without_threshold(t, x):
    return forward(t | {"threshold": torch.zeros_like(t["threshold"])}, x)


def without_relu(t, x):
    p = torch.einsum("tld,ldn->tln", x, t["w_enc"]) + t["b_enc"]
    return forward(t, x) - decode(t, encode(t, x)) + decode(t, p * (p > t["threshold"]))


def skip_transposed(t, x):
    return decode(t, encode(t, x)) + torch.einsum("tld,led->tle", x, t[SKIP])


def without_skip(t, x):
    return decode(t, encode(t, x))


MISTAKES = (
    only_later_layers,
    last_layer_dropped,
    targets_taken_for_sources,
    a_bias_for_every_source,
    without_threshold,
    without_relu,
)
KEY = "gemma_scope_2_multi"
CC = "crosscoder/layer_7_13_22_width_262k_l0_medium"


def variant(name, write, make=None, mistakes=MISTAKES):
    return MultiOrigin(name, KEY, write, make or tensors(), encode, forward, mistakes)


AFFINE = (*MISTAKES, skip_transposed, without_skip)
ORIGINS = [
    variant("clt", writer()),
    variant("affine clt", writer(affine=True), tensors(affine=True), AFFINE),
    variant(
        "affine clt without a config",
        writer(cfg=False, affine=True),
        tensors(affine=True),
        AFFINE,
    ),
    variant("crosscoder", writer(CROSSCODER, name=CC)),
    variant("crosscoder without a config", writer(name=CC, cfg=False)),
    variant("bfloat16 clt", writer(), tensors(dtype=torch.bfloat16)),
]
