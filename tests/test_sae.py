"""The module: each architecture computes its formula, for any shape, device and dtype, and says
what it cannot take.
"""

import copy

import pytest
import torch
from torch import Tensor

from saezoo.config import ConstantNorm, LayerNorm, SAEConfig, Scale
from saezoo.errors import ConfigError, FormatError, InputError
from saezoo.numerics import close
from saezoo.sae import SAE, build_sae
from saezoo.sparse import SparseFeatures, decode_dense, decode_sparse, pack_active, top_k

D_IN, D_SAE, K = 6, 24, 3


def tiny(seed: int = 0, dtype: torch.dtype | None = torch.float64, **spec: object) -> SAE:
    """A random SAE in float64, with every bias far from zero so that a forgotten one shows."""
    cfg = SAEConfig.from_json({"d_in": D_IN, "d_sae": D_SAE} | spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in cfg.tensor_shapes().items()
    }
    return build_sae(cfg, tensors, dtype=dtype)


def pre(sae: SAE, z: Tensor) -> Tensor:
    return torch.einsum("...d,md->...m", z, sae.W_enc_rows) + sae.b_enc


def keep_largest(values: Tensor, by: Tensor) -> Tensor:
    """All but the K entries with the largest `by` of each row are set to 0, one row at a time."""
    out = torch.zeros_like(values)
    for row in range(values.shape[0]):
        for index in sorted(range(D_SAE), key=lambda i: -float(by.detach()[row, i]))[:K]:
            out[row, index] = values[row, index]
    return out


def relu(sae: SAE, z: Tensor) -> Tensor:
    return pre(sae, z).clamp_min(0)


def topk(sae: SAE, z: Tensor) -> Tensor:
    return keep_largest(pre(sae, z), pre(sae, z)).clamp_min(0)


def topk_without_relu(sae: SAE, z: Tensor) -> Tensor:
    return keep_largest(pre(sae, z), pre(sae, z))


def signed(sae: SAE, z: Tensor) -> Tensor:
    return keep_largest(pre(sae, z), pre(sae, z).abs())


def ranked(sae: SAE, z: Tensor) -> Tensor:
    a = pre(sae, z)
    return keep_largest(a, a * sae.W_dec.norm(dim=1)).clamp_min(0)


def jumprelu(sae: SAE, z: Tensor) -> Tensor:
    a = pre(sae, z)
    return torch.where(a > sae.threshold, a.clamp_min(0), torch.zeros_like(a))


def jumprelu_keep(sae: SAE, z: Tensor) -> Tensor:
    a = pre(sae, z)
    return torch.where(a > sae.threshold, a, torch.zeros_like(a))


def gated(sae: SAE, z: Tensor) -> Tensor:
    pi = torch.einsum("...d,md->...m", z, sae.W_enc_rows)
    magnitude = (pi * sae.r_mag.exp() + sae.b_mag).clamp_min(0)
    return torch.where(pi + sae.b_gate > 0, magnitude, torch.zeros_like(pi))


def groupmax(sae: SAE, z: Tensor) -> Tensor:
    a, size = pre(sae, z).clamp_min(0), D_SAE // K
    out = torch.zeros_like(a)
    for row in range(a.shape[0]):
        for group in range(K):
            best = max(
                range(group * size, (group + 1) * size), key=lambda i: float(a.detach()[row, i])
            )
            out[row, best] = a[row, best]
    return out


def tensor_topk(sae: SAE, z: Tensor) -> Tensor:
    """The K * tokens largest of all, one at a time."""
    a = pre(sae, z).clamp_min(0)
    norms = sae.W_dec.norm(dim=1) if sae.cfg.decoder_norm == "rank" else 1
    scores = (a * norms).detach().flatten()
    mask = torch.zeros_like(scores)
    for place in sorted(range(len(scores)), key=lambda i: -float(scores[i]))[: K * len(a)]:
        mask[place] = 1
    return a * mask.view_as(a)


