"""The losses that dictionary_learning's trainers compute, and their gradients: ours on the same
weights, in units in which the variance is 1.
"""

import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from saezoo_train.architectures import ARCHITECTURES, Setting

from saezoo.numerics import close
from saezoo.sae import build_sae

D, M, B, K, STEP, STEPS = 6, 96, 41, 3, 4, 100
PARTS = torch.float32
"""Whatever the dtype of the weights, theirs computes AuxK and the kernel's width in float32."""


@pytest.fixture(autouse=True)
def with_gradients():
    """The other files here compare what is loaded, without gradients."""
    with torch.enable_grad():
        yield


COMMON = {
    "steps": STEPS,
    "activation_dim": D,
    "dict_size": M,
    "layer": 0,
    "lm_name": "none",
    "device": "cpu",
}
CHOSEN = {"k": K, "warmup_steps": 1, "threshold_start_step": 0}
WARM = {"warmup_steps": 1, "sparsity_warmup_steps": 10}

# their trainer and options, our name and options, their names of our parameters
CASES = {
    "topk": (TopKTrainer, CHOSEN, "topk", {"k": K}),
    "batchtopk": (BatchTopKTrainer, CHOSEN, "batchtopk", {"k": K}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainer,
        # it averages what it has weighted already: weights of 1 are our mean
        CHOSEN | {"group_fractions": [0.25, 0.25, 0.5], "group_weights": [1.0, 1.0, 1.0]},
        "matryoshka",
        {"k": K, "group_shares": (0.25, 0.25, 0.5)},
    ),
    "gated": (
        GatedSAETrainer,
        WARM | {"l1_penalty": 0.3},
        "gated",
        {"l1_coefficient": 0.3, "sparsity_warmup": 0.1},
    ),
    "jumprelu": (
        JumpReluTrainer,
        WARM | {"bandwidth": 0.3, "target_l0": 4.0},
        "jumprelu",
        {"bandwidth": 0.3, "target_l0": 4.0, "sparsity_warmup": 0.1},
    ),
    "relu": (
        StandardTrainerAprilUpdate,
        WARM | {"l1_penalty": 0.3},
        "relu",
        {"l1_coefficient": 0.3, "sparsity_warmup": 0.1},
    ),
}
NAMES = {
    "W_enc": ("encoder.weight", "W_enc"),
    "W_dec": ("decoder.weight", "W_dec"),
    "b_enc": ("encoder.bias", "b_enc"),
    "b_dec": ("b_dec", "bias", "decoder_bias"),
    "b_gate": ("gate_bias",),
    "b_mag": ("mag_bias",),
    "r_mag": ("r_mag",),
    "threshold": ("threshold",),
}


def ours_and_theirs(case):
    """Both with the same random weights and the same dead latents, in float64."""
    trainer, options, name, own = CASES[case]
    theirs = trainer(**COMMON | options)
    theirs.ae.double()
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2 + 0.3
    setting = Setting(torch.zeros(D), 1.0, 1.0, x.float(), STEPS, B, 0)
    cls = ARCHITECTURES[name]
    model = cls(cls.Options(d_sae=M, dead_after_tokens=1000, **own), setting).double()
    generator = torch.Generator().manual_seed(2)
    foreign = dict(theirs.ae.named_parameters())
    pairs = {}
    with torch.no_grad():
        for key, value in model.named_parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if key == "threshold":
                value.fill_(0.4)
            there = next(foreign[there] for there in NAMES[key] if there in foreign)
            pairs[key] = there
            there.copy_(value if there.shape == value.shape else value.T)
        model.silent[[3, 17, 40]] = 10**9
        if hasattr(theirs, "num_tokens_since_fired"):
            theirs.num_tokens_since_fired[[3, 17, 40]] = 10**9
        if name in ("topk", "batchtopk", "matryoshka"):
            for bias in (model.b_enc, pairs["b_enc"]):
                bias[[3, 17, 40]] = -0.7
    return model, theirs, pairs, x


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_theirs(case):
    model, theirs, pairs, x = ours_and_theirs(case)
    # for relu theirs subtracts its bias from the input, which the update does not
    compute = _without_input_bias if case == "relu" else type(theirs).loss
    theirs_loss = compute(theirs, x, step=STEP)
    theirs_loss.backward()
    output = model.training_step(x, STEP)
    output.loss.backward()
    assert close(output.loss, theirs_loss, PARTS)
    for key, there in pairs.items():
        if (case, key) == ("jumprelu", "threshold"):
            continue  # theirs counts L0 on features: the next test
        got = getattr(model, key).grad
        assert got.abs().sum() > 0, key
        expected = there.grad if there.grad.shape == got.shape else there.grad.T
        assert close(got, expected, PARTS), key


def _without_input_bias(theirs, x, step):
    ae, weight = theirs.ae, theirs.l1_penalty * theirs.sparsity_warmup_fn(step)
    acts = (x @ ae.encoder.weight.T + ae.encoder.bias).relu()
    out = acts @ ae.decoder.weight.T + ae.bias
    l1 = (acts * ae.decoder.weight.norm(dim=0)).sum(-1).mean()
    return (x - out).pow(2).sum(-1).mean() + weight * l1


def test_a_threshold_that_only_reconstruction_moves_moves_as_theirs():
    model, theirs, pairs, x = ours_and_theirs("jumprelu")
    theirs.sparsity_coefficient = 0.0
    theirs.loss(x, step=STEP).backward()
    options = model.options.model_copy(update={"target_coefficient": 0.0})
    model.options = options
    model.training_step(x, STEP).loss.backward()
    assert model.threshold.grad.abs().sum() > 0
    assert close(model.threshold.grad, pairs["threshold"].grad, PARTS)


@pytest.mark.parametrize("case", ["batchtopk", "matryoshka"])
def test_what_is_exported_is_on_where_theirs_is(case):
    model, theirs, pairs, x = ours_and_theirs(case)
    theirs.ae.threshold.fill_(0.6)
    model.threshold.fill_(float(theirs.ae.threshold))
    sae = build_sae(*model.to_native({}), dtype=torch.float64)
    theirs_acts = theirs.ae.encode(x)
    assert close(sae.encode(x), theirs_acts.detach())
    exactly = torch.zeros(D, dtype=torch.float64)
    # an activation that is the threshold itself is off, in both
    for bias in (model.b_enc, pairs["b_enc"]):
        bias.data.fill_(float(model.threshold))
    for weight in (model.b_dec, theirs.ae.b_dec):
        weight.data.zero_()
    sae = build_sae(*model.to_native({}), dtype=torch.float64)
    assert not sae.encode(exactly).any()
    assert not theirs.ae.encode(exactly[None]).any()
