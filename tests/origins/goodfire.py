"""Goodfire's and qresearch's files: two namings of one formula, nothing subtracted."""

import torch

from tests.origins._origin import D, N, Origin, draw


def tensors(encoder, decoder, dtype=torch.float32):
    def make(g):
        made = {
            f"{encoder}.weight": draw(g, N, D),
            f"{encoder}.bias": draw(g, N),
            f"{decoder}.weight": draw(g, D, N),
            f"{decoder}.bias": draw(g, D),
        }
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def writer(name):
    def write(root, t):
        root.mkdir(parents=True, exist_ok=True)
        torch.save(t, root / name)
        return root / name

    return write


def encode(t, x):
    w, b, _, _ = (value.to(x.dtype) for value in t.values())
    return torch.relu(x @ w.T + b)


def forward(t, x):
    _, _, d, c = (value.to(x.dtype) for value in t.values())
    return encode(t, x) @ d.T + c


def of_b_dec_subtracted(t, x):
    return forward(t, x - list(t.values())[3])


def variant(name, key, file, made):
    return Origin(name, key, writer(file), made, encode, forward, (of_b_dec_subtracted,))


GOODFIRE, QRESEARCH = ("encoder_linear", "decoder_linear"), ("encoder", "decoder")

ORIGINS = [
    variant("Llama 3.3", "goodfire", "Llama-3.3-70B-Instruct-SAE-l50.pt", tensors(*GOODFIRE)),
    variant("Llama 3.1", "goodfire", "Llama-3.1-8B-Instruct-SAE-l19.pth", tensors(*GOODFIRE)),
    variant("bfloat16 file", "goodfire", "SAE-l19.pt", tensors(*GOODFIRE, torch.bfloat16)),
    variant(
        "qresearch", "deepseek_r1", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", tensors(*QRESEARCH)
    ),
    variant("bfloat16 file", "deepseek_r1", "SAE-l9.pt", tensors(*QRESEARCH, torch.bfloat16)),
]
