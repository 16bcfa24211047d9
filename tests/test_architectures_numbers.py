"""Each loss and some gradients on numbers small enough to work out by hand.

Two tokens, two dimensions, three latents. Encoder and decoder rows are (1, 0), (0, 1), (0.6, 0.8);
the variance is 2 and the inputs are scaled already. x = (3, 1) and (0, 2), so that without biases
the pre-activations are (3, 1, 2.6) and (0, 2, 1.6).
"""

import math
from dataclasses import replace

import pytest
import torch
from saezoo_train.architectures import ARCHITECTURES, Setting

X = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
HALFWAY, STEPS = 5, 100  # a warm-up over a tenth of the run is half done at step 5


def build(name, **options):
    setting = Setting(
        mean_D=torch.zeros(2),
        variance=2.0,
        scale=1.0,
        sample_SD=X,
        steps=STEPS,
        batch=2,
        seed=0,
    )
    cls = ARCHITECTURES[name]
    model = cls(cls.Options(d_sae=3, **options), setting)
    with torch.no_grad():
        model.W_dec.copy_(ROWS)
        model.W_enc.copy_(ROWS)
    return model


def step(model, at=HALFWAY):
    output = model.training_step(X, at)
    output.loss.backward()
    return replace(output, loss=output.loss.detach())


def test_topk():
    # k=1: (3, 0) misses (0, 1); (0, 2) misses nothing. FVU = (1 + 0) / 2 tokens / 2
    model = build("topk", k=1)
    output = step(model)
    assert float(output.loss) == pytest.approx(0.25)
    assert (float(output.l0), float(output.dead)) == (1.0, 0.0)
    # dL/dx_hat = 2 (x_hat - x) / 2 / 2 = (0, -0.5) for the first token; times f = 3
    assert model.W_dec.grad.tolist() == [[0.0, -1.5], [0.0, 0.0], [0.0, 0.0]]
    # along its row (1, 0) the error has no part, so the encoder has no gradient
    assert not model.W_enc.grad.any()
    assert model.b_dec.grad.tolist() == [0.0, -0.5]


def test_multi_topk():
    # with 2 latents: token 1 gives (3, 0) + 2.6 (0.6, 0.8) = (4.56, 2.08), off by (1.56, 1.08):
    # 3.6; token 2 gives (0, 2) + 1.6 (0.6, 0.8) = (0.96, 3.28), off by (0.96, 1.28): 2.56
    output = step(build("topk", k=1, multi_k=2))
    assert float(output.logs["multi"]) == pytest.approx((3.6 + 2.56) / 4)
    assert float(output.loss) == pytest.approx(0.25 + 1.54 / 8)


def test_auxk():
    # errors (0, 1) and (0, 0), their mean (0, 0.5): spread 0.25. Latent 2 is dead; its activations
    # 2.6 and 1.6 make (1.56, 2.08) and (0.96, 1.28): ‖(1.56, 1.08)‖² = 3.6 and 2.56, mean 3.08
    model = build("topk", k=1, auxk=1, auxk_coefficient=1.0, dead_after_tokens=10)
    model.silent[2] = 100
    output = step(model)
    assert float(output.logs["auxk"]) == pytest.approx(3.08 / 0.25)
    assert float(output.loss) == pytest.approx(0.25 + 12.32)
    assert float(output.dead) == pytest.approx(1 / 3)
    # d/de_hat = 2 r / 2 / 0.25 = 4 r; along the row: 4 (0.936 + 0.864) = 7.2 and 4 (0.576 + 1.024)
    # = 6.4; times x: 7.2 (3, 1) + 6.4 (0, 2)
    assert torch.allclose(model.W_enc.grad[2], torch.tensor([21.6, 20.0]), atol=1e-4)
    assert model.b_enc.grad.tolist() == pytest.approx([0.0, 0.0, 13.6], abs=1e-4)
    # 4 (2.6 (1.56, 1.08) + 1.6 (0.96, 1.28))
    assert torch.allclose(model.W_dec.grad[2], torch.tensor([22.368, 19.424]), atol=1e-4)


