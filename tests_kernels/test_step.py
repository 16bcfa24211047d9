"""The whole update through the kernels against the torch path: the same parameters, moments and
counters after some steps.
"""

import copy

import pytest
import torch
from saezoo_train.architectures import ARCHITECTURES, Setting
from saezoo_train.config import Optimiser
from saezoo_train.kernels import kit, reference
from saezoo_train.kernels.step import KernelStep
from saezoo_train.optimiser import make_adam
from torch.utils._python_dispatch import TorchDispatchMode

from saezoo.numerics import TOLERANCE, close, largest_difference
from tests_kernels.grid import device

B, D, STEPS = 24, 20, 3
LR = 3e-3

CASES = {
    "topk": ("topk", {"d_sae": 90, "k": 3, "dead_after_tokens": 100}, 0.9),
    "topk, k falls": (
        "topk",
        {"d_sae": 90, "k": 2, "k_start": 5, "k_steps": 2, "auxk_coefficient": 0.0},
        0.9,
    ),
    "batchtopk": (
        "batchtopk",
        {"d_sae": 90, "k": 3, "dead_after_tokens": 100, "auxk": 4, "threshold_beta": 0.5},
        0.9,
    ),
    "jumprelu": ("jumprelu", {"d_sae": 40, "target_l0": 4, "sparsity_warmup": 0.5}, 0.0),
    # fewer are on than wanted: thresholds fall, and stop at 0
    "jumprelu, to 0": (
        "jumprelu",
        {"d_sae": 40, "target_l0": 39, "sparsity_warmup": 0, "threshold_init": 1e-3},
        0.0,
    ),
    "jumprelu, all options": (
        "jumprelu",
        {
            "d_sae": 40,
            "target_l0": None,
            "l0_coefficient": 0.01,
            "ste_to_input": True,
            "subtract_b_dec": True,
        },
        0.0,
    ),
    "gated": ("gated", {"d_sae": 40}, 0.0),
    "gated, to an L0": (
        "gated",
        {"d_sae": 40, "target_l0": 5, "sparsity_warmup": 0.4, "l1_coefficient": 0.5},
        0.0,
    ),
}


