"""What every benchmark shares: where and with what it ran, medians, and the file it leaves."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / ".venvs" / "peers" / "bin" / "python"
"""The environment that `make peers` makes: SAELens, sparsify and dictionary_learning, with the same
torch.
"""
PACKAGES = ("torch", "sae-lens", "dictionary-learning", "eai-sparsify")

FEW_PAGE_FAULTS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
}
"""Environment of runs that are not timed: memory is kept rather than given back and asked for again
at each step. The numbers are the same.
"""


def parser(about: str | None) -> argparse.ArgumentParser:
    """Every script's own options are added to these."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--runs", type=int, default=15, help="timed runs of each; medians are kept")
    return made


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(python: Path | str) -> dict[str, str]:
    """Versions of the measured packages, as that interpreter sees them."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *PACKAGES], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def child(python: Path | str, script: Path, *words: str) -> Any:
    """The JSON that a script prints as its last line, run by another interpreter on this tree."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "training")])}
    done = subprocess.run(
        [str(python), str(script), *words], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        sys.exit(f"{script.name} {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def need_peers() -> Path:
    """The peers' interpreter, or an end with what to do."""
    if not PEERS.is_file():
        sys.exit("the peers are not installed: `make peers` first")
    return PEERS


def own_memory() -> int:
    """Bytes of this process that are its own: not those of mapped files, which the system takes
    back when it needs them.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Most:
    """The most that was seen."""

    most = 0


@contextmanager
def watch() -> Iterator[Most]:
    """Looks at `own_memory` about every millisecond in a thread; torch works without the lock that
    it needs for that. `most` is what it saw at most.
    """
    seen, done = Most(), threading.Event()

    def look() -> None:
        while True:
            seen.most = max(seen.most, own_memory())
            if done.wait(0.0005):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        seen.most = max(seen.most, own_memory())
        done.set()
        thread.join()


def write_result(name: str, setting: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Keep rows as results/NAME.json with date, machine and versions, and print them."""
    python = PEERS if PEERS.is_file() else own_python()
    result = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, no GPU used",
        "python": platform.python_version(),
        "versions": {"saezoo": _own_version()} | versions(python),
        "setting": setting,
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def _own_version() -> str:
    return importlib.metadata.version("saezoo")


def own_python() -> Path:
    """The interpreter that runs this."""
    return Path(sys.executable)