CASES = {
    "relu": (relu, {"architecture": "relu"}),
    "topk": (topk, {"architecture": "topk", "k": K}),
    "topk without relu": (topk_without_relu, {"architecture": "topk", "k": K, "relu_after": False}),
    "topk signed": (signed, {"architecture": "topk", "k": K, "relu_after": False, "signed": True}),
    "topk by decoder norm": (ranked, {"architecture": "topk", "k": K, "decoder_norm": "rank"}),
    "jumprelu": (jumprelu, {"architecture": "jumprelu"}),
    "jumprelu without relu": (jumprelu_keep, {"architecture": "jumprelu", "relu_after": False}),
    "gated": (gated, {"architecture": "gated"}),
    "groupmax": (groupmax, {"architecture": "groupmax", "k": K}),
    "tensor_topk": (tensor_topk, {"architecture": "tensor_topk", "k": K}),
    "tensor_topk by decoder norm": (
        tensor_topk,
        {"architecture": "tensor_topk", "k": K, "decoder_norm": "rank"},
    ),
}
each_case = pytest.mark.parametrize(("formula", "spec"), CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("subtract", [False, True], ids=["x", "x - b_dec"])
@pytest.mark.parametrize("seed", range(3))
def test_each_architecture_computes_its_formula(formula, spec, subtract, seed):
    sae = tiny(seed, subtract_b_dec=subtract, **spec)
    x = torch.randn(
        40, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100)
    )
    expected = formula(sae, x - sae.b_dec if subtract else x)
    assert close(sae.encode(x), expected)
    assert close(sae.encode_sparse(x).to_dense(), expected)
    assert close(sae(x), expected @ sae.W_dec + sae.b_dec)
    assert close(sae.decode(expected), expected @ sae.W_dec + sae.b_dec)
    assert close(sae.decode(sae.encode_sparse(x)), expected @ sae.W_dec + sae.b_dec)


@each_case
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_any_leading_shape_and_float_dtype_gives_that_shape_and_dtype(formula, spec, lead, dtype):
    sae = tiny(dtype=torch.float32, **spec)
    x = torch.randn(*lead, D_IN).to(dtype)
    features = sae.encode_sparse(x)
    assert sae.encode(x).shape == (*lead, D_SAE)
    assert features.values.shape == features.indices.shape
    assert features.values.shape[:-1] == features.counts.shape == lead
    assert sae(x).shape == (*lead, D_IN)
    assert sae(x).dtype == dtype
    expected = formula(sae, x.float().reshape(-1, D_IN)) @ sae.W_dec + sae.b_dec
    coarser = torch.float32 if dtype == torch.float64 else dtype  # the weights are float32
    assert close(sae(x).reshape(-1, D_IN), expected.to(dtype), coarser)


@each_case
def test_sparse_features_are_every_active_one_strongest_first(formula, spec):
    sae = tiny(**spec)
    x = torch.randn(50, D_IN, dtype=torch.float64)
    features, expected = sae.encode_sparse(x), formula(sae, x)
    for row in range(50):
        used = int(features.counts[row])
        assert used == int((expected[row] != 0).sum())
        assert set(features.indices[row, :used].tolist()) == set(
            expected[row].nonzero().flatten().tolist()
        )
        magnitudes = features.values[row].abs()
        assert (magnitudes.diff() <= 0).all()
        assert not features.values[row, used:].any()
        assert not features.indices[row, used:].any()


@pytest.mark.parametrize(
    ("norm", "inward"),
    [
        (
            LayerNorm(eps=1e-2, ddof=1),
            lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-2),
        ),
        (
            LayerNorm(eps=0.5, ddof=0),
            lambda x: (
                (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 0.5)
            ),
        ),
        (ConstantNorm(), lambda x: x * (D_IN**0.5) / x.norm(dim=-1, keepdim=True)),
        (Scale(factor=0.3), lambda x: x * 0.3),
    ],
    ids=["layer_norm ddof 1", "layer_norm ddof 0", "constant_norm", "scale"],
)
def test_normalisation_is_undone_on_the_output_and_eps_is_only_on_the_way_in(norm, inward):
    sae = tiny(architecture="relu", input_norm=norm.to_json(), subtract_b_dec=True)
    x = torch.randn(30, D_IN, dtype=torch.float64) * 4 + 2
    f = relu(sae, inward(x) - sae.b_dec)
    y = f @ sae.W_dec + sae.b_dec
    if isinstance(norm, LayerNorm):
        y = y * x.std(-1, correction=norm.ddof, keepdim=True) + x.mean(-1, keepdim=True)
    elif isinstance(norm, ConstantNorm):
        y = y * x.norm(dim=-1, keepdim=True) / D_IN**0.5
    else:
        y = y / 0.3
    assert close(sae.encode(x), f)
    assert close(sae(x), y)
    assert torch.equal(sae.decode(sae.encode_sparse(x), x), sae(x))


