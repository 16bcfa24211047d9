"""Sums of decoder rows, the loss on them, and what it gives back."""

import pytest
import torch
from saezoo_train.kernels import decode as kernels
from saezoo_train.kernels import reference

from saezoo import sparse
from saezoo.errors import InputError
from saezoo.numerics import close
from tests_kernels.grid import DTYPES
from tests_kernels.lists import SHAPES, lists, numbers

WIDE = (3, 130, 180, 70)
"""More slots than stay in registers."""


@pytest.fixture
def poisoned():
    """torch itself fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, WIDE], ids=str)
def test_decode_is_the_sum_of_rows(shape, dtype, bias):
    tokens, d, d_sae, k = shape
    values, idx = lists(tokens, d_sae, k)
    W = numbers(d_sae, d, seed=1, dtype=dtype)
    bias_D = numbers(d, seed=2) if bias else None
    expected = reference.decode(values, idx, W, bias_D)
    assert close(kernels.decode(values, idx, W, bias_D), expected)
    assert close(kernels.decode(values, idx.long(), W, bias_D), expected)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, WIDE], ids=str)
def test_the_loss_its_gradient_and_that_of_the_values(shape, dtype, relu):
    tokens, d, d_sae, k = shape
    values, idx = lists(tokens, d_sae, k)
    W, x = numbers(d_sae, d, seed=1, dtype=dtype), numbers(tokens, d, seed=2, dtype=dtype)
    bias = numbers(d, seed=3) if relu else None
    got = kernels.decode_loss(values, idx, W, x, 0.3, bias, relu=relu)
    expected = reference.decode_loss(values, idx, W, x, 0.3, bias, relu=relu)
    for name, ours, theirs in zip(("grad", "loss", "dvalues"), got, expected, strict=True):
        assert ours.dtype == theirs.dtype, name
        # grad may be rounded to a neighbour, and dvalues are made of it
        assert close(ours, theirs, torch.float32 if name == "loss" else dtype), name
    assert not got[2][idx == d_sae].any()


def test_the_reference_is_the_gradient_of_the_dense_loss():
    tokens, d, d_sae, k = SHAPES[1]
    values, idx = lists(tokens, d_sae, k)
    W, x, bias = numbers(d_sae, d, seed=1), numbers(tokens, d, seed=2), numbers(d, seed=3)
    pre = values.clone()
    pre[values == 0] = -0.5
    pre.requires_grad_()
    place = idx.long()
    dense = torch.zeros(tokens, d_sae + 1, device=x.device).scatter(1, place, pre.relu())
    out = dense[:, :-1] @ W + bias
    out.retain_grad()
    losses = (out - x).pow(2).sum(-1)
    (0.3 / 2 * losses.sum()).backward()
    grad, loss, dpre = reference.decode_loss(values, idx, W, x, 0.3, bias, relu=True)
    assert close(grad, out.grad)
    assert close(loss, losses)
    assert close(dpre, pre.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, WIDE], ids=str)
def test_products_of_pairs(shape, dtype):
    tokens, d, d_sae, k = shape
    _, idx = lists(tokens, d_sae, k)
    W, rows = numbers(d_sae, d, seed=1, dtype=dtype), numbers(tokens, d, seed=2, dtype=dtype)
    got = kernels.pair_products(rows, idx, W)
    assert close(got, reference.pair_products(rows, idx, W), torch.float32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_librarys_sparse_decode_is_the_same_through_the_kernel(dtype, monkeypatch):
    acts = numbers(2, 9, 300, dtype=dtype).relu() * (numbers(2, 9, 300, seed=1) > 1.8)
    acts[0, 3] = 0
    features = sparse.pack_active(acts)
    W = numbers(300, 40, seed=2, dtype=dtype)
    monkeypatch.setattr(sparse, "runs_kernels", lambda _: False)
    expected = sparse.decode_sparse(features, W)
    monkeypatch.setattr(sparse, "runs_kernels", lambda _: True)
    assert close(sparse.decode_sparse(features, W), expected)
    assert close(sparse.decode_sparse(features, W), acts @ W)


def test_a_gradient_goes_through_torchs_own_sum(monkeypatch):
    monkeypatch.setattr(sparse, "runs_kernels", lambda _: True)
    features = sparse.pack_active((numbers(9, 300) - 1.8).relu())
    W = numbers(300, 40, seed=2).requires_grad_()
    sparse.decode_sparse(features, W).sum().backward()
    assert close(W.grad, features.to_dense().sum(0)[:, None].expand(300, 40))


def test_float64_is_summed_in_float64(monkeypatch):
    monkeypatch.setattr(sparse, "runs_kernels", lambda _: True)
    features = sparse.pack_active((numbers(9, 300).double() - 1.8).relu())
    W = numbers(300, 40, seed=2).double()
    assert close(sparse.decode_sparse(features, W), features.to_dense() @ W, torch.float64)


def test_a_device_that_cannot_run_them_is_left_alone():
    assert not sparse.runs_kernels(torch.device("cpu"))


def test_a_kernel_that_fails_is_told_of_once(monkeypatch, caplog):
    monkeypatch.setattr(sparse, "why_no_triton", lambda _: None)
    monkeypatch.setattr("saezoo.sparse_gpu.decode", lambda *_: 1 / 0)
    place = torch.device("cpu", 0)
    assert not sparse.runs_kernels(place)
    assert not sparse.runs_kernels(place)
    assert len(caplog.records) == 1
    assert "ZeroDivisionError" in caplog.text
    sparse.runs_kernels.cache_clear()


def test_no_tokens():
    values, idx = lists(5, 41, 3)
    assert kernels.decode(values[:0], idx[:0], numbers(41, 7)).shape == (0, 7)


def test_what_is_not_contiguous_is_refused_by_name():
    values, idx = lists(5, 41, 3)
    with pytest.raises(InputError, match="W_dec_MD"):
        kernels.decode(values, idx, numbers(7, 41).T)
