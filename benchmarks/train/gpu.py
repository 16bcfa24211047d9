"""The Triton kernels on a GPU: whether they are right, then how long a step takes at three sizes,
beside the bound of the hardware and beside other libraries, then each kernel alone. Within 8
minutes, without a network; results/train_gpu.json.

python -m benchmarks.train.gpu [--acts FILE] [--openai FOLDER]
python -m benchmarks.train.gpu --dry-run     on any machine: the checks at a tiny size, in Triton's
                                             interpreter where there is no GPU; the plan; the bounds

--acts: a safetensors file with x (tokens, d), taken for the sizes of that d. --openai: a checkout
of github.com/openai/sparse_autoencoder. The other libraries are those of `make peers`, or else
those that this interpreter can import; what cannot be imported is said to be missing.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import _run
from benchmarks.train.gpu_run import RUNS
from benchmarks.train.gpu_settings import H100, SIZES, TINY, bound_ms, bound_terms

MINUTES = 8
NEEDS = {"OpenAI kernels": "sparse_autoencoder", "SAELens": "sae_lens"}
"""The module of a library, where it is not the first word of its name."""


def main() -> None:
    words = parse()
    until = time.monotonic() + 60 * MINUTES - 15
    if not torch.cuda.is_available():
        if not words.dry_run:
            sys.exit("there is no GPU here: --dry-run shows what can be shown without one")
        # before anything imports triton
        os.environ["TRITON_INTERPRET"] = "1"
    checks = check(words.dry_run)
    wrong = [row for row in checks if not row["right"]]
    if wrong:
        sys.exit(f"not measured, because this is wrong:\n{json.dumps(wrong, indent=1)}")
    plan = {name: plan_of(name) for name in SIZES}
    if words.dry_run:
        rows = dry_runs(words)
        write("train_gpu_dry_run", rows, checks=summary(checks), plan=plan)
        return
    peaks = measured_peaks()
    kernels = kernel_times()
    rows = runs(words, until, peaks)
    write("train_gpu", rows, checks=summary(checks), plan=plan, peaks=peaks, kernels=kernels)


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--dry-run", action="store_true")
    made.add_argument("--acts", type=Path)
    made.add_argument("--openai", type=Path)
    made.add_argument("--only", nargs="*", default=list(RUNS), help="libraries, instead of all")
    return made.parse_args()


def check(dry: bool) -> list[dict[str, Any]]:
    """Every kernel against the reference, bits that repeat, and a training against one on a CPU."""
    from benchmarks.train import gpu_checks as checks

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name, size in checks.CHECKED.items():
        if (name == "tiny") != dry:
            continue
        dtypes = [torch.bfloat16] if name[0] in "AC" else [torch.float32, torch.bfloat16]
        for dtype in dtypes:
            tell(f"checking the kernels, size {name}, {dtype}")
            found = checks.check_kernels(size, dtype, device)
            rows += [{"size": name, "dtype": str(dtype)} | row for row in found]
    tell("checking that an update repeats, and a training against torch on the CPU")
    small = checks.CHECKED["tiny" if dry else "odd"]
    rows.append(
        {"check": "same bits twice", "right": checks.check_repeats(small, torch.bfloat16, device)}
    )
    trained, lr = (checks.TRAINED_TINY, 5e-3) if dry else (checks.TRAINED, 1e-3)
    rows.append({"check": "training"} | checks.check_training(trained, device, lr))
    return rows


def summary(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel, size and dtype the worst result."""
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    others = []
    for row in checks:
        if "kernel" not in row:
            others.append(row)
            continue
        key = row["size"], row["dtype"], row["kernel"]
        share = row["off_by"] / (row["allowed"] or 1)
        if key not in worst or share > worst[key]["share_of_allowed"]:
            kept = {name: row[name] for name in ("size", "dtype", "kernel", "off_by", "allowed")}
            worst[key] = kept | {"share_of_allowed": share}
    return [*worst.values(), *others]


def plan_of(name: str) -> dict[str, Any]:
    """A size, its bound on an H100 and what that is made of."""
    size = SIZES[name]
    terms = {
        phase: round(1000 * (product / H100[0] + memory / H100[1]), 4)
        for phase, (product, memory) in bound_terms(size).items()
    }
    shape = {key: getattr(size, key) for key in ("d_in", "d_sae", "k", "batch", "steps")}
    return shape | {
        "bound_ms_h100": round(bound_ms(size), 3),
        "of_which_ms": terms,
        "must_be_ms_h100": size.must_be_ms,
    }


def python_of(library: str) -> tuple[Path, str | None]:
    """The interpreter that a run takes, and what it lacks, if anything."""
    if library.startswith("saezoo"):
        return _run.own_python(), None
    python = _run.PEERS if _run.PEERS.is_file() else _run.own_python()
    return python, NEEDS.get(library.split(",")[0], library.split(",")[0])


