"""What comes out of equal tokens: FVU, L0 and dead features of each library's SAE, trained on the
same activations in the same order. Medians of three seeds.

python -m benchmarks.train.quality --acts TRAIN --held HELD [--only topk]

A run that the results hold already is not run again, so an interrupted call goes on.
"""

import argparse
import datetime
import hashlib
import json
import os
import statistics
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks import _run

ONE = Path(__file__).parent / "one.py"
RUNS = _run.RESULTS / "train_quality_runs.json"
WHAT = (
    "library",
    "architecture",
    "seed",
    "lr",
    "warmup",
    "decay",
    "steps",
    "k",
    "penalty",
    "options",
)
"""Which keys tell a run from another."""
RATE: dict[str, Any] = {"lr": 2.37e-3}
"""Three times this project's default, which is chosen for longer runs (see ablation.py)."""
QUICK = json.dumps({"optimiser.beta2": 0.97, "auxk": 32, "dead_after_tokens": 50_000})
"""What else helps in a run as short as these: Adam forgets sooner, and dead latents are seen sooner
and asked fewer at a time.
"""
TASKS: list[tuple[str, str, dict[str, Any]]] = [
    ("saezoo", "topk", RATE),
    ("saezoo", "topk", RATE | {"options": QUICK}),
    ("sparsify", "topk", {}),
    ("dictionary_learning", "topk", {"lr": 1e-3}),
    ("dictionary_learning", "topk", RATE),
    ("saezoo", "batchtopk", RATE),
    ("dictionary_learning", "batchtopk", RATE),
    ("dictionary_learning", "batchtopk", RATE | {"k": 35}),
    ("saezoo", "jumprelu", RATE),
    ("dictionary_learning", "jumprelu", {"lr": 1e-3}),
    ("dictionary_learning", "jumprelu", RATE),
    ("saezoo", "gated", RATE),
    ("dictionary_learning", "gated", {"lr": 1e-3}),
    ("dictionary_learning", "gated", {"lr": 1e-3, "penalty": 0.131}),
    ("dictionary_learning", "gated", RATE | {"penalty": 0.115}),
    ("sparsify, Adam", "topk", {"lr": 1e-3}),
]
"""(library, architecture, options of one.py). sparsify has a learning rate of its own.
dictionary_learning gets 1e-3 and, because RATE was chosen for this project, RATE too; its BatchTopK
also a k, and its Gated a penalty, with which its L0 on held-out tokens is this project's.
"""


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--acts", type=Path, required=True)
    made.add_argument("--held", type=Path, required=True)
    made.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    made.add_argument("--only", action="append", help="architectures, instead of all")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time")
    made.add_argument("--threads", type=int, default=2, help="of each run")
    words = made.parse_args()
    wanted = [
        (library, architecture, seed, options)
        for seed in words.seeds
        for library, architecture, options in TASKS
        if not words.only or architecture in words.only
    ]
    work(wanted, words.acts, words.held, words.jobs, words.threads)


def work(
    wanted: list[tuple[str, str, int, dict[str, Any]]],
    acts: Path,
    held: Path,
    jobs: int,
    threads: int,
) -> None:
    """Make the runs that are not there yet, in this order, `jobs` at a time; each is kept as soon
    as it is done.
    """
    peers = _run.need_peers()
    os.environ.update(_run.FEW_PAGE_FAULTS)
    runs: list[dict[str, Any]] = json.loads(RUNS.read_text()) if RUNS.is_file() else []
    lock = threading.Lock()
    where = {"machine": _run.processor(), "acts": digest(acts)}

    def train(what: dict[str, Any], options: dict[str, Any]) -> None:
        python = _run.own_python() if what["library"] == "saezoo" else peers
        extra = [f"--{key}={value}" for key, value in options.items()]
        files = ["--acts", str(acts), "--held", str(held)]
        how = ["--seed", str(what["seed"]), "--threads", str(threads)]
        got = _run.child(python, ONE, what["library"], what["architecture"], *files, *how, *extra)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        with lock:
            runs.append(what | got | {"date": today} | where)
            RUNS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
            _run.write_result("train_quality", f"{SETTING}; {places(runs)}", summary(runs))

    with ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for library, architecture, seed, options in wanted:
            what = {"library": library, "architecture": architecture, "seed": seed} | options
            if not any({key: run[key] for key in WHAT if key in run} == what for run in runs):
                waiting.append(pool.submit(train, what, options))
        for item in waiting:
            item.result()


def digest(acts: Path) -> str:
    """The beginning of the sha256 of x's bytes. Kinds of CPU round the language model's sums
    differently, so it is the same only between machines alike.
    """
    with safe_open(acts, framework="np") as file:
        return hashlib.sha256(file.get_tensor("x").tobytes()).hexdigest()[:16]


SETTING = (
    "SmolLM2-135M-Instruct, output of layer 15, d 576, 1,000,000 tokens once, d_sae 8,192, k or "
    "target L0 32, batch 1,024, where not said otherwise 100 steps of warm-up and decay over the "
    "last fifth; FVU and L0 on 49,984 held-out tokens; dead: features that fire on none of them "
    "nor of 262,144 training tokens; norms above three times the median left out; text: the "
    "English mix of the bundled SAE"
)


def places(runs: list[dict[str, Any]]) -> str:
    """Which machines made how many of the runs, on which activations."""
    made = Counter((run["machine"], run["acts"]) for run in runs)
    return "; ".join(
        f"{count} of {len(runs)} runs on {machine}, x of train with sha256 {acts}…"
        for (machine, acts), count in made.items()
    )


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each library and architecture: medians over the seeds, and which seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        settings = {key: run[key] for key in WHAT[3:] if key in run}
        key = run["library"], run["architecture"], json.dumps(settings)
        groups.setdefault(key, []).append(run)
    return [
        {
            "library": library,
            "architecture": architecture,
            **json.loads(settings),
            **{
                key: round(statistics.median(run[key] for run in group), 4)
                for key in ("fvu", "l0", "dead")
            },
            "fvu_of_seeds": [round(run["fvu"], 4) for run in group],
        }
        for (library, architecture, settings), group in groups.items()
    ]


if __name__ == "__main__":
    main()
