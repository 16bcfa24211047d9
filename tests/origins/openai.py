"""OpenAI's autoencoders: LN, tied pre_bias, TopK or ReLU, written by torch.save of the state
dict.
"""

import torch

from tests.origins._origin import D, K, N, Origin, draw, keep_k


def tensors(g):
    return {
        "pre_bias": draw(g, D),
        "encoder.weight": draw(g, N, D),
        "latent_bias": draw(g, N),
        "decoder.weight": draw(g, D, N),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.int64),
        "latents_activation_frequency": torch.rand(N, generator=g),
        "latents_mean_square": torch.rand(N, generator=g),
    }


def writer(activation, **state):
    def write(folder, t):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({**t, "activation": activation, "activation_state_dict": state}, folder / "8.pt")
        return folder / "8.pt"

    return write


def normalise(x, eps=1e-5, ddof=1):
    mu = x.mean(dim=-1, keepdim=True)
    x = x - mu
    std = x.std(dim=-1, keepdim=True, correction=ddof)
    return x / (std + eps), mu, std


def pre(t, x):
    return torch.nn.functional.linear(x - t["pre_bias"], t["encoder.weight"], t["latent_bias"])


def decode(t, f):
    return f @ t["decoder.weight"].T + t["pre_bias"]


def encode_topk(t, x, post=torch.relu):
    a = pre(t, normalise(x)[0])
    return post(keep_k(a, a))


def forward_topk(t, x, post=torch.relu):
    _, mu, std = normalise(x)
    return decode(t, encode_topk(t, x, post)) * std + mu


def as_relu(t, x):
    z, mu, std = normalise(x)
    return decode(t, torch.relu(pre(t, z))) * std + mu


def without_normalising(t, x):
    a = pre(t, x)
    return decode(t, torch.relu(keep_k(a, a)))


def biased_std(t, x):
    z, mu, std = normalise(x, ddof=0)
    a = pre(t, z)
    return decode(t, torch.relu(keep_k(a, a))) * std + mu


def without_bias(t, x):
    return decode(
        t, torch.relu(torch.nn.functional.linear(x, t["encoder.weight"], t["latent_bias"]))
    )


ORIGINS = [
    Origin(
        "v5, TopK",
        "openai",
        writer("TopK", k=K, postact_fn="ReLU"),
        tensors,
        encode_topk,
        forward_topk,
        (as_relu, without_normalising, biased_std),
    ),
    Origin(
        "TopK without ReLU",
        "openai",
        writer("TopK", k=K, postact_fn="Identity"),
        tensors,
        lambda t, x: encode_topk(t, x, post=lambda f: f),
        lambda t, x: forward_topk(t, x, post=lambda f: f),
    ),
    Origin(
        "v1 and v4, ReLU",
        "openai",
        writer("ReLU"),
        tensors,
        lambda t, x: torch.relu(pre(t, x)),
        lambda t, x: decode(t, torch.relu(pre(t, x))),
        (as_relu, without_bias),
    ),
]
