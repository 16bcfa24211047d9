"""encode_sparse of an SAE of 131,072 features, some features at a time: how long it takes beside a
dense product and torch.topk, and how much memory beyond what is there before: the weights mapped,
as float32 and as bfloat16, and the inputs.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._run import child, own_memory, parser, watch, write_result

D_IN, D_SAE, K, TOKENS = 768, 131_072, 32, 1_024
KINDS = ("dense, topk", "topk", "topk, bfloat16 file", "jumprelu", "gated")


def main() -> None:
    """Write each SAE, then measure each in fresh processes, in turns."""
    options = parser(__doc__)
    options.add_argument("--d-sae", type=int, default=D_SAE, help="features, to try it out")
    options.add_argument("--one", nargs=2, metavar=("KIND", "FOLDER"), help="measure here")
    chosen = options.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one[0], Path(chosen.one[1]))))
        return
    script = Path(__file__).resolve()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            write(kind, Path(scratch) / kind, chosen.d_sae)
        for _ in range(chosen.runs):
            for kind in KINDS:
                found[kind].append(
                    child(sys.executable, script, "--one", kind, str(Path(scratch) / kind))
                )
    write_result(
        "chunked_encode",
        f"{D_IN} x {chosen.d_sae:,}, k {K}, {TOKENS:,} tokens, files in the page cache, a fresh "
        f"process each, its second call; medians of {chosen.runs} in turns. Memory: the process's "
        "own, without mapped pages of the file, over what it was before, as a multiple of a "
        "part's weights in float32 and, taken off before, the output",
        [{"what": kind} | _medians(rows) for kind, rows in found.items()],
    )


def write(kind: str, folder: Path, d_sae: int) -> None:
    """A native folder of random weights, of which few features are on."""
    import torch

    from saezoo.config import SAEConfig
    from saezoo.formats import native

    architecture = kind.partition(",")[0].replace("dense", "topk")
    k = {"k": K} if architecture == "topk" else {}
    cfg = SAEConfig.from_json({"architecture": architecture, "d_in": D_IN, "d_sae": d_sae} | k)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) for name, shape in cfg.tensor_shapes().items()
    }
    for name in ("b_enc", "b_mag", "b_gate"):
        if name in tensors:
            # about 32 of 131,072 pre-activations, whose spread is sqrt(d_in), are above this
            tensors[name] -= 3.5 * D_IN**0.5
    if "bfloat16" in kind:
        tensors |= {name: tensors[name].bfloat16() for name in ("W_enc_rows", "W_dec")}
    folder.mkdir()
    native.write(cfg, tensors, folder)


def measure(kind: str, folder: Path) -> dict[str, float]:
    """Milliseconds of the second call, and the memory that it takes."""
    import torch

    from saezoo.chunked import cut
    from saezoo.load import load_sae

    kept = {"W_enc": torch.bfloat16, "W_dec": torch.bfloat16} if "bfloat16" in kind else None
    sae = load_sae(folder, dtype=kept)
    x = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(1))
    call: Callable[[], Any] = lambda: sae.encode_sparse(x)  # noqa: E731
    if kind.startswith("dense"):
        call = lambda: torch.nn.functional.linear(x, sae.W_enc_rows, sae.b_enc).topk(K)  # noqa: E731
    with torch.no_grad():
        call()
        before = own_memory()
        with watch() as seen:
            started = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - started
    output = sum(value.nbytes for value in (result.values, result.indices))
    parts = cut(TOKENS, sae.d_sae, D_IN).features
    part = 4 * D_IN * (parts[0].stop - parts[0].start)
    return {
        "milliseconds": seconds * 1000,
        "mb": (seen.most - before) / 1e6,
        "parts_of_weights": (seen.most - before - output) / part,
        "part_mb": part / 1e6,
        "output_mb": output / 1e6,
    }


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}


if __name__ == "__main__":
    main()
