"""Some features at a time gives what all at once gives, ties included, and takes less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saezoo import chunked, placing, sparse
from saezoo.chunked import cut
from saezoo.config import SAEConfig
from saezoo.numerics import close
from saezoo.sae import build_sae
from saezoo.sparse import SparseFeatures, decode_sparse, top_k

D_IN, D_SAE, K = 6, 96, 6

SPECS = {
    "relu": {"architecture": "relu"},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu without relu": {"architecture": "jumprelu", "relu_after": False},
    "gated": {"architecture": "gated"},
    "topk": {"architecture": "topk", "k": K},
    "topk without relu": {"architecture": "topk", "k": K, "relu_after": False},
    "signed": {"architecture": "topk", "k": K, "relu_after": False, "signed": True},
    "groupmax": {"architecture": "groupmax", "k": 3},
    "groupmax of large groups": {"architecture": "groupmax", "k": 1},
    "groupmax of small groups": {"architecture": "groupmax", "k": 48},
}
SCALED = {
    "topk, ranked": SPECS["topk"] | {"decoder_norm": "rank"},
    "topk, scaled": SPECS["topk"] | {"decoder_norm": "scale"},
    "relu, scaled": SPECS["relu"] | {"decoder_norm": "scale"},
    "jumprelu, ranked": SPECS["jumprelu"] | {"decoder_norm": "rank"},
    "layer norm": SPECS["relu"] | {"input_norm": {"kind": "layer_norm"}},
    "skip": SPECS["topk"] | {"skip": True},
}
each = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
all_of_them = pytest.mark.parametrize("spec", (SPECS | SCALED).values(), ids=SPECS | SCALED)


def made(spec, *, whole_numbers=False, dtype=torch.float32):
    """A random SAE; of whole numbers every sum is exact in any order, and ties are many."""
    cfg = SAEConfig.from_json({"d_in": D_IN, "d_sae": D_SAE, "subtract_b_dec": True} | spec)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in cfg.tensor_shapes().items():
        drawn = torch.randn(shape, generator=generator)
        tensors[name] = (drawn.round() * (name != "r_mag") if whole_numbers else drawn).to(dtype)
    return build_sae(cfg, tensors)


def inputs(whole_numbers=False):
    drawn = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(1)) * 2
    return drawn.round() if whole_numbers else drawn


def results(sae, x):
    features = sae.encode_sparse(x)
    return {
        "values": features.values,
        "indices": features.indices,
        "counts": features.counts,
        "encode": sae.encode(x),
        "forward": sae(x),
        "decode": sae.decode(features, x),
        "pre": sae.pre_activations(x),
    }


@pytest.fixture
def small(monkeypatch):
    """Parts of 32 features and tiles of 3 tokens."""
    monkeypatch.setattr(chunked, "NUMBERS", D_IN * 32)


@each
def test_parts_give_the_very_same_numbers_and_ties(spec, monkeypatch):
    x = inputs(whole_numbers=True)
    sae = made(spec, whole_numbers=True)
    at_once = results(sae, x)
    for numbers in (1, 7, D_IN * 5, D_IN * 32, D_IN * 50, D_IN * 95):
        monkeypatch.setattr(chunked, "NUMBERS", numbers)
        in_parts = results(sae, x)
        for what, expected in at_once.items():
            assert torch.equal(in_parts[what], expected), (what, numbers)


@all_of_them
@pytest.mark.usefixtures("small")
def test_parts_compute_the_same(spec, monkeypatch):
    sae, x = made(spec), inputs()
    in_parts = results(sae, x)
    monkeypatch.setattr(chunked, "NUMBERS", 2**25)
    for what, expected in results(sae, x).items():
        assert close(in_parts[what].double(), expected.double(), torch.float32), what


@each
@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (0,), (2, 0)], ids=str)
@pytest.mark.usefixtures("small")
def test_any_leading_shape(spec, lead):
    sae, x = made(spec), torch.randn(*lead, D_IN)
    features = sae.encode_sparse(x)
    assert features.counts.shape == lead
    assert features.values.shape == features.indices.shape
    assert sae.encode(x).shape == sae.pre_activations(x).shape == (*lead, D_SAE)
    assert sae(x).shape == x.shape


@each
@pytest.mark.usefixtures("small")
def test_gradients_go_through_as_if_nothing_were_cut(spec, monkeypatch):
    sae = made(spec)
    ours, theirs = (inputs().requires_grad_() for _ in range(2))
    sae(ours).square().sum().backward()
    monkeypatch.setattr(chunked, "NUMBERS", 2**25)
    sae(theirs).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("n", [5, 32, 96, 640, 4096])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_equal_keys_the_lower_index_comes_first(n, k, dtype, monkeypatch):
    monkeypatch.setattr(sparse, "TIES", 3 * n)
    generator = torch.Generator().manual_seed(n * k)
    for spread in (0, 1, 3, 40):
        keys = torch.randint(-spread, spread + 1, (11, n), generator=generator).to(dtype)
        expected = [
            sorted(range(n), key=lambda at, row=row: (-row[at], at))[:k] for row in keys.tolist()
        ]
        assert top_k(keys, k).tolist() == expected
        assert top_k(keys.view(11, 1, n), k).squeeze(1).tolist() == expected


def test_keys_that_are_not_numbers_are_the_largest_and_end_nowhere_else():
    keys = torch.tensor([[1.0, torch.nan, 1.0, 1.0, torch.inf], [torch.nan] * 5])
    assert top_k(keys, 3)[0].tolist() == [1, 4, 0]
    assert sorted(top_k(keys, 3)[1].tolist()) == sorted(set(top_k(keys, 3)[1].tolist()))


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(0, 9),
    d_sae=st.integers(1, 300),
    width=st.integers(1, 40),
    k=st.integers(1, 300),
    numbers=st.integers(1, 4000),
)
def test_every_feature_and_token_is_in_one_part(tokens, d_sae, width, k, numbers):
    group = d_sae // k if d_sae % k == 0 else 1
    before, chunked.NUMBERS = chunked.NUMBERS, numbers
    try:
        parts = cut(tokens, d_sae, width, group)
    finally:
        chunked.NUMBERS = before
    for items, count in ((parts.features, d_sae), (parts.tokens, tokens)):
        assert [at for item in items for at in range(count)[item]] == list(range(count))
    assert all(part.stop - part.start <= max(1, numbers // width) for part in parts.features)
    if group > 1:
        for part in parts.features:
            inside = part.start // group == (part.stop - 1) // group
            assert inside or (part.start % group == part.stop % group == 0)


KEPT = {"W_enc": torch.bfloat16, "W_dec": torch.bfloat16}


@all_of_them
@pytest.mark.usefixtures("small")
def test_16_bit_weights_that_stay_as_they_are_compute_as_if_they_were_float32(spec):
    stays = made(spec, dtype=torch.bfloat16)
    tensors = {name: value.bfloat16() for name, value in stays.named_parameters()}
    kept = build_sae(stays.cfg, tensors, dtype=KEPT)
    assert (kept.W_enc_rows.dtype, kept.W_dec.dtype, kept.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    assert kept.W_enc_rows.data_ptr() == tensors["W_enc_rows"].data_ptr()
    expected = results(stays, inputs())
    for what, got in results(kept, inputs()).items():
        assert got.dtype == expected[what].dtype
        assert close(got.double(), expected[what].double(), torch.float32), what
    dense = kept.encode(inputs())
    assert close(kept.decode(dense, inputs()), expected["decode"])


def test_above_a_size_16_bit_weights_stay_as_they_are_by_themselves(monkeypatch):
    sae = made(SPECS["relu"])
    tensors = {name: value.bfloat16() for name, value in sae.named_parameters()}
    assert build_sae(sae.cfg, tensors).W_dec.dtype == torch.float32
    monkeypatch.setattr(placing, "LARGE", 4 * 2 * D_IN * D_SAE - 1)
    large = build_sae(sae.cfg, tensors)
    assert large.W_dec.dtype == large.W_enc_rows.dtype == torch.bfloat16
    assert large.dtype == large.b_enc.dtype == torch.float32
    assert large.W_dec.data_ptr() == tensors["W_dec"].data_ptr()
    assert build_sae(sae.cfg, dict(sae.named_parameters())).W_dec.dtype == torch.float32
    assert build_sae(sae.cfg, tensors, dtype=torch.float32).W_dec.dtype == torch.float32
    wide = large.float()
    assert wide.W_dec.dtype == wide.dtype == torch.float32


@pytest.mark.parametrize("k_max", [1, 3, 40, D_SAE])
def test_sparse_features_decode_the_same_however_many_are_on(k_max, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(7, 2, k_max, generator=generator)
    indices = torch.stack([torch.randperm(D_SAE, generator=generator)[:k_max] for _ in range(14)])
    features = SparseFeatures(values, indices.view(7, 2, k_max), torch.full((7, 2), k_max), D_SAE)
    W_dec = torch.randn(D_SAE, 5, generator=generator)
    expected = features.to_dense() @ W_dec
    monkeypatch.setattr(sparse, "DENSE", 3 * D_SAE)
    assert close(decode_sparse(features, W_dec), expected)


def peak_of(call):
    """The most bytes that torch had at once during a call, beyond those before it."""
    held = most = 0
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        result = call()
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most, result


@pytest.mark.parametrize("kept", [None, KEPT], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated"])
def test_dense_features_are_never_in_memory(name, kept, monkeypatch):
    d_in, d_sae, tokens = 64, 16_384, 512
    cfg = SAEConfig.from_json({"d_in": d_in, "d_sae": d_sae} | SPECS[name])
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(shape, generator=generator) for key, shape in cfg.tensor_shapes().items()
    }
    for key in ("b_enc", "b_mag", "b_gate"):
        if key in tensors:
            tensors[key] -= 28
    if kept:
        tensors |= {key: tensors[key].bfloat16() for key in ("W_enc_rows", "W_dec")}
    sae, x = build_sae(cfg, tensors, dtype=kept), torch.randn(tokens, d_in, generator=generator)
    monkeypatch.setattr(chunked, "NUMBERS", 2**17)
    part, dense = 4 * 2**17, 4 * tokens * d_sae
    most, features = peak_of(lambda: sae.encode_sparse(x))
    output = features.values.nbytes + features.indices.nbytes
    room = 3 * part + 4 * output + 4 * x.nbytes
    assert most < room
    assert most < dense / 3
    most, _ = peak_of(lambda: sae(x))
    assert most < room
    assert most < dense / 3
