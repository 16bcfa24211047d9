"""Every format of several layers or models computes what its authors' own formula computes."""

import pytest
import torch

from saezoo import rows
from saezoo.build import need_sae
from saezoo.clt import CrossLayerTranscoder
from saezoo.clt_layer import CLTLayer
from saezoo.convert import convert_sae
from saezoo.crosscoder import Crosscoder
from saezoo.errors import CannotConvert, ConfigError, InputError, MissingFile, UnknownSAE
from saezoo.formats import detect
from saezoo.interop import to_saelens
from saezoo.load import load_sae
from saezoo.numerics import TOLERANCE, close, largest_difference
from saezoo.save import save_sae
from tests.origins import (
    SEVERAL,
    finetuning_crosscoder,
    gemma_scope_2_multi,
    kissane_crosscoder,
    llamascopium_multi,
    mntss_clt,
)
from tests.origins._multi import D, L, N

LAYERED = [origin for origin in SEVERAL if origin.layered]
each_origin = pytest.mark.parametrize("origin", SEVERAL, ids=str)
each_layered = pytest.mark.parametrize("origin", LAYERED, ids=str)


def load(origin, folder, seed=0, dtype=torch.float64):
    tensors = origin.tensors(torch.Generator().manual_seed(seed))
    path = origin.write(folder, tensors)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    return path, load_sae(path, dtype=dtype), cast


def activations(seed=50, tokens=48, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, L, D, generator=generator, dtype=dtype) * 2 + 0.5


def dense(model, x):
    """encode_sparse of all, as dense features."""
    found = model.encode_sparse(x)
    return (
        torch.stack([f.to_dense() for f in found], -2) if type(found) is tuple else found.to_dense()
    )


@each_origin
@pytest.mark.parametrize("chunk", [2**25, 40], ids=["whole", "in pieces"])
@pytest.mark.parametrize("seed", range(2))
def test_a_loaded_module_computes_what_its_origin_computes(
    origin, seed, chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr(rows, "CHUNK", chunk)
    _, model, tensors = load(origin, tmp_path, seed)
    x = activations(seed + 50)
    features, out = origin.encode(tensors, x), origin.forward(tensors, x)
    assert (features != 0).any(0).sum() > 3
    assert (features == 0).any(0).sum() > 3
    assert close(model.encode(x), features)
    assert close(dense(model, x), features)
    assert close(model(x), out)
    assert close(model.decode(model.encode(x), x), out)
    assert close(model.decode(model.encode_sparse(x), x), out)
    assert close(model(x.view(4, 3, 4, L, D)).view_as(x), out)
    assert model(x[:0]).shape == (0, L, D)


@each_origin
def test_in_float32_it_is_as_near_as_float32_allows(origin, tmp_path):
    _, model, tensors = load(origin, tmp_path, dtype=torch.float32)
    x = activations(9, dtype=torch.float32)
    assert close(model.encode(x), origin.encode(tensors, x))
    assert close(model(x), origin.forward(tensors, x))


@each_origin
def test_a_known_mistake_would_be_seen(origin, tmp_path):
    _, model, tensors = load(origin, tmp_path)
    x = activations(9)
    seen = [largest_difference(mistake(tensors, x), model(x)) for mistake in origin.mistakes]
    assert origin.mistakes
    assert all(difference > 100 * TOLERANCE[torch.float32] for difference in seen)


@each_origin
def test_the_files_say_which_format_they_are(origin, tmp_path):
    path, model, _ = load(origin, tmp_path)
    assert detect(path) == origin.format
    assert (model.d_in, model.d_sae, model.d_out) == (D, N, D)
    assert isinstance(model, CrossLayerTranscoder if hasattr(model, "layers") else Crosscoder)
    assert not any(value.requires_grad for value in model.parameters())


@each_layered
@pytest.mark.parametrize("layer", range(L))
def test_a_layer_by_name_is_exactly_that_layer(origin, layer, tmp_path):
    path, whole, tensors = load(origin, tmp_path)
    one = load_sae(path / f"layer_{layer}", dtype=torch.float64)
    x = activations()
    assert isinstance(one, CLTLayer)
    assert (one.layer, one.cfg.layer, one.targets[-1]) == (layer, layer, L - 1)
    features = origin.encode(tensors, x)
    assert close(one.encode(x[:, layer]), features[:, layer])
    assert close(one.encode_sparse(x[:, layer]).to_dense(), features[:, layer])
    # what the layer adds is what goes missing without it
    others = features.clone()
    others[:, layer] = 0
    added = whole.decode(features) - whole.decode(others)
    got = one.decode(one.encode(x[:, layer]))
    assert got.shape == (len(x), len(one.targets), D)
    assert close(got, added[:, list(one.targets)])
    assert torch.equal(got, whole.layer(layer).decode(one.encode(x[:, layer])))
    with pytest.raises(InputError, match="has no forward") as caught:
        one(x[:, layer])
    assert "encode and decode" in str(caught.value)


def test_features_of_a_layer_whose_k_is_of_all_layers_are_refused_with_the_reason(tmp_path):
    origin = next(o for o in SEVERAL if o.name == "clt, topk of all layers")
    path, whole, _ = load(origin, tmp_path)
    with pytest.raises(ConfigError, match="chosen among all layers"):
        load_sae(path / "layer_1")
    with pytest.raises(InputError, match="chosen among all layers"):
        whole.layer(1).encode(torch.ones(2, D, dtype=torch.float64))


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (mntss_clt.ORIGINS[0], "W_enc_3"),
        (gemma_scope_2_multi.ORIGINS[0], "params_layer_3"),
        (kissane_crosscoder.ORIGINS[0], "has no layers"),
        (llamascopium_multi.ORIGINS[0], "layers 0 to 2"),
        (llamascopium_multi.ORIGINS[-1], "has no layers"),
    ],
    ids=str,
)
def test_a_layer_that_there_is_not_is_missing(origin, said, tmp_path):
    path, _, _ = load(origin, tmp_path)
    with pytest.raises(MissingFile) as caught:
        load_sae(path / "layer_3")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@each_origin
