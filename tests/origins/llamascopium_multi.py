"""Llamascopium's cross-layer transcoders and crosscoders: config.json and sae_weights."""

import json
import math

import torch
from safetensors.torch import save_file

from tests.origins._multi import D, L, MultiOrigin, N, draw

K = 3
THRESHOLD = "activation_function.log_jumprelu_threshold"
INTO = [f"blocks.{i}.ln2.hook_normalized" for i in range(L)]
OUT = [f"blocks.{i}.hook_mlp_out" for i in range(L)]
HEADS = [f"blocks.{i}.hook_resid_post" for i in (4, 9, 14)]
NORM = "dataset_average_activation_norm."


def clt_tensors(g):
    made = {"W_E": draw(g, L, D, N), "b_E": draw(g, L, N), THRESHOLD: draw(g, L, N, scale=0.5)}
    for m in range(L):
        made |= {f"W_D.{m}": draw(g, m + 1, N, D), f"b_D.{m}": draw(g, D)}
    hooks = [*INTO, *OUT]
    return made | {f"{NORM}{hook}": 2 + 3 * torch.rand((), generator=g) for hook in hooks}


def crosscoder_tensors(g):
    made = {
        "W_E": draw(g, L, D, N),
        "b_E": draw(g, L, N),
        "W_D": draw(g, L, N, D),
        "b_D": draw(g, L, D),
        THRESHOLD: draw(g, N, scale=0.5),
    }
    return made | {f"{NORM}{hook}": 2 + 3 * torch.rand((), generator=g) for hook in HEADS}


def writer(kind, act, *, pickled=False, **changes):
    def write(root, t):
        folder = root / kind
        folder.mkdir(parents=True)
        t = {k: v for k, v in t.items() if k != THRESHOLD or act == "jumprelu"}
        if pickled:
            torch.save({"sae": t, "version": "1"}, folder / "sae_weights.pt")
        else:
            save_file(t, folder / "sae_weights.safetensors")
        data = {
            "sae_type": kind,
            "d_model": D,
            "expansion_factor": N / D,
            "act_fn": act,
            "norm_activation": "inference",
            "sparsity_include_decoder_norm": True,
            "top_k": K,
        }
        hooks = {"hook_points_in": INTO, "hook_points_out": OUT}
        data |= hooks if kind == "clt" else {"hook_points": HEADS}
        (folder / "config.json").write_text(json.dumps(data | changes))
        return folder

    return write


def factor(t, hook, mode):
    return math.sqrt(D) / t[f"{NORM}{hook}"] if mode == "dataset-wise" else 1.0


def top(x, k):
    return x * torch.zeros_like(x).scatter(-1, x.topk(k, -1).indices, 1)


def act_of(name, t):
    relu = torch.relu
    return {
        "relu": relu,
        "jumprelu": lambda x: x * (x > t[THRESHOLD].exp()),
        "topk": lambda x: top(relu(x), K),
        "layertopk": lambda x: top(relu(x).flatten(1), K).view_as(x),
        "signed topk": lambda x: top(x, K),
    }[name]


def clt_encode(act, mode, rank):
    def encode(t, x):
        x = torch.stack([x[:, i] * factor(t, INTO[i], mode) for i in range(L)], 1)
        h = torch.einsum("tld,ldn->tln", x, t["W_E"]) + t["b_E"]
        if not rank:
            return act_of(act, t)(h)
        squares = torch.zeros(L, N, dtype=x.dtype)
        for m in range(L):
            squares[: m + 1] += t[f"W_D.{m}"].pow(2).sum(-1)
        return act_of(act, t)(h * squares.sqrt()) / squares.sqrt()

    return encode


def clt_forward(act, mode, rank):
    def forward(t, x):
        f = clt_encode(act, mode, rank)(t, x)
        out = []
        for m in range(L):
            y = sum(f[:, i] @ t[f"W_D.{m}"][i] for i in range(m + 1)) + t[f"b_D.{m}"]
            out.append(y / factor(t, OUT[m], mode))
        return torch.stack(out, 1)

    return forward


def crosscoder_encode(act, mode):
    def encode(t, x):
        if mode == "token-wise":
            x = x * math.sqrt(D) / x.norm(dim=-1, keepdim=True)
        else:
            x = torch.stack([x[:, i] * factor(t, HEADS[i], mode) for i in range(L)], 1)
        h = (torch.einsum("tld,ldn->tln", x, t["W_E"]) + t["b_E"]).sum(1, keepdim=True)
        c = t["W_D"].norm(dim=-1)
        return act_of("signed topk" if act == "topk" else act, t)(h * c) / c

    return encode


def crosscoder_forward(act, mode):
    def forward(t, x):
        f = crosscoder_encode(act, mode)(t, x)
        y = torch.einsum("tln,lnd->tld", f, t["W_D"]) + t["b_D"]
        if mode == "token-wise":
            return y * x.norm(dim=-1, keepdim=True) / math.sqrt(D)
        return torch.stack([y[:, i] / factor(t, HEADS[i], mode) for i in range(L)], 1)

    return forward


def clt(name, act, mode="inference", rank=True, mistakes=(), **options):
    changes = {"norm_activation": mode, "sparsity_include_decoder_norm": rank}
    forward = clt_forward(act, mode, rank)

    def by_source(t, x):
        """W_D.m taken for the decoders of source m."""
        turned = {f"W_D.{m}": t[f"W_D.{m}"].flip(0) for m in range(L)}
        return forward(t | turned, x)

    def a_bias_for_every_source(t, x):
        return forward(t, x) + torch.stack([m * t[f"b_D.{m}"] for m in range(L)])

    return MultiOrigin(
        name,
        "llamascopium",
        writer("clt", act, **options, **changes),
        clt_tensors,
        clt_encode(act, mode, rank),
        forward,
        (by_source, a_bias_for_every_source, *mistakes),
        layered=act != "layertopk",
    )


def crosscoder(name, act, mode="inference", mistakes=()):
    forward = crosscoder_forward(act, mode)

    def one_bias(t, x):
        return forward(t | {"b_E": t["b_E"] / L}, x)

    return MultiOrigin(
        name,
        "llamascopium",
        writer("crosscoder", act, norm_activation=mode),
        crosscoder_tensors,
        crosscoder_encode(act, mode),
        forward,
        (one_bias, *mistakes),
        layered=False,
    )


ORIGINS = [
    clt("clt, relu", "relu", rank=False),
    clt("clt, jumprelu", "jumprelu", mistakes=(clt_forward("jumprelu", "inference", False),)),
    clt("clt, topk", "topk", mistakes=(clt_forward("topk", "inference", False),)),
    clt("clt, topk of all layers", "layertopk", mistakes=(clt_forward("topk", "inference", True),)),
    clt(
        "clt, dataset norms",
        "jumprelu",
        "dataset-wise",
        mistakes=(clt_forward("jumprelu", "inference", True),),
    ),
    clt("clt, pickled", "jumprelu", pickled=True),
    crosscoder("crosscoder, relu", "relu"),
    crosscoder("crosscoder, jumprelu", "jumprelu"),
    crosscoder("crosscoder, topk", "topk"),
    crosscoder(
        "crosscoder, dataset norms",
        "jumprelu",
        "dataset-wise",
        mistakes=(crosscoder_forward("jumprelu", "inference"),),
    ),
    crosscoder("crosscoder, each token normalised", "jumprelu", "token-wise"),
]
