"""The update of both matrices against the reference, and the reference against torch's autograd and
Adam.
"""

from dataclasses import replace

import pytest
import torch
from saezoo_train.kernels import adam as vectors
from saezoo_train.kernels import reference, sums, update
from saezoo_train.kernels.csc import csc
from saezoo_train.kernels.rows import Extra, adam_rates, make_rows
from saezoo_train.ops import normalise_rows, remove_parallel_gradient

from saezoo.numerics import close
from tests_kernels.grid import DTYPES, device
from tests_kernels.lists import SHAPES, lists, numbers

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
LONG = (700, 40, 9, 2)
"""A latent that every token has: some lists of hundreds of places."""
WIDTHS = [(12, d, 33, 4) for d in (1, 64, 96, 130)]
"""One piece, two whole ones, two with a rest."""


def places(idx, d_sae):
    return reference.csc(idx, d_sae)


def state(d_sae, d, dtype, moments=torch.float32):
    """Rows as in the middle of a run: moments that no gradient of a step dominates."""
    W_enc, W_dec = numbers(d_sae, d, seed=11), numbers(d_sae, d, seed=12)
    normalise_rows(W_dec)
    rows = make_rows(W_enc, W_dec, dtype, moments)
    for seed, name in enumerate(("enc_m", "dec_m")):
        getattr(rows, name).copy_(numbers(d_sae, d, seed=20 + seed))
    for seed, name in enumerate(("enc_v", "dec_v")):
        getattr(rows, name).copy_(numbers(d_sae, d, seed=30 + seed).square() + 0.1)
    return rows


def copied(rows):
    return replace(rows, **{name: value.clone() for name, value in vars(rows).items()})


def batch(shape, dtype):
    """What a step hands to the update: x, grad, values, dpre, idx, order, starts."""
    tokens, d, d_sae, k = shape
    values, idx = lists(tokens, d_sae, k)
    dpre = numbers(tokens, k, seed=5) * (values > 0)
    x, grad = numbers(tokens, d, seed=6, dtype=dtype), numbers(tokens, d, seed=7, dtype=dtype)
    return x, grad, values, dpre, idx, *places(idx, d_sae)


def rates(step=3, lr=1e-3):
    return torch.tensor(adam_rates(lr, ADAM["betas"], step), device=device())


def extra(d_sae, d, dtype):
    slot = torch.full((d_sae,), -1, dtype=torch.int32)
    slot[[d_sae - 1, 0, d_sae - 3]] = torch.tensor([0, 1, 2], dtype=torch.int32)
    parts = [numbers(8, d, seed=seed, dtype=dtype) for seed in (41, 42)]
    return Extra(slot.to(device()), *parts, numbers(8, seed=43))


def same(got, expected, dtype):
    for name, theirs in vars(expected).items():
        tolerance = dtype if name.endswith("_c") else torch.float32
        assert close(getattr(got, name), theirs, tolerance), name