@pytest.mark.parametrize("how", ["convert", "save"])
def test_a_native_folder_holds_it_bit_for_bit(origin, how, tmp_path):
    path, _, _ = load(origin, tmp_path)
    source = load_sae(path)
    if how == "convert":
        proof = convert_sae(path, tmp_path / "native")
        assert (proof.difference, proof.format) == (0, "native")
    else:
        save_sae(source, tmp_path / "native")
    again = load_sae(tmp_path / "native")
    x = activations(dtype=torch.float32)
    assert detect(tmp_path / "native") == "native"
    assert again.cfg == source.cfg
    assert torch.equal(again(x), source(x))
    for (name, a), (other, b) in zip(
        source.named_parameters(), again.named_parameters(), strict=True
    ):
        assert (name, a.dtype) == (other, b.dtype)
        assert torch.equal(a, b)
    again = convert_sae(tmp_path / "native", tmp_path / "once more")
    assert again.difference == 0
    if origin.layered:
        one, whole = load_sae(tmp_path / "native" / "layer_1"), source.layer(1)
        save_sae(one, tmp_path / "one")
        for layer in (one, load_sae(tmp_path / "one"), load_sae(tmp_path / "one" / "layer_1")):
            assert layer.targets == whole.targets
            assert torch.equal(layer.encode(x[:, 1]), whole.encode(x[:, 1]))
            f = layer.encode_sparse(x[:, 1])
            assert torch.equal(layer.decode(f), whole.decode(f))
        save_sae(whole, tmp_path / "one")
        assert load_sae(tmp_path / "one").cfg == one.cfg