def setting():
    """Data with a mean, of mean norm 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, D, generator=generator) * 0.2 + 0.1
    x = (x / x.norm(dim=-1).mean()).to(device())
    mean = x.mean(0)
    variance = float((x - mean).pow(2).sum(-1).mean())
    return Setting(mean.cpu(), variance, 1.0, x.cpu(), STEPS, B, 0), x


def pair(name):
    """Two equal models, some of whose latents are dead where the architecture revives them; and
    their Adams; and data.
    """
    architecture, options, beta1 = CASES[name]
    known, x = setting()
    cls = ARCHITECTURES[architecture]
    one = cls(cls.Options(**options), known).to(device())
    if architecture in ("topk", "batchtopk"):
        one.silent[:30] = 1000
        one.b_enc.data[:30] = -0.25
    two = copy.deepcopy(one)
    # with a small eps Adam makes a whole step of a gradient that is rounding alone, and hides the
    # size of all others
    settings = Optimiser(lr=LR, beta1=beta1, beta2=0.999, eps=1e-3)
    return one, two, make_adam(one, settings), make_adam(two, settings), x


def batch(x, step):
    chosen = torch.randint(0, len(x), (B,), generator=torch.Generator().manual_seed(step))
    return x[chosen.to(x.device)]


def torch_step(model, adam, x_BD, step):
    out = model.training_step(x_BD, step)
    adam.zero_grad()
    out.loss.backward()
    model.before_update()
    adam.step()
    model.after_update()
    return out


def assert_agree(one, two, adam_one, adam_two, dtype):
    for (name, ours), theirs in zip(two.named_parameters(), one.parameters(), strict=True):
        assert close(ours, theirs, dtype), (name, largest_difference(ours, theirs))
        kept, expected = adam_two.state[ours], adam_one.state[theirs]
        assert kept.keys() == expected.keys()
        for key, value in kept.items():
            assert value.dtype == expected[key].dtype, (name, key)
            assert close(value, expected[key], dtype), (name, key)
    for (name, ours), theirs in zip(two.named_buffers(), one.buffers(), strict=True):
        assert close(ours, theirs, dtype), name


@pytest.mark.parametrize("functions", [reference, kit], ids=["reference", "kernels"])
@pytest.mark.parametrize("name", CASES)
def test_after_some_steps_all_state_is_that_of_the_torch_path(name, functions):
    one, two, adam_one, adam_two, x = pair(name)
    step = KernelStep(two, adam_two, kit=functions, compute=torch.float32)
    for number in range(STEPS):
        x_BD = batch(x, number)
        expected = torch_step(one, adam_one, x_BD, number)
        assert step.takes(x_BD, number)
        got = step(x_BD, number, LR)
        for key in ("loss", "fvu", "l0", "dead"):
            assert close(getattr(got, key), getattr(expected, key).detach(), torch.float32), key
        assert got.logs.keys() == expected.logs.keys()
        for key, value in got.logs.items():
            assert close(value, expected.logs[key], torch.float32), key
    if "dead_after_tokens" in CASES[name][1]:
        assert step.plan.dead >= 30
        assert got.logs["auxk"] > 0
    assert_agree(one, two, adam_one, adam_two, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["topk", "gated"])
def test_products_in_16_bits_go_the_same_way(name, dtype):
    one, two, adam_one, adam_two, x = pair(name)
    step = KernelStep(two, adam_two, kit=kit, compute=dtype)
    for number in range(STEPS):
        x_BD = batch(x, number)
        expected = torch_step(one, adam_one, x_BD, number)
        step.takes(x_BD, number)
        got = step(x_BD, number, LR)
    assert close(got.fvu, expected.fvu.detach(), dtype)
    for rows, master in ((step.rows.W_enc_c, two.W_enc), (step.rows.W_dec_c, two.W_dec)):
        assert rows.dtype == dtype
        assert largest_difference(rows, master) <= TOLERANCE[dtype]


def test_steps_of_both_kinds_may_follow_each_other():
    one, two, adam_one, adam_two, x = pair("topk")
    step = KernelStep(two, adam_two, kit=reference, compute=torch.float32)
    for number in range(STEPS):
        torch_step(one, adam_one, batch(x, number), number)
        if number % 2:
            torch_step(two, adam_two, batch(x, number), number)
            step.stale = True
        else:
            assert step.takes(batch(x, number), number)
            step(batch(x, number), number, LR)
    assert_agree(one, two, adam_one, adam_two, torch.float32)


class NothingWaits(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU, or gives a shape that depends on data."""

    WAITS = (
        "_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal",
        "is_nonzero", "repeat_interleave.Tensor",
    )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(part in name for part in self.WAITS), f"{name} waits for the device"
        if name.startswith(("aten.index.Tensor", "aten.index_put")):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_an_update_waits_for_the_device(name):
    _, model, _, adam, x = pair(name)
    step = KernelStep(model, adam, kit=kit, compute=torch.float32)
    step.takes(batch(x, 0), 0)
    step(batch(x, 0), 0, LR)
    plan = step.plan.__class__(4, max(step.plan.capacity, 16), step.plan.dead)
    with NothingWaits():
        step.update(plan, batch(x, 1))


def test_the_watch_for_waiting_sees_it():
    with pytest.raises(AssertionError, match="waits"), NothingWaits():
        reference.csc(torch.zeros(2, 2, dtype=torch.int32), 4)
    with pytest.raises(AssertionError, match="waits"), NothingWaits():
        float(torch.ones(1))


def test_a_token_with_too_many_latents_leaves_the_step_to_torch(monkeypatch):
    _, model, _, adam, x = pair("jumprelu")
    monkeypatch.setattr("saezoo_train.kernels.step.LONGEST", 12)
    step = KernelStep(model, adam, kit=reference, compute=torch.float32)
    # about half of 40 latents are on at the start
    assert not step.takes(batch(x, 0), 0)
    assert not step.takes(batch(x, 1), 1)
    model.threshold.data.fill_(0.4)
    assert step.look_at > 1
    assert not step.takes(batch(x, 1), step.look_at - 1)
    assert step.takes(batch(x, 1), step.look_at)


def test_lists_that_were_too_short_are_told_and_grow(caplog):
    _, model, _, adam, x = pair("batchtopk")
    step = KernelStep(model, adam, kit=reference, compute=torch.float32)
    assert step.takes(batch(x, 0), 0)
    step.plan = step.plan.__class__(0, 2, step.plan.dead)
    step(batch(x, 0), 0, LR)
    assert int(step.lacking) > 0
    before = step.room
    step.takes(batch(x, 1), step.look_at)
    assert len(caplog.records) == 1
    assert "more latents on than a list held" in caplog.text
    assert step.room > before
    assert int(step.lacking) == 0


def test_latents_that_may_die_before_the_next_look_have_room():
    _, model, _, adam, x = pair("topk")
    step = KernelStep(model, adam, kit=reference, compute=torch.float32)
    model.silent.zero_()
    step.takes(batch(x, 0), 0)
    ahead = step.look_at
    assert step.plan.dead == 0
    model.silent[7] = 100 - ahead * B + 1
    step.takes(batch(x, 0), ahead)
    assert step.plan.dead >= 1
