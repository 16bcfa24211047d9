"""Some features, the encoder alone, a dtype for each matrix: what is there is exact, and what is
not there is never made up.
"""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from saezoo.config import SAEConfig
from saezoo.errors import InputError, PartialSAE, SaezooError
from saezoo.interop import to_saelens
from saezoo.load import load_sae
from saezoo.numerics import close
from saezoo.placing import BLOCK, place
from saezoo.sae import build_sae
from saezoo.save import save_sae
from tests.origins import ALL
from tests.origins._origin import N

FEATURES = [7, 0, 23, 11]
RELU = {"architecture": "relu", "subtract_b_dec": True}
TOPK = {"architecture": "topk", "k": 3, "subtract_b_dec": True}


def tiny(**spec):
    cfg = SAEConfig.from_json({"d_in": 6, "d_sae": 24} | spec)
    generator = torch.Generator().manual_seed(0)
    shapes = cfg.tensor_shapes().items()
    return build_sae(cfg, {name: torch.randn(shape, generator=generator) for name, shape in shapes})


def inputs(dtype=torch.float64):
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(3)).to(dtype) * 2 + 1


@pytest.mark.parametrize("origin", ALL, ids=str)
def test_some_features_are_those_of_the_whole(origin, tmp_path):
    path = origin.write(tmp_path, origin.tensors(torch.Generator().manual_seed(0)))
    sae = load_sae(path, dtype=torch.float64)
    some = load_sae(path, dtype=torch.float64, features=FEATURES)
    x = inputs()
    assert some.feature_ids.tolist() == FEATURES
    assert (some.d_sae, some.cfg) == (4, sae.cfg)
    assert torch.equal(some.W_dec, sae.W_dec[FEATURES])
    assert torch.equal(some.W_enc, sae.W_enc[:, FEATURES])
    assert close(some.pre_activations(x), sae.pre_activations(x)[:, FEATURES])
    features = sae.encode(x)[:, FEATURES]
    alone = torch.zeros(40, N, dtype=torch.float64).index_copy(1, torch.tensor(FEATURES), features)
    assert close(some.decode(features, x), sae.decode(alone, x))
    if sae.cfg.k is None:
        assert close(some.encode(x), features)
        sparse = some.encode_sparse(x)
        assert close(sparse.to_dense(), features)
        assert close(some.decode(sparse, x), sae.decode(alone, x))
    else:
        for call in (some.encode, some.encode_sparse):
            with pytest.raises(PartialSAE, match="pre_activations"):
                call(x)
    with pytest.raises(PartialSAE, match=r"sae\.decode\(sae\.encode\(x\), x\)") as caught:
        some(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("origin", ALL, ids=str)
def test_the_encoder_alone_encodes_as_the_whole_does(origin, tmp_path):
    path = origin.write(tmp_path, origin.tensors(torch.Generator().manual_seed(0)))
    sae = load_sae(path, dtype=torch.float64)
    half = load_sae(path, dtype=torch.float64, encoder_only=True)
    x = inputs()
    assert torch.equal(half.encode(x), sae.encode(x))
    assert torch.equal(half.encode_sparse(x).indices, sae.encode_sparse(x).indices)
    assert "W_dec" not in dict(half.named_parameters())
    for call in (half, lambda y: half.decode(half.encode(y), y)):
        with pytest.raises(PartialSAE, match="encoder_only=True"):
            call(x)
    with pytest.raises(AttributeError, match="encoder_only=True left it out"):
        _ = half.W_dec


NORMS = [
    TOPK | {"decoder_norm": "rank"},
    TOPK | {"decoder_norm": "scale"},
    {"architecture": "jumprelu", "decoder_norm": "rank"},
]


@pytest.mark.parametrize("spec", NORMS, ids=str)
def test_norms_of_a_decoder_that_is_left_out_are_kept(spec, tmp_path):
    sae = tiny(**spec)
    save_sae(sae, tmp_path / "a")
    half = load_sae(tmp_path / "a", encoder_only=True)
    x = inputs(torch.float32)
    assert torch.equal(half.encode(x), sae.encode(x))
    assert half.to(torch.bfloat16).decoder_norms.dtype == torch.float32
    if sae.cfg.k is None:
        both = load_sae(tmp_path / "a", encoder_only=True, features=FEATURES)
        assert close(both.encode(x), sae.encode(x)[:, FEATURES])


@pytest.mark.parametrize(
    "given",
    [FEATURES, tuple(FEATURES), torch.tensor(FEATURES), np.array(FEATURES), iter(FEATURES)],
    ids=["list", "tuple", "tensor", "numpy", "iterator"],
)
def test_features_may_be_given_as_any_numbers(given, tmp_path):
    save_sae(tiny(**RELU), tmp_path / "a")
    assert load_sae(tmp_path / "a", features=given).feature_ids.tolist() == FEATURES
    assert load_sae(tmp_path / "a", features=range(3, 9)).feature_ids.tolist() == [*range(3, 9)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([24], "24 is no feature; there are 0 to 23"),
        ([3, -1], "-1 is no feature"),
        ([1.5], "1.5 is no feature"),
        (["3"], "'3' is no feature"),
        ([True], "True is no feature"),
        ([3, 5, 3], "3 is given twice"),
        ([], "one or more"),
        (torch.tensor(3), "one or more"),
        (torch.tensor([0.5]), "0.5 is no feature"),
    ],
    ids=str,
)
def test_what_is_no_feature_is_refused_in_one_line(given, said, tmp_path):
    save_sae(tiny(**RELU), tmp_path / "a")
    with pytest.raises(InputError) as caught:
        load_sae(tmp_path / "a", features=given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_sae_in_part_is_not_saved_or_handed_on_as_a_whole_one(tmp_path):
    save_sae(tiny(**RELU), tmp_path / "a")
    for options in ({"features": FEATURES}, {"encoder_only": True}):
        part = load_sae(tmp_path / "a", **options)
        with pytest.raises(PartialSAE, match="loaded in part"):
            save_sae(part, tmp_path / "b")
        with pytest.raises(PartialSAE, match="loaded in part"):
            to_saelens(part)
    assert not (tmp_path / "b").exists()


def test_what_it_is_can_be_read_off_it(tmp_path):
    save_sae(tiny(**RELU), tmp_path / "a")
    assert "d_sae=4 of 24" in repr(load_sae(tmp_path / "a", features=FEATURES))
    assert "encoder only" in repr(load_sae(tmp_path / "a", encoder_only=True))
    assert "d_sae=24," in repr(load_sae(tmp_path / "a"))


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [
    # asked, W_enc, W_dec, products
    (None, F32, F32, F32),
    (BF16, BF16, BF16, BF16),
    (F64, F64, F64, F64),
    ({}, F32, F32, F32),
    ({"W_dec": BF16}, F32, BF16, F32),
    ({"W_enc": F16}, F16, F32, F32),
    ({"W_enc_rows": BF16, "W_dec": BF16}, BF16, BF16, F32),
    ({"W_dec": F64}, F32, F64, F64),
]


@pytest.mark.parametrize(("asked", "W_enc", "W_dec", "products"), DTYPES, ids=str)
def test_each_matrix_has_the_dtype_asked_for_and_biases_never_below_float32(
    asked, W_enc, W_dec, products, tmp_path
):
    save_sae(tiny(**RELU), tmp_path / "a")
    sae = load_sae(tmp_path / "a", dtype=asked)
    assert (sae.W_enc.dtype, sae.W_dec.dtype, sae.dtype) == (W_enc, W_dec, products)
    assert sae.b_enc.dtype == sae.b_dec.dtype == torch.promote_types(products, F32)
    whole, x = load_sae(tmp_path / "a"), inputs(F32)
    coarse = min(F32, W_enc, W_dec, key=lambda dtype: torch.finfo(dtype).bits)
    assert close(sae(x), whole(x), coarse)
    assert sae(x).dtype == F32
    if products == F32:
        # each weight is rounded once, and no sum
        for name in ("W_enc_rows", "W_dec"):
            kept = getattr(sae, name).dtype
            setattr(whole, name, torch.nn.Parameter(getattr(whole, name).to(kept).float()))
        assert close(sae(x), whole(x), F32)
        assert close(sae.encode(x), whole.encode(x), F32)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"threshold": BF16}, "threshold has none to choose"),
        ({"W_up": BF16}, "W_up has none to choose"),
        ({"W_dec": torch.int8}, "int8 is no float dtype"),
        ({"W_dec": "bfloat16"}, "bfloat16 is no float dtype"),
        (torch.int32, "int32 is no float dtype"),
    ],
    ids=str,
)
def test_a_dtype_for_what_has_none_is_refused_in_one_line(asked, said, tmp_path):
    save_sae(tiny(**RELU), tmp_path / "a")
    with pytest.raises(InputError, match=said):
        load_sae(tmp_path / "a", dtype=asked)


