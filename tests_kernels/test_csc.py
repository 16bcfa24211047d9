"""Lists by latent: a stable sort, whatever the lists hold."""

import pytest
import torch
from saezoo_train.kernels import reference
from saezoo_train.kernels.csc import csc

from tests_kernels.grid import assert_same, device


def lists(tokens, k, d_sae, seed=0, unused=0.0):
    """Distinct latents for each token, rising; some slots unused."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.stack([torch.randperm(d_sae, generator=generator)[:k] for _ in range(tokens)])
    off = torch.rand(tokens, k, generator=generator) < unused
    return idx.masked_fill(off, d_sae).sort(dim=-1).values.int().to(device())


@pytest.mark.parametrize("unused", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("tokens", "k", "d_sae"), [(41, 7, 63), (300, 7, 64), (37, 41, 5001), (1, 1, 1), (3, 2, 70_001)]
)
def test_a_stable_sort_by_latent(tokens, k, d_sae, unused):
    idx = lists(tokens, k, d_sae, unused=unused)
    order, starts = csc(idx, d_sae)
    expected_order, expected_starts = reference.csc(idx, d_sae)
    assert_same(order, expected_order, "order")
    assert_same(starts, expected_starts, "starts")


def test_one_latent_that_is_on_for_all_tokens():
    idx = lists(700, 3, 500)
    idx[:, 0] = 0
    got, expected = csc(idx, 500), reference.csc(idx, 500)
    assert_same(got[0], expected[0], "order")
    assert_same(got[1], expected[1], "starts")
    assert got[1][1] >= 700


def test_lists_need_not_be_sorted():
    idx = lists(50, 8, 300).flip(-1).contiguous()
    got, expected = csc(idx, 300), reference.csc(idx, 300)
    assert_same(got[0], expected[0], "order")
    assert_same(got[1], expected[1], "starts")


def test_no_tokens():
    order, starts = csc(torch.empty(0, 4, dtype=torch.int32, device=device()), 9)
    assert len(order) == 0
    assert (starts == 0).all()
