"""How long the second load of a Gemma Scope SAE takes (2304 x 16,384 float32, 302 MB, in a
synthetic .npz that deflates to 178 MB), and how much memory the first and the second take.

Beside it SAELens' own gemma_2_sae_huggingface_loader on the same file; only its two functions that
ask the Hub are replaced, by ones that answer with this file and its sizes.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._run import child, need_peers, parser, write_result

D_IN, D_SAE = 2304, 16_384
HELD = 4 * (2 * D_IN * D_SAE + 2 * D_SAE + D_IN)
"""Bytes that this SAE holds."""
FOLDER = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
URL = f"https://example.org/{FOLDER}/params.npz"
FIRST, SECOND, PEER = "saezoo, first load", "saezoo, second load", "SAELens"


def main() -> None:
    """Write the file into a cache, then load it in fresh processes, in turns."""
    options = parser(__doc__)
    options.add_argument("--one", nargs=2, metavar=("WHAT", "CACHE"))
    options.add_argument("--write", metavar="CACHE")
    chosen = options.parse_args()
    if chosen.write:
        print(json.dumps(write(Path(chosen.write))))
        return
    if chosen.one:
        print(json.dumps(measure(chosen.one[0], Path(chosen.one[1]))))
        return
    peers, script = need_peers(), Path(__file__).resolve()
    kinds = (FIRST, SECOND, PEER)
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        deflated = child(peers, script, "--write", scratch)["bytes"]
        for _ in range(chosen.runs):
            for kind in kinds:
                rows[kind].append(child(peers, script, "--one", kind, scratch))
    write_result(
        "second_load",
        f"{D_IN} x {D_SAE:,} float32, {HELD / 1e6:.0f} MB, deflated to {deflated / 1e6:.0f} MB, "
        f"synthetic, files in the page cache, a fresh process each, imports done before; medians "
        f"of {chosen.runs} in turns",
        [{"what": kind} | _medians(rows[kind]) for kind in kinds],
    )


def write(cache: Path) -> dict[str, int]:
    """The file as a download would leave it in a cache. Floats of few digits, so that it deflates
    like a published one.
    """
    import numpy as np

    from saezoo.files import sha256_of
    from saezoo.https import cache_place
    from saezoo.transfer import write_marker

    draw = np.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN)}
    shapes |= {"b_enc": (D_SAE,), "b_dec": (D_IN,), "threshold": (D_SAE,)}
    arrays = {
        name: draw.standard_normal(shape, "f4").astype("f2").astype("f4")
        for name, shape in shapes.items()
    }
    path, marker = cache_place(URL, cache)
    path.parent.mkdir(parents=True)
    np.savez_compressed(path, **arrays)
    write_marker(marker, path, sha256_of(path))
    return {"bytes": path.stat().st_size}


def measure(kind: str, cache: Path) -> dict[str, float]:
    """Seconds of a load and of the first forward (16 tokens); and how far the peak of resident
    memory rose from before the load to after the load, and to after the forward, as shares of what
    the SAE holds.
    """
    import torch

    if kind == FIRST:
        from saezoo.cached import list_cached, remove_cached

        remove_cached(list_cached(cache, ["kept"]), cache)
    load = _sae_lens(cache) if kind == PEER else _saezoo(cache)
    x = torch.randn(16, D_IN)
    forget_peak()
    before = peak()
    started = time.perf_counter()
    forward = load()
    seconds = time.perf_counter() - started
    loaded = peak()
    started = time.perf_counter()
    with torch.no_grad():
        forward(x)
    return {
        "seconds": seconds,
        "peak_of_held": (loaded - before) / HELD,
        "first_forward_seconds": time.perf_counter() - started,
        "peak_with_forward_of_held": (peak() - before) / HELD,
    }


def forget_peak() -> None:
    """Let the peak start anew from what is in memory now: imports have had one of their own."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes of this process that were in memory at once, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _saezoo(cache: Path) -> Callable[[], Callable]:  # type: ignore[type-arg]
    import numpy as np
    import torch

    from saezoo.load import load_sae

    # a tiny one first, so that only the loading is timed, and no import
    tiny = cache / "tiny" / "params.npz"
    if not tiny.exists():
        tiny.parent.mkdir()
        shapes = {"W_enc": (4, 8), "W_dec": (8, 4), "b_enc": 8, "b_dec": 4, "threshold": 8}
        np.savez_compressed(tiny, **{name: np.ones(shape, "f4") for name, shape in shapes.items()})
    load_sae(tiny)(torch.zeros(1, 4))
    os.environ["SAEZOO_CACHE"] = str(cache)
    return lambda: load_sae(URL, local_files_only=True)


def _sae_lens(cache: Path) -> Callable[[], Callable]:  # type: ignore[type-arg]
    import torch
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    from saezoo.https import cache_place

    file = str(cache_place(URL, cache)[0])
    loaders.get_gemma_2_config_from_hf = lambda *_: {"d_in": D_IN, "d_sae": D_SAE}
    loaders.hf_hub_download = lambda **_: file
    JumpReLUSAE(JumpReLUSAEConfig(d_in=4, d_sae=8, device="cpu"))(torch.zeros(1, 4))

    def load() -> Callable:  # type: ignore[type-arg]
        _, state, _ = loaders.gemma_2_sae_huggingface_loader("", FOLDER)
        # as SAE.from_pretrained does with it
        with torch.device("meta"):
            sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, device="meta"))
        sae.load_state_dict(state, assign=True)
        return sae

    return load


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}


if __name__ == "__main__":
    main()
