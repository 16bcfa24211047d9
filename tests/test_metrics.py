"""Each metric against numbers worked out by hand."""

import math

import pytest
import torch

from saezoo.capture import padded
from saezoo.config import SAEConfig
from saezoo.errors import InputError
from saezoo.metrics import (
    ReconstructionSums,
    density_histogram,
    kl_divergence,
    next_token_loss,
    recovered,
)
from saezoo.numerics import TOLERANCE
from saezoo.sae import build_sae

D = 12
ROWS = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]
DECODER = [[1.0, 0.0], [0.0, 0.5], [-1.0, 0.0], [1.0, 1.0]]
TOKENS = [[3.0, 4.0], [-1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]
# features (3, 4, 0, 0), (0, 0, 1, 0), (0, 2, 0, 0), (2, 0, 0, 0)
# outputs  (3, 2), (-1, 0), (0, 1), (2, 0);  errors 4, 0, 1, 0;  mean (1, 1.5)


def by_hand(architecture="relu"):
    cfg = {"architecture": architecture, "d_in": 2, "d_sae": 4}
    cfg |= {"k": 4} if architecture == "topk" else {}
    bias = torch.tensor([0.0, 0.0, 0.0, -1.0])
    tensors = {"W_enc_rows": torch.tensor(ROWS), "W_dec": torch.tensor(DECODER)}
    return build_sae(SAEConfig.from_json(cfg), tensors | {"b_enc": bias, "b_dec": torch.zeros(2)})


@pytest.mark.parametrize("architecture", ["relu", "topk"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_metric_of_reconstruction_is_what_hand_and_pencil_give(architecture, size):
    sums = ReconstructionSums(2, 4, covariance=True, norms=True)
    for part in torch.tensor(TOKENS).split(size):
        sums.add(by_hand(architecture), part)
    assert sums.tokens == 4
    assert sums.fvu == pytest.approx(5 / 21)
    assert sums.l0 == pytest.approx(1.25)
    assert sums.l1 == pytest.approx(3.0)
    assert sums.cosine == pytest.approx((17 / (5 * math.sqrt(13)) + 3) / 4)
    assert sums.bias == pytest.approx(19 / 24)
    assert sums.dead_fraction == pytest.approx(1 / 4)
    assert sums.dense_fraction == pytest.approx(3 / 4)
    assert sums.density.tolist() == [0.5, 0.5, 0.25, 0.0]
    assert sums.strongest.tolist() == [3.0, 4.0, 1.0, 0.0]
    assert sums.mean.tolist() == [1.0, 1.5]
    assert torch.cat(sums.counts).tolist() == [2, 1, 1, 1]
    assert torch.cat(sums.norms)[0].tolist() == pytest.approx([5.0, math.sqrt(13)])


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_tokens_that_do_not_count_are_reconstructed_and_not_counted(architecture):
    sums, sae = ReconstructionSums(2, 4), by_hand(architecture)
    x = torch.tensor([*TOKENS, [100.0, -100.0]])
    out = sums.add(sae, x, keep=torch.tensor([True, True, True, True, False]))
    assert torch.equal(out, sae(x))
    assert sums.fvu == pytest.approx(5 / 21)
    assert sums.l0 == pytest.approx(1.25)
    assert sums.strongest.tolist() == [3.0, 4.0, 1.0, 0.0]


def test_a_transcoder_is_measured_against_its_target():
    cfg = SAEConfig(architecture="relu", d_in=2, d_sae=2, d_out=1)
    tensors = {"W_enc_rows": torch.eye(2), "W_dec": torch.tensor([[1.0], [2.0]])}
    sae = build_sae(cfg, tensors | {"b_enc": torch.zeros(2), "b_dec": torch.zeros(1)})
    sums = ReconstructionSums(1, 2)
    # it gives 5, 0, 2; the mean of the target is 3, its variance 9 + 4 + 1
    sums.add(sae, torch.tensor([[1.0, 2], [-1, 0], [2, 0]]), target=torch.tensor([[6.0], [1], [2]]))
    assert sums.fvu == pytest.approx(2 / 14)
    assert sums.bias == pytest.approx((25 + 0 + 4) / (30 + 0 + 4))
    # where either is zero the cosine is zero, not NaN
    assert sums.cosine == pytest.approx(2 / 3)
    with pytest.raises(InputError, match=r"target is \(3, 2\), expected \(3, 1\)"):
        sums.add(sae, torch.zeros(3, 2))


def test_a_feature_is_dense_on_more_than_a_tenth_of_the_tokens():
    cfg = SAEConfig(architecture="relu", d_in=2, d_sae=2)
    tensors = {"W_enc_rows": torch.eye(2), "W_dec": torch.eye(2)}
    sae = build_sae(cfg, tensors | {"b_enc": torch.zeros(2), "b_dec": torch.zeros(2)})
    sums, x = ReconstructionSums(2, 2), -torch.ones(10, 2)
    x[0, 0] = x[0, 1] = x[1, 1] = 1  # the first fires on one token of ten, the second on two
    sums.add(sae, x)
    assert sums.dense_fraction == 0.5


def topk_sae():
    cfg = SAEConfig(architecture="topk", k=4, d_in=D, d_sae=24)
    generator = torch.Generator().manual_seed(0)
    shapes = cfg.tensor_shapes().items()
    return build_sae(cfg, {key: torch.randn(shape, generator=generator) for key, shape in shapes})


def test_sums_over_batches_are_those_over_all_tokens_even_far_from_zero():
    sae, x = topk_sae(), torch.randn(64, D) * 3 + 100
    sums = ReconstructionSums(D, 24)
    for part in x.split(10):
        sums.add(sae, part)
    x64, out, f = x.double(), sae(x).double(), sae.encode(x)
    assert sums.fvu == pytest.approx(
        float((x64 - out).square().sum() / (x64 - x64.mean(0)).square().sum()),
        rel=TOLERANCE[torch.float32],
    )
    assert sums.l0 == pytest.approx(float((f != 0).sum(1).double().mean()))
    assert torch.allclose(sums.density, (f != 0).float().mean(0))
    assert torch.allclose(sums.strongest, f.amax(0).clamp_min(0))


@pytest.mark.parametrize("k", [1, 5, 11])
def test_pca_fvu_is_what_the_best_k_directions_leave(k):
    x = torch.randn(200, D, dtype=torch.float64) @ torch.randn(D, D, dtype=torch.float64) + 7
    sums = ReconstructionSums(D, 24, covariance=True)
    sums.add(topk_sae(), x.float())
    centred = x.float().double() - x.float().double().mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    left = centred - centred @ directions[:k].T @ directions[:k]
    assert sums.pca_fvu(k) == pytest.approx(
        float(left.square().sum() / centred.square().sum()), rel=1e-6
    )


def test_the_histogram_has_half_a_decade_a_bin_and_counts_what_never_fires_apart():
    found = density_histogram(torch.tensor([0.0, 1.0, 0.5, 0.05, 0.0004]))
    assert found["edges"] == pytest.approx([10 ** (step / 2) for step in range(-7, 1)])
    assert found["counts"] == [1, 0, 0, 0, 1, 0, 2]
    assert found["never"] == 1
    assert density_histogram(torch.zeros(3)) == {"edges": [0.1, 10**-0.5, 1.0]} | {
        "counts": [0, 0],
        "never": 3,
    }


def test_next_token_loss_counts_real_targets_only():
    logits = torch.randn(2, 4, 7)
    ids, mask = padded([[1, 2, 3, 4], [5, 6]], pad_id=0)
    total, count = next_token_loss(logits, ids, mask)
    by_hand = sum(
        -float(logits[row, place].log_softmax(-1)[ids[row, place + 1]])
        for row, place in [(0, 0), (0, 1), (0, 2), (1, 0)]
    )
    assert count == 4
    assert total == pytest.approx(by_hand, rel=1e-5)


def test_kl_is_from_the_clean_prediction_in_nats_over_real_targets():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.0])
    clean = torch.stack([p, p, q]).log().unsqueeze(0)
    other = torch.stack([q, p, p]).log().unsqueeze(0)
    # the last position has no next token; half ln(4/3) and nothing
    assert kl_divergence(clean, other, torch.ones(1, 3)) == pytest.approx(0.5 * math.log(4 / 3))
    assert kl_divergence(clean, other, torch.tensor([[1, 0, 0]])) == 0.0


def test_loss_recovered_is_the_share_of_what_ablation_costs():
    assert recovered(3.0, 3.5, 8.0) == pytest.approx(0.9)
    assert recovered(3.0, 3.5, 3.0) is None