def test_latents_count_as_dead_after_so_many_tokens_and_live_again_when_they_fire():
    model = build("topk", k=1, dead_after_tokens=3)
    assert float(model.training_step(X, 0).dead) == 0  # 2 tokens without latent 2
    assert float(model.training_step(X, 1).dead) == pytest.approx(1 / 3)
    with torch.no_grad():
        model.b_enc[2] = 50
    assert float(model.training_step(X, 2).dead) == 0
    assert model.silent.tolist() == [2, 2, 0]


def test_batchtopk():
    # k=1, two tokens: the two largest of all are 3 and 2.6, both of the first token. It gives
    # (4.56, 2.08), off by 3.6; the second nothing, off by 4
    model = build("batchtopk", k=1, threshold_beta=0.75)
    output = step(model)
    assert float(output.loss) == pytest.approx((3.6 + 4) / 4)
    assert float(output.l0) == 1.0
    assert float(model.threshold) == pytest.approx(2.6)
    with torch.no_grad():
        model.b_enc += 1  # 4 and 3.6 now
    step(model)
    assert float(model.threshold) == pytest.approx(0.75 * 2.6 + 0.25 * 3.6)
    cfg, tensors = model.to_native({})
    assert cfg.architecture == "jumprelu"
    assert tensors["threshold"].tolist() == pytest.approx([2.85] * 3)
    assert {"threshold", "smallest", "silent"} <= model.state_dict().keys()


def test_matryoshka():
    # groups of one and two latents. 3 and 2.6 are on. By the first group: (3, 0) and (0, 0), off by
    # 1 and 4: FVU 1.25; by both 1.9, as BatchTopK
    options = {"k": 1, "group_shares": (0.34, 0.66)}
    assert float(step(build("matryoshka", **options)).loss) == pytest.approx((1.25 + 1.9) / 2)
    model = build("matryoshka", **options, group_weights=(1.0, 0.0))
    output = step(model)
    assert float(output.loss) == pytest.approx(1.25)
    assert float(output.fvu) == pytest.approx(1.9)
    # the second group is not in the first's reconstruction
    assert not model.W_dec.grad[1:].any()
    assert model.W_dec.grad[0].tolist() == [0.0, -1.5]


def test_gated():
    # b_gate = (-2, -1.5, -9): gates (1, -, -) and (-, 0.5, -). r_mag = log 2, b_mag = -1: the
    # magnitudes are 2 * 3 - 1 = 5 and 2 * 2 - 1 = 3. Outputs (5, 0) and (0, 3): off by 4 + 1 and 1.
    # Frozen: (1, 0) and (0, 0.5): off by 4 + 1 and 2.25. L1 = (1 + 0.5) / 2, weight 0.4 * half
    model = build("gated", l1_coefficient=0.4, sparsity_warmup=0.1)
    with torch.no_grad():
        model.b_gate.copy_(torch.tensor([-2.0, -1.5, -9.0]))
        model.r_mag.fill_(math.log(2))
        model.b_mag.fill_(-1.0)
    output = step(model)
    assert float(output.fvu) == pytest.approx(6 / 4)
    assert float(output.logs["auxiliary"]) == pytest.approx(7.25 / 4)
    assert float(output.loss) == pytest.approx(1.5 + 1.8125 + 0.2 * 0.75)
    # gate of token 1: aux 2 (1 - 3) / 4 = -1 along its row, L1 0.2 / 2. The other: 2 (0.5 - 2) / 4
    assert model.b_gate.grad.tolist() == pytest.approx([-1 + 0.1, -0.75 + 0.1, 0])
    # magnitudes: 2 (5 - 3) / 4 = 1 and 2 (3 - 2) / 4 = 0.5; r_mag: times 2 * 3 and 2 * 2
    assert model.b_mag.grad.tolist() == pytest.approx([1, 0.5, 0])
    assert model.r_mag.grad.tolist() == pytest.approx([6, 2, 0])
    # the decoder sees the magnitudes alone: 5 (1, -0.5) and 3 (0, 0.5)
    assert torch.allclose(model.W_dec.grad[:2], torch.tensor([[5.0, -2.5], [0.0, 1.5]]))


