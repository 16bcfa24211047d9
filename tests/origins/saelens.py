"""SAELens: cfg.json and sae_weights.safetensors, as versions before 6 and since wrote them.

Each function here is one of theirs: process_sae_in and _setup_activation_normalization of
saes/sae.py, encode and decode of saes/{standard,gated,topk,abstopk,jumprelu}_sae.py, and
saes/transcoder.py.
"""

import json

import torch
from safetensors.torch import save_file

from tests.origins._origin import D, K, N, Origin, draw, keep_k

SIX = {
    "d_in": D,
    "d_sae": N,
    "dtype": "float32",
    "device": "cuda",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.12.1",
        "sae_lens_training_version": "6.12.1",
        "model_name": "gpt2-small",
        "hook_name": "blocks.8.hook_resid_pre",
        "hook_head_index": None,
        "prepend_bos": False,
        "context_size": 128,
        "seqpos_slice": [None],
        "exclude_special_tokens": False,
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
        "some_later_key": 3,
    },
    "architecture": "standard",
}

OLD = {  # of 2024
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "dtype": "torch.float32",
    "device": "mps",
    "model_name": "pythia-70m-deduped",
    "hook_name": "blocks.3.hook_mlp_out",
    "hook_layer": 3,
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "3.9.0",
    "prepend_bos": True,
    "context_size": 256,
    "dataset_path": "EleutherAI/pile",
    "normalize_activations": "none",
    "l1_coefficient": 3.0,
}

OLDEST = {  # without an architecture or a version, and with other names
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "hook_point_head_index": None,
    "d_in": D,
    "expansion_factor": 4,
    "d_sae": N,
    "dtype": "torch.float32",
    "context_size": 128,
    "use_ghost_grads": False,
}

TRANSCODER = SIX | {
    "d_out": D,
    "apply_b_dec_to_input": False,
    "metadata": SIX["metadata"]
    | {"hook_name": "blocks.8.hook_mlp_in", "hook_name_out": "blocks.8.hook_mlp_out"},
}


def tensors(kind="relu", *, skip=False, dtype=torch.float32, **more):
    def make(g):
        made = {"W_enc": draw(g, D, N), "W_dec": draw(g, N, D), "b_dec": draw(g, D)}
        if kind == "gated":
            made |= {"b_gate": draw(g, N), "b_mag": draw(g, N), "r_mag": draw(g, N, scale=0.5)}
        else:
            made["b_enc"] = draw(g, N)
        if kind == "jumprelu":
            made["threshold"] = draw(g, N).abs()
        if kind == "log_threshold":
            made["log_threshold"] = draw(g, N, scale=0.5)
        if skip:
            made["W_skip"] = draw(g, D, D)  # (d_out, d_in)
        made |= {name: function(g) for name, function in more.items()}
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def low(g):
    """So low that k latents above zero are rare: ReLU after top-k then has something to do."""
    return draw(g, N) - 9


def writer(base=SIX, **changes):
    def write(folder, t):
        folder = folder / "blocks.8"
        folder.mkdir(parents=True)
        save_file(t, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(base | changes))
        return folder

    return write


def norm_in(x, norm):
    if norm == "layer_norm":
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.std(dim=-1, keepdim=True) + 1e-5)
    if norm == "constant_norm_rescale":
        return x * (D**0.5 / x.norm(dim=-1, keepdim=True))
    return x


def norm_out(y, x, norm):
    if norm == "layer_norm":
        return y * x.std(dim=-1, keepdim=True) + x.mean(dim=-1, keepdim=True)
    if norm == "constant_norm_rescale":
        return y / (D**0.5 / x.norm(dim=-1, keepdim=True))
    return y


