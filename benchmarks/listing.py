"""How long `saezoo list --names` and `--json` over everything take as processes, and how long one
name takes to be found in a process that has its imports done.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._run import ROOT, parser, write_result

NAMES = (
    "openai-gpt2-small/resid_post_mlp_v5_32k/8",
    "gemma-scope-9b-pt-res/layer_20/width_16k/average_l0_68",
    "gemma-scope-2-27b-it-res-all/layer_40_width_262k_l0_small",
    "sae_bench_pythia70m_sweep_gated_ctx128_0730/blocks.4.hook_resid_post__trainer_0",
)


def main() -> None:
    """Time each command in turns; keep medians."""
    options = parser(__doc__).parse_args()
    saezoo = str(Path(sys.executable).parent / "saezoo")
    commands = {
        "saezoo list --names": [saezoo, "list", "--names"],
        "saezoo list --json": [saezoo, "list", "--json"],
        "find_sae, one name, its release not read before": [sys.executable, __file__, "--one"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as cache:
        # without a network the open releases are only named on stderr
        env = os.environ | {"SAEZOO_CACHE": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        for turn in range(options.runs + 1):
            for name, command in commands.items():
                started = time.perf_counter()
                done = subprocess.run(command, check=True, capture_output=True, env=env, text=True)
                seconds = time.perf_counter() - started
                if turn:
                    own = float(done.stdout) if "--one" in command else seconds
                    times[name].append(own)
    rows = [
        {"what": name, "seconds": round(statistics.median(values), 4)}
        for name, values in times.items()
    ]
    lines = subprocess.run(commands["saezoo list --names"], capture_output=True, text=True, env=env)
    count = lines.stdout.count("\n")
    write_result(
        "listing",
        f"{count:,} registered SAEs; whole processes, medians of {options.runs} in turns",
        rows,
    )


def one() -> None:
    """Print the most seconds that finding one of these names takes, each of another release."""
    from saezoo.find import find_sae

    find_sae("smollm2-135m-instruct/layer_15_resid_post")  # the imports
    seconds = []
    for name in NAMES:
        started = time.perf_counter()
        find_sae(name)
        seconds.append(time.perf_counter() - started)
    print(max(seconds))


if __name__ == "__main__":
    one() if "--one" in sys.argv else main()
