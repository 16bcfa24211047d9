"""Llamascopium: config.json and sae_weights.safetensors; normalize_activations, encode, decode and
denormalize_activations.
"""

import json

import torch
from safetensors.torch import save_file

from tests.origins._origin import D, K, N, Origin, draw, keep_k

INTO, OUT, NORM = (
    "blocks.9.ln2.hook_normalized",
    "blocks.9.hook_mlp_out",
    "dataset_average_activation_norm.",
)
CONFIG = {
    "sae_type": "sae",
    "hook_point_in": OUT,
    "hook_point_out": OUT,
    "use_glu_encoder": False,
    "d_model": D,
    "expansion_factor": N / D,
    "use_decoder_bias": True,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": K,
    "use_triton_kernel": False,
    "jumprelu_threshold_window": 2.0,
}
THRESHOLD = "activation_function.log_jumprelu_threshold"


def tensors(*, bias=True, jumps=True, norms=(3.5, 3.5), dtype=torch.float32):
    def make(g):
        made = {
            "W_E": draw(g, D, N),
            "b_E": draw(g, N),
            "W_D": draw(g, N, D) * torch.rand(N, 1, generator=g).add(0.1),
        }
        if bias:
            made["b_D"] = draw(g, D)
        if jumps:
            made[THRESHOLD] = draw(g, N) * 0.5
        made = {name: value.to(dtype) for name, value in made.items()}
        return made | {NORM + INTO: torch.tensor(norms[0]), NORM + OUT: torch.tensor(norms[1])}

    return make


def writer(file="sae_weights.safetensors", **changes):
    def write(root, t):
        folder = root / "layer9_transcoder_8x_k64"
        folder.mkdir(parents=True)
        if file.endswith(".pt"):
            torch.save({"sae": t, "version": "2.0"}, folder / file)
        else:
            save_file(t, folder / file)
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        return folder

    return write


def factors(t, x, cfg):
    """compute_norm_factor of what goes in and of what comes out."""
    if cfg["norm_activation"] == "inference":
        return 1.0, 1.0
    if cfg["norm_activation"] == "token-wise":
        return (D**0.5 / x.norm(dim=-1, keepdim=True),) * 2
    return tuple(D**0.5 / t[NORM + cfg[key]] for key in ("hook_point_in", "hook_point_out"))


def encode(t, x, cfg):
    w, b, d = (t[name].to(x.dtype) for name in ("W_E", "b_E", "W_D"))
    p = (x * factors(t, x, cfg)[0]) @ w + b
    norm = d.norm(dim=1) if cfg["sparsity_include_decoder_norm"] else torch.ones(N, dtype=x.dtype)
    return activate(t, p * norm, cfg) / norm


def activate(t, p, cfg):
    if cfg["act_fn"] == "jumprelu":
        return p * (p > t[THRESHOLD].to(p.dtype).exp())
    p = p * (p > 0)
    if cfg["act_fn"] == "topk":
        return keep_k(p, p)
    if cfg["act_fn"] == "batchtopk":
        flat = p.flatten()
        return keep_k(flat, flat, k=cfg["top_k"] * len(p)).view_as(p)
    return p


def forward(t, x, cfg):
    y = encode(t, x, cfg) @ t["W_D"].to(x.dtype)
    if cfg["use_decoder_bias"]:
        y = y + t["b_D"].to(x.dtype)
    return y / factors(t, x, cfg)[1]


def other(cfg, **changes):
    return lambda t, x: forward(t, x, cfg | changes)


def of_b_dec_subtracted(cfg):
    return lambda t, x: forward(t, x - t["b_D"], cfg)


def threshold_not_exponential(cfg):
    return lambda t, x: forward(t | {THRESHOLD: t[THRESHOLD].exp()}, x, cfg)


def variant(name, make=None, wrong=(), file="sae_weights.safetensors", **changes):
    cfg = CONFIG | changes
    return Origin(
        name,
        "llamascopium",
        writer(file, **changes),
        make or tensors(),
        lambda t, x: encode(t, x, cfg),
        lambda t, x: forward(t, x, cfg),
        tuple(mistake(cfg) if callable(mistake) else other(cfg, **mistake) for mistake in wrong),
    )


PLAIN = tensors(jumps=False)
NO_NORM = {"sparsity_include_decoder_norm": False}
FOLDED, SCALED = {"norm_activation": "inference"}, {"norm_activation": "dataset-wise"}

ORIGINS = [
    variant(
        "jumprelu",
        wrong=[NO_NORM, FOLDED, of_b_dec_subtracted, threshold_not_exponential, {"act_fn": "relu"}],
    ),
    variant("inference mode, with norms in the file", wrong=[SCALED, NO_NORM], **FOLDED),
    variant("threshold by no norm", wrong=[{next(iter(NO_NORM)): True}], **NO_NORM),
    variant("relu", PLAIN, wrong=[FOLDED], act_fn="relu"),
    variant("topk", PLAIN, wrong=[NO_NORM, {"act_fn": "relu"}], act_fn="topk"),
    variant("batchtopk", PLAIN, wrong=[NO_NORM, {"act_fn": "topk"}], act_fn="batchtopk"),
    variant("transcoder", wrong=[FOLDED, NO_NORM], hook_point_in=INTO),
    variant(
        "transcoder of two norms",
        tensors(norms=(3.5, 7.0)),
        wrong=[FOLDED, {"hook_point_out": INTO}, {"hook_point_in": OUT}],
        hook_point_in=INTO,
    ),
    variant("of each token's norm", wrong=[FOLDED, SCALED], norm_activation="token-wise"),
    variant("without decoder bias", tensors(bias=False), use_decoder_bias=False),
    variant("pickle", file="sae_weights.pt"),
    variant("bfloat16 file", tensors(dtype=torch.bfloat16)),
]
