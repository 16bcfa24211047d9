"""Kissane's attention SAEs: NAME.pt and NAME_cfg.json; x is hook_z, flattened, minus b_dec."""

import json

import torch

from tests.origins._origin import D, N, Origin, draw

NAME = "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds24_bs4096_dc1.00e-06_rie25000_nr4_v9"
CONFIG = {
    "seed": 49,
    "batch_size": 4096,
    "model_name": "gpt2-small",
    "act_name": "blocks.5.attn.hook_z",
    "site": "z",
    "layer": 5,
    "head": "cat",
    "concat_heads": True,
    "act_size": D,
    "dict_size": N,
    "enc_dtype": "fp32",
    "l1_coeff": 1.0,
}


def tensors(dtype=torch.float32):
    def make(g):
        made = {
            "W_enc": draw(g, D, N),
            "W_dec": draw(g, N, D),
            "b_enc": draw(g, N),
            "b_dec": draw(g, D),
        }
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def write(root, t):
    root.mkdir(parents=True, exist_ok=True)
    torch.save(t, root / f"{NAME}.pt")
    (root / f"{NAME}_cfg.json").write_text(json.dumps(CONFIG))
    return root / f"{NAME}.pt"


def encode(t, x):
    centred = x - t["b_dec"].to(x.dtype)
    return torch.relu(centred @ t["W_enc"].to(x.dtype) + t["b_enc"].to(x.dtype))


def forward(t, x):
    return encode(t, x) @ t["W_dec"].to(x.dtype) + t["b_dec"].to(x.dtype)


def of_x_itself(t, x):
    return torch.relu(x @ t["W_enc"] + t["b_enc"]) @ t["W_dec"] + t["b_dec"]


ORIGINS = [
    Origin("heads' outputs", "kissane_attn", write, tensors(), encode, forward, (of_x_itself,)),
    Origin("float16 file", "kissane_attn", write, tensors(torch.float16), encode, forward),
]
