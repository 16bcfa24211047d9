"""Qwen-Scope: layer{n}.sae.pt, W_enc (n, d) and W_dec (d, n), the k largest with their signs."""

import json

import torch

from tests.origins._origin import D, K, N, Origin, draw, keep_k

CONFIG = {
    "model_type": "topk_sae",
    "base_model": "Qwen/Qwen3-1.7B-Base",
    "d_model": D,
    "d_sae": N,
    "k": K,
    "hook_point": "resid_post",
    "num_layers": 28,
}


def tensors(dtype=torch.float32):
    def make(g):
        made = {
            "W_enc": draw(g, N, D),
            "W_dec": draw(g, D, N),
            # most pre-activations are negative: some tokens have fewer than k positive ones
            "b_enc": draw(g, N) - 6,
            "b_dec": draw(g, D),
        }
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def writer(repo="SAE-Res-Qwen3-1.7B-Base-W32K-L0_3", cfg=CONFIG):
    def write(root, t):
        folder = root / repo
        folder.mkdir(parents=True)
        torch.save(t, folder / "layer7.sae.pt")
        if cfg is not None:
            (folder / "config.json").write_text(json.dumps(cfg))
        return folder / "layer7.sae.pt"

    return write


def encode(t, x):
    p = x @ t["W_enc"].to(x.dtype).T + t["b_enc"].to(x.dtype)
    return keep_k(p, p)


def decode(t, f):
    return f @ t["W_dec"].to(f.dtype).T + t["b_dec"].to(f.dtype)


def forward(t, x):
    return decode(t, encode(t, x))


def with_relu(t, x):
    return decode(t, torch.relu(encode(t, x)))


def of_b_dec_subtracted(t, x):
    return forward(t, x - t["b_dec"])


def by_magnitude(t, x):
    p = x @ t["W_enc"].T + t["b_enc"]
    return decode(t, keep_k(p, p.abs()))


def variant(name, write, make=None):
    wrong = (with_relu, of_b_dec_subtracted, by_magnitude)
    return Origin(name, "qwen_scope", write, make or tensors(), encode, forward, wrong)


ORIGINS = [
    variant("k in the config", writer(repo="anywhere")),
    variant("k in the repo's name", writer(cfg=None)),
    variant("k in both", writer()),
    variant("bfloat16 file", writer(), tensors(torch.bfloat16)),
]
