"""One training run in a process of its own: its time a step and its memory, or what it learns.

Run by `steps.py` and `quality.py`, by this project's interpreter or by the peers'. The last line
that it prints is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.train.peers import LIBRARIES, Task

WARM = 3
"""Steps before the clock starts."""
HELD_BATCH = 2048


def main() -> None:
    words = parse()
    torch.set_num_threads(words.threads)
    x = open_x(words.acts)
    task = Task(
        d_in=x.shape[1],
        d_sae=words.d_sae,
        k=words.k,
        batch=words.batch,
        steps=words.steps or len(x) // words.batch,
        seed=words.seed,
        lr=words.lr,
        warmup=words.warmup,
        decay_share=words.decay,
        penalty=words.penalty,
        options=json.loads(words.options),
        sample=x[:: max(1, len(x) // 8192)].float(),
    )
    make = LIBRARIES.get(words.library) or own()
    before = memory("VmRSS")
    run = make(task, words.architecture)
    if words.timed:
        print(json.dumps({"ms": timed(run, x, task), "memory": memory("VmHWM") - before}))
        return
    seconds = train(run, x, task)
    print(json.dumps({"seconds": seconds} | measure(run.result(), x, open_x(words.held), task)))


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("library")
    made.add_argument("architecture")
    made.add_argument("--acts", type=Path, required=True)
    made.add_argument("--held", type=Path)
    made.add_argument("--d-sae", type=int, default=8192)
    made.add_argument("--k", type=int, default=32)
    made.add_argument("--batch", type=int, default=1024)
    made.add_argument("--steps", type=int, default=0, help="0: one pass over the activations")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--lr", type=float)
    made.add_argument("--warmup", type=int, default=100)
    made.add_argument("--decay", type=float, default=0.2)
    made.add_argument("--penalty", type=float)
    made.add_argument("--options", default="{}", help="JSON: this project's further options")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--timed", action="store_true")
    return made.parse_args()


def own() -> object:
    """This project's trainer, imported only here: the peers' interpreter needs none of it."""
    from benchmarks.train.own import Own

    return Own


def open_x(path: Path) -> Tensor:
    """The activations (tokens, d) of a safetensors file, mapped."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("x")


def batches(x: Tensor, task: Task) -> object:
    """Batches in an order that only the seed decides: the same for every library."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(task.seed))
    for step in range(task.steps):
        start = step * task.batch % (len(x) - task.batch + 1)
        yield x[order[start : start + task.batch]].float()


def timed(run: object, x: Tensor, task: Task) -> float:
    """Median milliseconds of a whole step, optimiser included."""
    times = []
    for number, batch in enumerate(batches(x, task)):
        started = time.perf_counter()
        run.step(number, batch)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[WARM:])


def train(run: object, x: Tensor, task: Task) -> float:
    started = time.monotonic()
    for number, batch in enumerate(batches(x, task)):
        run.step(number, batch)
        if number % 100 == 0:
            print(f"step {number} of {task.steps}", file=sys.stderr, flush=True)
    return time.monotonic() - started


@torch.no_grad()
def measure(reconstruct: object, x: Tensor, held: Tensor, task: Task) -> dict[str, float]:
    """FVU about the mean and L0 on held-out tokens; dead: features that fire on none of the last
    262,144 training tokens, by the final weights.
    """
    error = total = active = 0.0
    mean = held.double().mean(0)
    fired = torch.zeros(task.d_sae, dtype=torch.bool)
    for part in held.split(HELD_BATCH):
        out, on = reconstruct(part.float())
        error += float((out.double() - part.double()).pow(2).sum())
        total += float((part.double() - mean).pow(2).sum())
        active += float(on.sum())
        fired |= on.any(0)
    for part in x[-262_144:].split(HELD_BATCH):
        fired |= reconstruct(part.float())[1].any(0)
    return {
        "fvu": error / total,
        "l0": active / len(held),
        "dead": 1 - float(fired.double().mean()),
    }


def memory(key: str) -> float:
    """MB of this process: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1000
    raise SystemExit(f"this system does not tell {key}")


if __name__ == "__main__":
    main()
