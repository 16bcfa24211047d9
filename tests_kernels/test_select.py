"""Selections are exact for the pre-activations as they are stored; of equal ones the lower index is
first.
"""

import pytest
import torch
from saezoo_train.kernels import reference
from saezoo_train.kernels.batch_top_k import select_batch_top_k
from saezoo_train.kernels.select import select_above, select_top_k

from saezoo.errors import InputError
from tests_kernels.grid import DTYPES, SIZES, assert_same, dtype_name, normal


def rounded(pre):
    """Few different values: ties within groups, across groups, across tokens; both zeros."""
    return (pre * 2).round() / 2 * torch.where(normal(*pre.shape, seed=5) > 0, 1, -1).to(pre.dtype)


def maxima_of(pre, offset=None):
    above = pre.float() if offset is None else pre.float() - offset
    padded = torch.nn.functional.pad(above, (0, -pre.shape[1] % 32), value=-torch.inf)
    maxima = padded.unflatten(1, (-1, 32)).amax(-1)
    return maxima.to(pre.dtype) if offset is None else maxima


def check(got, expected, *names):
    for one, other, name in zip(got, expected, names, strict=True):
        assert_same(one, other, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_k_largest(dtype, size, ties, k):
    B, _, M = size
    pre = normal(B, M, dtype=dtype)
    pre = rounded(pre) if ties else pre
    # a token with fewer than k positive ones, and one whose largest are all in one group
    pre[0] = -pre[0].abs()
    pre[1, 32:] = -1
    got = select_top_k(pre, maxima_of(pre), k)
    check(got, reference.select_top_k(pre, maxima_of(pre), k), "values", "indices")


def test_the_k_largest_may_be_negative_where_no_relu_follows():
    pre = -normal(41, 203).abs()
    got = select_top_k(pre, maxima_of(pre), 7, relu=False)
    check(got, reference.select_top_k(pre, maxima_of(pre), 7, relu=False), "values", "indices")
    assert (got[0] < 0).all()


def test_all_latents_and_fewer_groups_than_k():
    pre = normal(5, 40)
    for k in (33, 40):
        got = select_top_k(pre, maxima_of(pre), k)
        check(got, reference.select_top_k(pre, maxima_of(pre), k), "values", "indices")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_both_zeros_are_equal(dtype):
    pre = -normal(6, 203, dtype=dtype).abs() - 1
    pre[:, 10:90:8] = 0.0
    pre[:, 10:90:16] = -0.0
    for k in (1, 3, 7):
        _, idx = select_top_k(pre, maxima_of(pre), k)
        assert idx[0].tolist() == list(range(10, 90, 8))[:k]


def test_infinity_is_kept_and_nan_is_not_hidden():
    pre = normal(4, 203)
    pre[0, 77], pre[1, 50], pre[2, 3] = torch.inf, torch.nan, -torch.inf
    values, idx = select_top_k(pre, maxima_of(pre), 3)
    assert values[0].max() == torch.inf
    assert 77 in idx[0]
    assert values[1].isnan().sum() == 1
    assert 50 in idx[1]
    assert 3 not in idx[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_the_largest_of_a_whole_batch(dtype, size, ties):
    B, _, M = size
    pre = normal(B, M, dtype=dtype)
    # tokens of very different sizes: some get many latents, some none
    pre = pre * torch.linspace(0.2, 2, B, device=pre.device).to(dtype)[:, None]
    pre = rounded(pre) if ties else pre
    names = "values", "indices", "smallest", "lacking"
    got = select_batch_top_k(pre, maxima_of(pre), 4 * B, 64)
    check(got, reference.select_batch_top_k(pre, maxima_of(pre), 4 * B, 64), *names)
    assert got[3] == 0


@pytest.mark.parametrize(("shift", "kept"), [(-10.0, 0), (-2.5, None)], ids=["none", "too few"])
def test_a_batch_with_fewer_positive_ones_than_wanted(shift, kept):
    pre = normal(41, 203) + shift
    positive = int((pre > 0).sum())
    assert positive < 4 * 41
    got = select_batch_top_k(pre, maxima_of(pre), 4 * 41, 32)
    expected = reference.select_batch_top_k(pre, maxima_of(pre), 4 * 41, 32)
    check(got, expected, "values", "indices", "smallest", "lacking")
    assert (got[1] < 203).sum() == (positive if kept is None else kept)


def test_lists_that_are_too_short_say_so():
    pre = normal(41, 203)
    pre[3] = pre[3].abs() + 3
    got = select_batch_top_k(pre, maxima_of(pre), 300, 16)
    expected = reference.select_batch_top_k(pre, maxima_of(pre), 300, 16)
    assert got[3] > 0
    check(got, expected, "values", "indices", "smallest", "lacking")
    bound = torch.zeros(203, device=pre.device)
    values, idx, _, lacking = select_above(pre, maxima_of(pre), bound, 16)
    assert lacking > 0
    check((values, idx), reference.select_above(pre, maxima_of(pre), bound, 16)[:2], "v", "i")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_exceeds_its_latents_bound(dtype, size):
    B, _, M = size
    pre = rounded(normal(B, M, dtype=dtype))
    # bounds that some pre-activations equal: equal is not above
    bound = (normal(M).abs() * 2).round() / 2 + 1
    names = "values", "indices", "counts", "lacking"
    got = select_above(pre, maxima_of(pre, bound), bound, 300)
    check(got, reference.select_above(pre, maxima_of(pre, bound), bound, 300), *names)
    assert got[3] == 0
    # thresholds near 0 less half a bandwidth: negative ones are above their bound too
    bound = torch.full((M,), -0.25, device=pre.device)
    pre = normal(B, M, dtype=dtype) - 1
    got = select_above(pre, maxima_of(pre, bound), bound, 300)
    check(got, reference.select_above(pre, maxima_of(pre, bound), bound, 300), *names)


@pytest.mark.parametrize(
    ("select", "said"),
    [
        (lambda pre, maxima: select_top_k(pre, maxima, 513), "k=513: the kernels hold 1 to 512"),
        (lambda pre, maxima: select_top_k(pre, maxima, 0), "k=0"),
        (lambda pre, maxima: select_top_k(pre, maxima, 204), "k=204 is more than d_sae=203"),
        (lambda pre, maxima: select_top_k(pre, maxima[:, 1:].contiguous(), 3), "one for each 32"),
        (lambda pre, maxima: select_top_k(pre.T, maxima, 3), "is not contiguous"),
        (lambda pre, maxima: select_batch_top_k(pre, maxima, 9, 513), "capacity=513"),
        (lambda pre, maxima: select_above(pre, maxima, pre[0, ::2], 9), "bound of shape"),
    ],
)
def test_what_the_kernels_cannot_hold_is_refused(select, said):
    pre = normal(4, 203)
    with pytest.raises(InputError, match=said):
        select(pre, maxima_of(pre))