def test_decode_keeps_no_state_from_an_earlier_encode():
    sae = tiny(architecture="relu", input_norm={"kind": "layer_norm"})
    x, other = torch.randn(2, 4, D_IN, dtype=torch.float64)
    f = sae.encode(x)
    first = sae.decode(f, x)
    sae.encode(other)
    assert torch.equal(sae.decode(f, x), first)


def test_scale_returns_activations_times_the_decoder_norm_and_the_same_reconstruction():
    plain, scaled = tiny(architecture="relu"), tiny(architecture="relu", decoder_norm="scale")
    x = torch.randn(20, D_IN, dtype=torch.float64)
    assert close(scaled.encode(x), plain.encode(x) * plain.W_dec.norm(dim=1))
    assert close(scaled(x), plain(x))


def test_a_transcoder_writes_d_out_and_adds_the_skip_of_the_raw_input():
    sae = tiny(architecture="topk", k=K, d_out=9, skip=True, input_bias=True)
    x = torch.randn(7, D_IN, dtype=torch.float64)
    f = topk(sae, x - sae.b_in)
    assert sae.W_skip.shape == (D_IN, 9)
    assert close(sae(x), f @ sae.W_dec + sae.b_dec + x @ sae.W_skip)
    assert close(sae.decode(sae.encode(x)), f @ sae.W_dec + sae.b_dec)


def test_shapes_read_as_in_the_papers():
    sae = tiny(architecture="topk", k=K)
    assert sae.W_enc.shape == (D_IN, D_SAE)
    assert sae.W_dec.shape == (D_SAE, D_IN)
    assert sae.W_enc.data_ptr() == sae.W_enc_rows.data_ptr()
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    assert not sae.training


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_input_and_equal_the_formulas(case):
    formula, spec = CASES[case]
    sae = tiny(**spec)
    x = torch.randn(10, D_IN, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    sae(ours).square().sum().backward()
    (formula(sae, theirs) @ sae.W_dec + sae.b_dec).square().sum().backward()
    assert close(ours.grad, theirs.grad)


def test_thresholds_and_biases_stay_float32_in_a_16_bit_module():
    sae = tiny(architecture="jumprelu", dtype=torch.float32)
    threshold = sae.threshold.clone()
    for changed in (copy.deepcopy(sae).half(), copy.deepcopy(sae).to(torch.bfloat16)):
        assert changed.W_enc_rows.dtype in (torch.float16, torch.bfloat16)
        assert changed.b_enc.dtype == changed.b_dec.dtype == torch.float32
        assert torch.equal(changed.threshold, threshold)
    built = build_sae(
        sae.cfg,
        {name: value.bfloat16() for name, value in sae.named_parameters()},
        dtype=torch.bfloat16,
    )
    assert built.dtype == torch.bfloat16
    assert built.threshold.dtype == torch.float32


def test_16_bit_weights_are_float32_on_a_cpu_unless_asked_otherwise():
    sae = tiny(architecture="relu")
    stored = {name: value.bfloat16() for name, value in sae.named_parameters()}
    assert build_sae(sae.cfg, stored).dtype == torch.float32
    assert build_sae(sae.cfg, stored, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(3, 7), "(…, 6)"),
        (torch.zeros(2, 3, 2), "flatten(-2)"),
        (torch.zeros(4, 6, dtype=torch.int64), "int64"),
        (torch.zeros(4, 6, device="meta"), "meta"),
        (torch.tensor(1.0), "(…, 6)"),
        ([1.0] * 6, "list"),
    ],
    ids=["width", "heads", "integers", "device", "scalar", "no tensor"],
)
def test_wrong_input_is_refused_with_what_was_expected(x, said):
    sae = tiny(architecture="relu", dtype=torch.float32)
    for call in (sae, sae.encode, sae.encode_sparse):
        with pytest.raises(InputError) as caught:
            call(x)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "features",
    [torch.zeros(3, 23), torch.zeros(3, 24, dtype=torch.int64), [0.0] * 24],
    ids=["width", "int", "list"],
)
def test_wrong_features_are_refused(features):
    with pytest.raises(InputError):
        tiny(architecture="relu", dtype=torch.float32).decode(features)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"architecture": "topk"}, "needs k"),
        ({"architecture": "relu", "k": 3}, "has no k"),
        ({"architecture": "topk", "k": 25}, "more than d_sae"),
        ({"architecture": "groupmax", "k": 5}, "multiple"),
        ({"architecture": "topk", "k": 3, "signed": True}, "signed"),
        ({"architecture": "gated", "relu_after": False}, "relu_after"),
        ({"architecture": "swiglu"}, "architecture"),
        ({"architecture": "relu", "colour": "red"}, "colour"),
        ({"architecture": "relu", "d_out": 9, "subtract_b_dec": True}, "d_out"),
        ({"architecture": "relu", "d_sae": -1}, "d_sae"),
        ({"architecture": "relu", "input_norm": {"kind": "batch"}}, "input_norm"),
    ],
    ids=str,
)
def test_a_spec_that_contradicts_itself_is_refused_in_one_line(spec, said):
    with pytest.raises(ConfigError, match=said) as caught:
        SAEConfig.from_json({"d_in": D_IN, "d_sae": D_SAE} | spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "integers"])
