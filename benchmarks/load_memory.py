"""How much memory loading takes at its worst moment, as a share of what the SAE then holds, for
every format: of each checkpoint of tests/origins, made large.

Memory is the process's own: mapped pages of a file are not counted, since the system takes them
back when it needs them. An SAE that stays mapped holds none of its own, so what it holds is counted
as if it were read; a load that read it twice would show.
"""

import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._run import child, own_memory, parser, watch, write_result

D_IN = 1536
"""The origins have four features a dimension, and three groups of them: as many are kept here."""


def main() -> None:
    """Write each checkpoint and load it in a fresh process."""
    options = parser(__doc__)
    options.add_argument("--d-in", type=int, default=D_IN, help="a multiple of 3, to try it out")
    options.add_argument("--only", metavar="FORMAT", help="one format, to try it out")
    options.add_argument("--variants", type=int, help="of each format, at the most; default: all")
    options.add_argument("--one", metavar="PATH", help="measure here")
    options.add_argument("--write", nargs=3, metavar=("NUMBER", "D_IN", "FOLDER"))
    chosen = options.parse_args()
    if chosen.one:
        print(json.dumps(measure(Path(chosen.one))))
        return
    if chosen.write:
        number, d_in, folder = chosen.write
        print(json.dumps(write(int(number), int(d_in), Path(folder))))
        return
    from tests.origins import ALL

    script, found, left_out = Path(__file__).resolve(), [], []
    tried: Counter[str] = Counter()
    for number, origin in enumerate(ALL):
        if chosen.only not in (None, origin.format):
            continue
        tried[origin.format] += 1
        if chosen.variants is not None and tried[origin.format] > chosen.variants:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            words = ("--write", str(number), str(chosen.d_in), scratch)
            try:
                written = child(sys.executable, script, *words)
            except SystemExit as error:  # an origin whose sizes are not those of _origin.py
                left_out.append({"what": str(origin), "why": str(error).splitlines()[-1]})
                continue
            rows = [
                child(sys.executable, script, "--one", written["path"]) for _ in range(chosen.runs)
            ]
        held, peak = (statistics.median(row[key] for row in rows) for key in ("held", "peak"))
        found.append(
            {
                "what": str(origin),
                "format": origin.format,
                "held_mb": round(held / 1e6, 1),
                "peak_mb": round(peak / 1e6, 1),
                "peak_of_held": round(peak / held, 3),
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr)
    write_result(
        "load_memory",
        f"{len(found)} checkpoints of {len({row['format'] for row in found})} formats as their "
        f"authors write them, {chosen.d_in:,} x "
        f"{4 * chosen.d_in:,}, a fresh process each, imports and a tiny load done before; "
        f"medians of {chosen.runs}",
        found,
        left_out=left_out,
    )


def write(number: int, d_in: int, folder: Path) -> dict[str, str]:
    """One checkpoint by its origin's own writer, with sizes of its own."""
    import torch

    # the sizes are constants of the origins, which every module of theirs takes from this one
    from tests.origins import _origin

    _origin.D, _origin.N = d_in, 4 * d_in
    from tests.origins import ALL

    origin = ALL[number]
    return {"path": str(origin.write(folder, origin.tensors(torch.Generator().manual_seed(0))))}


def measure(path: Path) -> dict[str, float]:
    """Bytes that the SAE holds, and that loading took at its worst moment."""
    import torch

    from saezoo.config import SAEConfig
    from saezoo.formats import detect, format_module
    from saezoo.load import load_sae
    from saezoo.sae import SAE
    from saezoo.save import save_sae

    with tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch) / "tiny"
        save_sae(SAE(SAEConfig(architecture="relu", d_in=4, d_sae=8)), tiny)
        load_sae(tiny)(torch.zeros(1, 4))
    format_module(detect(path))  # what this format's reader imports
    before = own_memory()
    with watch() as seen:
        sae = load_sae(path)
    held = sum(value.numel() * value.element_size() for value in sae.parameters())
    return {"held": held, "peak": max(0, seen.most - before)}


if __name__ == "__main__":
    main()
