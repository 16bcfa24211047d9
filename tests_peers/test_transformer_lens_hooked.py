"""HookedTransformer, which TransformerLens 3 still has: its tensors are those of the plain
HuggingFace model, as they are and centred; and the guard sees what its processing changed.
"""

import re

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions

from saezoo.attaching import attach
from saezoo.capture import capture
from saezoo.config import Site
from saezoo.errors import CaptureError
from saezoo.guard import compare_host
from saezoo.numerics import close
from saezoo.sites import run_model
from tests.hosts import VOCABULARY, D, make_host, make_ids
from tests_peers.test_transformer_lens import SITES, check_alike, make_sae

HOOKED = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN", "d_mlp": 48, "eps": 1e-5},
    "llama": {
        "act_fn": "silu",
        "normalization_type": "RMS",
        "d_mlp": 16,
        "eps": 1e-6,
        "gated_mlp": True,
        "final_rms": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 6,
        "rotary_adjacent_pairs": False,
        "n_key_value_heads": 1,
    },
}
"""HookedTransformerConfig of two of the tiny models."""


def make_hooked(name, *, process=False):
    """The tiny model as a HookedTransformer; process: as from_pretrained does by default."""
    shape = {"n_layers": 3, "d_model": D, "n_heads": 2, "d_head": 6, "n_ctx": 64}
    cfg = HookedTransformerConfig(d_vocab=VOCABULARY, device="cpu", **shape, **HOOKED[name])
    convert = getattr(weight_conversions, f"convert_{name}_weights")
    model = HookedTransformer(cfg)
    model.load_and_process_state_dict(
        convert(make_host(name), cfg),
        fold_ln=process,
        center_writing_weights=process,
        center_unembed=process,
        fold_value_biases=process,
    )
    return model.eval()


@pytest.mark.parametrize("name", HOOKED)
def test_a_hooked_transformer_has_the_tensors_of_the_plain_model_and_goes_on_alike(name):
    check_alike(make_host(name), make_hooked(name))


@pytest.mark.parametrize("name", HOOKED)
def test_a_hooked_transformer_generates_with_its_cache_as_the_plain_model_does(name):
    ids, sae = make_ids(), make_sae(SITES["resid_post"])
    plain, hooked = make_host(name), make_hooked(name)
    stack = {"max_new_tokens": 4, "do_sample": False}
    with attach(plain, sae):
        mask = torch.ones_like(ids)
        expected = plain.generate(ids, attention_mask=mask, eos_token_id=None, **stack)
    with attach(hooked, sae, keep="all") as run:
        got = hooked.generate(ids, stop_at_eos=False, verbose=False, **stack)
    assert torch.equal(got, expected)
    assert [len(p[0].features.values[0]) for p in run.passes] == [9, 1, 1, 1]


def test_a_centred_host_gives_what_a_centred_site_takes_from_the_plain_one():
    ids, plain, hooked = make_ids(), make_host("gpt2"), make_hooked("gpt2", process=True)
    for point in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
        site = Site(layer=1, point=point, centred=True)
        assert close(capture(hooked, site, ids), capture(plain, site, ids)), point
        uncentred = Site(layer=1, point=point, centred=False)
        assert not close(capture(hooked, uncentred, ids), capture(plain, uncentred, ids)), point
        with pytest.raises(CaptureError, match="writing weights were centred"):
            attach(hooked, make_sae(uncentred)).__enter__()
    sae = make_sae(Site(layer=1, point="resid_post", centred=True))
    with attach(hooked, sae), attach(plain, sae):
        got, expected = run_model(hooked, ids), run_model(plain, ids)
    assert close(got.log_softmax(-1), expected.log_softmax(-1))


def test_the_guard_says_what_processing_changed():
    hooked = make_hooked("gpt2", process=True)
    doubts = {
        "resid_post": "centred .* does not say so",
        "attn_z": "value biases were folded",
    }
    for point, said in doubts.items():
        found = compare_host(hooked, make_sae(SITES[point]).cfg)
        assert [item.wrong for item in found] == [False]
        assert re.search(said, found[0].what)
    assert not compare_host(hooked, make_sae(SITES["mlp_act"]).cfg)
    for site in SITES.values():
        assert not compare_host(make_hooked("gpt2"), make_sae(site).cfg)
    with pytest.raises(CaptureError, match="gain was folded .* fold_ln=False"):
        attach(hooked, make_sae(SITES["mlp_in"])).__enter__()