def test_jumprelu():
    # thresholds (2.5, 1.9, 5), width 1.2: on are 3 of token 1 and 2 of token 2. Both lie within
    # half a width; nothing that is off does (1 is 0.9 below 1.9). FVU 0.25 as for topk
    options = {"bandwidth": 1.2, "target_l0": None, "l0_coefficient": 0.5, "sparsity_warmup": 0.1}
    model = build("jumprelu", **options)
    with torch.no_grad():
        model.threshold.copy_(torch.tensor([2.5, 1.9, 5.0]))
    output = step(model)
    assert float(output.l0) == 1.0
    assert float(output.loss) == pytest.approx(0.25 + 0.25 * 1.0)
    # L0: -(1 / 1.2) for each token of two, weight 0.25. f: the first's error is across its row, the
    # second has none, so nothing comes from there
    each = -0.25 / 1.2 / 2
    assert model.threshold.grad.tolist() == pytest.approx([each, each, 0])
    assert not model.W_enc.grad.any()
    # off, but within the window: threshold 3.2 > 3. Its error (0, 1)+(3, 0): f would be 3 more
    model = build("jumprelu", **options)
    with torch.no_grad():
        model.threshold.copy_(torch.tensor([3.2, 1.9, 5.0]))
    output = step(model)
    assert float(output.l0) == 0.5
    # dL/df = 2 (0 - 3) / 4 = -1.5; df/dthreshold = -3.2 / 1.2
    assert model.threshold.grad[0] == pytest.approx(-1.5 * -3.2 / 1.2 + each)
    assert not model.W_enc.grad[0].any()


def test_jumprelu_with_a_target_and_a_gradient_to_the_input():
    # L0 = 1, target 4: (1 / 4 - 1)² = 0.5625, half of it at half the warm-up
    model = build("jumprelu", bandwidth=1.2, target_l0=4, sparsity_warmup=0.1, ste_to_input=True)
    with torch.no_grad():
        model.threshold.copy_(torch.tensor([2.5, 1.9, 5.0]))
    output = step(model)
    assert float(output.loss) == pytest.approx(0.25 + 0.5625 / 2)
    # d/dL0 = 0.5 * 2 (0.25 - 1) / 4; each token counts half
    each = 0.5 * 2 * -0.75 / 4 / 2 / 1.2
    assert model.threshold.grad.tolist() == pytest.approx([-each, -each, 0])
    assert model.b_enc.grad.tolist() == pytest.approx([each, each, 0])


def test_jumprelu_moves_a_threshold_by_the_learning_rate_whatever_its_size_and_not_below_zero():
    model = build("jumprelu", bandwidth=10.0, target_l0=None, l0_coefficient=100.0)
    model.threshold.data.fill_(1e-3)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    step(model, 50)
    adam.step()
    model.after_update()
    assert model.threshold.dtype == torch.float32
    assert model.threshold.tolist() == pytest.approx([0.101] * 3, rel=1e-3)
    model.threshold.grad.fill_(1e9)
    adam.step()
    adam.step()
    model.after_update()
    assert min(model.threshold.tolist()) == 0


