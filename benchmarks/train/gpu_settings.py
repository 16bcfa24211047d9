"""What is measured on a GPU: three sizes, their activations, and the least time of a step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# N tokens, D d_in, M d_sae


@dataclass(frozen=True)
class Size:
    """A training step, and what it must reach."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int
    """Updates of a run; its FVU is looked at after each third."""
    batches: int
    """Different batches that are kept on the device and gone through again and again."""
    must_be_ms: float | None = None
    """On an H100."""


SIZES = {
    "A": Size(768, 32_768, 32, 8192, 300, 32, 2.0),
    "B": Size(576, 16_384, 32, 8192, 300, 32, 0.9),
    "C": Size(4096, 131_072, 64, 8192, 30, 12, 40.0),
}
TINY = Size(24, 96, 4, 48, 6, 4)
"""Of a dry run on a CPU, in Triton's interpreter."""

H100 = (798e12, 3.0e12)
"""Its bf16 products (FLOP/s, of an 8192³ one) and memory (bytes/s, reads and writes together)."""


def bound_terms(size: Size) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes of each phase that no implementation with Adam in float32 can leave out: bf16
    products and copies, float32 weights and moments, every tensor read or written once.
    """
    n, d, m, k = size.batch, size.d_in, size.d_sae, size.k
    return {
        "encoder product": (2.0 * n * m * d, 0),
        "group maxima, written and read, and the values of k groups": (
            0,
            2 * 2 * n * m / 32 + 2 * n * k * 32,
        ),
        "decoder rows, x and the error": (0, 2 * min(m, n * k) * d + 2 * 2 * n * d),
        "x and the error again, for the weights": (0, 2 * 2 * n * d),
        "lists by latent": (0, 4 * 10 * n * k),
        "both matrices, their moments and copies": (0, 26 * 2 * m * d),
    }


def bound_ms(size: Size, flops: float = H100[0], bandwidth: float = H100[1]) -> float:
    """The phases of `bound_terms` one after another, in milliseconds."""
    terms = bound_terms(size).values()
    return 1000 * sum(product / flops + memory / bandwidth for product, memory in terms)


def synthetic(tokens: int, d_in: int, device: str, seed: int = 0) -> Tensor:
    """Sparse positive sums of random directions, some far more frequent than others, about a mean:
    (N, D) bfloat16.
    """
    generator = torch.Generator(device).manual_seed(seed)
    directions = torch.randn(4 * d_in, d_in, generator=generator, device=device) / d_in**0.5
    mean = torch.randn(d_in, generator=generator, device=device) / d_in**0.5
    out = torch.empty(tokens, d_in, dtype=torch.bfloat16, device=device)
    for part in out.split(8192):
        x = mean.expand(len(part), -1).clone()
        for _ in range(24):
            uniform = torch.rand(len(part), generator=generator, device=device)
            chosen = (uniform.pow(3) * len(directions)).long().clamp_max(len(directions) - 1)
            x += directions[chosen] * torch.rand(len(part), 1, generator=generator, device=device)
        part.copy_(x)
    return out


def activations(size: Size, acts: Path | None, device: str) -> Tensor:
    """As many as a size's batches and one more to look at, from a file (x, (tokens, d), of the
    size's d_in) or made up.
    """
    tokens = (size.batches + 1) * size.batch
    if acts is None:
        return synthetic(tokens, size.d_in, device)
    with safe_open(acts, framework="pt") as file:
        x = file.get_slice("x")
        assert x.get_shape()[1] == size.d_in, f"{acts} is of d {x.get_shape()[1]}"
        got = x[:tokens]
    return got.to(device, torch.bfloat16)


def batches(x_ND: Tensor, size: Size) -> Iterator[Tensor]:
    """Those of a run; the last batch of x is not among them."""
    parts = x_ND.split(size.batch)
    known = max(1, len(parts) - 1)
    for step in range(size.steps):
        yield parts[step % known]


def width_of(acts: Path) -> int:
    """d of a file of activations."""
    with safe_open(acts, framework="pt") as file:
        return int(file.get_slice("x").get_shape()[1])
