"""The training loop: shards of activations in, a trained module out."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saezoo_train.architectures import TopKTrainer
from saezoo_train.config import Recipe
from saezoo_train.losses import auxk_loss, reconstruction_loss
from saezoo_train.step import normalise_rows, remove_parallel_gradient

POOL = 12
"""Shards that are shuffled together: bounds memory, and mixes more contexts than a batch has
tokens.
"""


@dataclass(frozen=True)
class Moments:
    """What is measured on the shards before training, in raw units, outliers left out."""

    mean_D: Tensor
    median_norm: float
    mean_norm: float
    variance: float
    """Mean squared distance from the mean."""
    tokens: int
    outliers: int


def shard_paths(folder: Path) -> list[Path]:
    """The whole shards of a harvest, in order."""
    count = json.loads((folder / "index.json").read_text())["shards"]
    return [folder / f"shard-{number:05d}.npy" for number in range(count)]


def measure_moments(paths: list[Path], max_norm_factor: float) -> Moments:
    """Two passes: the median norm decides who is an outlier, then mean and variance of the rest, in
    float64.
    """
    norms = [torch.from_numpy(np.load(path)).float().norm(dim=-1) for path in paths]
    median = float(torch.cat(norms).median())
    total, squares, kept, length = torch.zeros(()), 0.0, 0, 0.0
    for path, norm in zip(paths, norms, strict=True):
        x = torch.from_numpy(np.load(path)).float()[norm <= max_norm_factor * median]
        kept += len(x)
        total = total + x.double().sum(0)
        squares += float(x.double().pow(2).sum())
        length += float(x.norm(dim=-1).double().sum())
    mean = total / kept
    seen = sum(len(norm) for norm in norms)
    return Moments(
        mean.float(),
        median,
        length / kept,
        squares / kept - float(mean.pow(2).sum()),
        kept,
        seen - kept,
    )


def batches(paths: list[Path], size: int, max_norm: float, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches (size, d) float32 in raw units. The order depends on the seed
    alone.
    """
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0)
    while True:
        order = torch.randperm(len(paths), generator=generator).tolist()
        for start in range(0, len(order), POOL):
            pool = torch.cat(
                [torch.from_numpy(np.load(paths[number])) for number in order[start : start + POOL]]
            )
            pool = pool[torch.randperm(len(pool), generator=generator)]
            for block in pool.split(64 * size):
                block = block.float()
                block = block[block.norm(dim=-1) <= max_norm]
                left = torch.cat([left, block]) if len(left) else block
                whole = len(left) // size * size
                yield from left[:whole].split(size)
                left = left[whole:]


def train(
    recipe: Recipe,
    folder: Path,
    *,
    log: Callable[[dict[str, float]], None] = lambda _row: None,
    every: int = 100,
) -> tuple[TopKTrainer, Moments]:
    """Train on the shards of `folder`. `log` gets a row of numbers every so many steps."""
    paths = shard_paths(folder)
    moments = measure_moments(paths, recipe.tokens.max_norm_factor or float("inf"))
    max_norm = moments.median_norm * (recipe.tokens.max_norm_factor or float("inf"))
    scale = 1 / moments.mean_norm
    generator = torch.Generator().manual_seed(recipe.seed)
    model = TopKTrainer(recipe.sae, moments.mean_D, scale, generator)
    steps = recipe.train_tokens // recipe.batch
    settings = recipe.optimiser
    adam = torch.optim.Adam(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
    silent = torch.zeros(recipe.sae.d_sae, dtype=torch.int64)  # tokens since each latent last fired
    stream = batches(paths, recipe.batch, max_norm, recipe.seed + 1)
    started = time.monotonic()
    for step in range(steps):
        adam.param_groups[0]["lr"] = settings.lr * rate_at(
            step, steps, settings.warmup_steps, settings.decay_share
        )
        numbers = train_step(
            model, adam, next(stream) * scale, silent, recipe, moments.variance * scale**2, step
        )
        if step % every == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            log(
                numbers
                | {"step": step, "tokens": (step + 1) * recipe.batch, "seconds": round(seconds, 1)}
            )
    return model, moments


def train_step(
    model: TopKTrainer,
    adam: torch.optim.Optimizer,
    x_BD: Tensor,
    silent: Tensor,
    recipe: Recipe,
    variance: float,
    step: int,
) -> dict[str, float]:
    """One update in place; returns the batch's FVU, AuxK loss and share of dead latents."""
    cfg = recipe.sae
    out, acts, idx = model(x_BD, k_at(step, cfg.k, cfg.k_start, cfg.k_steps))
    loss = fvu = reconstruction_loss(x_BD, out, variance)
    dead = (silent > cfg.dead_after_tokens).nonzero().flatten()
    aux = torch.zeros(())
    if dead.numel() and cfg.auxk_coefficient:
        aux = auxk_loss(
            x_BD, out, model.W_enc, model.b_enc, model.W_dec, model.b_dec, dead, cfg.auxk
        )
        loss = fvu + cfg.auxk_coefficient * aux
    adam.zero_grad(set_to_none=True)
    loss.backward()
    assert model.W_dec.grad is not None
    remove_parallel_gradient(model.W_dec.data, model.W_dec.grad)
    adam.step()
    normalise_rows(model.W_dec.data)
    silent += len(x_BD)
    silent[idx[acts > 0]] = 0
    return {
        "fvu": float(fvu.detach()),
        "auxk": float(aux.detach()),
        "dead": dead.numel() / cfg.d_sae,
    }


def rate_at(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Share of the full learning rate: linear up, flat, linear down to zero."""
    decay = max(1, round(steps * decay_share))
    return min(1.0, (step + 1) / max(warmup, 1), (steps - step) / decay)


def k_at(step: int, k: int, k_start: int | None, k_steps: int) -> int:
    """Latents on per token at this step: falls linearly from k_start to k."""
    if k_start is None or step >= k_steps:
        return k
    return round(k_start + (k - k_start) * step / k_steps)
