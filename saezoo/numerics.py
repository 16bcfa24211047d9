"""What "the same numbers" means, once per dtype, for checks, conversions and tests alike."""

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""Largest difference allowed, as a share of the largest magnitude of what is expected (at least
1e-30).
"""


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / max |expected|, in float64; infinite when shapes differ or either is
    not finite.
    """
    if got.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    worst = float((got - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
    return worst if worst == worst else float("inf")


def close(got: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors agree within the tolerance of `dtype` (default: that of what was got)."""
    return largest_difference(got, expected) <= TOLERANCE[dtype or got.dtype]
