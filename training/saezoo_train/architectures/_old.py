"""The TopK SAE while it is trained: scaled inputs, unit-norm decoder; `to_native` folds the scale
away.
"""

import torch
from torch import Tensor, nn

from saezoo.config import SAEConfig
from saezoo_train.config import TopK
from saezoo_train.step import TopKReconstruct, normalise_rows


class TopKTrainer(nn.Module):
    """Parameters in scaled units: it reads x * scale, whose mean norm is 1.

    Initialised as in Gao et al. 2024, appendix A: random unit decoder rows, the encoder their copy,
    b_dec the mean.
    """

    def __init__(self, cfg: TopK, mean_D: Tensor, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.cfg, self.scale = cfg, scale
        rows = torch.randn(cfg.d_sae, mean_D.shape[0], generator=generator)
        normalise_rows(rows)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_dec = nn.Parameter(mean_D * scale)

    def forward(self, x_BD: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (B, D), activations (B, k) and indices (B, k) of scaled inputs."""
        return TopKReconstruct.apply(x_BD, self.W_enc, self.b_enc, self.W_dec, self.b_dec, k)

    def to_native(self, facts: dict[str, object]) -> tuple[SAEConfig, dict[str, Tensor]]:
        """Spec and tensors that read raw activations. TopK and ReLU commute with a positive factor,
        so only biases change: W_enc (s x - b) + c = s (W_enc (x - b / s) + c / s), and features
        come out in raw units.
        """
        d_sae, d_in = self.W_enc.shape
        cfg = SAEConfig(
            architecture="topk",
            d_in=d_in,
            d_sae=d_sae,
            k=self.cfg.k,
            subtract_b_dec=True,
            **facts,  # type: ignore[arg-type]
        )
        tensors = {
            "W_enc_rows": self.W_enc.data,
            "W_dec": self.W_dec.data,
            "b_enc": self.b_enc.data / self.scale,
            "b_dec": self.b_dec.data / self.scale,
        }
        return cfg, tensors
