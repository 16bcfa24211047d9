"""circuit-tracer: config.yaml and layer_{i}.safetensors; SingleLayerTranscoder with relu, JumpReLU
and TopK.
"""

import torch
import yaml
from safetensors.torch import save_file

from tests.origins._origin import D, K, N, Origin, draw

CONFIG = {
    "model_name": "meta-llama/Llama-3.2-1B",
    "model_kind": "transcoder_set",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
    "scan": "mine",
}
THRESHOLD = "activation_function.threshold"
WANDB = {
    "wandb_version": 1,
    "d_model": {"desc": None, "value": D},
    "d_feature": {"desc": None, "value": N},
    "batch_size": {"desc": None, "value": 2048},
}


def tensors(*, skip=False, threshold=False, k=False, low=0, dtype=torch.float32):
    def make(g):
        made = {
            "W_enc": draw(g, N, D),
            "b_enc": draw(g, N) - low,
            "W_dec": draw(g, N, D),
            "b_dec": draw(g, D),
        }
        if skip:
            made["W_skip"] = draw(g, D, D)
        if threshold:
            made[THRESHOLD] = draw(g, N)  # negative ones too: there no ReLU would show
        made = {name: value.to(dtype) for name, value in made.items()}
        return made | ({"k": torch.tensor(K)} if k else {})

    return make


def writer(cfg=CONFIG, *, wandb=None, layer=5, whole=False, **changes):
    def write(folder, t):
        folder = folder / "set"
        folder.mkdir(parents=True)
        save_file(t, folder / f"layer_{layer}.safetensors")
        if cfg is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(cfg | changes))
        if wandb is not None:
            (folder / wandb).write_text(yaml.safe_dump(WANDB))
        return folder if whole else folder / f"layer_{layer}.safetensors"

    return write


def encode(t, x, act="relu"):
    pre = torch.nn.functional.linear(x, t["W_enc"].to(x.dtype), t["b_enc"].to(x.dtype))
    if act == "topk":
        index = pre.topk(K, dim=-1).indices
        return pre * torch.zeros_like(pre).scatter(-1, index, 1)
    if act == "jumprelu" and THRESHOLD in t:
        return pre * (pre > t[THRESHOLD].to(x.dtype))
    return torch.relu(pre)


def forward(t, x, act="relu"):
    y = encode(t, x, act) @ t["W_dec"].to(x.dtype) + t["b_dec"].to(x.dtype)
    return y + x @ t["W_skip"].to(x.dtype).T if "W_skip" in t else y


def skip_untransposed(t, x):
    return forward({**t, "W_skip": t["W_skip"].T}, x)


def without_skip(t, x):
    return forward({key: value for key, value in t.items() if key != "W_skip"}, x)


def relu_too(act):
    return lambda t, x: torch.relu(encode(t, x, act)) @ t["W_dec"] + t["b_dec"]


def centred(t, x):
    return forward(t, x - t["b_dec"])


def origin(name, write, make=None, *mistakes, act="relu"):
    return Origin(
        name,
        "circuit_tracer",
        write,
        make or tensors(),
        lambda t, x: encode(t, x, act),
        lambda t, x: forward(t, x, act),
        mistakes,
    )


LOW = 9
"""Below this the k largest are negative for some tokens, so that a ReLU would show."""

TOPK = {"activation": "topk", "k": K}
ORIGINS = [
    origin("relu", writer(), None, centred),
    origin("activation relu", writer(activation="relu"), None, centred),
    origin("the folder of one layer", writer(whole=True), None, centred),
    origin("skip", writer(), tensors(skip=True), skip_untransposed, without_skip),
    origin(
        "thresholds, some negative",
        writer(),
        tensors(threshold=True),
        relu_too("jumprelu"),
        forward,
        act="jumprelu",
    ),
    origin("topk", writer(**TOPK), tensors(low=LOW), relu_too("topk"), forward, act="topk"),
    origin(
        "topk, with a tensor k",
        writer(**TOPK),
        tensors(k=True, low=LOW),
        relu_too("topk"),
        act="topk",
    ),
    origin("topk, by the tensor k alone", writer(), tensors(k=True, low=LOW), forward, act="topk"),
    origin("bfloat16 file", writer(), tensors(dtype=torch.bfloat16)),
    origin("Qwen3, with wandb-config.yaml", writer(wandb="wandb-config.yaml"), None, centred),
    origin("Qwen3 14b, without config.yaml", writer(None, wandb="wanb-config.yaml"), None, centred),
]
