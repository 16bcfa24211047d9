"""The training loop: batches in, a trained architecture out, and all of its state at any step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saezoo.errors import Stopped, TrainingError
from saezoo_train.architectures import Architecture, StepOutput
from saezoo_train.buffer import Buffer
from saezoo_train.checkpoint import random_state, set_random_state
from saezoo_train.config import Recipe
from saezoo_train.kernels.step import KernelStep
from saezoo_train.optimiser import adam_tensors, load_adam, make_adam, rate_at
from saezoo_train.watch import Row, Stop

EXPLODED = 100.0
"""A run has exploded when its FVU is this many times the lowest that it had, and above 10."""


@dataclass
class Window:
    """Sums of what the steps since the last row gave."""

    count: int = 0
    sums: dict[str, Tensor | float] = field(default_factory=dict)

    def add(self, out: StepOutput) -> None:
        """One more step. Sums stay on the device: nothing waits for them."""
        values = {"loss": out.loss, "fvu": out.fvu, "l0": out.l0, "dead": out.dead, **out.logs}
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.detach().double()
        self.count += 1

    def totals(self) -> dict[str, float]:
        """The sums as plain numbers."""
        return {key: float(value) for key, value in self.sums.items()}

    def means(self) -> Row:
        """The mean of each number."""
        return {key: value / self.count for key, value in self.totals().items()}


class Trainer:
    """An architecture, its optimiser and where they are. `run` trains to the end."""

    def __init__(
        self,
        recipe: Recipe,
        model: Architecture,
        buffer: Buffer,
        scale: float,
        kit: ModuleType | None = None,
    ) -> None:
        """recipe: resolved. The model is where it is to be trained. kit: the kernels that make the
        updates; None: torch ops do.
        """
        self.recipe, self.model, self.buffer, self.scale = recipe, model, buffer, scale
        self.adam = make_adam(model, recipe.optimiser)
        self.device = next(model.parameters()).device
        self.kit = kit
        self.kernel_step: KernelStep | None = None
        self.step, self.seconds, self.lowest = 0, 0.0, math.inf
        self.window = Window()

    def run(
        self,
        *,
        row: Callable[[Row], None],
        save: Callable[[], None],
        progress: Callable[[int], None],
        stop: Stop,
    ) -> None:
        """Train until the last step. row gets the metrics every `run.log_every` steps, save is
        called every `run.checkpoint_minutes` and at the end.

        Raises TrainingError when the loss is not finite or explodes, naming what is wrong, and
        Stopped when asked to, after a save.
        """
        recipe, settings = self.recipe, self.recipe.run
        saved = began = time.monotonic()
        spent, at_row = self.seconds, self.step
        row_time = began
        while self.step < recipe.steps:
            self.train_step()
            now = time.monotonic()
            self.seconds = spent + now - began
            progress(self.step * recipe.batch)
            if self.step % settings.log_every == 0 or self.step == recipe.steps:
                tokens = (self.step - at_row) * recipe.batch
                row(self._row(tokens / max(now - row_time, 1e-9)))
                row_time, at_row = now, self.step
            if stop.signal is not None:
                save()
                raise Stopped(f"stopped after step {self.step:,} of {recipe.steps:,}")
            if now - saved >= settings.checkpoint_minutes * 60 or self.step == recipe.steps:
                save()
                saved = time.monotonic()

    def train_step(self) -> None:
        """One update. Through torch ops, raises TrainingError for a loss that is not finite before
        it does harm; with kernels nothing waits for the loss, and the next row of metrics tells.
        """
        rate = self.learning_rate
        self.adam.param_groups[0]["lr"] = rate
        x_BD = (self.buffer.next().to(self.device)) * self.scale
        if self.kit is not None and self.kernel_step is None:
            # made late: it holds Adam's tensors, which `load` replaces
            self.kernel_step = KernelStep(self.model, self.adam, kit=self.kit)
        if self.kernel_step is not None and self.kernel_step.takes(x_BD, self.step):
            self.window.add(self.kernel_step(x_BD, self.step, rate))
        else:
            self.window.add(self._update(x_BD, rate))
        self.step += 1

    def _update(self, x_BD: Tensor, rate: float) -> StepOutput:
        """One update through torch ops."""
        out = self.model.training_step(x_BD, self.step)
        if not math.isfinite(float(out.loss.detach())):
            raise TrainingError(self._diagnosis(x_BD, out, rate))
        self.adam.zero_grad(set_to_none=True)
        out.loss.backward()
        self.model.before_update()
        if self.recipe.optimiser.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip_norm)
        self.adam.step()
        self.model.after_update()
        return out

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        settings = self.recipe.optimiser
        assert settings.lr is not None
        share = rate_at(self.step, self.recipe.steps, settings.warmup_steps, settings.decay_share)
        return settings.lr * share

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that changes, as plain values and as tensors.

        Raises TrainingError when a parameter is not finite: that is nothing to go on from.
        """
        if broken := not_finite(dict(self.model.named_parameters())):
            raise TrainingError(
                f"step {self.step:,}: {broken}, so no checkpoint is written; {self._advice()}"
            )
        run = {
            "step": self.step,
            "seconds": self.seconds,
            "lowest": self.lowest if math.isfinite(self.lowest) else None,
            "window": {"count": self.window.count, "sums": self.window.totals()},
            "place": self.buffer.place.model_dump(),
        }
        tensors = {f"model/{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {
            f"adam/{key}": value for key, value in adam_tensors(self.model, self.adam).items()
        }
        return run, tensors | random_state(self.device)

    def load(self, run: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave. The buffer was made at its place already."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "adam": {}}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            parts.setdefault(group, {})[name] = value
        self.model.load_state_dict(parts["model"])
        load_adam(self.model, self.adam, parts["adam"])
        self.kernel_step = None
        set_random_state(tensors, self.device)
        self.step, self.seconds = run["step"], run["seconds"]
        self.lowest = math.inf if run["lowest"] is None else run["lowest"]
        self.window = Window(**run["window"])

    def _row(self, speed: float) -> Row:
        """The means since the last row. Raises TrainingError when they have exploded."""
        means = self.window.means()
        if not math.isfinite(means["loss"]):
            broken = not_finite(dict(self.model.named_parameters())) or "all parameters are finite"
            raise TrainingError(
                f"step {self.step:,}: the loss of one of the last {self.window.count} steps is "
                f"not finite: {broken}; {self._advice()}"
            )
        self.window = Window()
        if means["fvu"] > max(10.0, EXPLODED * self.lowest):
            raise TrainingError(
                f"step {self.step:,}: the loss exploded: FVU {means['fvu']:.3g}, its lowest was "
                f"{self.lowest:.3g}; {self._advice()}"
            )
        self.lowest = min(self.lowest, means["fvu"])
        return {
            "step": self.step,
            "tokens": self.step * self.recipe.batch,
            **means,
            "lr": self.adam.param_groups[0]["lr"],
            "tokens_per_second": round(speed, 1),
            "seconds": round(self.seconds, 2),
        }

    def _diagnosis(self, x_BD: Tensor, out: StepOutput, rate: float) -> str:
        parts = {"the batch of activations": x_BD, **dict(self.model.named_parameters())}
        named = {
            "the FVU": out.fvu,
            **{f"the loss {key}": value for key, value in out.logs.items()},
        }
        broken = not_finite(parts) or not_finite(named) or "all tensors are finite"
        return (
            f"step {self.step:,}: the loss is {float(out.loss.detach())} at learning rate "
            f"{rate:.3g}: {broken}; {self._advice()}"
        )

    def _advice(self) -> str:
        lr = self.recipe.optimiser.lr or 0.0
        clip = "" if self.recipe.optimiser.clip_norm else ", or optimiser.clip_norm=1"
        return f"try optimiser.lr={lr / 3:.2g}, a longer optimiser.warmup_steps{clip}"


def not_finite(tensors: dict[str, Tensor]) -> str:
    """The first tensor that has NaN or infinity in it, in words; empty when all are finite."""
    for name, value in tensors.items():
        wrong = int((~value.detach().isfinite()).sum())
        if wrong:
            return f"{name} holds {wrong:,} values of {value.numel():,} that are not finite"
    return ""
