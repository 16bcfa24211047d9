"""How long `import saezoo` and `saezoo --help` take, and that nothing heavy comes with them.

Whole processes, start of the interpreter included, one after the other in turns.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._run import ROOT, need_peers, parser, write_result

HEAVY = ("torch", "numpy", "yaml", "pydantic", "huggingface_hub", "transformers", "datasets")


def main() -> None:
    """Time each command in turns; keep medians."""
    options = parser(__doc__).parse_args()
    peers = str(need_peers())
    saezoo = str(Path(sys.executable).parent / "saezoo")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import saezoo": [sys.executable, "-c", "import saezoo"],
        "saezoo --help": [saezoo, "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "from saezoo import load_sae": [sys.executable, "-c", "from saezoo import load_sae"],
        "import sae_lens": [peers, "-c", "import sae_lens"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(options.runs + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            if turn:  # the first turn reads everything from disk
                times[name].append(time.perf_counter() - started)
    rows = [
        {"what": name, "seconds": round(statistics.median(values), 3)}
        for name, values in times.items()
    ]
    write_result(
        "import_time",
        f"whole processes, medians of {options.runs} in turns",
        rows,
        heavy_imported={name: heavy(code) for name, code in CODE.items()},
    )


CODE = {
    "import saezoo": "import saezoo",
    "saezoo --help": (
        "import sys; sys.argv = ['saezoo', '--help']\n"
        "from saezoo.cli import main\n"
        "try: main()\nexcept SystemExit: pass"
    ),
}


def heavy(code: str) -> list[str]:
    """Which heavy packages running `code` imports."""
    ask = f"{code}\nimport json, sys; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", ask], check=True, capture_output=True, text=True, cwd=ROOT
    )
    found: list[str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
