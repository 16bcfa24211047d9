"""The differentiable functions: every gradient by name, for a loss of one's own."""

import pytest
import torch
import torch.nn.functional as F
from saezoo_train.kernels import autograd as kernels

from saezoo.numerics import close
from tests_kernels.grid import DTYPES
from tests_kernels.lists import numbers

NAMES = ("x", "W_enc", "b_enc", "b_dec", "W_dec")
SIZES = [(5, 7, 41, 30), (19, 72, 130, 12)]
"""(B, D, M, K); of the first, some of the chosen are negative."""


def own_loss(out, values):
    """Not a squared error, and one that the values enter by themselves too."""
    return (out.float().pow(3) / 3).mean() + (values + 1).log().mean()


def parameters(shape, dtype):
    tokens, d, d_sae, _ = shape
    made = {
        "x": numbers(tokens, d, seed=1, dtype=dtype),
        "W_enc": numbers(d_sae, d, seed=2) / d**0.5,
        "b_enc": numbers(d_sae, seed=3) * 0.1 - 0.5,
        "b_dec": numbers(d, seed=4) * 0.1,
        "W_dec": numbers(d_sae, d, seed=5) / d**0.5,
    }
    return {name: value.requires_grad_() for name, value in made.items()}


def dense(given, idx, dtype):
    """The same function of the same choice, from weights as rounded as the kernels see them."""

    def seen(value):
        """Rounded, as the identity to a gradient."""
        return value + (value.detach().to(dtype).float() - value.detach())

    centred = given["x"].float() - given["b_dec"]
    pre = seen(centred) @ seen(given["W_enc"]).T + given["b_enc"]
    values = F.relu(pre.gather(1, idx.long()))
    acts = torch.zeros_like(pre).scatter(1, idx.long(), values)
    return acts @ seen(given["W_dec"]) + given["b_dec"], values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_gradient_by_name(shape, dtype):
    ours = parameters(shape, dtype)
    chosen = kernels.encode_top_k(ours["x"], ours["W_enc"], ours["b_enc"], ours["b_dec"], shape[3])
    out = kernels.decode(chosen, ours["W_dec"], ours["b_dec"])
    assert out.dtype == dtype
    own_loss(out, chosen.values_BK).backward()
    theirs = parameters(shape, dtype)
    expected, values = dense(theirs, chosen.idx_BK, dtype)
    own_loss(expected, values).backward()
    assert close(out, expected)
    assert close(chosen.values_BK, values, dtype)
    assert (chosen.values_BK == 0).any() == (shape == SIZES[0])
    for name in NAMES:
        assert close(ours[name].grad, theirs[name].grad, dtype), name
        assert ours[name].grad.dtype == ours[name].dtype, name


def test_it_chooses_the_largest():
    shape = SIZES[1]
    given = parameters(shape, torch.float32)
    chosen = kernels.encode_top_k(given["x"], given["W_enc"], given["b_enc"], None, shape[3])
    pre = F.linear(given["x"], given["W_enc"], given["b_enc"])
    expected = pre.topk(shape[3], dim=-1).indices.sort(dim=-1).values
    assert torch.equal(chosen.idx_BK.long(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_asks_for_a_gradient_gets_one(name):
    given = {key: value.detach() for key, value in parameters(SIZES[0], torch.float32).items()}
    given[name].requires_grad_()
    chosen = kernels.encode_top_k(
        given["x"], given["W_enc"], given["b_enc"], given["b_dec"] if name == "b_dec" else None, 30
    )
    kernels.decode(chosen, given["W_dec"]).sum().backward()
    assert given[name].grad.any()
    assert all(value.grad is None for key, value in given.items() if key != name)


def test_a_second_derivative_is_refused():
    given = parameters(SIZES[0], torch.float32)
    chosen = kernels.encode_top_k(given["x"], given["W_enc"], given["b_enc"], None, 30)
    out = kernels.decode(chosen, given["W_dec"]).pow(2).sum()
    (first,) = torch.autograd.grad(out, given["W_dec"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_same_bits_every_time():
    grads = []
    for _ in range(2):
        given = parameters(SIZES[1], torch.float32)
        chosen = kernels.encode_top_k(
            given["x"], given["W_enc"], given["b_enc"], given["b_dec"], SIZES[1][3]
        )
        kernels.decode(chosen, given["W_dec"], given["b_dec"]).pow(2).sum().backward()
        grads.append({name: value.grad for name, value in given.items()})
    for name in NAMES:
        assert torch.equal(grads[0][name], grads[1][name]), name
