"""What helped: one option of the recipe changed at a time, equal tokens, the same activations in
the same order.

python -m benchmarks.train.ablation --acts TRAIN --held HELD [--jobs 2 --threads 1]

A run that the results hold already is not run again. The table in docs/training.md is made of the
results by scripts/make_docs.py.
"""

import argparse
import datetime
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import _run

ONE = Path(__file__).parent / "one.py"
RESULT = _run.RESULTS / "train_ablation.json"
D_SAE, WARMUP, DECAY = 4096, 200, 0.5
LR = 1e-3 * (5120 / D_SAE) ** 0.5
BASE = {"decoder_init": "random", "encoder_init": "decoder", "dead_after_tokens": 200_000}

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "sae.decoder_init=data": {"options": {"decoder_init": "data"}},
    "sae.encoder_init=matched": {"options": {"encoder_init": "matched"}},
    "sae.decoder_init=data sae.encoder_init=matched": {
        "options": {"decoder_init": "data", "encoder_init": "matched"}
    },
    "sae.decoder_init=data sae.encoder_init=matched sae.dead_after_tokens=50000": {
        "options": {
            "decoder_init": "data",
            "encoder_init": "matched",
            "dead_after_tokens": 50_000,
        }
    },
    "sae.b_dec_init=median": {"options": {"b_dec_init": "median"}},
    "sae.b_dec_init=zero": {"options": {"b_dec_init": "zero"}},
    "optimiser.lr x 3": {"lr": 3 * LR},
    "optimiser.lr / 3": {"lr": LR / 3},
    "optimiser.decay_share=0.2": {"decay": 0.2},
    "sae.k_start=128 sae.k_steps=488": {"options": {"k_start": 128, "k_steps": 488}},
    "sae.multi_k=128": {"options": {"multi_k": 128}},
    "sae.auxk_coefficient=0": {"options": {"auxk_coefficient": 0.0}},
    "activations not scaled": {"options": {"raw_inputs": True}},
}
"""Changes to BASE: what is written in a recipe, and options of one.py."""


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--acts", type=Path, required=True)
    made.add_argument("--held", type=Path, required=True)
    made.add_argument("--first", nargs="*", default=[], help="changes to begin with")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time")
    made.add_argument("--threads", type=int, default=2, help="of each run")
    words = made.parse_args()
    os.environ.update(_run.FEW_PAGE_FAULTS)
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    lock = threading.Lock()

    def train(change: str, how: dict[str, Any]) -> None:
        given = {"warmup": WARMUP, "decay": DECAY, "lr": LR, "d-sae": D_SAE} | how
        given["options"] = json.dumps(BASE | how.get("options", {}))
        extra = [f"--{key}={value}" for key, value in given.items()]
        files = ["--acts", str(words.acts), "--held", str(words.held)]
        threads = ["--threads", str(words.threads)]
        got = _run.child(_run.own_python(), ONE, "saezoo", "topk", *files, *threads, *extra)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        with lock:
            rows.append(
                {"change": change}
                | {key: round(got[key], 4) for key in ("fvu", "l0", "dead")}
                | {"date": today}
            )
            _run.write_result("train_ablation", SETTING, in_order(rows))

    with ThreadPoolExecutor(words.jobs) as pool:
        known = {row["change"] for row in rows}
        left = sorted(VARIANTS.keys() - known, key=lambda change: change not in words.first)
        waiting = [pool.submit(train, change, VARIANTS[change]) for change in left]
        for item in waiting:
            item.result()


SETTING = (
    "topk, begun as in Gao et al. 2024: random rows of length 1, the encoder a copy of them; b_dec "
    "the mean, AuxK, 200 steps of warm-up, decay over the second half; SmolLM2-135M-Instruct, "
    "output of layer 15, d 576, 1,000,000 tokens once, d_sae 4,096, k 32, batch 1,024, seed 0; FVU "
    "on 49,984 held-out tokens; dead: features that fire on none of them nor of 262,144 training "
    "tokens"
)


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as the variants stand above."""
    order = list(VARIANTS)
    return sorted(rows, key=lambda row: order.index(row["change"]))


if __name__ == "__main__":
    main()
