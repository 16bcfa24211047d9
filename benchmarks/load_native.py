"""How long loading a 151 MB SAE (768 x 24,576, float32) takes after imports, and what it adds to
resident memory before first use. SAELens' own folder of the same weights beside it.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._run import child, need_peers, parser, write_result

D_IN, D_SAE, K = 768, 24_576, 32


def main() -> None:
    """Write both folders, then load each in fresh processes, in turns."""
    options = parser(__doc__)
    options.add_argument("--one", nargs=2, metavar=("LIBRARY", "FOLDER"))
    options.add_argument("--write", nargs=2, metavar=("LIBRARY", "FOLDER"))
    chosen = options.parse_args()
    if chosen.write:
        WRITE[chosen.write[0]](Path(chosen.write[1]))
        print("{}")
        return
    if chosen.one:
        print(json.dumps(measure(LOAD[chosen.one[0]](Path(chosen.one[1])))))
        return
    peers, script = need_peers(), Path(__file__).resolve()
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in LOAD}
    with tempfile.TemporaryDirectory() as scratch:
        for name in LOAD:
            child(peers, script, "--write", name, f"{scratch}/{name}")
        for _ in range(chosen.runs):
            for name, rows in measured.items():
                rows.append(child(peers, script, "--one", name, f"{scratch}/{name}"))
    write_result(
        "load_native",
        f"{D_IN} x {D_SAE:,} float32, 151 MB, file in the page cache, a fresh process each, "
        f"imports done before; medians of {chosen.runs} in turns",
        [
            {
                "what": name,
                "milliseconds": _median(rows, "seconds", 1000),
                "resident_mb": _median(rows, "resident", 1e-6),
                "first_forward_milliseconds": _median(rows, "first_forward", 1000),
            }
            for name, rows in measured.items()
        ],
    )


def measure(load):  # type: ignore[no-untyped-def]
    """Seconds and bytes of resident memory that one load takes, and seconds of the first forward
    (16 tokens), which is when a mapped file is really read.
    """
    import torch

    x = torch.randn(16, D_IN)
    before = resident()
    started = time.perf_counter()
    sae = load()
    seconds = time.perf_counter() - started
    grown = resident() - before
    started = time.perf_counter()
    with torch.no_grad():
        sae(x)
    return {"seconds": seconds, "resident": grown, "first_forward": time.perf_counter() - started}


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def _write_saezoo(folder: Path) -> None:
    import torch

    from saezoo import SAE, SAEConfig, save_sae

    cfg = SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K, subtract_b_dec=True)
    sae = SAE(cfg)
    for value in sae.parameters():
        torch.nn.init.normal_(value, std=0.02)
    save_sae(sae, folder)


def _write_sae_lens(folder: Path) -> None:
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, device="cpu")).save_model(str(folder))


def _load_saezoo(folder: Path):  # type: ignore[no-untyped-def]
    import torch

    from saezoo import SAE, SAEConfig, save_sae
    from saezoo.load import load_sae

    # a tiny one first, so that only the loading is timed, and no import
    tiny = folder.parent / "tiny"
    if not tiny.exists():
        save_sae(SAE(SAEConfig(architecture="relu", d_in=4, d_sae=8)), tiny)
    load_sae(tiny)(torch.zeros(1, 4))
    return lambda: load_sae(folder)


def _load_sae_lens(folder: Path):  # type: ignore[no-untyped-def]
    import torch
    from sae_lens import SAE
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    tiny = folder.parent / "tiny_sae_lens"
    if not tiny.exists():
        TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2, device="cpu")).save_model(str(tiny))
    SAE.load_from_disk(tiny)(torch.zeros(1, 4))
    return lambda: SAE.load_from_disk(folder)


WRITE = {"saezoo load_sae": _write_saezoo, "SAELens load_from_disk": _write_sae_lens}
LOAD = {"saezoo load_sae": _load_saezoo, "SAELens load_from_disk": _load_sae_lens}


def _median(rows: list[dict[str, float]], key: str, factor: float) -> float:
    return round(statistics.median(row[key] for row in rows) * factor, 2)


if __name__ == "__main__":
    main()
