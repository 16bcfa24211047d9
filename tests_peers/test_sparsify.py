"""EleutherAI's SparseCoder: what it saves, saezoo reads; what saezoo writes, it loads."""

import pytest
import torch
from sparsify import SparseCoder, SparseCoderConfig

from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.load import load_sae
from saezoo.numerics import TOLERANCE, close, largest_difference
from saezoo.sae import build_sae
from saezoo.save import save_sae
from tests.origins.sparsify import ORIGINS
from tests_peers._compare import DTYPES, D, K, N, check_loaded, inputs, randomise

CODERS = {
    "topk": {},
    "topk, expansion factor": {"num_latents": 0, "expansion_factor": N // D},
    "groupmax": {"activation": "groupmax"},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
    "skip, as published in 2025": {"skip_connection": True},
    "groupmax skip transcoder": {
        "activation": "groupmax",
        "transcode": True,
        "skip_connection": True,
    },
}


def saved(name, folder, dtype=torch.float32, **more):
    """SparseCoder.save_to_disk of random weights, and the coder."""
    options = {"k": K, "num_latents": N} | CODERS[name] | more
    coder = SparseCoder(D, SparseCoderConfig(**options))
    coder = randomise(coder).to(dtype)
    coder.save_to_disk(folder)
    return coder


def dense(coder):
    """encode as (tokens, N): the package gives values and indices."""

    def encode(x):
        values, indices, _ = coder.encode(x)
        return torch.zeros(len(x), N, dtype=x.dtype).scatter(-1, indices, values)

    return encode


def output(coder):
    return lambda x: coder(x).sae_out


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads(name, dtype, tmp_path, same):
    coder = saved(name, tmp_path / "layers.3").to(dtype)
    check_loaded(tmp_path / "layers.3", dense(coder), output(coder), same, dtype)
    assert load_sae(tmp_path / "layers.3").cfg.site.layer == 3


@pytest.mark.parametrize("name", CODERS)
def test_reads_bfloat16(name, tmp_path, same):
    saved(name, tmp_path / "layers.3", torch.bfloat16)
    wide = SparseCoder.load_from_disk(tmp_path / "layers.3").float()
    check_loaded(tmp_path / "layers.3", dense(wide), output(wide), same, torch.float32)


@pytest.mark.parametrize("name", CODERS)
def test_what_was_read_and_written_again_is_loaded_by_the_package(name, tmp_path, same):
    coder = saved(name, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="sparsify")
    again, x = SparseCoder.load_from_disk(tmp_path / "b"), inputs(torch.float32)
    same(dense(again)(x), dense(coder)(x))
    same(again(x).sae_out, coder(x).sae_out)


WRITTEN = {
    "topk": {"architecture": "topk", "subtract_b_dec": True},
    "topk, b_dec not subtracted": {"architecture": "topk"},
    "groupmax": {"architecture": "groupmax", "subtract_b_dec": True},
    "skip": {"architecture": "topk", "skip": True},
    "skip, b_dec subtracted": {"architecture": "topk", "skip": True, "subtract_b_dec": True},
    "signed": {
        "architecture": "topk",
        "subtract_b_dec": True,
        "signed": True,
        "relu_after": False,
    },
}


def written(name, tmp_path):
    """An SAE of saezoo's own making, and the package's SparseCoder of what saezoo wrote of it."""
    cfg = SAEConfig.from_json({"d_in": D, "d_sae": N, "k": K} | WRITTEN[name])
    generator = torch.Generator().manual_seed(0)
    shapes = cfg.tensor_shapes().items()
    sae = build_sae(cfg, {key: torch.randn(shape, generator=generator) for key, shape in shapes})
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="sparsify")
    return sae, SparseCoder.load_from_disk(tmp_path / "b")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "signed"])
def test_loads_what_saezoo_writes(name, dtype, tmp_path, same):
    sae, coder = written(name, tmp_path)
    sae, coder, x = sae.to(dtype), coder.to(dtype), inputs(dtype)
    same(dense(coder)(x), sae.encode(x))
    same(coder(x).sae_out, sae(x))


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
def test_the_origin_in_our_tests_is_the_package(origin, tmp_path, same):
    tensors = origin.tensors(torch.Generator().manual_seed(0))
    path = origin.write(tmp_path, tensors)
    coder = SparseCoder.load_from_disk(path).double()
    tensors = {key: value.double() for key, value in tensors.items()}
    x = inputs(torch.float64)
    if origin.name == "of 2024, signed":  # see test_it_forgets_signed
        assert largest_difference(origin.forward(tensors, x), coder(x).sae_out) > 1e-2
        return
    same(origin.encode(tensors, x), dense(coder)(x))
    same(origin.forward(tensors, x), coder(x).sae_out)


@pytest.mark.parametrize("name", ["topk", "skip transcoder"])
def test_with_multi_topk_its_forward_is_not_its_decode_of_its_encode(name, tmp_path, same):
    """A disagreement of the package with itself: forward computes the loss of 4 k latents last and
    returns that reconstruction, without the skip, as sae_out. saezoo's forward is k latents and
    the skip, as decode(encode(x)) is, and as forward is once multi_topk is off.
    """
    coder, x = saved(name, tmp_path / "a", multi_topk=True), inputs(torch.float32)
    sae = load_sae(tmp_path / "a")
    values, indices, pre = coder.encode(x)
    skip = x @ coder.W_skip.mT if coder.W_skip is not None else 0
    same(sae.encode(x), dense(coder)(x))
    same(sae(x), coder.decode(values, indices) + skip)
    assert torch.equal(coder(x).sae_out, coder.decode(*pre.topk(4 * K, sorted=False)))
    assert largest_difference(coder(x).sae_out, sae(x)) > 100 * TOLERANCE[torch.float32]
    coder.cfg.multi_topk = False
    same(sae(x), coder(x).sae_out)


def test_it_forgets_signed(tmp_path):
    """Known: sparsify of mid-2024 had `signed`; today's drops unknown keys of cfg.json without a
    word and applies ReLU. What saezoo writes for such an SAE only the code of its day computes.
    """
    sae, coder = written("signed", tmp_path)
    x = inputs(torch.float32)
    assert (sae.encode(x) < 0).any()
    assert not hasattr(coder.cfg, "signed")
    assert (coder.encode(x).top_acts >= 0).all()
    assert largest_difference(coder(x).sae_out, sae(x)) > 100 * TOLERANCE[torch.float32]
    assert close(load_sae(tmp_path / "b")(x), sae(x))
