"""SAELens' JumpReLU training loss and gradients, with and without the gradient to the input, and
with its pre-activation loss: ours on the same weights, in units in which the variance is 1.
"""

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from saezoo_train.architectures import ARCHITECTURES, Setting

from saezoo.numerics import close

D, M, B = 6, 96, 41


@pytest.fixture(autouse=True)
def with_gradients():
    """The other files here compare what is loaded, without gradients."""
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("ste", [False, True])
@pytest.mark.parametrize("pull", [None, 0.3])
def test_jumprelu_loss_and_gradients_are_theirs(ste, pull):
    theirs = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=D,
            d_sae=M,
            dtype="float32",
            jumprelu_bandwidth=0.3,
            jumprelu_ste_to_input=ste,
            l0_coefficient=0.2,
            pre_act_loss_coefficient=pull,
            apply_b_dec_to_input=False,
        )
    )
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1)) / 2 + 0.3
    cls = ARCHITECTURES["jumprelu"]
    options = cls.Options(
        d_sae=M,
        bandwidth=0.3,
        target_l0=None,
        l0_coefficient=0.2,
        ste_to_input=ste,
        pre_act_coefficient=pull or 0,
        dead_after_tokens=1000,
        sparsity_warmup=0,
    )
    model = cls(options, Setting(torch.zeros(D), 1.0, 1.0, x, 100, B, 0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator)
        model.threshold.fill_(0.4)
        model.b_enc[[3, 17]] = -2.0
        model.silent[[3, 17]] = 10**9
        for key, value in model.named_parameters():
            getattr(theirs, key).copy_(value.T if key == "W_enc" else value)
    step = theirs.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={"l0": 0.2},
            dead_neuron_mask=model.silent > 1000,
            n_training_steps=5,
            is_logging_step=False,
        )
    )
    step.loss.backward()
    output = model.training_step(x, 5)
    output.loss.backward()
    assert close(output.loss, step.loss)
    for key, value in model.named_parameters():
        grad = getattr(theirs, key).grad
        assert value.grad.abs().sum() > 0, key
        assert close(value.grad, grad.T if key == "W_enc" else grad), key
