"""AuxK on the compacted dead latents."""

import pytest
import torch
from saezoo_train.architectures.auxk import auxk_loss
from saezoo_train.kernels import auxk as kernels
from saezoo_train.kernels import reference

from saezoo.numerics import close
from tests_kernels.grid import DTYPES, device
from tests_kernels.lists import numbers

B, D, M = 37, 24, 90
SCALE, COEFFICIENT = 0.02, 1 / 32


def rounded(*shape, seed=0, dtype):
    """Few different numbers, so that many are equal."""
    return (numbers(*shape, seed=seed) * 4).round().div(4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 41])
@pytest.mark.parametrize("make", [numbers, rounded], ids=["different", "ties"])
def test_the_largest_of_each_row(make, k, dtype):
    pre = make(7, 41, seed=3, dtype=dtype)
    pre[2] = -pre[2].abs()
    pre[3, 5:] = -torch.inf
    got = kernels.keep_largest(pre, k)
    assert torch.equal(got, reference.keep_largest(pre, k))


def test_rows_that_are_too_wide_for_a_program(monkeypatch):
    monkeypatch.setattr(kernels, "WIDEST", 40)
    pre = numbers(7, 41)
    assert torch.equal(kernels.keep_largest(pre, 5), reference.keep_largest(pre, 5))


@pytest.mark.parametrize("capacity", [1, 4, 16, 64])
def test_dead_rows_rise_and_are_filled_up(capacity):
    silent = torch.zeros(50, dtype=torch.int64, device=device())
    silent[[3, 7, 8, 30, 49]] = 1000
    silent[9] = 999
    expected = [3, 7, 8, 30, 49, *[50] * 64][:capacity]
    got = kernels.dead_rows(silent, 999, capacity)
    assert got.dtype == torch.int32
    assert got.tolist() == expected
    assert reference.dead_rows(silent, 999, capacity).tolist() == expected


def given(dtype, dead, capacity):
    silent = torch.zeros(M, dtype=torch.int64, device=device())
    silent[dead] = 10
    return (
        numbers(B, D, seed=1, dtype=dtype),
        (numbers(B, D, seed=2) * SCALE).to(dtype),
        SCALE,
        numbers(M, D, seed=3, dtype=dtype),
        numbers(M, seed=4),
        numbers(M, D, seed=5, dtype=dtype) * 0.2,
        kernels.dead_rows(silent, 5, capacity),
    )


DEAD = [0, 3, 17, 18, 44, 60, 61, 88, 89]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 9, 12])
def test_loss_and_gradients(k, dtype):
    parts = given(dtype, DEAD, 16)
    loss, extra = kernels.auxk(*parts, k, COEFFICIENT)
    expected_loss, expected = reference.auxk(*parts, k, COEFFICIENT)
    assert close(loss, expected_loss, dtype)
    assert torch.equal(extra.slot_M, expected.slot_M)
    for name in ("dW_enc_AD", "dW_dec_AD", "db_A"):
        assert close(getattr(extra, name), getattr(expected, name), dtype), name


@pytest.mark.parametrize("k", [2, 9, 12])
def test_the_reference_is_the_trainers_own_loss(k):
    x, grad, scale, W_enc, b_enc, W_dec, dead = given(torch.float32, DEAD, 16)
    loss, extra = reference.auxk(x, grad, scale, W_enc, b_enc, W_dec, dead, k, COEFFICIENT)
    weights = [part.clone().requires_grad_() for part in (W_enc, b_enc, W_dec)]
    dead_M = torch.zeros(M, dtype=torch.bool, device=device())
    dead_M[DEAD] = True
    theirs = auxk_loss(grad / -scale, x, *weights, torch.zeros_like(x[0]), dead_M, k)
    (COEFFICIENT * theirs).backward()
    assert close(loss, theirs)
    rows = extra.slot_M[dead_M].long()
    assert rows.tolist() == list(range(len(DEAD)))
    assert (extra.slot_M[~dead_M] == -1).all()
    for got, weight in zip((extra.dW_enc_AD, extra.db_A, extra.dW_dec_AD), weights, strict=True):
        assert close(got[rows], weight.grad[dead_M])
        assert not weight.grad[~dead_M].any()


@pytest.mark.parametrize("kit", [kernels, reference], ids=["kernels", "reference"])
def test_an_error_without_spread_and_nothing_dead_give_nothing(kit):
    x, grad, *rest = given(torch.float32, DEAD, 16)
    flat = given(torch.float32, [], 16)
    for parts in ((x, torch.ones_like(grad), *rest), flat):
        loss, extra = kit.auxk(*parts, 4, COEFFICIENT)
        assert loss == 0
        assert not extra.dW_enc_AD.any()
        assert not extra.dW_dec_AD.any()
        assert not extra.db_A.any()
    assert (extra.slot_M == -1).all()
