"""What a run would take, found out in seconds: everything is checked, a few texts are read, a few
steps are made, and nothing is kept.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saezoo_train.activations import Chunk, Position, Source
from saezoo_train.architectures import Architecture
from saezoo_train.backend import choose_backend
from saezoo_train.buffer import Buffer
from saezoo_train.config import Recipe, resolve
from saezoo_train.moments import Moments, measure_moments, to_setting
from saezoo_train.own import find_architecture
from saezoo_train.preflight import Needs, refuse_no_room
from saezoo_train.prepare import Prepared, prepare
from saezoo_train.reading import read_recipe
from saezoo_train.trainer import Trainer
from saezoo_train.watch import Watch

STEPS = 3
"""Of training that are timed; the first is not counted."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Times are what this machine does now."""

    site: str
    d_in: int
    d_sae: int | None
    steps: int
    host_tokens: int
    """Activations that the language model is read for."""
    host_speed: float | None
    """Activations a second; None where none is needed."""
    train_speed: float
    """Activations a second."""
    seconds: float
    memory: int
    """Bytes."""
    disk: int
    """Bytes."""
    free: int
    """Bytes on that disk."""


def dry_run(
    config: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Estimate:
    """Check all that can stop a run, and estimate memory, disk and time. Writes nothing.

    Raises what `train_sae` raises for bad input.
    """
    watch = watch or Watch()
    try:
        ready = prepare(resolve(read_recipe(config, changes)), watch)
        recipe = ready.recipe
        watch.phase("reading a few texts", None)
        source = ready.source()
        x_SD, speed = _read_some(source, recipe)
        factor = recipe.tokens.max_norm_factor
        moments = measure_moments(x_SD, factor, recipe.tokens.median_norm, recipe.seed)
        needs = Needs.of(recipe, len(moments.mean_D), ready.host_parameters)
        free = refuse_no_room(needs, Path(out or "."), ready.device)
        with torch.random.fork_rng([]):
            setting = to_setting(moments, recipe)
            model = find_architecture(recipe.architecture)(recipe.sae, setting).to(ready.device)
            watch.phase("making a few steps", None)
            step = _time_steps(ready, model, moments, x_SD)
        return _estimate(ready, needs, free, len(moments.mean_D), speed, step)
    finally:
        watch.close()


def _read_some(source: Source, recipe: Recipe) -> tuple[torch.Tensor, float]:
    """At least a batch of activations, and how many of them come a second. The first chunk is not
    counted where there are others: a model's first call takes many times as long as the next.
    Raises DataError where there is no batch.
    """
    began = time.monotonic()
    parts: list[torch.Tensor] = []
    for chunk in source.chunks(Position()):
        parts.append(chunk.x.float().cpu())
        if len(parts) == 1:
            first = time.monotonic()
        elif sum(map(len, parts)) >= recipe.batch:
            break
    x_SD = torch.cat(parts)
    if len(parts) == 1:
        return x_SD, len(x_SD) / (first - began)
    return x_SD, (len(x_SD) - len(parts[0])) / (time.monotonic() - first)


class _Again(Source):
    """The same few activations for ever: what a step costs does not depend on them."""

    what = "a few activations"

    def __init__(self, x_SD: torch.Tensor) -> None:
        self.x_SD = x_SD

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """See Source."""
        while True:
            yield Chunk(self.x_SD, start)


def _time_steps(
    ready: Prepared, model: Architecture, moments: Moments, x_SD: torch.Tensor
) -> float:
    """Seconds of a step."""
    recipe = ready.recipe
    buffer = Buffer(
        _Again(x_SD),
        batch=recipe.batch,
        batches=STEPS,
        tokens=recipe.batch,
        max_norm=moments.max_norm(recipe.tokens.max_norm_factor),
        dtype=torch.float32,
        seed=recipe.seed,
    )
    kit = choose_backend(recipe, ready.device).kit()
    trainer = Trainer(recipe, model, buffer, moments.scale, kit)
    trainer.train_step()
    began = time.monotonic()
    for _ in range(STEPS - 1):
        trainer.train_step()
    return (time.monotonic() - began) / (STEPS - 1)


def _estimate(
    ready: Prepared, needs: Needs, free: int, d_in: int, speed: float, step: float
) -> Estimate:
    recipe = ready.recipe
    host_tokens = 0
    if ready.folder is None:
        stored = recipe.data.tokens if recipe.data.store else None
        host_tokens = stored or recipe.train_tokens
    # measuring runs the model three times on each held-out context
    measured = 3 * sum(map(len, ready.pieces))
    seconds = recipe.steps * step + (host_tokens + measured) / speed
    return Estimate(
        site=f"{ready.site.side} of {ready.site.module} of {ready.site.model}",
        d_in=d_in,
        d_sae=recipe.d_sae,
        steps=recipe.steps,
        host_tokens=host_tokens,
        host_speed=speed if host_tokens else None,
        train_speed=recipe.batch / step,
        seconds=seconds,
        memory=needs.memory,
        disk=needs.disk,
        free=free,
    )
