"""Dunefsky's transcoders: save_model's {cfg, state_dict}, and SparseAutoencoder.forward."""

import torch

from tests.origins._classes import classes_of, filled
from tests.origins._origin import D, N, Origin, draw

CLASS = "sae_training.config.LanguageModelSAERunnerConfig"
NAME = "final_sparse_autoencoder_gpt2-small_blocks.8.ln2.hook_normalized_24.pt"
CONFIG = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.ln2.hook_normalized",
    "hook_point_layer": 8,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
    "d_in": D,
    "d_out": D,
    "d_sae": N,
    "expansion_factor": N // D,
    "is_transcoder": True,
    "out_hook_point": "blocks.8.hook_mlp_out",
    "out_hook_point_layer": 8,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "use_ghost_grads": (False,),
    "l1_coefficient": 1e-3,
}
SAE = {
    "is_transcoder": False,
    "hook_point": "blocks.8.hook_mlp_out",
    "out_hook_point": None,
    "d_out": None,
}


def tensors(*, out=D, transcoder=True):
    def make(g):
        made = {
            "W_enc": draw(g, D, N),
            "b_enc": draw(g, N),
            "W_dec": draw(g, N, out),
            "b_dec": draw(g, D),
        }
        return made | ({"b_dec_out": draw(g, out)} if transcoder else {})

    return make


def writer(name=CLASS, **changes):
    def write(folder, t):
        folder.mkdir(parents=True, exist_ok=True)
        fields = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
        with classes_of(name) as (kind,):
            torch.save({"cfg": filled(kind, fields), "state_dict": t}, folder / NAME)
        return folder / NAME

    return write


def encode(t, x):
    return torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])


def forward(t, x):
    return encode(t, x) @ t["W_dec"] + t.get("b_dec_out", t["b_dec"])


def nothing_subtracted(t, x):
    return forward(t, x + t["b_dec"])


def input_bias_on_the_output(t, x):
    return encode(t, x) @ t["W_dec"] + t["b_dec"]


def origin(name, write, make=None, *mistakes):
    return Origin(name, "dunefsky", write, make or tensors(), encode, forward, mistakes)


ORIGINS = [
    origin("transcoder", writer(), None, nothing_subtracted, input_bias_on_the_output),
    origin(
        "transcoder of another width", writer(d_out=D + 2), tensors(out=D + 2), nothing_subtracted
    ),
    origin("SAE", writer(**SAE), tensors(transcoder=False), nothing_subtracted),
    origin("class of a fork, few fields", writer("my_fork.Config", is_transcoder=..., d_out=...)),
]