@pytest.mark.parametrize("to", ["sparsify", "saelens"])
@pytest.mark.parametrize("origin", [mntss_clt.ORIGINS[0], kissane_crosscoder.ORIGINS[0]], ids=str)
def test_no_format_of_one_layer_takes_it(origin, to, tmp_path):
    path, _, _ = load(origin, tmp_path)
    names = [path, path / "layer_1"] if origin.layered else [path]
    for name in names:
        with pytest.raises(CannotConvert, match="cannot express"):
            convert_sae(name, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_who_wants_an_sae_says_so(tmp_path):
    path, model, _ = load(mntss_clt.ORIGINS[0], tmp_path)
    with pytest.raises(UnknownSAE, match=r"cross-layer transcoder.*saezoo demo takes an SAE"):
        need_sae(model, str(path), "saezoo demo")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"features": [0, 1]}, "features= is for SAEs of one layer"),
        ({"encoder_only": True}, "encoder_only= is for SAEs of one layer"),
        ({"dtype": {"W_dec": torch.bfloat16}}, "takes one dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("origin", [mntss_clt.ORIGINS[0], kissane_crosscoder.ORIGINS[0]], ids=str)
def test_it_is_not_loaded_in_part_and_says_so(origin, asked, said, tmp_path):
    path, _, _ = load(origin, tmp_path)
    for name in [path, path / "layer_1"] if origin.layered else [path]:
        with pytest.raises(InputError, match=said) as caught:
            load_sae(name, **asked)
        assert "\n" not in str(caught.value)


WRONG = [
    (lambda m, x: m.encode(x[:, :2]), "every layer"),
    (lambda m, x: m.encode(x[:, 0]), "every layer"),
    (lambda m, x: m(x.long()), "float dtype"),
    (lambda m, x: m(x.tolist()), "list"),
    (lambda m, x: m.layer(1).encode(x), None),
    (lambda m, _: m.layer(1).encode(torch.ones(2, D + 1)), "layer 1 alone"),
    (lambda m, _: m.decode(torch.ones(2, N)), "features of every layer"),
    (lambda m, x: m.decode(m.encode_sparse(x)[:2]), "features of 3 layers, got 2"),
    (lambda m, _: m.layer(0).decode(torch.ones(2, N + 1)), "features of this layer"),
]


@pytest.mark.parametrize(("call", "said"), WRONG, ids=[str(said) for _, said in WRONG])
def test_inputs_of_another_shape_are_refused_in_one_line(call, said, tmp_path):
    model = load(mntss_clt.ORIGINS[0], tmp_path, dtype=torch.float32)[1]
    x = activations(dtype=torch.float32)
    if said is None:  # leading dimensions of a layer's activations may be any
        assert call(model, x).shape == (len(x), L, N)
        return
    with pytest.raises(InputError) as caught:
        call(model, x)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_crosscoder_refuses_partial_inputs_and_features_of_another_kind(tmp_path):
    model = load(kissane_crosscoder.ORIGINS[0], tmp_path, dtype=torch.float32)[1]
    for x in (torch.ones(4, L - 1, D), torch.ones(4, D), torch.ones(4, L, D - 1)):
        with pytest.raises(InputError, match="none left out or masked"):
            model(x)
    with pytest.raises(InputError, match=r"expected \(…, 16\)"):
        model.decode(torch.ones(2, L, N + 1))
    each = next(o for o in SEVERAL if o.name == "crosscoder, each token normalised")
    model = load(each, tmp_path, dtype=torch.float32)[1]
    with pytest.raises(InputError, match="normalises every token"):
        model.decode(model.encode(torch.ones(2, L, D)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "origin", [mntss_clt.ORIGINS[3], finetuning_crosscoder.ORIGINS[2]], ids=str
)
def test_small_tensors_stay_float32_whatever_the_dtype(origin, dtype, tmp_path):
    _, model, tensors = load(origin, tmp_path, dtype=torch.float32)
    path = next(path for path in tmp_path.iterdir())
    low = load_sae(path, dtype=dtype)
    moved = load_sae(path).to(dtype)
    for small in (low, moved):
        for name, value in small.named_parameters():
            if not name.rpartition(".")[2].startswith("W_") and "W_skip" not in name:
                assert value.dtype == torch.float32, name
    assert low.dtype == moved.dtype == dtype
    x = activations(dtype=torch.float32)
    out = low(x)
    assert out.dtype == torch.float32
    assert largest_difference(out, model(x)) < TOLERANCE[dtype]
    assert close(moved(x), out, dtype)
    assert tensors


def test_sixteen_bit_files_are_computed_in_float32_on_a_cpu_and_never_cast_as_a_whole(tmp_path):
    origin = next(o for o in SEVERAL if o.name == "bfloat16" and o.format == "mntss_clt")
    path, _, tensors = load(origin, tmp_path, dtype=torch.float32)
    model = load_sae(path)
    assert model.dtype == torch.float32
    assert model.layer(0).W_enc_rows.dtype == torch.bfloat16
    x = activations(dtype=torch.float32)
    assert close(model(x), origin.forward(tensors, x))


def test_a_decode_that_lacks_the_skip_says_so_once(tmp_path, caplog):
    _, model, tensors = load(mntss_clt.ORIGINS[3], tmp_path)
    x = activations()
    for _ in range(2):
        without = model.decode(model.encode(x))
    assert [record.message[:30] for record in caplog.records] == ["decode(features) without x lac"]
    skips = torch.stack([x[:, m] @ tensors[f"W_skip_{m}"] for m in range(L)], 1)
    assert close(without + skips, model(x))


def test_saelens_takes_no_module_of_several_layers(tmp_path):
    model = load(mntss_clt.ORIGINS[0], tmp_path)[1]
    for one in (model, model.layer(0)):
        with pytest.raises(CannotConvert, match="SAEs of one layer"):
            to_saelens(one)


def test_gradients_flow_back_to_the_activations_and_through_the_features(tmp_path):
    _, model, tensors = load(mntss_clt.ORIGINS[3], tmp_path)
    x = activations(tokens=5).requires_grad_()
    model(x).square().sum().backward()
    got, x.grad = x.grad, None
    mntss_clt.forward(tensors, x).square().sum().backward()
    assert close(got, x.grad)
