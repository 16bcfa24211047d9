"""SAELens' own classes: what they save, saezoo reads; what saezoo writes, they load."""

import json

import pytest
import torch
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from sae_lens.registry import get_sae_class, get_sae_training_class

from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.errors import FormatError
from saezoo.load import load_sae
from saezoo.numerics import TOLERANCE, close, largest_difference
from saezoo.sae import build_sae
from saezoo.save import save_sae
from tests.origins.saelens import ORIGINS
from tests_peers._compare import DTYPES, D, K, N, check_loaded, inputs, randomise

HEADS = 2
TOPK = {"architecture": "topk", "k": K}
ABSTOPK = {"architecture": "abstopk", "k": K}
RESCALED = {"rescale_acts_by_decoder_norm": True}
LAYER_NORM = {"normalize_activations": "layer_norm"}
CONSTANT = {"normalize_activations": "constant_norm_rescale"}
WIDE = {"apply_b_dec_to_input": False, "d_out": 9}
HOOK_Z = {
    "reshape_activations": "hook_z",
    "metadata": {"model_name": "gpt2", "hook_name": "blocks.5.attn.hook_z"},
}

SAES = {
    "standard": {"architecture": "standard"},
    "standard, b_dec not subtracted": {
        "architecture": "standard",
        "apply_b_dec_to_input": False,
    },
    "standard, layer_norm": {"architecture": "standard"} | LAYER_NORM,
    "standard, constant_norm_rescale": {"architecture": "standard"} | CONSTANT,
    "gated": {"architecture": "gated"},
    "gated, layer_norm": {"architecture": "gated"} | LAYER_NORM,
    "topk": TOPK,
    "topk, rescaled": TOPK | RESCALED,
    "topk, layer_norm": TOPK | LAYER_NORM,
    "topk, rescaled, constant_norm_rescale": TOPK | RESCALED | CONSTANT,
    "abstopk": ABSTOPK,
    "abstopk, rescaled": ABSTOPK | RESCALED,
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu, layer_norm": {"architecture": "jumprelu"} | LAYER_NORM,
    "transcoder": {"architecture": "transcoder"} | WIDE,
    "skip_transcoder": {"architecture": "skip_transcoder"} | WIDE,
    "jumprelu_transcoder": {"architecture": "jumprelu_transcoder"} | WIDE,
    "jumprelu_skip_transcoder": {"architecture": "jumprelu_skip_transcoder"} | WIDE,
    "hook_z": {"architecture": "standard"} | HOOK_Z,
    "hook_z, topk": TOPK | HOOK_Z,
    "hook_z, layer_norm": {"architecture": "standard"} | HOOK_Z | LAYER_NORM,
}
each = pytest.mark.parametrize("name", SAES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(facts):
    """SAELens' SAE of a config, with random weights."""
    return randomise(SAE.from_dict({"d_in": D, "d_sae": N} | facts)).eval()


def flat(peer):
    """encode and forward on flat inputs: hook_z SAEs take and give (…, heads, d_head)."""
    if peer.cfg.reshape_activations == "none":
        return peer.encode, peer.forward
    return (
        lambda x: peer.encode(x.unflatten(-1, (HEADS, -1))),
        lambda x: peer(x.unflatten(-1, (HEADS, -1))).flatten(-2),
    )


@each
@each_dtype
def test_reads(name, dtype, tmp_path, same):
    peer = made(SAES[name])
    peer.save_model(tmp_path)
    check_loaded(tmp_path, *flat(peer.to(dtype)), same, dtype)


@each
def test_reads_bfloat16(name, tmp_path, same):
    made(SAES[name]).to(torch.bfloat16).save_model(tmp_path)
    wide = SAE.load_from_disk(tmp_path, dtype="float32")
    check_loaded(tmp_path, *flat(wide), same, torch.float32)


@each
def test_what_was_read_and_written_again_is_loaded_by_the_package(name, tmp_path, same):
    peer = made(SAES[name])
    peer.save_model(tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="saelens")
    again, x = SAE.load_from_disk(tmp_path / "b"), inputs(torch.float32)
    assert type(again) is type(peer)
    for function, expected in zip(flat(again), flat(peer), strict=True):
        same(function(x), expected(x))
    one, other = again.cfg.to_dict(), peer.cfg.to_dict()
    assert one | {"metadata": None} == other | {"metadata": None}
    assert again.cfg.metadata.hook_name == peer.cfg.metadata.hook_name


TRAINING = {
    "standard": {},
    "gated": {},
    "topk": {"k": K},
    "abstopk": {"k": K},
    "jumprelu": {},
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [N // 2, N]},
}


def trained(name):
    """A SAELens SAE as in training, with random weights."""
    training_class, config_class = get_sae_training_class(name)
    peer = training_class(config_class(d_in=D, d_sae=N, **TRAINING[name]))
    for key, value in peer.named_buffers():
        if key == "topk_threshold":
            value.fill_(0.7)
    return randomise(peer).eval()


@pytest.mark.parametrize("name", TRAINING)
def test_reads_what_training_leaves_for_inference(name, tmp_path, same):
    trained(name).save_inference_model(tmp_path)
    peer = SAE.load_from_disk(tmp_path)
    check_loaded(tmp_path, peer.encode, peer, same, torch.float32)


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_checkpoint_is_read_as_saelens_reads_it_or_refused(name, tmp_path, same):
    trained(name).save_model(tmp_path)
    if "batchtopk" in name:  # SAELens has no inference class of that name either
        with pytest.raises(KeyError):
            get_sae_class(name)
        with pytest.raises(FormatError, match="save_inference_model"):
            load_sae(tmp_path)
        return
    peer = SAE.load_from_disk(tmp_path)
    check_loaded(tmp_path, peer.encode, peer, same, torch.float32)


@pytest.mark.parametrize("name", ["matching_pursuit", "temporal"])
def test_what_is_not_one_product_is_refused(name, tmp_path):
    _, config_class = get_sae_class(name)
    facts = config_class(d_in=D, d_sae=N).to_dict()
    (tmp_path / "cfg.json").write_text(json.dumps(facts, default=str))
    (tmp_path / "sae_weights.safetensors").touch()
    with pytest.raises(FormatError, match=f"'{name}' cannot be read"):
        load_sae(tmp_path)


OUT = {"hook_name": "blocks.5.hook_mlp_out", "layer": 5}
WRITTEN = {
    "relu": {"architecture": "relu", "subtract_b_dec": True},
    "relu, b_dec not subtracted": {"architecture": "relu"},
    "gated": {"architecture": "gated", "subtract_b_dec": True},
    "jumprelu": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk", "k": K, "subtract_b_dec": True},
    "topk, scaled": {"architecture": "topk", "k": K, "decoder_norm": "scale"},
    "signed": {"architecture": "topk", "k": K, "signed": True, "relu_after": False},
    "layer norm": {
        "architecture": "relu",
        "input_norm": {"kind": "layer_norm"},
        "subtract_b_dec": True,
    },
    "constant norm": {"architecture": "topk", "k": K, "input_norm": {"kind": "constant_norm"}},
    "scale": {
        "architecture": "jumprelu",
        "input_norm": {"kind": "scale", "factor": 4.0},  # folded into float32 without rounding
        "subtract_b_dec": True,
    },
    "transcoder": {"architecture": "relu", "d_out": 9, "out_site": OUT},
    "skip transcoder": {"architecture": "relu", "d_out": 9, "skip": True, "out_site": OUT},
    "jumprelu transcoder": {"architecture": "jumprelu", "out_site": OUT},
    "jumprelu skip transcoder": {"architecture": "jumprelu", "skip": True, "out_site": OUT},
}


def own(spec):
    """An SAE of saezoo's own making, with random weights."""
    cfg = SAEConfig.from_json({"d_in": D, "d_sae": N} | spec)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(shape, generator=generator) for key, shape in cfg.tensor_shapes().items()
    }
    return build_sae(cfg, tensors)


@pytest.mark.parametrize("name", WRITTEN)
@each_dtype
def test_loads_what_saezoo_writes(name, dtype, tmp_path, same):
    sae = own(WRITTEN[name])
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="saelens")
    peer, x = SAE.load_from_disk(tmp_path / "b").to(dtype), inputs(dtype)
    sae = sae.to(dtype)
    same(peer.encode(x), sae.encode(x))
    same(peer(x), sae(x))


