"""The encoder's product, its group maxima, and the input's centring."""

import pytest
import torch
from saezoo_train.kernels import reference
from saezoo_train.kernels.centre import centre
from saezoo_train.kernels.encode import Tile, encode

from saezoo.errors import InputError
from tests_kernels.grid import (
    DTYPES,
    SIZES,
    assert_close,
    assert_same,
    device,
    dtype_name,
    normal,
)

SMALL = Tile(32, 128, 64, 2, 4, 2)
"""So that every size has several tiles in each direction."""


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("offset", [False, True], ids=["plain", "offset"])
def test_the_product_and_the_maxima_of_what_was_stored(dtype, size, offset):
    B, D, M = size
    x, w, b = normal(B, D, dtype=dtype), normal(M, D, dtype=dtype), normal(M)
    offset_M = normal(M, seed=1) if offset else None
    pre, maxima = encode(x, w, b, offset_M=offset_M, tile=SMALL)
    expected, _ = reference.encode(x, w, b)
    assert_close(pre, expected, "pre", dtype)
    # the maxima are those of the values as they lie in memory, bit for bit
    above = pre.float() if offset_M is None else pre.float() - offset_M
    padded = torch.nn.functional.pad(above, (0, -M % 32), value=-torch.inf)
    of_stored = padded.unflatten(1, (-1, 32)).amax(-1)
    assert_same(maxima, of_stored.to(maxima.dtype), "maxima")
    assert maxima.dtype == (torch.float32 if offset else dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_the_persistent_product_through_descriptors_is_the_same(dtype):
    if device().type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors are sm_90's")
    x, w, b = normal(41, 72, dtype=dtype), normal(200, 72, dtype=dtype), normal(200)
    tile = Tile(64, 128, 64, 2, 4, 2)
    pre, maxima = encode(x, w, b, tile=tile, tma=True)
    other, other_maxima = encode(x, w, b, tile=tile, tma=False)
    assert_close(pre, other, "pre", dtype)
    assert_close(maxima, other_maxima, "maxima", dtype)


@pytest.mark.parametrize("tma", [False, True])
def test_what_lies_past_the_last_latent_is_no_maximum(tma):
    if tma and device().type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors are sm_90's")
    x, w = normal(5, 64, dtype=torch.float16), normal(72, 64, dtype=torch.float16)
    b = torch.full((72,), -1000.0, device=device())
    pre, maxima = encode(x, w, b, tile=SMALL, tma=tma)
    assert (maxima < 0).all()
    assert_same(maxima[:, 2], pre[:, 64:].amax(-1), "last group")


def test_the_default_tile_takes_whole_inputs_that_are_not_contiguous():
    x, w, b = normal(63, 41).T, normal(70, 63), normal(70)
    assert not x.is_contiguous()
    got, expected = encode(x, w, b), reference.encode(x, w, b)
    assert_close(got[0], expected[0], "pre", torch.float32)
    assert_close(got[1], expected[1], "maxima", torch.float32)


def test_addresses_that_are_not_multiples_of_16_bytes():
    x, w = normal(42 * 63)[63:].view(41, 63), normal(70 * 63 + 1)[1:].view(70, 63)
    b = normal(71)[1:]
    got, expected = encode(x, w, b), reference.encode(x, w, b)
    assert_close(got[0], expected[0], "pre", torch.float32)


def test_no_tokens():
    pre, maxima = encode(normal(0, 8), normal(40, 8), normal(40))
    assert (pre.shape, maxima.shape) == ((0, 40), (0, 2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"w": normal(70, 62)}, "do not fit together"),
        ({"w": normal(70, 63).half()}, "do not fit together"),
        ({"b": normal(69)}, "do not fit together"),
        ({"w": normal(63, 70).T}, r"W_enc of shape \(70, 63\) is not contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    given = {"x": normal(4, 63), "w": normal(70, 63), "b": normal(70)} | change
    with pytest.raises(InputError, match=said):
        encode(given["x"], given["w"], given["b"])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_activations_about_b_dec_are_rounded_once(dtype, size):
    B, D, _ = size
    x, b = normal(B, D) + 100, normal(D) + 100
    # the interpreter cuts float32 off where it makes bfloat16 of it
    same = assert_same if dtype != torch.bfloat16 or device().type == "cuda" else assert_near
    same(centre(x, b, dtype), reference.centre(x, b, dtype), "centred")
    same(centre(x, None, dtype), x.to(dtype), "not centred")


def assert_near(got, expected, name):
    """Each within one step of bfloat16."""
    assert got.dtype == expected.dtype, name
    assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=0), name
