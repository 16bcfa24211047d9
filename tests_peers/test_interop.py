"""to_saelens: the real class, the same numbers, the same memory."""

import json

import pytest
import torch
from sae_lens import SAE, HookedSAETransformer
from sae_lens.registry import get_sae_class
from transformer_lens import HookedTransformerConfig

from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.interop import to_saelens
from saezoo.numerics import close
from saezoo.sae import build_sae
from saezoo.save import save_sae
from tests_peers._compare import DTYPES, D, K, N, inputs

SITE = {"model": "openai-community/gpt2", "hook_name": "blocks.5.hook_mlp_in", "layer": 5}
OUT = SITE | {"hook_name": "blocks.5.hook_mlp_out"}
CAN = {
    "standard": {"architecture": "relu", "subtract_b_dec": True},
    "gated": {"architecture": "gated", "subtract_b_dec": True},
    "jumprelu": {"architecture": "jumprelu", "subtract_b_dec": True},
    "topk": {"architecture": "topk", "k": K},
    "topk, rescaled": {"architecture": "topk", "k": K, "decoder_norm": "scale"},
    "abstopk": {"architecture": "topk", "k": K, "signed": True, "relu_after": False},
    "standard, layer_norm": {"architecture": "relu", "input_norm": {"kind": "layer_norm"}},
    "topk, constant_norm_rescale": {
        "architecture": "topk",
        "k": K,
        "input_norm": {"kind": "constant_norm"},
    },
    "standard, scale": {
        "architecture": "relu",
        "subtract_b_dec": True,
        "input_norm": {"kind": "scale", "factor": 1.75},
    },
    "transcoder": {"architecture": "relu", "d_out": 9, "site": SITE, "out_site": OUT},
    "skip_transcoder": {"architecture": "relu", "d_out": 9, "skip": True, "out_site": OUT},
    "jumprelu_transcoder": {"architecture": "jumprelu", "out_site": OUT},
    "jumprelu_skip_transcoder": {"architecture": "jumprelu", "skip": True, "out_site": OUT},
}
each = pytest.mark.parametrize("name", CAN)


def own(spec, dtype=torch.float32):
    cfg = SAEConfig.from_json({"d_in": D, "d_sae": N} | spec)
    generator = torch.Generator().manual_seed(0)
    shapes = cfg.tensor_shapes().items()
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes}
    return build_sae(cfg, tensors, dtype=dtype)


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_computes_the_same(name, dtype, same):
    sae, x = own(CAN[name], dtype), inputs(dtype)
    peer = to_saelens(sae)
    assert type(peer) is get_sae_class(name.partition(",")[0])[0]
    assert isinstance(peer, SAE)
    assert (peer.dtype, peer.device, peer.training) == (dtype, torch.device("cpu"), False)
    assert not any(value.requires_grad for value in peer.parameters())
    same(peer.encode(x), sae.encode(x))
    same(peer(x), sae(x))
    in_pieces = x.view(4, 16, D)
    same(peer(in_pieces), sae(in_pieces))


@each
def test_it_is_what_saelens_loads_from_the_folder_that_convert_writes(name, tmp_path):
    sae = own(CAN[name])
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="saelens")
    peer, loaded = to_saelens(sae), SAE.load_from_disk(tmp_path / "b")
    assert peer.cfg.to_dict() == loaded.cfg.to_dict()
    assert peer.state_dict().keys() == loaded.state_dict().keys()
    assert all(
        torch.equal(value, loaded.state_dict()[key]) for key, value in peer.named_parameters()
    )


@each
def test_no_weight_is_copied_that_need_not_be(name):
    sae = own(CAN[name])
    peer = to_saelens(sae)
    shared = {value.untyped_storage().data_ptr() for value in sae.parameters()}
    copied = {
        key
        for key, value in peer.named_parameters()
        if value.untyped_storage().data_ptr() not in shared
    }
    assert copied == ({"W_enc", "W_dec", "b_dec"} if name == "standard, scale" else set())
    assert sae.b_dec.requires_grad is False


@each
def test_saelens_saves_it_and_loads_it_again(name, tmp_path, same):
    sae, x = own(CAN[name]), inputs(torch.float32)
    to_saelens(sae).save_model(tmp_path)
    same(SAE.load_from_disk(tmp_path)(x), sae(x))


def test_a_decoder_that_its_file_keeps_transposed_is_taken_as_it_is(tmp_path, same):
    cfg = own(CAN["standard"]).cfg
    tensors = dict(own(CAN["standard"]).named_parameters())
    tensors["W_dec"] = tensors["W_dec"].data.T.contiguous().T
    sae, x = build_sae(cfg, tensors), inputs(torch.float32)
    peer = to_saelens(sae)
    assert not peer.W_dec.is_contiguous()
    assert peer.W_dec.data_ptr() == sae.W_dec.data_ptr()
    same(peer(x), sae(x))
    peer.save_model(tmp_path)
    same(SAE.load_from_disk(tmp_path)(x), sae(x))


def test_mixed_dtypes_become_the_widest(same):
    sae = own(CAN["jumprelu"]).to(torch.bfloat16)
    assert (sae.W_dec.dtype, sae.threshold.dtype) == (torch.bfloat16, torch.float32)
    peer, x = to_saelens(sae), inputs(torch.float32)
    assert {value.dtype for value in peer.parameters()} == {torch.float32}
    assert peer.threshold.data_ptr() == sae.threshold.data_ptr()
    same(peer(x), sae.to(torch.float32)(x))


def test_config_and_metadata_are_saelens_own():
    spec = CAN["standard"] | {
        "site": SITE | {"hook_name": "blocks.5.hook_mlp_out", "centred": True},
        "tokens": {"prepend_bos": True, "context": 64},
        "notes": {"neuronpedia_id": "gpt2-small/5-mlp"},
    }
    cfg = to_saelens(own(spec)).cfg
    assert (cfg.architecture(), cfg.d_in, cfg.d_sae, cfg.device) == ("standard", D, N, "cpu")
    meta = cfg.metadata
    assert (meta.model_name, meta.hook_name) == ("openai-community/gpt2", "blocks.5.hook_mlp_out")
    assert (meta.prepend_bos, meta.context_size) == (True, 64)
    assert meta.neuronpedia_id == "gpt2-small/5-mlp"
    assert meta.model_from_pretrained_kwargs == {"center_writing_weights": True}
    json.dumps(cfg.to_dict())


def test_a_hook_z_sae_takes_heads_there_and_is_flat_here(same):
    site = {"hook_name": "blocks.5.attn.hook_z", "layer": 5, "point": "attn_z"}
    sae, x = own(CAN["standard"] | {"site": site}), inputs(torch.float32)
    same(to_saelens(sae)(x.view(64, 2, 3)).flatten(-2), sae(x))


def test_a_hooked_transformer_takes_it():
    """As SAEBench and SAEDashboard use it: the features in the cache are saezoo's."""
    torch.manual_seed(0)
    small = {"n_layers": 2, "d_model": D, "n_ctx": 8, "d_head": 3, "d_vocab": 20}
    model = HookedSAETransformer(HookedTransformerConfig(act_fn="relu", device="cpu", **small))
    hook, tokens = "blocks.1.hook_resid_post", torch.arange(8).view(1, 8)
    sae = own(CAN["topk"] | {"site": {"hook_name": hook, "layer": 1}})
    _, plain = model.run_with_cache(tokens)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[to_saelens(sae)])
    assert close(cache[f"{hook}.hook_sae_acts_post"], sae.encode(plain[hook]))
    assert close(cache[f"{hook}.hook_sae_output"], sae(plain[hook]))
