"""Two architectures of one's own: `architecture: my_sae:SquaredSAE` in a recipe beside it."""

import math

import torch
from saezoo_train.architectures import Architecture, StepOutput
from torch import nn

from saezoo.config import SAEConfig, Spec


class SquaredSAE(Architecture):
    """f = ReLU(W_enc (x - b_dec) + b_enc)²; loss: FVU, and sqrt(f) with a weight that
    rises as a cosine.
    """

    class Options(Spec):
        d_sae: int = 4096
        sparsity: float = 0.05

    def __init__(self, options, setting):
        super().__init__(options, setting)
        generator = torch.Generator().manual_seed(setting.seed)
        rows = torch.randn(options.d_sae, len(setting.mean_D), generator=generator)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(options.d_sae))
        self.b_dec = nn.Parameter(setting.mean_D.clone())

    def activation(self, pre):
        return pre.relu().square()

    def encode(self, x):  # raw activations, as the model gives them
        x = x * self.setting.scale
        return self.activation((x - self.b_dec) @ self.W_enc.T + self.b_enc)

    def decode(self, features):
        return (features @ self.W_dec + self.b_dec) / self.setting.scale

    def forward(self, x):
        return self.decode(self.encode(x))

    def training_step(self, x, step):  # x is scaled already: its mean norm is 1
        features = self.activation((x - self.b_dec) @ self.W_enc.T + self.b_enc)
        error = features @ self.W_dec + self.b_dec - x
        fvu = error.square().sum(1).mean() / self.setting.variance
        on = features > 0
        strength = features[on].sqrt() * self.W_dec.norm(dim=1).expand_as(on)[on]
        share = (1 - math.cos(math.pi * step / self.setting.steps)) / 2
        loss = fvu + self.options.sparsity * share * strength.sum() / len(x)
        dead = (~on.any(0)).float().mean()
        return StepOutput(loss, fvu.detach(), on.float().sum(1).mean(), dead)


class ShiftedSAE(SquaredSAE):
    """f = ReLU(W_enc (x - b_dec) + b_enc - shift): another activation, but one that has a name."""

    class Options(SquaredSAE.Options):
        shift: float = 0.1

    def activation(self, pre):
        return (pre - self.options.shift).relu()

    def to_native(self, facts):
        scale, (d_sae, d_in) = self.setting.scale, self.W_enc.shape
        spec = SAEConfig(architecture="relu", d_in=d_in, d_sae=d_sae, subtract_b_dec=True, **facts)
        return spec, {
            "W_enc_rows": self.W_enc.detach(),
            "W_dec": self.W_dec.detach(),
            "b_enc": (self.b_enc.detach() - self.options.shift) / scale,
            "b_dec": self.b_dec.detach() / scale,
        }
