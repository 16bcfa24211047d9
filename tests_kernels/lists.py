"""Lists as selection makes them, with empty slots, a latent that is on everywhere and latents that
never are.
"""

import torch

from tests_kernels.grid import device

SHAPES = [(5, 7, 41, 3), (19, 200, 97, 12)]
"""(B, D, M, K): no tile divides them."""


def numbers(*shape, seed=0, dtype=torch.float32):
    """Normal random numbers, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device())


def lists(tokens, d_sae, k, seed=0):
    """Values (B, K) float32, a quarter of them 0, and indices, rising; latents of the last quarter
    are never on, the first is for every token but the one that has nothing at all.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, d_sae, generator=generator)
    scores[:, 3 * d_sae // 4 :] = -1
    scores[:, 0] = 2
    counts = torch.randint(1, k + 1, (tokens,), generator=generator)
    counts[tokens // 2] = 0
    counts[0] = k
    idx = scores.argsort(dim=-1, descending=True)[:, :k]
    idx = torch.where(torch.arange(k) < counts[:, None], idx, d_sae).sort(dim=-1).values
    values = torch.rand(tokens, k, generator=generator) + 0.1
    values[torch.rand(tokens, k, generator=generator) < 0.25] = 0
    values[idx == d_sae] = 0
    return values.to(device()), idx.int().to(device())
