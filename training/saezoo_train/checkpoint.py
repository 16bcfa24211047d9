"""Checkpoints: all of a run's state, in folders that appear whole or not at all.

    NAME.run/checkpoint-00001200/run.json             step, recipe, place in the data, running sums
                                 state.safetensors    parameters, buffers, Adam, random numbers
                                 setting.safetensors  what was measured before the first step

A checkpoint is a new folder that is renamed into place; only then is the one before it removed. A
run that dies at any moment leaves a whole one.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saezoo.errors import TrainingError
from saezoo.files import write_folder

PREFIX = "checkpoint-"
STATE, SETTING, RUN = "state.safetensors", "setting.safetensors", "run.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it lies on disk."""

    path: Path
    run: dict[str, Any]
    """What run.json says."""

    @property
    def step(self) -> int:
        """Updates that were made."""
        return int(self.run["step"])

    def state(self) -> dict[str, Tensor]:
        """Tensors of model, optimiser and random numbers."""
        return _read(self.path / STATE)

    def setting(self) -> dict[str, Tensor]:
        """Tensors that were measured before the first step."""
        return _read(self.path / SETTING)


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a run's folder. Raises TrainingError for one that cannot be read."""
    paths = sorted(folder.glob(f"{PREFIX}*"), reverse=True)
    if not paths:
        return None
    try:
        return Checkpoint(paths[0], json.loads((paths[0] / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{paths[0]}: cannot be read ({error}); remove it to go on from an earlier one, "
            "or start over with --fresh"
        ) from None


def save_checkpoint(
    folder: Path, run: dict[str, Any], state: dict[str, Tensor], setting: dict[str, Tensor]
) -> Path:
    """Write a checkpoint of `run["step"]`, then remove those before it.

    Raises TrainingError when it cannot be written; the one before then stays whole.
    """
    path = folder / f"{PREFIX}{run['step']:08d}"
    before = [item for item in folder.glob(f"{PREFIX}*") if item != path]
    try:
        with write_folder(path) as work:
            save_file({key: value.contiguous() for key, value in state.items()}, work / STATE)
            _link_setting(before, setting, work / SETTING)
            (work / RUN).write_text(json.dumps(run, indent=1), encoding="utf-8")
            for name in (STATE, SETTING, RUN):
                _to_disk(work / name)
    except (OSError, SafetensorError) as error:
        raise TrainingError(_no_room(path, run["step"], state, before, error)) from None
    for item in before:
        shutil.rmtree(item, ignore_errors=True)
    return path


def sweep(folder: Path) -> None:
    """Remove what a run that died while writing left behind."""
    for item in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(item, ignore_errors=True)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's random numbers."""
    state = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng/cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["rng/cpu"])
    if device.type == "cuda" and "rng/cuda" in state:
        torch.cuda.set_rng_state(state["rng/cuda"], device)


def _link_setting(before: list[Path], setting: dict[str, Tensor], path: Path) -> None:
    """The same file in every checkpoint of a run: linked where it is there already."""
    for item in before:
        try:
            os.link(item / SETTING, path)
        except OSError:
            continue
        return
    save_file({key: value.contiguous() for key, value in setting.items()}, path)


def _to_disk(path: Path) -> None:
    """Past the system's cache, so that a power cut after the rename finds the bytes there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _no_room(
    path: Path, step: int, state: dict[str, Tensor], before: list[Path], error: Exception
) -> str:
    size = sum(value.numel() * value.element_size() for value in state.values()) / 1e6
    free = shutil.disk_usage(path.parent).free / 1e6
    kept = f"{before[-1].name} stays whole" if before else "there is none yet"
    first = str(error).splitlines()[0]
    return (
        f"{path}: the checkpoint of step {step:,} could not be written ({first}); it takes "
        f"{size:,.0f} MB, {free:,.0f} MB are free; {kept}; make room and run the same command again"
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); start over with --fresh") from None
