"""mlsae: a PyTorchModelHubMixin folder; standardised inputs, no encoder bias, ReLU in forward."""

import json

import torch
from safetensors.torch import save_file

from tests.origins._origin import D, K, N, Origin, draw, keep_k

CONFIG = {
    "n_inputs": D,
    "n_latents": N,
    "k": K,
    "dead_steps_threshold": 76,
    "dead_threshold": 0.001,
    "auxk": 256,
    "standardize": True,
}


def tensors(*, last=False):
    def make(g):
        made = {
            # few positive pre-activations, so that ReLU of the k largest shows
            "encoder.weight": draw(g, N, D) * torch.rand(N, 1, generator=g).sub(0.9),
            "decoder.weight": draw(g, D, N),
            "pre_encoder_bias": draw(g, D),
        }
        return made | ({"last_nonzero": torch.zeros(N, dtype=torch.int64)} if last else {})

    return make


def writer(**changes):
    def write(root, t):
        folder = root / "mlsae-pythia-70m-deduped-x64-k32"
        folder.mkdir(parents=True)
        save_file(t, folder / "model.safetensors")
        data = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(data))
        return folder

    return write


def standardise(x, eps=1e-5, ddof=1):
    mu = x.mean(dim=-1, keepdim=True)
    x = x - mu
    std = x.std(dim=-1, keepdim=True, correction=ddof)
    return x / (std + eps), mu, std


def encode(t, x, *, standard=True, relu=True):
    z = standardise(x)[0] if standard else x
    p = (z - t["pre_encoder_bias"]) @ t["encoder.weight"].T
    kept = keep_k(p, p)
    return torch.relu(kept) if relu else kept


def forward(t, x, *, standard=True, relu=True, back=True):
    y = encode(t, x, standard=standard, relu=relu) @ t["decoder.weight"].T + t["pre_encoder_bias"]
    _, mu, std = standardise(x)
    return y * std + mu if standard and back else y


def biased_std(t, x):
    z, mu, std = standardise(x, ddof=0)
    p = (z - t["pre_encoder_bias"]) @ t["encoder.weight"].T
    f = torch.relu(keep_k(p, p))
    return (f @ t["decoder.weight"].T + t["pre_encoder_bias"]) * std + mu


def as_relu(t, x):
    z, mu, std = standardise(x)
    f = torch.relu((z - t["pre_encoder_bias"]) @ t["encoder.weight"].T)
    return (f @ t["decoder.weight"].T + t["pre_encoder_bias"]) * std + mu


def wrong(**how):
    return lambda t, x: forward(t, x, **how)


def variant(name, write, make=None, mistakes=(), **how):
    return Origin(
        name,
        "mlsae",
        write,
        make or tensors(),
        lambda t, x: encode(t, x, **how),
        lambda t, x: forward(t, x, **how),
        mistakes,
    )


ORIGINS = [
    variant(
        "standardised",
        writer(),
        mistakes=(wrong(standard=False), wrong(back=False), biased_std, as_relu),
    ),
    variant("its training buffer", writer(), tensors(last=True)),
    variant("default of standardize", writer(standardize=...)),
    variant("plain", writer(standardize=False), standard=False, mistakes=(wrong(),)),
]
