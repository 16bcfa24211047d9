"""Training step time and memory beside the peers, on the same activations, whole steps with their
optimisers: interleaved runs in processes of their own, medians.

python -m benchmarks.train.steps [--acts FILE] [--runs 5]
"""

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks import _run
from benchmarks.train.data import synthetic

ONE = Path(__file__).parent / "one.py"
SIZES = ((8192, 12), (32768, 8))
"""(d_sae, steps that are timed, with the first three left out)."""
LIBRARIES = ("saezoo", "sparsify", "sparsify, Adam", "SAELens", "dictionary_learning")
"""SAELens: its topk with its own defaults."""
FLOOR = {"SAELens": {8192: 4.0, 32768: 4.0}, "sparsify": {8192: 1.1, 32768: 1.2}}
"""How many times as fast as these a step must be."""


def main() -> None:
    made = _run.parser(__doc__)
    made.set_defaults(runs=5)
    made.add_argument("--acts", type=Path, help="a safetensors file with x (tokens, d)")
    made.add_argument("--batch", type=int, default=1024)
    made.add_argument("--k", type=int, default=32)
    made.add_argument("--sizes", type=int, nargs="*", help="d_sae, instead of both")
    words = made.parse_args()
    peers = _run.need_peers()
    acts = words.acts or synthetic()
    rows = []
    for d_sae, steps in SIZES:
        if words.sizes and d_sae not in words.sizes:
            continue
        common = [
            "topk",
            "--timed",
            "--acts",
            str(acts),
            "--d-sae",
            str(d_sae),
            "--k",
            str(words.k),
        ]
        common += [
            "--batch",
            str(words.batch),
            "--steps",
            str(steps),
            "--warmup",
            "2",
            "--decay",
            "0",
        ]
        rows += measure(peers, common, d_sae, words.runs)
    setting = (
        f"topk, d 576, k {words.k}, batch {words.batch:,}, float32, whole step with optimiser, "
        f"{torch.get_num_threads()} threads; a fresh process each in turns, medians of {words.runs}"
    )
    _run.write_result("train_steps", setting, rows)


def measure(peers: Path, common: list[str], d_sae: int, runs: int) -> list[dict[str, Any]]:
    """A row for each library at one width."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in LIBRARIES}
    for _ in range(runs):
        for name in LIBRARIES:
            python = _run.own_python() if name == "saezoo" else peers
            seen[name].append(_run.child(python, ONE, name, *common))
    middle = {
        name: {key: statistics.median(item[key] for item in items) for key in items[0]}
        for name, items in seen.items()
    }
    ours = middle["saezoo"]
    return [
        {
            "library": name,
            "d_sae": d_sae,
            "ms": round(got["ms"], 1),
            "peak_memory_mb": round(got["memory"], 1),
            "saezoo_is_faster_by": round(got["ms"] / ours["ms"], 2),
            "must_be": FLOOR.get(name, {}).get(d_sae),
        }
        for name, got in middle.items()
    ]


if __name__ == "__main__":
    main()
