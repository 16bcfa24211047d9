"""The parts of the sparse step, one by one, against the dense product that each stands for."""

import pytest
import torch
from saezoo_train import ops
from saezoo_train.ops import Active
from saezoo_train.ops.active import SPARSE_BELOW

from saezoo.numerics import close
from saezoo.sparse import largest

B, D, M, K = 37, 6, 96, 5


def numbers(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch):
    """So few tokens at a time that there are whole pieces and a rest."""
    for module in ("select", "products"):
        monkeypatch.setattr(f"saezoo_train.ops.{module}.ROWS", 16)


@pytest.fixture(params=["sparse", "dense"])
def way(request, monkeypatch):
    monkeypatch.setattr(
        "saezoo_train.ops.active.SPARSE_BELOW", {"sparse": 2.0, "dense": 0.0}[request.param]
    )


def ragged(groups=1, seed=1):
    """Pairs, some bags without any, and the same as (bags, M) of ones."""
    on = torch.rand(groups * B, M, generator=torch.Generator().manual_seed(seed)) < 0.06
    on[[0, 5, 6, groups * B - 1]] = False
    bag, latent = on.nonzero(as_tuple=True)
    return Active.from_pairs(bag, latent, B, M, groups), on.double()


def fixed():
    idx = numbers(B, M, seed=2).topk(K).indices
    return Active.from_chosen(idx, M), torch.zeros(B, M).double().scatter(1, idx, 1.0)


ACTIVE = {"ragged": ragged, "three groups": lambda: ragged(3), "k each": fixed}


def test_pairs_know_their_bag_and_token_however_they_were_made():
    active, on = ragged(3)
    bag, latent = on.nonzero(as_tuple=True)
    assert torch.equal(active.token_N, bag % B)
    again = Active(latent, active.starts, B, M)
    assert torch.equal(again.bag_N, bag)
    active, _ = fixed()
    assert active.bag_N.tolist() == [bag for bag in range(B) for _ in range(K)]


def test_pairs_by_latent_keep_the_order_of_tokens():
    active, on = ragged()
    group = active.by_latent
    expected = [(m, b) for m in range(M) for b in on[:, m].nonzero().flatten().tolist()]
    got = list(
        zip(
            active.latent_N[group.order_N].tolist(),
            active.bag_N[group.order_N].tolist(),
            strict=True,
        )
    )
    assert got == expected
    counts = on.sum(0).long()
    assert torch.equal(group.starts_M, counts.cumsum(0) - counts)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ACTIVE)
def test_the_products_of_pairs_are_the_dense_ones(kind):
    active, on = ACTIVE[kind]()
    values = numbers(len(active.latent_N), seed=3)
    dense = torch.zeros_like(on)
    dense[active.bag_N, active.latent_N] = values
    W, rows, tokens = numbers(M, D, seed=4), numbers(len(on), D, seed=5), numbers(B, D, seed=6)
    assert close(ops.decode(values, active, W), dense @ W)
    assert close(ops.pair_products(rows, W, active), (rows @ W.T)[active.bag_N, active.latent_N])
    assert close(ops.weight_gradient(values, rows, active), dense.T @ rows)
    by_token = dense.view(-1, B, M).sum(0)
    assert close(ops.weight_gradient(values, tokens, active), by_token.T @ tokens)
    assert close(ops.latent_sums(values, active), dense.sum(0))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ACTIVE)
def test_the_differentiable_forms_pass_gradcheck(kind):
    active, _ = ACTIVE[kind]()
    W, b, b_dec = numbers(M, D, seed=4), numbers(M, seed=5), numbers(D, seed=6)
    x = numbers(B, D, seed=7)
    values = numbers(len(active.latent_N), seed=8).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, w: ops.decode_at(v, w, active),
        (values, W.clone().requires_grad_()),
        fast_mode=True,
    )
    assert torch.autograd.gradcheck(
        lambda p: ops.at_latents(p, active), b.clone().requires_grad_(), fast_mode=True
    )

    def encode(weight, bias, inner):
        """The values as selection would compute them, so that numeric differences see them move."""
        centred = (x - inner).detach()
        pre = (centred @ weight.detach().T + bias.detach())[active.token_N, active.latent_N]
        return ops.encode_at(pre, centred, weight, bias, active, inner)

    inputs = tuple(value.clone().requires_grad_() for value in (W, b, b_dec))
    assert torch.autograd.gradcheck(encode, inputs, fast_mode=True)


