"""Llama Scope: hyperparams.json and checkpoints/final.safetensors; what from_config makes of them,
then encode and decode.
"""

import json

import torch
from safetensors.torch import save_file

from tests.origins._origin import D, K, N, Origin, draw, keep_k

CONFIG = {
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": N // D,
    "d_model": D,
    "d_sae": N,
    "bias_init_method": "all_zero",
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.8,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 3.7, "out": 3.7},
    "decoder_exactly_fixed_norm": False,
    "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False,
    "top_k": K,
}
TRANSCODER = {
    "hook_point_in": "blocks.15.hook_resid_mid",
    "hook_point_out": "blocks.15.hook_mlp_out",
    # their ratio is a power of two, and so exact in the float32 weights that it is folded into
    "dataset_average_activation_norm": {"in": 3.5, "out": 7.0},
}


def tensors(*, bias=True, dtype=torch.float32):
    def make(g):
        made = {
            "encoder.weight": draw(g, N, D),
            "encoder.bias": draw(g, N),
            # columns far from length 1
            "decoder.weight": draw(g, D, N) * torch.rand(N, generator=g).add(0.1),
        }
        if bias:
            made["decoder.bias"] = draw(g, D)
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def writer(file="checkpoints/final.safetensors", **changes):
    def write(root, t):
        folder = root / "Llama3_1-8B-Base-L15R-8x"
        (folder / file).parent.mkdir(parents=True)
        if file.endswith(".pt"):
            torch.save({"sae": t, "version": "1.0"}, folder / file)
        else:
            save_file(t, folder / file)
        data = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
        (folder / "hyperparams.json").write_text(json.dumps(data))
        return folder

    return write


def folded(t, cfg):
    """The state dict after standardize_parameters… and transform_to_unit_decoder_norm."""
    w, b, d = t["encoder.weight"], t["encoder.bias"], t["decoder.weight"]
    c = t.get("decoder.bias", torch.zeros(D))
    if cfg["norm_activation"] == "dataset-wise":
        norms = cfg["dataset_average_activation_norm"]
        s_in, s_out = D**0.5 / norms["in"], D**0.5 / norms["out"]
        b, c, d = b / s_in, c / s_out, d * s_in / s_out
    if cfg["sparsity_include_decoder_norm"]:
        norm = d.norm(dim=0)
        d, w, b = d / norm, w * norm[:, None], b * norm
    return w, b, d, c


def encode(t, x, cfg):
    w, b, d, c = (value.to(x.dtype) for value in folded(widened(t, x), cfg))
    if cfg["norm_activation"] == "token-wise":
        x = x * (D**0.5 / x.norm(dim=-1, keepdim=True))
    if cfg["use_decoder_bias"] and cfg["apply_decoder_bias_to_pre_encoder"]:
        x = x - c
    p = x @ w.T + b
    name, threshold = cfg["act_fn"], cfg["jump_relu_threshold"]
    if name == "jumprelu" or (name == "topk" and threshold > 0):
        return p.where(p > threshold, 0)
    p = p.clamp(min=0)
    true = p * d.norm(dim=0) if cfg["sparsity_include_decoder_norm"] else p
    return p if name == "relu" else keep_k(p, true)


def decode(t, f, cfg):
    _, _, d, c = folded(widened(t, f), cfg)
    return f @ d.T + c


def widened(t, x):
    return {name: value.to(x.dtype) for name, value in t.items()}


def forward(t, x, cfg):
    y = decode(t, encode(t, x, cfg), cfg)
    if cfg["norm_activation"] == "token-wise":  # aux_data of compute_loss: / label_norm_factor
        return y * (x.norm(dim=-1, keepdim=True) / D**0.5)
    return y


def other(cfg, **changes):
    """The reconstruction of a config that says otherwise."""
    return lambda t, x: forward(t, x, cfg | changes)


def as_saelens(cfg):
    """fold_activation_norm_scaling_factor with a threshold times s, and no unit decoder norm."""

    def reconstruct(t, x):
        s = D**0.5 / cfg["dataset_average_activation_norm"]["in"]
        p = (x * s) @ t["encoder.weight"].T + t["encoder.bias"]
        f = torch.relu(p) * (p > cfg["jump_relu_threshold"] * s)
        return (f @ t["decoder.weight"].T + t["decoder.bias"]) / s

    return reconstruct


def threshold_in_normalised_units(cfg):
    """The threshold taken for one of pre-activations of scaled x, as the weights are."""
    norms = cfg["dataset_average_activation_norm"]
    return other(cfg, jump_relu_threshold=cfg["jump_relu_threshold"] * norms["in"] / D**0.5)


def variant(name, make=None, wrong=(), file="checkpoints/final.safetensors", **changes):
    cfg = CONFIG | changes
    return Origin(
        name,
        "llama_scope",
        writer(file, **changes),
        make or tensors(),
        lambda t, x: encode(t, x, cfg),
        lambda t, x: forward(t, x, cfg),
        tuple(mistake(cfg) if callable(mistake) else other(cfg, **mistake) for mistake in wrong),
    )


NO_NORM = {"sparsity_include_decoder_norm": False}
NOT_SCALED = {"norm_activation": "none"}
SUBTRACTS = {"apply_decoder_bias_to_pre_encoder": True}
AVERAGE = "dataset_average_activation_norm"

ORIGINS = [
    variant(
        "residual stream",
        wrong=[
            as_saelens,
            threshold_in_normalised_units,
            NO_NORM,
            NOT_SCALED,
            SUBTRACTS,
            {"act_fn": "relu"},
            {AVERAGE: {"in": 3.7, "out": 1.0}},
        ],
    ),
    variant("b_dec subtracted", wrong=[NOT_SCALED, {next(iter(SUBTRACTS)): False}], **SUBTRACTS),
    variant("topk", act_fn="topk", jump_relu_threshold=0.0, wrong=[NO_NORM, {"act_fn": "relu"}]),
    variant(
        "topk without decoder norm",
        act_fn="topk",
        jump_relu_threshold=0.0,
        wrong=[{"sparsity_include_decoder_norm": True}],
        **NO_NORM,
    ),
    variant("topk that became jumprelu", act_fn="topk", wrong=[{"jump_relu_threshold": 0.0}]),
    variant("negative threshold", jump_relu_threshold=-0.5, wrong=[{"act_fn": "relu"}]),
    variant("relu", act_fn="relu", wrong=[NOT_SCALED, {"act_fn": "jumprelu"}]),
    variant("transcoder", wrong=[{AVERAGE: {"in": 7.0, "out": 7.0}}, NOT_SCALED], **TRANSCODER),
    variant(
        "transcoder without decoder norm",
        wrong=[{AVERAGE: {"in": 7.0, "out": 7.0}}, NOT_SCALED],
        **TRANSCODER | NO_NORM,
    ),
    variant("of each token's norm", norm_activation="token-wise", wrong=[NOT_SCALED]),
    variant(
        "without normalisation",
        norm_activation="inference",
        wrong=[{"norm_activation": "dataset-wise"}],
    ),
    variant("without decoder bias", tensors(bias=False), use_decoder_bias=False),
    variant("pickle", file="sae_weights.pt"),
    variant("pruned", file="checkpoints/pruned.safetensors"),
    variant("bfloat16 file", tensors(dtype=torch.bfloat16)),
]