FOLDED = {
    "relu, scaled": {"architecture": "relu", "decoder_norm": "scale"},
    "jumprelu, ranked": {"architecture": "jumprelu", "decoder_norm": "rank"},
    "topk, scaled twice": {
        "architecture": "topk",
        "k": K,
        "decoder_norm": "scale",
        "input_norm": {"kind": "scale", "factor": 4.0},
    },
}


@pytest.mark.parametrize("name", FOLDED)
def test_loads_what_saezoo_folds(name, tmp_path, same):
    sae, x = own(FOLDED[name]), inputs(torch.float32)
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="saelens")
    peer = SAE.load_from_disk(tmp_path / "b")
    same(peer.encode(x), sae.encode(x))
    same(peer(x), sae(x))


@pytest.mark.parametrize(
    "spec",
    [
        {"architecture": "jumprelu"},
        {"architecture": "relu"},
        {"architecture": "jumprelu", "input_norm": {"kind": "scale", "factor": 4.0}},
    ],
    ids=str,
)
def test_its_gemma_scope_loader_reads_the_params_that_saezoo_writes(
    spec, tmp_path, same, monkeypatch
):
    sae = own(spec)
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="gemma_scope")
    # its two functions that ask the Hub
    sizes = {"d_in": D, "d_sae": N}
    monkeypatch.setattr(loaders, "get_gemma_2_config_from_hf", lambda *_: dict(sizes))
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: tmp_path / "b" / "params.npz")
    _, state, _ = loaders.gemma_2_sae_huggingface_loader("", "layer_20/width_16k/average_l0_71")
    peer = SAE.from_dict({"architecture": "jumprelu", "apply_b_dec_to_input": False} | sizes)
    peer.load_state_dict(state)
    x = inputs(torch.float32)
    same(peer.encode(x), sae.encode(x))
    same(peer(x), sae(x))