def test_nothing_on_decodes_to_nothing_and_has_no_gradient():
    none = torch.empty(0, dtype=torch.int64)
    active = Active.from_pairs(none, none, B, M)
    values, W = numbers(0).requires_grad_(), numbers(M, D).requires_grad_()
    out = ops.decode_at(values, W, active)
    assert out.shape == (B, D)
    assert not out.any()
    out.sum().backward()
    assert not W.grad.any()
    assert values.grad.shape == (0,)


def test_data_is_not_given_a_gradient_that_would_be_wrong():
    active, _ = fixed()
    with pytest.raises(AssertionError, match="data"):
        ops.encode_at(numbers(B * K), numbers(B, D).requires_grad_(), numbers(M, D), None, active)


@pytest.mark.parametrize("n", [24, 96, 128, 4096, 4100])
@pytest.mark.parametrize("k", [1, 3, 24])
def test_the_k_largest_are_found_however_they_lie(n, k):
    rough = numbers(B, n, seed=n + k).mul(9).round()  # many ties
    smooth = numbers(B, n, seed=n + k)
    crowded, strided = smooth.clone(), smooth.clone()
    crowded[:, : k + 2] += 100  # side by side
    strided[:, :: max(n // 8, 1)] += 100  # under one maximum
    for keys in (rough, smooth, crowded, strided, -smooth.abs()):
        values, index = largest(keys, k)
        assert torch.equal(values, keys.topk(k).values)
        assert torch.equal(keys.gather(-1, index), values)
        assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("tokens", [1, 16, B])
def test_selection_sees_every_token_once_piece_by_piece(tokens):
    x, W, b = numbers(tokens, D), numbers(M, D, seed=1), numbers(M, seed=2)
    pre = x @ W.T + b
    values, idx = ops.select_top_k(x, W, b, K)
    assert close(values, pre.topk(K).values)
    assert close(pre.gather(1, idx), values)
    bound = numbers(M, seed=3) + 2
    values, token, latent = ops.select_above(x, W, b, bound)
    assert torch.equal(torch.stack([token, latent], 1), (pre > bound).nonzero())
    assert close(values, pre[pre > bound])


@pytest.mark.parametrize("guess", [0.0, 1.0, 2.5, 100.0, -3.0])
def test_the_largest_of_a_batch_are_found_whatever_was_guessed(guess):
    x, W, b = numbers(B, D), numbers(M, D, seed=1), numbers(M, seed=2)
    pre = x @ W.T + b
    count = K * B
    values, token, latent = ops.select_batch_top_k(x, W, b, count, torch.tensor(guess).double())
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    chosen[token, latent] = True
    assert int(chosen.sum()) == count == len(values)
    assert pre[chosen].min() > pre[~chosen].max()
    assert torch.equal((token * M + latent).sort().values, token * M + latent)
    assert close(values, pre[token, latent])


def test_where_fewer_are_positive_than_wanted_only_those_are_kept():
    x, W, b = numbers(B, D), numbers(M, D, seed=1), numbers(M, seed=2) - 9
    positive = int(((x @ W.T + b) > 0).sum())
    values, _, _ = ops.select_batch_top_k(x, W, b, K * B, torch.tensor(0.5).double())
    assert 0 < positive == len(values) < K * B
    assert (values > 0).all()


def test_what_is_sparse_goes_pair_by_pair_and_what_is_not_does_not():
    latent = torch.arange(M)
    few, many = int(M * B * SPARSE_BELOW) - 1, int(M * B * SPARSE_BELOW) + 1
    for count, expected in ((few, True), (many, False)):
        bag = torch.arange(count) * B // count
        assert Active.from_pairs(bag, latent[bag], B, M).is_sparse is expected
