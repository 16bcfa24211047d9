"""ESM-C: layer_{n}.safetensors and the repo's config.json; z-scored positions, no encoder bias."""

import json

import torch
from safetensors.torch import save_file

from tests.origins._origin import D, K, N, Origin, draw, keep_k

CONFIG = {
    "model_type": "esmc_sae",
    "d_model": D,
    "codebook_dim": N,
    "k": K,
    "available_layers": [0, 27],
}


def tensors(*, statistics=True):
    def make(g):
        made = {"W_enc": draw(g, D, N) - 0.5, "W_dec": draw(g, N, D), "b_dec": draw(g, D)}
        for name, least in (("idf", 1), ("max", 2)):
            made[name] = torch.rand(N, generator=g) + least if statistics else torch.ones(N)
        return made

    return make


def writer(cfg=CONFIG):
    def write(root, t):
        root.mkdir(parents=True, exist_ok=True)
        save_file(t, root / "layer_27.safetensors")
        (root / "config.json").write_text(json.dumps(cfg))
        return root / "layer_27.safetensors"

    return write


def z_score(x):
    mu = x.mean(dim=-1, keepdim=True)
    x = x - mu
    std = x.std(dim=-1, keepdim=True)
    return x / (std + 1e-5), mu, std


def encode(t, x):
    p = torch.relu((z_score(x)[0] - t["b_dec"]) @ t["W_enc"])
    return keep_k(p, p)


def in_units_of_z(t, f):
    return f @ t["W_dec"] + t["b_dec"]


def forward(t, x):
    """Theirs is compared with z; in units of x it is times the deviation, and plus the mean."""
    _, mu, std = z_score(x)
    return in_units_of_z(t, encode(t, x)) * std + mu


def left_in_units_of_z(t, x):
    return in_units_of_z(t, encode(t, x))


def not_scored(t, x):
    p = torch.relu((x - t["b_dec"]) @ t["W_enc"])
    return in_units_of_z(t, keep_k(p, p))


def rescaled(t, x):
    _, mu, std = z_score(x)
    return in_units_of_z(t, encode(t, x) / t["max"] * t["idf"]) * std + mu


def as_relu(t, x):
    z, mu, std = z_score(x)
    return in_units_of_z(t, torch.relu((z - t["b_dec"]) @ t["W_enc"])) * std + mu


WRONG = (left_in_units_of_z, not_scored, as_relu)

ORIGINS = [
    Origin("with statistics", "esmc", writer(), tensors(), encode, forward, (*WRONG, rescaled)),
    Origin("statistics of 1", "esmc", writer(), tensors(statistics=False), encode, forward, WRONG),
]