def test_tensors_that_do_not_fit_the_spec_are_refused(change):
    sae = tiny(architecture="relu")
    tensors = dict(sae.named_parameters())
    if change == "missing":
        del tensors["b_enc"]
    elif change == "unknown":
        tensors["threshold"] = torch.zeros(D_SAE)
    elif change == "shape":
        tensors["W_dec"] = tensors["W_dec"].T
    else:
        tensors["b_enc"] = torch.zeros(D_SAE, dtype=torch.int32)
    with pytest.raises(FormatError):
        build_sae(sae.cfg, tensors)


@pytest.mark.parametrize("n", [24, 96, 128, 4096, 4100])
@pytest.mark.parametrize("k", [1, 3, 24])
def test_top_k_finds_the_k_largest_however_they_lie(n, k):
    generator = torch.Generator().manual_seed(n + k)
    rough = torch.randint(0, 50, (37, n), generator=generator).float()  # many ties
    smooth = torch.randn(37, n, generator=generator)
    crowded = smooth.clone()
    crowded[:, : k + 2] += 100  # all in one group
    for keys in (rough, smooth, crowded, -smooth.abs()):
        index = top_k(keys, k)
        assert torch.equal(keys.gather(-1, index), keys.topk(k).values)
        assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("density", [0.0, 0.002, 0.03, 0.5, 1.0])
def test_sparse_and_dense_decoding_agree_whichever_way_is_taken(density):
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(9, 960, generator=generator) * (
        torch.rand(9, 960, generator=generator) < density
    )
    W_dec = torch.randn(960, 7, generator=generator)
    expected = dense @ W_dec
    packed = pack_active(dense)
    assert torch.equal(packed.to_dense(), dense)
    assert close(decode_dense(dense, W_dec), expected)
    assert close(decode_sparse(packed, W_dec), expected)


def test_unused_slots_never_overwrite_feature_zero():
    features = SparseFeatures(
        torch.tensor([[2.0, 0.0, 0.0]]), torch.zeros(1, 3, dtype=torch.int64), torch.tensor([1]), 4
    )
    assert features.to_dense().tolist() == [[2.0, 0.0, 0.0, 0.0]]
