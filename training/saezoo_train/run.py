"""A whole run, from a recipe to a folder that `load_sae` opens: prepare, store, measure, train,
finish. Each part goes on where an earlier run of the same recipe left it.

    NAME.run/           recipe.json, metrics.jsonl, checkpoint-…/, activations/, done.json
    NAME/               the result, when it is whole
"""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saezoo.errors import Stopped
from saezoo_train.activations import ModelSource, Position, ShardSource, Source
from saezoo_train.backend import choose_backend
from saezoo_train.buffer import Buffer, BufferPlace
from saezoo_train.checkpoint import last_checkpoint, save_checkpoint
from saezoo_train.config import Recipe, resolve
from saezoo_train.data import fingerprint
from saezoo_train.finish import (
    STATS_TOKENS,
    Facts,
    feature_stats,
    fold,
    measure,
    measure_rows,
    write_result,
)
from saezoo_train.folder import RunFolder
from saezoo_train.metrics_log import MetricsLog, Wandb
from saezoo_train.moments import (
    MEASURED,
    Moments,
    first_chunks,
    measure_moments,
    to_setting,
)
from saezoo_train.own import find_architecture, to_measure
from saezoo_train.preflight import Needs, refuse_no_room
from saezoo_train.prepare import Prepared, prepare, rows_up_to
from saezoo_train.reading import read_recipe
from saezoo_train.store import store_pass
from saezoo_train.trainer import Trainer
from saezoo_train.watch import Row, Stop, Watch

GOLDEN_FROM = 512
"""Activations that golden inputs are chosen from."""


@dataclass(frozen=True)
class Trained:
    """What a run came to."""

    folder: Path
    """Native: `load_sae(folder)` opens it."""
    metrics: Facts
    """Measured on held-out documents."""
    resumed_at: int | None = None
    """The step at which an earlier run was taken up."""
    was_done: bool = False
    """Nothing was left to do."""


def train_sae(
    config: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    fresh: bool = False,
    watch: Watch | None = None,
) -> Trained:
    """Train an SAE, or go on with a run of the same recipe that was stopped or killed.

    config: a recipe, its values, its file, or the name of a bundled one. out: the folder to write;
    default: the recipe's name, here. changes: dotted keys and their new values, such as
    {"sae.k": 64}. fresh: start over. watch: told how it goes; default: nobody.

    Ctrl-C and SIGTERM save a checkpoint and raise Stopped. Raises SaezooError in one line for bad
    input, before anything long begins, and TrainingError for a loss that is not finite.
    """
    watch = watch or Watch()
    recipe = resolve(read_recipe(config, changes))
    folder = RunFolder(Path(out) if out is not None else Path(recipe.name.replace("/", "-")))
    try:
        with folder.open(recipe, fingerprint(recipe.data), fresh), Stop().listening() as stop:
            done = folder.done()
            if done is not None:
                return Trained(folder.out, done, was_done=True)
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(recipe.seed)
                return _run(prepare(recipe, watch), folder, fresh, watch, stop)
    finally:
        watch.close()


def _run(ready: Prepared, folder: RunFolder, fresh: bool, watch: Watch, stop: Stop) -> Trained:
    recipe = ready.recipe
    source = ready.source()
    watch.phase("reading a first text", None)
    d_in = next(source.chunks(Position())).x.shape[1]
    refuse_no_room(Needs.of(recipe, d_in, ready.host_parameters), folder.path, ready.device)
    if recipe.data.store and isinstance(source, ModelSource):
        watch.phase("reading activations", recipe.data.tokens)
        progress = _stoppable(watch, stop)
        store_pass(source, folder.activations, replace=fresh, progress=progress)
        source = ShardSource(recipe, folder.activations, hold_out=False)
    trainer, moments, resumed_at = _trainer(ready, source, folder, watch, stop)
    logger = None
    if recipe.run.logger == "wandb":
        logger = Wandb(recipe.name, recipe.model_dump(mode="json"), folder.path)
    log = MetricsLog(folder.path, trainer.step, logger)
    numbers, setting = moments.parts()

    def row(values: Row) -> None:
        log.add(values)
        watch.row(values)

    def save() -> None:
        run, state = trainer.state()
        save_checkpoint(folder.path, run | {"moments": numbers}, state, setting)

    if trainer.step < recipe.steps:
        watch.phase("filling the buffer", trainer.buffer.block_tokens)
        trainer.buffer.begin(_stoppable(watch, stop))
    watch.phase("training", recipe.steps * recipe.batch, trainer.step * recipe.batch)
    try:
        trainer.run(row=row, save=save, progress=watch.progress, stop=stop)
    finally:
        log.close()
    facts = _finish(ready, trainer, moments, source, folder, watch, stop)
    folder.finish(facts)
    return Trained(folder.out, facts, resumed_at)


