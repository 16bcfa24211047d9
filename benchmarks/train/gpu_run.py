"""One library's training on the GPU in a process of its own, so that what breaks breaks alone:
times and memory of whole steps, and how well it reconstructs as it goes. The last line is JSON.

python -m benchmarks.train.gpu_run LIBRARY [--sizes A B C] [--acts FILE] [--openai FOLDER]
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.train.gpu_settings import SIZES, TINY, Size, activations, batches, width_of
from benchmarks.train.peers import LIBRARIES, Task

WARM = 10
"""Steps that are not timed: they compile and allocate."""
LOOKED_AT = 2048
"""Tokens that FVU is measured on."""


def own(kernels: bool) -> Callable[[Task], Any]:
    def make(task: Task) -> Any:
        from benchmarks.train.own import Own

        return Own(task, "topk", kernels=kernels)

    return make


def peer(name: str, autocast: bool = False) -> Callable[[Task], Any]:
    return lambda task: LIBRARIES[name](dataclasses.replace(task, autocast=autocast), "topk")


def openai(task: Task) -> Any:
    from benchmarks.train.openai_peer import OpenAI

    return OpenAI(task)


RUNS: dict[str, tuple[Callable[[Task], Any], float | None]] = {
    "saezoo": (own(True), None),
    "saezoo, torch ops": (own(False), None),
    "OpenAI kernels": (openai, 1.5),
    "sparsify": (peer("sparsify"), 2.5),
    "sparsify, Adam": (peer("sparsify, Adam"), 2.5),
    "dictionary_learning, bf16": (peer("dictionary_learning", autocast=True), 4.0),
    "SAELens, bf16": (peer("SAELens", autocast=True), 4.0),
    "SAELens": (peer("SAELens"), 4.0),
}
"""What makes a run, and how many times as long its step must take as saezoo's. bf16: the library's
own option; without it SAELens computes in float32, as is its default.
"""


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("library", choices=RUNS)
    made.add_argument("--sizes", nargs="*", default=list(SIZES))
    made.add_argument("--acts", type=Path)
    made.add_argument("--openai", type=Path)
    made.add_argument("--seconds", type=float, default=60, help="of all sizes together")
    words = made.parse_args()
    if words.openai:
        sys.path.insert(0, str(words.openai))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    until = time.monotonic() + words.seconds
    rows = {}
    for name in words.sizes:
        size = TINY if name == "tiny" else SIZES[name]
        try:
            rows[name] = measure(words.library, size, words.acts, device, until)
        except Exception as error:  # noqa: BLE001 whatever it is, it is this library's result
            rows[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if device == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(rows))


def measure(
    library: str, size: Size, acts: Path | None, device: str, until: float
) -> dict[str, Any]:
    """A run of one size."""
    if acts and width_of(acts) != size.d_in:
        acts = None
    x_ND = activations(size, acts, device)
    held_ND = x_ND[-LOOKED_AT:].float()
    task = Task(
        d_in=size.d_in,
        d_sae=size.d_sae,
        k=size.k,
        batch=size.batch,
        steps=size.steps,
        seed=0,
        lr=None if library == "sparsify" else 1e-3 * (5120 / size.d_sae) ** 0.5,
        warmup=max(1, size.steps // 10),
        decay_share=0.2,
        penalty=None,
        options={},
        sample=x_ND[:4096].float(),
        device=device,
    )
    clock = Clock(device)
    run = RUNS[library][0](task)
    curve: dict[int, float] = {}
    for number, batch in enumerate(batches(x_ND, size)):
        if time.monotonic() > until:
            break
        clock.step(lambda number=number, batch=batch: run.step(number, batch.float()))
        if (number + 1) % max(1, size.steps // 3) == 0:
            curve[number + 1] = fvu(run.result(), held_ND)
    data = "file" if acts else "synthetic"
    return clock.result(size.batch) | {"fvu_after_steps": curve, "data": data}


@torch.no_grad()
def fvu(reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]], x_ND: Tensor) -> float:
    """Squared error over the variance about the mean, of tokens that are not trained on."""
    error = sum(
        float((reconstruct(part)[0].float() - part).pow(2).sum()) for part in x_ND.split(512)
    )
    return error / float((x_ND - x_ND.mean(0)).pow(2).sum())


class Clock:
    """Times of whole steps by the device's own events, and the most memory that the steps took
    beyond what was there before.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.events: list[Any] = []
        self.before = self.peak = 0
        if self.cuda:
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def step(self, work: Callable[[], None]) -> None:
        if not self.cuda:
            started = time.perf_counter()
            work()
            self.events.append(1000 * (time.perf_counter() - started))
            return
        torch.cuda.reset_peak_memory_stats()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        self.events.append((first, last))
        self.peak = max(self.peak, torch.cuda.max_memory_allocated())

    def result(self, tokens: int) -> dict[str, Any]:
        if self.cuda:
            torch.cuda.synchronize()
            times = [first.elapsed_time(last) for first, last in self.events]
        else:
            times = self.events
        timed = times[min(WARM, len(times) // 2) :]
        if not timed:
            return {"failed": "no time was left"}
        ms = statistics.median(timed)
        return {
            "ms": round(ms, 4),
            "ms_quartiles": [round(part, 4) for part in quartiles(timed)],
            "tokens_per_second": round(1000 * tokens / ms),
            "peak_memory_gb": round((self.peak - self.before) / 1e9, 3) if self.cuda else None,
            "steps": len(times),
        }


def quartiles(times: list[float]) -> list[float]:
    return statistics.quantiles(times, n=4)[::2] if len(times) > 1 else times * 2


if __name__ == "__main__":
    main()