def test_relu():
    # decoder rows of length 2, 1, 1; b_enc = (0, -1, -9): activations (3, 0) and (0, 1). Outputs
    # (6, 0) and (0, 1): off by 9 + 1 and 1: FVU 11 / 4. L1 = (3 * 2 + 1 * 1) / 2, weight 0.1 * half
    model = build("relu", l1_coefficient=0.1, sparsity_warmup=0.1)
    with torch.no_grad():
        model.W_dec[0] *= 2
        model.b_enc.copy_(torch.tensor([0.0, -1.0, -9.0]))
    output = step(model)
    assert float(output.fvu) == pytest.approx(11 / 4)
    assert float(output.loss) == pytest.approx(11 / 4 + 0.05 * 3.5)
    # decoder: f 2 (x_hat - x) / 4 = 3 (1.5, -0.5), and 0.05 / 2 * 3 along its row
    assert model.W_dec.grad[0].tolist() == pytest.approx([4.5 + 0.075, -1.5])
    # encoder: the error's part along (2, 0) is 3, and 0.05 / 2 * 2 from L1; its x is (3, 1)
    assert model.b_enc.grad.tolist() == pytest.approx([3.05, -0.5 + 0.025, 0])
    assert model.W_enc.grad[0].tolist() == pytest.approx([9.15, 3.05])
    # no row is held at length 1
    model.before_update()
    model.after_update()
    assert float(model.W_dec.detach()[0].norm()) == pytest.approx(2)


@pytest.mark.parametrize(("at", "share"), [(0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)])
def test_sparsity_penalties_warm_up(at, share):
    weights = {"l1_coefficient": 1.0, "sparsity_warmup": 0.1}
    for name in ("relu", "gated"):
        output = build(name, **weights).training_step(X, at)
        rest = output.fvu + output.logs.get("auxiliary", 0)
        assert float((output.loss - rest).detach()) == pytest.approx(
            share * float(output.logs["l1"])
        )
    options = {"target_l0": None, "l0_coefficient": 1.0, "sparsity_warmup": 0.1}
    output = build("jumprelu", **options).training_step(X, at)
    assert float((output.loss - output.fvu).detach()) == pytest.approx(share * float(output.l0))


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_the_search_for_a_weight(name):
    """It rises by a hundredth of ln(mean L0 / target) a step, at most by a hundredth, once the
    warm-up is over; the mean keeps nine tenths.
    """
    model = build(name, l1_coefficient=0.5, target_l0=2.0, sparsity_warmup=0.1)
    assert [model.share_at(step) for step in (0, HALFWAY, 10, 99)] == [0, 0.5, 1, 1]
    model.search(torch.tensor(4.0), 0.5)
    assert (float(model.mean_l0), float(model.log_factor)) == (4.0, 0.0)
    logs = model.search(torch.tensor(2.0), 1.0)
    assert float(model.mean_l0) == pytest.approx(3.8)
    assert float(model.log_factor) == pytest.approx(0.01 * math.log(3.8 / 2))
    assert float(logs["l1_coefficient"]) == pytest.approx(0.5 * (3.8 / 2) ** 0.01)
    model.search(torch.tensor(1000.0), 1.0)
    assert float(model.log_factor) == pytest.approx(0.01 * (math.log(3.8 / 2) + 1))
    assert float(model.penalty_weight(1.0)) == pytest.approx(0.5 * math.exp(0.01) * 1.9**0.01)
    # without a target the weight is as given, and nothing is searched
    plain = build(name, l1_coefficient=0.5)
    assert plain.search(torch.tensor(9.0), 1.0) == {}
    assert plain.penalty_weight(0.5) == 0.25
    assert "log_factor" not in plain.state_dict()


def test_k_falls_linearly_to_its_value_and_stays():
    options = ARCHITECTURES["topk"].Options(k=4, k_start=8, k_steps=4)
    assert [options.k_at(at) for at in range(6)] == [8, 7, 6, 5, 4, 4]
    assert ARCHITECTURES["topk"].Options(k=4).k_at(0) == 4
    model = build("topk", k=1, k_start=3, k_steps=10)
    assert [float(model.training_step(X, at).l0) for at in (0, 5, 10)] == [2.5, 2.0, 1.0]
