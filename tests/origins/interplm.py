"""InterPLM: layer_L/ae_normalized.pt and ae_unnormalized.pt, before and since its version 1.0."""

import torch

from tests.origins._origin import D, N, Origin, draw


def tensors(*, folded=False, root_d=None, factor=False):
    def make(g):
        made = {
            "bias": draw(g, D),
            "encoder.weight": draw(g, N, D),
            "encoder.bias": draw(g, N),
            "decoder.weight": draw(g, D, N),
        }
        largest = torch.rand(N, generator=g) * 3 + 0.5
        if (
            folded
        ):  # create_normalized_model before 1.0; features that never fired have columns of 0
            made["encoder.weight"] /= largest[:, None]
            made["encoder.bias"] /= largest
            made["decoder.weight"] *= largest
            made["decoder.weight"][:, 3] = 0
        if factor:
            made["activation_rescale_factor"] = largest
        if root_d is not None:
            made["normalize_to_sqrt_d"] = torch.tensor(root_d)
        return made

    return make


def writer(name="ae_normalized.pt"):
    def write(root, t):
        (root / "layer_3").mkdir(parents=True)
        torch.save(t, root / "layer_3" / name)
        return root / "layer_3" / name

    return write


def norm_of(x):
    return x.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def says_root_d(t):
    return bool(t.get("normalize_to_sqrt_d", False))


def encode(t, x, *, root_d=None):
    """As forward and encode_feat_subset do: normalised first, features not rescaled."""
    root_d = says_root_d(t) if root_d is None else root_d
    z = torch.nn.functional.normalize(x, dim=-1) * D**0.5 if root_d else x
    return torch.relu((z - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"])


def forward(t, x, *, root_d=None, unnormalize=True):
    root_d = says_root_d(t) if root_d is None else root_d
    y = encode(t, x, root_d=root_d) @ t["decoder.weight"].T + t["bias"]
    return y * norm_of(x) / D**0.5 if root_d and unnormalize else y


def of_x_itself(t, x):
    f = torch.relu(x @ t["encoder.weight"].T + t["encoder.bias"])
    return f @ t["decoder.weight"].T + t["bias"]


def unit_columns(t, x):
    """AutoEncoder.from_pretrained of dictionary_learning with normalize_decoder, done by half."""
    d = torch.nn.functional.normalize(t["decoder.weight"], dim=0)
    return encode(t, x) @ d.T + t["bias"]


def rescaled(t, x):
    return (encode(t, x) / t["activation_rescale_factor"]) @ t["decoder.weight"].T + t["bias"]


def wrong(**how):
    return lambda t, x: forward(t, x, **how)


def variant(name, make, mistakes=(of_x_itself,), file="ae_normalized.pt"):
    return Origin(name, "interplm", writer(file), make, encode, forward, mistakes)


ORIGINS = [
    variant("normalised", tensors(folded=True), (of_x_itself, unit_columns)),
    variant("unnormalised", tensors(), file="ae_unnormalized.pt"),
    variant("1.0", tensors(factor=True, root_d=False), (of_x_itself, rescaled)),
    variant(
        "1.0, of norm sqrt(d)",
        tensors(factor=True, root_d=True),
        (of_x_itself, wrong(root_d=False), wrong(unnormalize=False)),
    ),
]