def encode(t, x, *, act="relu", apply=True, norm="none", rescale=False):
    sae_in = norm_in(x, norm) - t["b_dec"] * apply
    if act == "gated":
        active = sae_in @ t["W_enc"] + t["b_gate"] > 0
        return active * torch.relu(sae_in @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
    pre = sae_in @ t["W_enc"] + t["b_enc"]
    if rescale:
        pre = pre * t["W_dec"].norm(dim=-1)
    if act == "topk":
        return keep_k(torch.relu(pre), pre)
    if act == "topk without ReLU":
        return keep_k(pre, pre)
    if act == "abstopk":
        return keep_k(pre, pre.abs())
    if act == "jumprelu":
        threshold = t["threshold"] if "threshold" in t else t["log_threshold"].exp()
        return torch.relu(pre) * (pre > threshold)
    return torch.relu(pre)


def forward(t, x, *, norm="none", rescale=False, **how):
    acts = encode(t, x, norm=norm, rescale=rescale, **how)
    if rescale:
        acts = acts * (1 / t["W_dec"].norm(dim=-1))
    acts = acts * t.get("scaling_factor", 1)
    y = norm_out(acts @ t["W_dec"] + t["b_dec"], x, norm)
    return y + x @ t["W_skip"].T if "W_skip" in t else y


def variant(name, write, make=None, mistakes=(), **how):
    return Origin(
        name,
        "saelens",
        write,
        make or tensors(),
        lambda t, x: encode(t, x, **how),
        lambda t, x: forward(t, x, **how),
        tuple(mistakes),
    )


def wrong(**how):
    return lambda t, x: forward(t, x, **how)


def without(name, **how):
    return lambda t, x: forward({key: t[key] for key in t if key != name}, x, **how)


def skip_untransposed(t, x):
    return forward(t | {"W_skip": t["W_skip"].T}, x, apply=False)


def rescaled_twice(t, x):
    """f over |W_dec| left out, as where a decoder is taken to be normalised."""
    return encode(t, x, act="topk", rescale=True) @ t["W_dec"] + t["b_dec"]


def jumprelu_without_relu(t, x):
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    return (pre * (pre > t["threshold"])) @ t["W_dec"] + t["b_dec"]


def eps_on_the_way_back(t, x):
    std = x.std(dim=-1, keepdim=True) + 0.1
    y = encode(t, x, norm="layer_norm") @ t["W_dec"] + t["b_dec"]
    return y * std + x.mean(dim=-1, keepdim=True)


HOOK_Z = SIX["metadata"] | {"hook_name": "blocks.5.attn.hook_z"}
TOPK = {"architecture": "topk", "k": K}

SAES = [
    variant("standard", writer(), mistakes=[wrong(apply=False), wrong(act="topk")]),
    variant(
        "standard, b_dec not subtracted",
        writer(apply_b_dec_to_input=False),
        apply=False,
        mistakes=[wrong()],
    ),
    variant(
        "gated",
        writer(architecture="gated"),
        tensors("gated"),
        act="gated",
        mistakes=[
            wrong(act="gated", apply=False),
            lambda t, x: forward(t | {"r_mag": t["r_mag"] * 0}, x, act="gated"),
        ],
    ),
    variant(
        "topk",
        writer(**TOPK, rescale_acts_by_decoder_norm=False),
        tensors(b_enc=low),
        act="topk",
        mistakes=[
            wrong(act="topk without ReLU"),
            wrong(act="topk", rescale=True),
            wrong(act="abstopk"),
            wrong(),
        ],
    ),
    variant(
        "topk, rescaled by decoder norm",
        writer(**TOPK, rescale_acts_by_decoder_norm=True),
        act="topk",
        rescale=True,
        mistakes=[wrong(act="topk"), rescaled_twice],
    ),
    variant(
        "topk, of a training checkpoint",
        writer(**TOPK, rescale_acts_by_decoder_norm=True, aux_loss_coefficient=1.0),
        act="topk",
        rescale=True,
    ),
    variant("abstopk", writer(architecture="abstopk", k=K), act="abstopk"),
    variant(
        "abstopk, rescaled by decoder norm",
        writer(architecture="abstopk", k=K, rescale_acts_by_decoder_norm=True),
        act="abstopk",
        rescale=True,
        mistakes=[wrong(act="abstopk"), wrong(act="topk", rescale=True)],
    ),
    variant(
        "jumprelu",
        writer(architecture="jumprelu"),
        tensors("jumprelu"),
        act="jumprelu",
        mistakes=[wrong(), wrong(act="jumprelu", apply=False)],
    ),
    variant(
        "jumprelu, negative thresholds",
        writer(architecture="jumprelu"),
        tensors("jumprelu", threshold=lambda g: draw(g, N)),
        act="jumprelu",
        mistakes=[jumprelu_without_relu],
    ),
    variant(
        "layer_norm",
        writer(normalize_activations="layer_norm"),
        norm="layer_norm",
        mistakes=[wrong(), eps_on_the_way_back],
    ),
    variant(
        "topk with layer_norm",
        writer(**TOPK, normalize_activations="layer_norm"),
        act="topk",
        norm="layer_norm",
        mistakes=[wrong(act="topk")],
    ),
    variant(
        "constant_norm_rescale",
        writer(normalize_activations="constant_norm_rescale"),
        norm="constant_norm_rescale",
        mistakes=[wrong()],
    ),
    variant("hook_z", writer(reshape_activations="hook_z", metadata=HOOK_Z)),
    variant("bfloat16 file", writer(), tensors(dtype=torch.bfloat16)),
    variant("float16 file", writer(), tensors(dtype=torch.float16)),
]

TRANSCODERS = [
    variant(
        "transcoder",
        writer(TRANSCODER, architecture="transcoder"),
        apply=False,
        mistakes=[wrong()],
    ),
    variant(
        "skip_transcoder",
        writer(TRANSCODER, architecture="skip_transcoder"),
        tensors(skip=True),
        apply=False,
        mistakes=[skip_untransposed, without("W_skip", apply=False), wrong()],
    ),
    variant(
        "jumprelu_transcoder",
        writer(TRANSCODER, architecture="jumprelu_transcoder"),
        tensors("jumprelu"),
        act="jumprelu",
        apply=False,
        mistakes=[wrong(apply=False)],
    ),
    variant(
        "jumprelu_skip_transcoder",
        writer(TRANSCODER, architecture="jumprelu_skip_transcoder"),
        tensors("jumprelu", skip=True),
        act="jumprelu",
        apply=False,
        mistakes=[without("W_skip", act="jumprelu", apply=False)],
    ),
]

OLDER = [
    variant("of 2024", writer(OLD), mistakes=[wrong(apply=False)]),
    variant("the oldest keys", writer(OLDEST), mistakes=[wrong(apply=False)]),
    variant(
        "topk of 2024, called standard",
        writer(OLD, activation_fn_str="topk", activation_fn_kwargs={"k": K}),
        tensors(b_enc=low),
        act="topk",
        mistakes=[wrong(), wrong(act="topk without ReLU")],
    ),
    variant(
        "topk of 2025, called topk",
        writer(
            OLD,
            architecture="topk",
            activation_fn_str="topk",
            activation_fn_kwargs={"k": K},
            sae_lens_version="5.10.0",
        ),
        act="topk",
    ),
    variant(
        "topk of 2024 with layer_norm",
        writer(
            OLD,
            activation_fn_str="topk",
            activation_fn_kwargs={"k": K},
            normalize_activations="layer_norm",
        ),
        act="topk",
        norm="layer_norm",
        mistakes=[wrong(act="topk"), wrong(norm="layer_norm")],
    ),
    variant("normalize_activations false", writer(OLDEST, normalize_activations=False)),
    variant(
        "jumprelu of 2024",
        writer(OLD, architecture="jumprelu", apply_b_dec_to_input=False),
        tensors("jumprelu"),
        act="jumprelu",
        apply=False,
        mistakes=[wrong(apply=False)],
    ),
    variant(
        "jumprelu's training checkpoint",
        writer(OLD, architecture="jumprelu"),
        tensors("log_threshold"),
        act="jumprelu",
        mistakes=[wrong()],
    ),
    variant(
        "scaling_factor of ones",
        writer(OLD),
        tensors(scaling_factor=lambda _: torch.ones(N)),
    ),
    variant(
        "finetuned",
        writer(OLD, finetuning_scaling_factor=True),
        tensors(scaling_factor=lambda g: 2.0 ** draw(g, N).round()),  # exact in any float dtype
        mistakes=[without("scaling_factor")],
    ),
    variant("hook_z of 2024", writer(OLD, hook_name="blocks.5.attn.hook_z")),
]

ORIGINS = [*SAES, *TRANSCODERS, *OLDER]
