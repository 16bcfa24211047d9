"""circuit-tracer's cross-layer transcoders: config.yaml, W_enc_{i} and W_dec_{i}.safetensors."""

import torch
import yaml
from safetensors.torch import save_file

from tests.origins._multi import D, L, MultiOrigin, N, draw

CONFIG = {
    "model_kind": "cross_layer_transcoder",
    "model_name": "google/gemma-2-2b",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
    "repo_id": "mntss/clt-gemma-2-2b-2.5M",
    "scan": "mntss/clt-gemma-2-2b-2.5M",
}


def tensors(*, threshold=False, skip=False, dtype=torch.float32):
    def make(g):
        made = {}
        for i in range(L):
            made |= {
                f"W_enc_{i}": draw(g, N, D),
                f"b_enc_{i}": draw(g, N),
                f"b_dec_{i}": draw(g, D),
                f"W_dec_{i}": draw(g, N, L - i, D),
            }
            if threshold:
                made[f"threshold_{i}"] = draw(g, N)
            if skip:
                made[f"W_skip_{i}"] = draw(g, D, D)
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def writer(**changes):
    def write(root, t):
        folder = root / "clt"
        folder.mkdir(parents=True)
        for i in sorted({int(name.rpartition("_")[2]) for name in t}):
            own = {name: value for name, value in t.items() if name.endswith(f"_{i}")}
            decoder = {name: own.pop(name) for name in list(own) if name.startswith("W_dec")}
            save_file(own, folder / f"W_enc_{i}.safetensors")
            save_file(decoder, folder / f"W_dec_{i}.safetensors")
        data = {key: value for key, value in (CONFIG | changes).items() if value is not None}
        (folder / "config.yaml").write_text(yaml.safe_dump(data))
        return folder

    return write


def encode(t, x):
    features = []
    for i in range(L):
        p = x[:, i] @ t[f"W_enc_{i}"].T + t[f"b_enc_{i}"]
        keep = p > t[f"threshold_{i}"] if f"threshold_{i}" in t else p > 0
        features.append(p * keep)
    return torch.stack(features, 1)


def forward(t, x):
    f = encode(t, x)
    out = []
    for m in range(L):
        y = sum(f[:, i] @ t[f"W_dec_{i}"][:, m - i] for i in range(m + 1)) + t[f"b_dec_{m}"]
        out.append(y + x[:, m] @ t[f"W_skip_{m}"] if f"W_skip_{m}" in t else y)
    return torch.stack(out, 1)


def own_layer_only(t, x):
    return forward(
        t
        | {
            f"W_dec_{i}": torch.cat([t[f"W_dec_{i}"][:, :1], 0 * t[f"W_dec_{i}"][:, 1:]], 1)
            for i in range(L)
        },
        x,
    )


def decoders_summed(t, x):
    """SAELens' reading of a layer as a transcoder of its own."""
    f = encode(t, x)
    parts = [f[:, i] @ t[f"W_dec_{i}"].sum(1) + t[f"b_dec_{i}"] for i in range(L)]
    return torch.stack(parts, 1)


def targets_from_the_end(t, x):
    return forward(t | {f"W_dec_{i}": t[f"W_dec_{i}"].flip(1) for i in range(L)}, x)


def last_layer_dropped(t, x):
    return forward(t | {f"W_dec_{L - 1}": torch.zeros_like(t[f"W_dec_{L - 1}"])}, x)


def a_bias_for_every_source(t, x):
    more = torch.stack([m * t[f"b_dec_{m}"] for m in range(L)])
    return forward(t, x) + more


def relu_after_the_threshold(t, x):
    below = {f"threshold_{i}": t[f"threshold_{i}"].clamp(min=0) for i in range(L)}
    return forward(t | below, x)


def skip_transposed(t, x):
    return forward(t | {f"W_skip_{i}": t[f"W_skip_{i}"].T for i in range(L)}, x)


MISTAKES = (
    own_layer_only,
    decoders_summed,
    targets_from_the_end,
    last_layer_dropped,
    a_bias_for_every_source,
)


def variant(name, write=None, make=None, mistakes=MISTAKES):
    return MultiOrigin(
        name, "mntss_clt", write or writer(), make or tensors(), encode, forward, mistakes
    )


ORIGINS = [
    variant("relu"),
    variant("relu, says so", writer(activation="relu")),
    variant(
        "jumprelu", make=tensors(threshold=True), mistakes=(*MISTAKES, relu_after_the_threshold)
    ),
    variant("skip", make=tensors(skip=True), mistakes=(*MISTAKES, skip_transposed)),
    variant("bfloat16", make=tensors(dtype=torch.bfloat16)),
]
