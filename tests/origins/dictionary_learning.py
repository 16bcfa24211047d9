"""dictionary_learning: its seven classes, by torch.save of the state dict and a config.json."""

import json

import torch

from tests.origins._origin import D, K, N, Origin, draw, keep_k

linear = torch.nn.functional.linear


def writer(dict_class, *, config=True, **trainer):
    def write(folder, t):
        folder = folder / "resid_post_layer_3" / "trainer_0"
        folder.mkdir(parents=True)
        torch.save(t, folder / "ae.pt")
        data = {
            "trainer": {
                "dict_class": dict_class,
                "activation_dim": D,
                "dict_size": N,
                "layer": 3,
                "lm_name": "EleutherAI/pythia-70m-deduped",
                "submodule_name": "resid_post_layer_3",
                **trainer,
            },
            "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128},
        }
        if config:
            (folder / "config.json").write_text(json.dumps(data))
        return folder

    return write


def auto_encoder(g):
    return {
        "bias": draw(g, D),
        "encoder.weight": draw(g, N, D),
        "encoder.bias": draw(g, N),
        "decoder.weight": draw(g, D, N),
    }


def auto_encoder_new(g):
    rest = auto_encoder(g)
    rest["decoder.bias"] = rest.pop("bias")
    return rest


def gated(g):
    return {
        "decoder_bias": draw(g, D),
        "encoder.weight": draw(g, N, D),
        "r_mag": draw(g, N, scale=0.5),
        "gate_bias": draw(g, N),
        "mag_bias": draw(g, N),
        "decoder.weight": draw(g, D, N),
    }


def jump(g):
    return {
        "W_enc": draw(g, D, N),
        "b_enc": draw(g, N),
        "W_dec": draw(g, N, D),
        "b_dec": draw(g, D),
        "threshold": draw(g, N),
    }


def topk(threshold):
    def make(g):
        rest = auto_encoder(g)
        rest["b_dec"] = rest.pop("bias")
        return {**rest, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}

    return make


def matryoshka(threshold):
    def make(g):
        rest = jump(g)
        more = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
        return {**rest, **more, "group_sizes": torch.tensor([4, 8, 12])}

    return make


def relu_minus(bias):
    return lambda t, x: torch.relu(linear(x - t[bias], t["encoder.weight"], t["encoder.bias"]))


def encode_gated(t, x):
    x_enc = linear(x - t["decoder_bias"], t["encoder.weight"])
    gate = (x_enc + t["gate_bias"] > 0).to(x.dtype)
    return gate * torch.relu(t["r_mag"].exp() * x_enc + t["mag_bias"])


def encode_jump(t, x):
    pre = x @ t["W_enc"] + t["b_enc"]
    return torch.relu(pre * (pre > t["threshold"]))


def encode_topk(t, x):
    p = relu_minus("b_dec")(t, x)
    return keep_k(p, p)


def over_threshold(p, t):
    return p * (p > t["threshold"])


def encode_batch_topk(t, x):
    return over_threshold(relu_minus("b_dec")(t, x), t)


def encode_matryoshka(t, x):
    return over_threshold(torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]), t)


def linear_decode(encode, bias):
    return lambda t, x: encode(t, x) @ t["decoder.weight"].T + t[bias]


def plain_decode(encode):
    return lambda t, x: encode(t, x) @ t["W_dec"] + t["b_dec"]


def no_bias(encode, bias, decode):
    """The mistake of not subtracting the bias on the way in."""
    return lambda t, x: decode(lambda u, y: encode({**u, bias: torch.zeros(D)}, y))(t, x)


def origin(name, write, make, encode, forward, *mistakes):
    return Origin(name, "dictionary_learning", write, make, encode, forward, mistakes)


def gate_ignored(t, x):
    f = torch.relu(
        t["r_mag"].exp() * linear(x - t["decoder_bias"], t["encoder.weight"]) + t["mag_bias"]
    )
    return f @ t["decoder.weight"].T + t["decoder_bias"]


def jump_of_centred(t, x):
    return plain_decode(encode_jump)(t, x - t["b_dec"])


def topk_of_batch(t, x):
    return linear_decode(encode_topk, "b_dec")(t, x)


ENCODE = relu_minus("bias")

ORIGINS = [
    origin(
        "AutoEncoder",
        writer("AutoEncoder"),
        auto_encoder,
        ENCODE,
        linear_decode(ENCODE, "bias"),
        lambda t, x: linear_decode(ENCODE, "bias")(t, x + t["bias"]),
    ),
    origin(
        "AutoEncoder, bare ae.pt",
        writer("AutoEncoder", config=False),
        auto_encoder,
        ENCODE,
        linear_decode(ENCODE, "bias"),
    ),
    origin(
        "AutoEncoderNew",
        writer("AutoEncoderNew"),
        auto_encoder_new,
        lambda t, x: torch.relu(linear(x, t["encoder.weight"], t["encoder.bias"])),
        linear_decode(
            lambda t, x: torch.relu(linear(x, t["encoder.weight"], t["encoder.bias"])),
            "decoder.bias",
        ),
        linear_decode(relu_minus("decoder.bias"), "decoder.bias"),
    ),
    origin(
        "GatedAutoEncoder",
        writer("GatedAutoEncoder"),
        gated,
        encode_gated,
        linear_decode(encode_gated, "decoder_bias"),
        gate_ignored,
    ),
    origin(
        "GatedAutoEncoder, bare ae.pt",
        writer("GatedAutoEncoder", config=False),
        gated,
        encode_gated,
        linear_decode(encode_gated, "decoder_bias"),
    ),
    origin(
        "JumpReluAutoEncoder",
        writer("JumpReluAutoEncoder"),
        jump,
        encode_jump,
        plain_decode(encode_jump),
        jump_of_centred,
    ),
    origin(
        "AutoEncoderTopK",
        writer("AutoEncoderTopK", k=K),
        topk(0.7),
        encode_topk,
        linear_decode(encode_topk, "b_dec"),
        linear_decode(encode_batch_topk, "b_dec"),
    ),
    origin(
        "BatchTopKSAE",
        writer("BatchTopKSAE", k=K),
        topk(0.7),
        encode_batch_topk,
        linear_decode(encode_batch_topk, "b_dec"),
        topk_of_batch,
    ),
    origin(
        "BatchTopKSAE, threshold unset",
        writer("BatchTopKSAE", k=K),
        topk(-1.0),
        encode_batch_topk,
        linear_decode(encode_batch_topk, "b_dec"),
        topk_of_batch,
    ),
    origin(
        "MatryoshkaBatchTopKSAE",
        writer("MatryoshkaBatchTopKSAE", k=K),
        matryoshka(0.4),
        encode_matryoshka,
        plain_decode(encode_matryoshka),
        plain_decode(lambda t, x: encode_matryoshka(t, x + t["b_dec"])),
    ),
    origin(
        "MatryoshkaBatchTopKSAE, bare ae.pt",
        writer("", config=False),
        matryoshka(0.4),
        encode_matryoshka,
        plain_decode(encode_matryoshka),
    ),
]