def run_one(library: str, words: argparse.Namespace, sizes: list[str], seconds: float) -> Any:
    """What a library's process says: a row for each size."""
    python, module = python_of(library)
    options = ["--sizes", *sizes, "--seconds", f"{seconds:.0f}"]
    paths = [str(_run.ROOT), str(_run.ROOT / "training")]
    if words.openai:
        options += ["--openai", str(words.openai)]
        paths.append(str(words.openai))
    if words.acts:
        options += ["--acts", str(words.acts)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if module and not _imports(python, module, env):
        return {name: {"failed": f"{module} cannot be imported"} for name in sizes}
    tell(f"running {library}, at most {seconds:.0f} s")
    command = [str(python), "-m", "benchmarks.train.gpu_run", library, *options]
    limit = seconds + 30
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=_run.ROOT, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {name: {"failed": f"it took more than {limit:.0f} s"} for name in sizes}
    if done.returncode:
        return {name: {"failed": done.stderr.strip()[-300:]} for name in sizes}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _imports(python: Path, module: str, env: dict[str, str]) -> bool:
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return subprocess.run([str(python), "-c", find], env=env, check=False).returncode == 0


def runs(words: argparse.Namespace, until: float, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each library and size, saezoo's first."""
    rows: list[dict[str, Any]] = []
    own_ms: dict[str, float] = {}
    here = peaks["bf16_flops"], peaks["bytes_per_second"]
    for at, library in enumerate(words.only):
        left = max(5.0, (until - time.monotonic()) / (len(words.only) - at) - 15)
        for name, row in run_one(library, words, list(SIZES), min(left, 75)).items():
            full = {"library": library, "size": name} | row
            if "ms" in row:
                size = SIZES[name]
                full["share_of_bound_h100"] = round(bound_ms(size) / row["ms"], 3)
                full["share_of_bound_here"] = round(bound_ms(size, *here) / row["ms"], 3)
                if library == "saezoo":
                    own_ms[name], full["must_be_ms_h100"] = row["ms"], size.must_be_ms
                elif name in own_ms:
                    full["saezoo_is_faster_by"] = round(row["ms"] / own_ms[name], 2)
                    full["must_be"] = RUNS[library][1]
            rows.append(full)
    return rows


def dry_runs(words: argparse.Namespace) -> list[dict[str, Any]]:
    """A few tiny steps of each library that a CPU can run: that they start and learn."""
    rows = []
    for library in words.only:
        if library == "OpenAI kernels":
            continue
        for name, row in run_one(library, words, ["tiny"], 120).items():
            kept = {key: row[key] for key in ("failed", "fvu_after_steps", "steps") if key in row}
            rows.append({"library": library, "size": name} | kept)
    return rows


def measured_peaks() -> dict[str, float]:
    """What this device does at best: bf16 products of 8192³, and copying 2 GB."""
    tell("measuring the device")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = timed(lambda: a @ a)
    one = torch.empty(2**28, device="cuda")
    two = torch.empty_like(one)
    copy = timed(lambda: two.copy_(one))
    return {
        "bf16_flops": 2 * 8192**3 / (product / 1000),
        "bytes_per_second": 2 * one.nbytes / (copy / 1000),
    }


def kernel_times() -> list[dict[str, Any]]:
    """Median milliseconds of each kernel's call at each size, one after another on warm caches.
    That of select_above and auxk (a tenth dead) are not part of a TopK step.
    """
    from saezoo_train.kernels import kit

    from benchmarks.train.gpu_checks import Inputs

    rows = []
    for name, size in SIZES.items():
        tell(f"timing the kernels, size {name}")
        inputs = Inputs(size, torch.bfloat16, "cuda", kit)
        for kernel, call in inputs.calls(kit).items():
            rows.append({"size": name, "kernel": kernel, "ms": round(timed(call), 4)})
        del inputs, call
        torch.cuda.empty_cache()
    return rows


def timed(work: Any, warm: int = 3, runs: int = 15) -> float:
    """Median milliseconds on the device."""
    for _ in range(warm):
        work()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for first, last in events:
        first.record()
        work()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


def write(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """The JSON, with the device in place of the processor's name."""
    cuda = torch.cuda.is_available()
    machine = f"{_run.processor()}, no GPU: Triton's interpreter"
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        machine = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    setting = (
        "topk, Adam with float32 moments, whole steps; ms: median of steps by CUDA events; FVU on "
        f"{2048:,} tokens that are not trained on; sizes as in plan"
        if cuda
        else f"the checks at their smallest sizes, and steps of {TINY}"
    )
    triton = importlib.metadata.version("triton")
    _run.write_result(name, setting, rows, machine=machine, triton=triton, **more)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
