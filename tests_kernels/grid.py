"""What every kernel is tested on: dtypes, sizes that no tile divides, and how close is close."""

import torch
from torch import Tensor

from saezoo.numerics import TOLERANCE, largest_difference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(41, 63, 203), (19, 100, 1003)]
"""Tokens, d_in, d_sae."""
if torch.cuda.is_available():
    SIZES += [(1, 7, 33), (1000, 777, 16_401)]


def device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_name(dtype: torch.dtype) -> str:
    """For ids of tests."""
    return str(dtype).removeprefix("torch.")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(device(), dtype)


def assert_close(got: Tensor, expected: Tensor, name: str, dtype: torch.dtype) -> None:
    """Shape, dtype, and values within the tolerance of the dtype that it was computed in."""
    assert got.shape == expected.shape, f"{name}: {got.shape}, expected {expected.shape}"
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
    worst = largest_difference(got, expected)
    assert worst <= TOLERANCE[dtype], f"{name}: differs by {worst:.2e} of the largest"


def assert_same(got: Tensor, expected: Tensor, name: str) -> None:
    """Shape, dtype, and every bit."""
    assert got.shape == expected.shape, f"{name}: {got.shape}, expected {expected.shape}"
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
    wrong = got != expected
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} differ"
