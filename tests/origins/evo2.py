"""Goodfire's BatchTopKTiedSAE: one matrix, and the k * tokens largest of the whole tensor."""

import torch

from tests.origins._origin import D, K, N, Origin, draw, keep_k

NAME = f"sae-layer26-mixed-expansion_{N // D}-k_{K}.pt"


def tensors(prefix="", dtype=torch.float32):
    def make(g):
        made = {"W": draw(g, D, N), "b_enc": draw(g, N), "b_dec": draw(g, D)}
        return {prefix + name: value.to(dtype) for name, value in made.items()}

    return make


def write(root, t):
    root.mkdir(parents=True, exist_ok=True)
    torch.save(t, root / NAME)
    return root / NAME


def parts(t, x):
    return (value.to(x.dtype) for value in t.values())


def encode(t, x):
    w, b, _ = parts(t, x)
    f = torch.relu(x @ w + b)
    flat = f.flatten()
    return keep_k(flat, flat, k=K * x.shape[:-1].numel()).reshape(f.shape)


def decode(t, f):
    w, _, c = parts(t, f)
    return f @ w.T + c


def forward(t, x):
    return decode(t, encode(t, x))


def k_of_each_token(t, x):
    w, b, _ = parts(t, x)
    p = torch.relu(x @ w + b)
    return decode(t, keep_k(p, p))


def of_b_dec_subtracted(t, x):
    return forward(t, x - list(parts(t, x))[2])


def as_relu(t, x):
    w, b, _ = parts(t, x)
    return decode(t, torch.relu(x @ w + b))


def variant(name, made):
    wrong = (k_of_each_token, of_b_dec_subtracted, as_relu)
    return Origin(name, "evo2", write, made, encode, forward, wrong)


ORIGINS = [
    variant("tied", tensors()),
    variant("as torch.compile names it", tensors("_orig_mod.")),
    variant("bfloat16 file", tensors(dtype=torch.bfloat16)),
]