# the formulas that `make test` compares with

NOT_LOADED = {
    "jumprelu's training checkpoint": "log_threshold",
    "finetuned": "finetuning_scaling_factor",
}
"""Files of older versions that today's SAELens refuses, by what it says. saezoo reads them as the
versions of their day did.
"""


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
def test_the_origin_in_our_tests_is_the_package(origin, tmp_path, same):
    tensors = origin.tensors(torch.Generator().manual_seed(0))
    path = origin.write(tmp_path, tensors)
    if origin.name in NOT_LOADED:
        with pytest.raises(RuntimeError, match=NOT_LOADED[origin.name]):
            SAE.load_from_disk(path)
        return
    encode, forward = flat(SAE.load_from_disk(path, dtype="float32").to(torch.float64))
    tensors = {key: value.double() for key, value in tensors.items()}
    x = inputs(torch.float64)
    same(origin.encode(tensors, x), encode(x))
    same(origin.forward(tensors, x), forward(x))
    same(load_sae(path, dtype=torch.float64)(x), forward(x))


# what SAELens gets wrong itself, so that a newer version which does not is noticed


@pytest.mark.parametrize("name", ["standard, layer_norm", "standard, constant_norm_rescale"])
def test_a_batch_between_encode_and_decode_spoils_its_decode(name, tmp_path):
    """Known: SAELens keeps the last token batch's norms on the module. saezoo takes x again."""
    peer = made(SAES[name])
    peer.save_model(tmp_path)
    sae, x, other = load_sae(tmp_path), inputs(torch.float32), inputs(torch.float32, seed=8)
    right, features = peer(x), peer.encode(x)
    peer.encode(other * 3)
    wrong = peer.decode(features)
    assert largest_difference(wrong, right) > 100 * TOLERANCE[torch.float32]
    with pytest.raises(AttributeError):
        peer.decode(features)  # the norms are deleted by the first decode
    mine = sae.encode(x)
    sae.encode(other * 3)
    assert close(sae.decode(mine, x), right)


@pytest.mark.parametrize("name", ["skip_transcoder", "jumprelu_skip_transcoder"])
def test_attached_to_a_model_its_skip_is_lost(name, tmp_path):
    """Known: what HookedSAETransformer attaches calls encode and decode, and the skip is in forward
    alone. saezoo's decode adds it when given x.
    """
    peer, x = made(SAES[name] | {"d_out": D}), inputs(torch.float32)
    peer.save_model(tmp_path)
    sae = load_sae(tmp_path)
    attached = _SAEWrapper(peer)
    attached.capture_input(x)
    lost = attached(x)
    assert close(peer(x) - x @ peer.W_skip.T, lost)
    assert largest_difference(lost, peer(x)) > 100 * TOLERANCE[torch.float32]
    assert close(sae.decode(sae.encode(x), x), peer(x))


def test_its_loader_of_sparsify_folders_cannot_read_one(tmp_path):
    """Known: sparsify_disk_loader transposes W_dec, which sparsify keeps as SAELens does."""
    save_sae(own(WRITTEN["topk"]), tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "layers.3", to="sparsify")
    with pytest.raises(RuntimeError, match="size mismatch for W_dec"):
        SAE.load_from_disk(tmp_path / "layers.3", converter=sparsify_disk_loader)