def test_a_tensor_goes_to_its_place_a_block_at_a_time_and_stays_where_nothing_changes():
    value = torch.randn(50, 4)
    assert place(value, torch.device("cpu"), F32) is value
    assert torch.equal(place(value.T, torch.device("cpu"), BF16), value.T.to(BF16))
    tall = torch.randn(3, BLOCK // 2)
    assert torch.equal(place(tall, torch.device("cpu"), F64), tall.double())
    rows = torch.tensor([2, 0])
    assert torch.equal(place(tall, torch.device("cpu"), F32, rows), tall[rows])
    assert place(value, torch.device("meta"), BF16).device.type == "meta"
    assert place(torch.zeros(0, 4), torch.device("cpu"), BF16).shape == (0, 4)


def test_straight_to_a_device_with_every_tensor(tmp_path):
    save_sae(tiny(**TOPK), tmp_path / "a")
    sae = load_sae(tmp_path / "a", device="meta", dtype={"W_dec": BF16})
    assert {value.device.type for value in sae.parameters()} == {"meta"}
    # on an accelerator what is not named keeps its dtype, and products are in the widest
    assert (sae.W_enc.dtype, sae.W_dec.dtype, sae.dtype) == (F32, BF16, F32)


HOLED = """
import sys, torch
from saezoo.load import load_sae

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return sum(1024 * int(l.split()[1]) for l in lines if l.startswith(("RssAnon", "RssFile")))

load_sae(sys.argv[2])(torch.zeros(1, 4))
before = anonymous()
sae = load_sae(sys.argv[1], features=range(5, 200_000, 20_000))
sae.encode(torch.ones(2, sae.d_in))
print(anonymous() - before)
"""


def test_only_the_rows_asked_for_are_read_of_a_file_larger_than_they_are(tmp_path):
    """Two matrices of 1 GB, which are holes in a sparse file: resident is what was read."""
    d_in, d_sae = 1024, 262_144
    save_sae(build_small(), tmp_path / "small")
    folder = tmp_path / "large"
    folder.mkdir()
    cfg = SAEConfig(architecture="relu", d_in=d_in, d_sae=d_sae)
    shapes, header, end = cfg.tensor_shapes(), {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "sae.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    data = {"saezoo_format": 1} | cfg.to_json()
    (folder / "config.json").write_text(json.dumps(data))
    with safe_open(folder / "sae.safetensors", "pt") as file:
        assert set(file.keys()) == set(shapes)
    command = [sys.executable, "-c", HOLED, str(folder), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert int(done.stdout) < 64 * 2**20 < 4 * d_in * d_sae


def build_small():
    return build_sae(
        SAEConfig(architecture="relu", d_in=4, d_sae=8),
        {
            "W_enc_rows": torch.zeros(8, 4),
            "W_dec": torch.zeros(8, 4),
            "b_enc": torch.zeros(8),
            "b_dec": torch.zeros(4),
        },
    )


def test_the_error_is_one_of_saezoos_own():
    assert issubclass(PartialSAE, SaezooError)
    assert issubclass(PartialSAE, RuntimeError)
