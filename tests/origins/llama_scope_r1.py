"""Llama Scope R1 Distill: config.json and sae_weights.safetensors, by the code of early 2025, whose
encode normalises and whose activation functions are masks.
"""

import json

import torch
from safetensors.torch import save_file

from tests.origins._origin import D, N, Origin, draw

HOOK, NORM = "blocks.15.hook_resid_post", "dataset_average_activation_norm."
CONFIG = {
    "sae_type": "sae",
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
    "d_model": D,
    "expansion_factor": N // D,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.0,
    "apply_decoder_bias_to_pre_encoder": False,
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "force_unit_decoder_norm": False,
    "top_k": 50,
}


def tensors(*, norm=3.5, jumps=True, dtype=torch.float32):
    def make(g):
        made = {
            "encoder.weight": draw(g, N, D),
            "encoder.bias": draw(g, N),
            "decoder.weight": draw(g, D, N) * torch.rand(N, generator=g).add(0.1),
            "decoder.bias": draw(g, D),
        }
        if jumps:
            made["log_jumprelu_threshold"] = draw(g, N) * 0.5
        made = {name: value.to(dtype) for name, value in made.items()}
        return made | ({NORM + HOOK: torch.tensor(norm)} if norm else {})

    return make


def writer(**changes):
    def write(root, t):
        folder = root / "L15R"
        folder.mkdir(parents=True)
        save_file(t, folder / "sae_weights.safetensors")
        data = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(data))
        return folder

    return write


def factor(t, cfg):
    return 1.0 if cfg["norm_activation"] == "inference" else D**0.5 / t[NORM + HOOK]


def encode(t, x, cfg):
    w, b, d, c = (
        t[name].to(x.dtype)
        for name in ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    )
    x = x * factor(t, cfg)
    if cfg["apply_decoder_bias_to_pre_encoder"]:
        x = x - c
    p = x @ w.T + b
    score = p * d.norm(dim=0) if cfg["sparsity_include_decoder_norm"] else p
    if cfg["act_fn"] == "relu":
        return p * (score > 0)
    return p * (score > t["log_jumprelu_threshold"].to(x.dtype).exp())


def forward(t, x, cfg):
    f = encode(t, x, cfg)
    return (f @ t["decoder.weight"].to(x.dtype).T + t["decoder.bias"].to(x.dtype)) / factor(t, cfg)


def other(cfg, **changes):
    return lambda t, x: forward(t, x, cfg | changes)


def threshold_not_exponential(cfg):
    name = "log_jumprelu_threshold"
    return lambda t, x: forward(t | {name: t[name].exp()}, x, cfg)


def variant(name, make=None, wrong=(), **changes):
    cfg = CONFIG | {key: value for key, value in changes.items() if value is not ...}
    return Origin(
        name,
        "llama_scope_r1",
        writer(**changes),
        make or tensors(),
        lambda t, x: encode(t, x, cfg),
        lambda t, x: forward(t, x, cfg),
        tuple(mistake(cfg) if callable(mistake) else other(cfg, **mistake) for mistake in wrong),
    )


# SAELens compares p itself with the threshold
NO_NORM, FOLDED = {"sparsity_include_decoder_norm": False}, {"norm_activation": "inference"}
SUBTRACTS = {"apply_decoder_bias_to_pre_encoder": True}

ORIGINS = [
    variant("jumprelu", wrong=[NO_NORM, FOLDED, SUBTRACTS, threshold_not_exponential]),
    variant("keys that mean their defaults", norm_activation=..., hook_point_out=..., sae_type=...),
    variant("b_dec subtracted", wrong=[FOLDED, {next(iter(SUBTRACTS)): False}], **SUBTRACTS),
    variant(
        "inference mode, with a norm in the file",
        wrong=[{"norm_activation": "dataset-wise"}],
        **FOLDED,
    ),
    variant("threshold by no norm", wrong=[{next(iter(NO_NORM)): True}], **NO_NORM),
    variant("relu", tensors(jumps=False), wrong=[FOLDED], act_fn="relu"),
    variant("bfloat16 file", tensors(dtype=torch.bfloat16)),
]
