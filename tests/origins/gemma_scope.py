"""Gemma Scope 1: params.npz below folders that say layer, width and L0, in repos that say the
site.
"""

import zipfile

import numpy as np
import torch

from tests.origins._origin import D, N, Origin, draw

LAYER, EMBEDDING = "layer_20/width_16k/average_l0_71", "embedding/width_4k/average_l0_6"
RES, TRANSCODERS = "gemma-scope-2b-pt-res", "gemma-scope-2b-pt-transcoders"


def tensors(*, dtype=torch.float32):
    def make(g):
        made = {
            "W_enc": draw(g, D, N),
            "W_dec": draw(g, N, D),
            "b_enc": draw(g, N),
            "b_dec": draw(g, D),
            # half are below 0, where ReLU decides, not the threshold
            "threshold": draw(g, N),
        }
        # one feature is always exactly at its threshold, and so off
        made["W_enc"][:, 0] = 0
        made["b_enc"][0] = made["threshold"][0] = 0.5
        return {name: value.to(dtype) for name, value in made.items()}

    return make


def writer(repo=RES, folder=LAYER, save=np.savez, fortran=False, small=False, file=False):
    def write(root, t):
        path = root / repo / folder
        path.mkdir(parents=True)
        order = np.asfortranarray if fortran else np.asarray
        names = {"W_enc": "w_enc", "W_dec": "w_dec"} if small else {}
        save(
            path / "params.npz",
            **{names.get(name, name): order(value.numpy()) for name, value in t.items()},
        )
        return path / "params.npz" if file else path

    return write


def save_aligned(path, **arrays):
    """As a zip whose arrays start at multiples of 64 bytes, so that they can be mapped."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")
            start = archive.fp.tell() + 30 + len(member.filename) + 4
            padding = -start % 64
            member.extra = b"\xfe\xca" + padding.to_bytes(2, "little") + bytes(padding)
            with archive.open(member, "w") as file:
                np.lib.format.write_array(file, value)


def encode(t, x):
    p = x @ t["W_enc"].to(x.dtype) + t["b_enc"].to(x.dtype)
    return (p > t["threshold"].to(x.dtype)) * torch.relu(p)


def decode(t, f):
    return f @ t["W_dec"].to(f.dtype) + t["b_dec"].to(f.dtype)


def forward(t, x):
    return decode(t, encode(t, x))


def of_b_dec_subtracted(t, x):
    return forward(t, x - t["b_dec"].to(x.dtype))


def without_threshold(t, x):
    return decode(t, torch.relu(x @ t["W_enc"] + t["b_enc"]))


def without_relu(t, x):
    p = x @ t["W_enc"] + t["b_enc"]
    return decode(t, p * (p > t["threshold"]))


def at_the_threshold_too(t, x):
    p = x @ t["W_enc"] + t["b_enc"]
    return decode(t, torch.relu(p) * (p >= t["threshold"]))


MISTAKES = (of_b_dec_subtracted, without_threshold, without_relu, at_the_threshold_too)


def encode_scaled(t, x):
    return encode(t, x / D**0.5)


def forward_scaled(t, x):
    """In the units of the residual stream: the rows that it was trained on, times sqrt(d)."""
    return decode(t, encode_scaled(t, x)) * D**0.5


def b_dec_not_scaled(t, x):
    return encode_scaled(t, x) @ (t["W_dec"] * D**0.5) + t["b_dec"]


def variant(name, write, make=None, mistakes=MISTAKES, encode=encode, forward=forward):
    return Origin(
        name, "gemma_scope", write, make or tensors(), encode, forward, mistakes=tuple(mistakes)
    )


ORIGINS = [
    variant("residual stream", writer()),
    variant("one file", writer(file=True)),
    variant("mlp", writer("gemma-scope-9b-pt-mlp")),
    variant("heads' outputs", writer("gemma-scope-9b-pt-att")),
    variant("transcoder", writer(TRANSCODERS)),
    variant(
        "embedding",
        writer(folder=EMBEDDING, small=True),
        mistakes=[forward, b_dec_not_scaled],
        encode=encode_scaled,
        forward=forward_scaled,
    ),
    variant("of no known repo or folder", writer("mine", "sae")),
    variant("mapped in place", writer(save=save_aligned)),
    variant("deflated", writer(save=np.savez_compressed)),
    variant("Fortran order", writer(fortran=True)),
    variant("Fortran order, mapped in place", writer(fortran=True, save=save_aligned)),
    variant("float64 file", writer(), tensors(dtype=torch.float64)),
    variant("float16 file", writer(), tensors(dtype=torch.float16), mistakes=[of_b_dec_subtracted]),
]
