"""sparsify: cfg.json and sae.safetensors in a folder called like the hookpoint."""

import json

import torch
from safetensors.torch import save_file

from tests.origins._origin import D, K, N, Origin, draw, keep_k

FULL = {
    "activation": "topk",
    "expansion_factor": 4,
    "normalize_decoder": True,
    "num_latents": N,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


def tensors(*, skip=False, dtype=torch.float32):
    def make(g):
        made = {
            "encoder.weight": draw(g, N, D),
            "encoder.bias": draw(g, N),
            "W_dec": draw(g, N, D),
            "b_dec": draw(g, D),
        }
        if skip:
            made["W_skip"] = draw(g, D, D)
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def writer(cfg=FULL, **changes):
    def write(folder, t):
        folder = folder / "layers.3.mlp"
        folder.mkdir(parents=True)
        save_file(t, folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps(cfg | changes))
        return folder

    return write


def encode(t, x, *, transcode=False, activation="topk", signed=False):
    centred = x if transcode else x - t["b_dec"].to(x.dtype)
    p = torch.nn.functional.linear(
        centred, t["encoder.weight"].to(x.dtype), t["encoder.bias"].to(x.dtype)
    )
    if signed:
        return keep_k(p, p.abs())
    p = torch.relu(p)
    if activation == "groupmax":
        values, index = p.unflatten(-1, (K, -1)).max(dim=-1)
        index = index + torch.arange(0, N, N // K)
        return torch.zeros_like(p).scatter(-1, index, values)
    return keep_k(p, p)


def forward(t, x, **how):
    y = encode(t, x, **how) @ t["W_dec"].to(x.dtype) + t["b_dec"].to(x.dtype)
    return y + x @ t["W_skip"].to(x.dtype).mT if "W_skip" in t else y


def variant(name, write, make=None, mistakes=(), **how):
    return Origin(
        name,
        "sparsify",
        write,
        make or tensors(),
        lambda t, x: encode(t, x, **how),
        lambda t, x: forward(t, x, **how),
        tuple(mistakes),
    )


def wrong(**how):
    return lambda t, x: forward(t, x, **how)


def skip_of_centred(t, x):
    return encode(t, x) @ t["W_dec"] + t["b_dec"] + (x - t["b_dec"]) @ t["W_skip"].mT


def skip_untransposed(t, x):
    return encode(t, x) @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"]


OLD = {"expansion_factor": 4, "normalize_decoder": True, "k": K, "signed": False, "d_in": D}

ORIGINS = [
    variant("sae", writer(), mistakes=[wrong(transcode=True), wrong(signed=True)]),
    variant("transcoder", writer(transcode=True), transcode=True, mistakes=[wrong()]),
    variant(
        "skip transcoder",
        writer(transcode=True, skip_connection=True),
        tensors(skip=True),
        transcode=True,
        mistakes=[wrong(), lambda t, x: encode(t, x, transcode=True) @ t["W_dec"] + t["b_dec"]],
    ),
    variant(
        "published skip transcoder, without `transcode`",
        writer(
            {key: value for key, value in FULL.items() if key != "transcode"}, skip_connection=True
        ),
        tensors(skip=True),
        mistakes=[wrong(transcode=True), skip_of_centred, skip_untransposed],
    ),
    variant("groupmax", writer(activation="groupmax"), activation="groupmax", mistakes=[wrong()]),
    variant("of 2024, signed", writer(OLD | {"signed": True}), signed=True, mistakes=[wrong()]),
    variant("of 2024", writer(OLD), mistakes=[wrong(signed=True)]),
    variant("num_latents 0", writer(num_latents=0), mistakes=[wrong(transcode=True)]),
    variant("unknown keys of training", writer(some_new_option=3, another="x")),
    variant("bfloat16 file", writer(), tensors(dtype=torch.bfloat16)),
    variant("float16 file", writer(), tensors(dtype=torch.float16)),
]