@pytest.mark.parametrize("options", ["plain", "extra", "pull"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tensor_of_the_state(shape, dtype, options):
    _, d, d_sae, _ = shape
    ours, given = state(d_sae, d, dtype), batch(shape, dtype)
    theirs = copied(ours)
    more, norms = {}, [numbers(d_sae, seed=1) * torch.nan for _ in range(2)]
    if options == "extra":
        more = {"extra": extra(d_sae, d, dtype)}
    elif options == "pull":
        more = {"unit_rows": False, "pull_M": numbers(d_sae, seed=44)}
    wanted = options == "pull"
    got = update.update_rows(
        ours, *given, rates(), **ADAM, **more, norms_M=norms[0] if wanted else None
    )
    expected = reference.update_rows(
        theirs, *given, rates(), **ADAM, **more, norms_M=norms[1] if wanted else None
    )
    same(ours, theirs, dtype)
    assert close(got[0], expected[0]), "gb"
    assert close(got[1], expected[1]), "enc_part"
    assert not wanted or close(*norms)


@pytest.mark.parametrize("shape", [*WIDTHS, LONG], ids=str)
def test_every_width_and_lists_of_any_length(shape):
    _, d, d_sae, _ = shape
    ours, given = state(d_sae, d, torch.float32), batch(shape, torch.float32)
    theirs = copied(ours)
    got = update.update_rows(ours, *given, rates(), **ADAM)
    expected = reference.update_rows(theirs, *given, rates(), **ADAM)
    same(ours, theirs, torch.float32)
    assert close(got[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPES[0], LONG], ids=str)
def test_sums_by_latent(shape, dtype):
    _, _, d_sae, _ = shape
    x, _, values, _, idx, order, starts = batch(shape, dtype)
    assert close(
        sums.latent_sums(values, order, starts), reference.latent_sums(values, order, starts)
    )
    got = sums.weight_gradient(values, x, idx, order, starts)
    assert close(got, reference.weight_gradient(values, x, idx, order, starts))
    dense = torch.zeros(len(x), d_sae + 1, device=x.device).scatter(1, idx.long(), values)
    assert close(got, dense[:, :-1].T @ x.float())
    weights, W = numbers(d_sae, seed=1), numbers(d_sae, x.shape[1], seed=2, dtype=dtype)
    assert close(sums.weighted_rows(weights, W), reference.weighted_rows(weights, W))


def test_the_same_bits_every_time():
    shape, results = LONG, []
    for _ in range(2):
        rows, given = state(shape[2], shape[1], torch.bfloat16), batch(shape, torch.bfloat16)
        order, starts = csc(given[4], shape[2])
        update.update_rows(rows, *given[:5], order, starts, rates(), **ADAM)
        results.append(rows)
    for name in vars(results[0]):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name


def test_vectors():
    theirs = [numbers(1500, seed=1), numbers(1500, seed=2), numbers(1500, seed=3).square()]
    ours, grad = [part.clone() for part in theirs], numbers(1500, seed=4)
    for least in (None, 0.25):
        vectors.update_vector(*ours, grad, rates(), **ADAM, least=least)
        reference.update_vector(*theirs, grad, rates(), **ADAM, least=least)
        for got, expected in zip(ours, theirs, strict=True):
            assert close(got, expected)
    assert ours[0].min() == 0.25


@pytest.mark.parametrize("unit", [True, False], ids=["unit rows", "free rows"])
def test_the_reference_is_autograd_and_torchs_adam(unit):
    """Three steps on the loss sum(out * grad) + pull * |row|, linear in each matrix."""
    tokens, d, d_sae, k = SHAPES[1]
    rows = make_rows(numbers(d_sae, d, seed=11), numbers(d_sae, d, seed=12), torch.float32)
    if unit:
        normalise_rows(rows.W_dec)
    W_enc, W_dec = (part.clone().requires_grad_() for part in (rows.W_enc, rows.W_dec))
    adam = torch.optim.Adam([W_enc, W_dec], lr=1e-3, **ADAM)
    pull = None if unit else numbers(d_sae, seed=44)
    for step in range(1, 4):
        values, idx = lists(tokens, d_sae, k, seed=step)
        dpre, more = numbers(tokens, k, seed=5), extra(d_sae, d, torch.float32)
        x, grad = numbers(tokens, d, seed=6), numbers(tokens, d, seed=7)
        place = idx.long()
        parts = [
            torch.zeros(tokens, d_sae + 1, device=x.device).scatter(1, place, part)[:, :-1]
            for part in (dpre, values)
        ]
        loss = ((x @ W_enc.T) * parts[0]).sum() + ((parts[1] @ W_dec) * grad).sum()
        dead = more.slot_M >= 0
        slots = more.slot_M[dead].long()
        loss = loss + (W_enc[dead] * more.dW_enc_AD[slots]).sum()
        loss = loss + (W_dec[dead] * more.dW_dec_AD[slots]).sum()
        if pull is not None:
            loss = loss + (pull * W_dec.norm(dim=-1)).sum()
        adam.zero_grad()
        loss.backward()
        if unit:
            remove_parallel_gradient(W_dec.data, W_dec.grad)
        before = W_enc.detach().clone()
        adam.step()
        if unit:
            normalise_rows(W_dec.data)
        gb, enc_part = reference.update_rows(
            rows, x, grad, values, dpre, idx, *places(idx, d_sae), rates(step), **ADAM,
            unit_rows=unit, extra=more, pull_M=pull,
        )  # fmt: skip
        expected = parts[0].sum(0)
        expected[dead] += more.db_A[slots]
        assert close(gb, expected)
        assert close(enc_part, expected @ before)
    for name, weight in (("enc", W_enc), ("dec", W_dec)):
        held = adam.state[weight]
        assert close(getattr(rows, f"W_{name}"), weight)
        assert close(getattr(rows, f"{name}_m"), held["exp_avg"])
        assert close(getattr(rows, f"{name}_v"), held["exp_avg_sq"])
        assert torch.equal(getattr(rows, f"W_{name}_c"), getattr(rows, f"W_{name}"))


def test_moments_in_bfloat16_are_the_neighbours_and_the_weights_those_of_float32():
    shape = SHAPES[1]
    _, d, d_sae, _ = shape
    ours, given = state(d_sae, d, torch.float32, torch.bfloat16), batch(shape, torch.float32)
    theirs = replace(
        copied(ours),
        **{name: getattr(ours, name).float() for name in ("enc_m", "enc_v", "dec_m", "dec_v")},
    )
    seed = torch.tensor([7], dtype=torch.int32, device=device())
    update.update_rows(ours, *given, rates(), **ADAM, seed=seed)
    reference.update_rows(theirs, *given, rates(), **ADAM)
    assert close(ours.W_enc, theirs.W_enc)
    assert close(ours.W_dec, theirs.W_dec)
    for name in ("enc_m", "enc_v", "dec_m", "dec_v"):
        exact = getattr(theirs, name)
        off = (getattr(ours, name).float() - exact).abs()
        assert (off <= exact.abs() * 2**-7 + 1e-6).all(), name
        assert (off > exact.abs() * 2**-9).any(), f"{name} is rounded to the nearest"


def test_a_second_moment_in_bfloat16_shrinks_as_it_should():
    d, d_sae, k = 256, 16, 1
    rows = make_rows(
        numbers(d_sae, d, seed=1), numbers(d_sae, d, seed=2), torch.float32, torch.bfloat16
    )
    rows.enc_v.fill_(1)
    idx = torch.full((1, k), d_sae, dtype=torch.int32, device=device())
    values, x = torch.zeros(1, k, device=device()), numbers(1, d)
    for step in range(1, 21):
        seed = torch.tensor([1_000_003 * step % 2**31], dtype=torch.int32, device=device())
        update.update_rows(
            rows, x, x, values, values, idx, *places(idx, d_sae), rates(step), **ADAM, seed=seed
        )
    assert abs(float(rows.enc_v.float().mean()) - 0.999**20) < 5e-4
