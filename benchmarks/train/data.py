"""Activations for the benchmarks: a file of real ones, or synthetic ones that cost as much."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file


def synthetic(tokens: int = 16_384, d_in: int = 576, seed: int = 0) -> Path:
    """A file of sparse sums of random directions, (tokens, d_in) float16: for timing only."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    x = torch.zeros(tokens, d_in)
    for _ in range(24):
        chosen = torch.randint(4 * d_in, (tokens,), generator=generator)
        x += directions[chosen] * torch.rand(tokens, 1, generator=generator)
    path = Path(tempfile.mkdtemp(prefix="saezoo-bench-")) / "acts.safetensors"
    save_file({"x": x.half()}, path)
    return path
