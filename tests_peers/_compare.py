"""What the tests of every peer share: sizes, random weights, inputs, and the comparison itself."""

import torch
from torch import Tensor, nn

from saezoo.load import load_sae

D, N, K = 6, 24, 3
DTYPES = [torch.float32, torch.float64]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, so that no bias is zero and no decoder row of unit length;
    thresholds are positive.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        drawn = torch.randn(value.shape, generator=generator)
        value.data = drawn.abs() * 0.5 if name.endswith("threshold") else drawn
    return module


def inputs(dtype: torch.dtype, width: int = D, seed: int = 7) -> Tensor:
    """(64, width), off centre."""
    drawn = torch.randn(64, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return drawn * 2 + 1


def check_loaded(path, encode, forward, same, dtype: torch.dtype) -> None:
    """What saezoo reads from `path` computes what the peer's own encode and forward compute."""
    sae, x = load_sae(path, dtype=dtype), inputs(dtype)
    features, out = encode(x), forward(x)
    assert (features != 0).any(0).sum() > 3
    same(sae.encode(x), features)
    same(sae.encode_sparse(x).to_dense(), features)
    same(sae(x), out)
    same(sae.decode(sae.encode(x), x), out)
