"""Connor Kissane's crosscoder between models: cfg.json and cc_weights.pt."""

import json

import torch

from tests.origins._multi import D, L, MultiOrigin, N, draw


def tensors(*, dtype=torch.float32):
    def make(g):
        made = {
            "W_enc": draw(g, L, D, N),
            "W_dec": draw(g, N, L, D),
            "b_enc": draw(g, N),
            "b_dec": draw(g, L, D),
        }
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def writer(*, turned=False, **changes):
    def write(root, t):
        folder = root / "blocks.14.hook_resid_pre"
        folder.mkdir(parents=True)
        if turned:
            t = t | {"W_enc": t["W_enc"].transpose(0, 1).contiguous()}
        torch.save(t, folder / "cc_weights.pt")
        data = {
            "d_in": D,
            "dict_size": N,
            "enc_dtype": "fp32",
            "hook_point": "blocks.14.hook_resid_pre",
            "model_name": "gemma-2-2b",
            "seed": 49,
        }
        (folder / "cfg.json").write_text(json.dumps(data | changes))
        return folder

    return write


def encode(t, x):
    return torch.relu(torch.einsum("tld,ldn->tn", x, t["W_enc"]) + t["b_enc"])


def forward(t, x):
    return torch.einsum("tn,nld->tld", encode(t, x), t["W_dec"]) + t["b_dec"]


def models_swapped(t, x):
    return forward(t | {"W_dec": t["W_dec"].flip(1)}, x)


def axes_taken_as_the_converter_does(t, x):
    """W_enc read as (d, models, n)."""
    return forward(t | {"W_enc": t["W_enc"].reshape(D, L, N).transpose(0, 1)}, x)


def variant(name, write, make=None):
    return MultiOrigin(
        name,
        "kissane_crosscoder",
        write,
        make or tensors(),
        encode,
        forward,
        (models_swapped, axes_taken_as_the_converter_does),
        layered=False,
    )


ORIGINS = [
    variant("as its authors save it", writer()),
    variant("with the other order of axes", writer(turned=True)),
    variant("says how many models", writer(n_models=L)),
    variant("bfloat16", writer(), tensors(dtype=torch.bfloat16)),
]
