"""science-of-finetuning's crosscoders: config.json and model.safetensors of a HubMixin."""

import json

import torch
from safetensors.torch import save_file

from tests.origins._multi import D, L, MultiOrigin, N, draw

CODES = ["CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED"]
ALPHAS = 0.7, 0.2


def tensors(
    *, batch=False, code="CROSSCODER", normalised=False, unset=False, old=False, reads=None
):
    def make(g):
        made = {
            "encoder.weight": draw(g, L if reads is None else len(reads), D, N),
            "encoder.bias": draw(g, N),
            "decoder.weight": draw(g, L, N, D),
            "decoder.bias": draw(g, L, D),
        }
        if batch:
            each = code == "DECOUPLED"
            threshold = torch.tensor([4.0, 2.0, 3.0]) if each else torch.tensor(6.0)
            made["threshold"] = torch.full_like(threshold, -1) if unset else threshold
            made["k"] = torch.tensor(7, dtype=torch.int32)
        if old:
            return made
        std = draw(g, L, D).abs() + 0.5
        made |= {
            "code_normalization_id": torch.tensor(CODES.index(code) + 1),
            "target_rms": torch.tensor(1.5),
            "activation_mean": draw(g, L, D) if normalised else torch.full((L, D), torch.nan),
            "activation_std": std if normalised else torch.full((L, D), torch.nan),
            "activation_global_scale": torch.ones(L),
        }
        if normalised:
            made["activation_global_scale"] = 1.5 / (std**2).sum(-1).add(1e-8).sqrt()
        return made

    return make


def writer(**changes):
    def write(root, t):
        folder = root / "gemma-2-2b-crosscoder"
        folder.mkdir(parents=True)
        save_file(t, folder / "model.safetensors")
        data = {
            "activation_dim": D,
            "dict_size": N,
            "num_layers": L,
            "code_normalization_alpha_sae": ALPHAS[0],
            "code_normalization_alpha_cc": ALPHAS[1],
        }
        (folder / "config.json").write_text(json.dumps(data | changes))
        return folder

    return write


def normaliser(t):
    """(mean, scale) or None."""
    mean = t.get("activation_mean")
    if mean is None or mean.isnan().any():
        return None
    return mean, t["activation_global_scale"][:, None]


def code_norm(t, code):
    d = t["decoder.weight"]
    total, joint = d.norm(dim=2).sum(0), d.norm(dim=(0, 2))
    return {
        "CROSSCODER": total,
        "SAE": joint,
        "MIXED": joint * ALPHAS[0] + total * ALPHAS[1],
        "NONE": torch.ones(()),
        "DECOUPLED": d.norm(dim=2),
    }[code]


def encode_as(code, reads=None):
    def encode(t, x):
        if (norm := normaliser(t)) is not None:
            x = (x - norm[0]) * norm[1]
        x = x if reads is None else x[:, list(reads)]
        f = torch.relu(
            torch.einsum("tld,ldn->tln", x, t["encoder.weight"]).sum(1) + t["encoder.bias"]
        )
        if "threshold" not in t:
            return f
        c, threshold = code_norm(t, code), t["threshold"]
        if code == "DECOUPLED":
            return f[:, None] * (f[:, None] * c > threshold[:, None])
        return f * (f * c > threshold)

    return encode


def forward_as(code, reads=None):
    def forward(t, x):
        f = encode_as(code, reads)(t, x)
        letters = "tln" if f.dim() == 3 else "tn"
        y = torch.einsum(f"{letters},lnd->tld", f, t["decoder.weight"]) + t["decoder.bias"]
        if (norm := normaliser(t)) is not None:
            return y / (norm[1] + 1e-8) + norm[0]
        return y

    return forward


def not_denormalised(t, x):
    mean, scale = normaliser(t)
    return (forward_as("CROSSCODER")(t, x) - mean) * scale


def without_threshold(t, x):
    return forward_as("CROSSCODER")({k: v for k, v in t.items() if k != "threshold"}, x)


def variant(name, make, code="CROSSCODER", mistakes=(), reads=None, **changes):
    forward = forward_as(code, reads)

    def models_swapped(t, x):
        return forward(t | {"decoder.weight": t["decoder.weight"].flip(0)}, x)

    return MultiOrigin(
        name,
        "finetuning_crosscoder",
        writer(**changes),
        make,
        encode_as(code, reads),
        forward,
        (models_swapped, *mistakes),
        layered=False,
    )


def batch(code, **options):
    wrong = [other for other in CODES[:4] if other != code] if code != "DECOUPLED" else []
    return variant(
        f"BatchTopK, {code}",
        tensors(batch=True, code=code),
        code,
        mistakes=(*(forward_as(other) for other in wrong), without_threshold),
        code_normalization=code,
        **options,
    )


ORIGINS = [
    variant("CrossCoder", tensors()),
    variant("CrossCoder of an older version", tensors(old=True)),
    variant(
        "normalised CrossCoder",
        tensors(normalised=True),
        mistakes=(not_denormalised,),
        dict_class="CrossCoder",
    ),
    variant("decoupled CrossCoder, whose code is as it was", tensors(code="DECOUPLED")),
    *(batch(code) for code in CODES),
    variant(
        "normalised BatchTopK",
        tensors(batch=True, normalised=True),
        mistakes=(without_threshold, not_denormalised),
        dict_class="BatchTopKCrossCoder",
    ),
    variant("BatchTopK, threshold unset", tensors(batch=True, unset=True)),
    variant("reads two of three", tensors(reads=(0, 2)), reads=(0, 2), encoder_layers=[0, 2]),
]