def _trainer(
    ready: Prepared, source: Source, folder: RunFolder, watch: Watch, stop: Stop
) -> tuple[Trainer, Moments, int | None]:
    """A trainer at its first step, or at that of the last checkpoint."""
    recipe = ready.recipe
    factor = recipe.tokens.max_norm_factor
    checkpoint = last_checkpoint(folder.path)
    stream, place = None, None
    if checkpoint is None:
        watch.phase("measuring the first activations", MEASURED)
        taken, rest = first_chunks(source, _stoppable(watch, stop))
        x_SD = torch.cat([chunk.x.float().cpu() for chunk in taken])
        moments = measure_moments(x_SD, factor, recipe.tokens.median_norm, recipe.seed)
        stream = itertools.chain(taken, rest)
    else:
        moments = Moments.of(checkpoint.run["moments"], checkpoint.setting())
        place = BufferPlace.model_validate(checkpoint.run["place"])
        watch.note(f"going on after step {checkpoint.step:,} of {recipe.steps:,}")
    model = find_architecture(recipe.architecture)(recipe.sae, to_setting(moments, recipe))
    model = model.to(ready.device)
    backend = choose_backend(recipe, ready.device)
    watch.note(backend.words)
    buffer = Buffer(
        source,
        batch=recipe.batch,
        batches=recipe.steps,
        tokens=recipe.buffer.tokens,
        max_norm=moments.max_norm(factor),
        dtype=getattr(torch, recipe.buffer.dtype),
        seed=recipe.seed,
        place=place,
        stream=stream,
    )
    trainer = Trainer(recipe, model, buffer, moments.scale, backend.kit())
    if checkpoint is not None:
        trainer.load(checkpoint.run, checkpoint.state())
    return trainer, moments, checkpoint.step if checkpoint else None


def _finish(
    ready: Prepared,
    trainer: Trainer,
    moments: Moments,
    source: Source,
    folder: RunFolder,
    watch: Watch,
    stop: Stop,
) -> Facts:
    """Measure the rounded weights and write the result."""
    recipe = ready.recipe
    by = None if trainer.kit is None else "Triton kernels, products in bfloat16"
    cfg, tensors = fold(recipe, ready.site, trainer.model, moments.median_norm, by)
    kind = type(trainer.model)
    max_norm = moments.max_norm(recipe.tokens.max_norm_factor)
    facts: Facts = {
        "training_tokens": recipe.steps * recipe.batch,
        "held_out_documents": len(ready.pieces),
    }
    sae = to_measure(cfg, tensors, kind, ready.device)
    if sae is None:
        del facts["held_out_documents"]
        write_result(cfg, tensors, facts, moments.sample_SD, {}, folder.out)
        return facts
    progress = _stoppable(watch, stop)
    if ready.model is not None:
        watch.phase("measuring", len(ready.pieces), unit="contexts")
        found = measure(sae, ready.model, ready.tokenizer, ready.pieces, progress)
        facts = {**found.to_json(), **facts}
    sae = to_measure(cfg, tensors, kind)
    if ready.model is None and isinstance(source, ShardSource):
        del facts["held_out_documents"]
        facts = measure_rows(sae, source.held_out(), max_norm) | facts
    # the model would have to read again for more than the sample
    rows: Iterable[Tensor] = moments.sample_SD.split(4096)
    watch.phase("counting features", None)
    if isinstance(source, ShardSource):
        chunks = source.chunks(Position())
        one_pass = itertools.takewhile(lambda chunk: not chunk.after.epoch, chunks)
        whole = (chunk.x.float() for chunk in one_pass)
        rows = rows_up_to((x[x.norm(dim=-1) <= max_norm] for x in whole), STATS_TOKENS)
    stats, facts["stats_tokens"] = feature_stats(sae, rows, progress)
    write_result(cfg, tensors, facts, moments.sample_SD[:GOLDEN_FROM], stats, folder.out)
    return facts


def _stoppable(watch: Watch, stop: Stop) -> Callable[[int], None]:
    """Shows progress, and stops where there is nothing to save."""

    def progress(done: int) -> None:
        watch.progress(done)
        if stop.signal is not None:
            raise Stopped("stopped")

    return progress
