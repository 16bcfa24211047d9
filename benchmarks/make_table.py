"""The README's table of measurements, made from results/*.json and nothing else."""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def make_table() -> str:
    """Markdown: what was measured, ours, the other, their ratio; then with what and when."""
    paths = {name: RESULTS / f"{name}.json" for name in ROWS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    lines = ["| what | saezoo | beside it | ratio |", "|---|---|---|---|"]
    for name, result in found.items():
        lines += ROWS[name](result)
    lines += ["", *_footers(found)]
    return "\n".join(lines)


def _import_time(result: dict[str, Any]) -> list[str]:
    seconds = {row["what"]: row["seconds"] for row in result["rows"]}
    torch, sae_lens = seconds["import torch"], seconds["import sae_lens"]
    beside = f"`import torch` {torch:.2f} s, `import sae_lens` {sae_lens:.2f} s"
    return [
        f"| `{what}` | {seconds[what]:.3f} s | {beside} | "
        f"{torch / seconds[what]:.0f} x, {sae_lens / seconds[what]:.0f} x |"
        for what in ("import saezoo", "saezoo --help")
    ]


def _listing(result: dict[str, Any]) -> list[str]:
    seconds = {row["what"]: row["seconds"] for row in result["rows"]}
    find = seconds["find_sae, one name, its release not read before"]
    return [
        f"| `{what}` | {seconds[what]:.2f} s | | |"
        for what in ("saezoo list --names", "saezoo list --json")
    ] + [f"| one name found, its release not read before | {find * 1000:.0f} ms | | |"]


def _load_native(result: dict[str, Any]) -> list[str]:
    rows = {row["what"]: row for row in result["rows"]}
    ours, other = rows["saezoo load_sae"], rows["SAELens load_from_disk"]
    return [
        f"| load 151 MB from disk | {ours['milliseconds']:.1f} ms | SAELens "
        f"{other['milliseconds']:.1f} ms | {other['milliseconds'] / ours['milliseconds']:.1f} x |",
        f"| … memory before first use | {ours['resident_mb']:.1f} MB | SAELens "
        f"{other['resident_mb']:.1f} MB | |",
        f"| … and the first forward, of 16 tokens | {ours['first_forward_milliseconds']:.0f} ms | "
        f"SAELens {other['first_forward_milliseconds']:.0f} ms | "
        f"{other['first_forward_milliseconds'] / ours['first_forward_milliseconds']:.1f} x |",
    ]


def _second_load(result: dict[str, Any]) -> list[str]:
    rows = {row["what"]: row for row in result["rows"]}
    first, second, other = (
        rows[name] for name in ("saezoo, first load", "saezoo, second load", "SAELens")
    )
    faster = other["seconds"] / second["seconds"]
    return [
        f"| load a deflated Gemma Scope .npz, the second time | {second['seconds'] * 1000:.0f} ms "
        f"| SAELens {other['seconds']:.2f} s | {faster:.0f} x |",
        f"| … the first time, when it is unpacked and kept | {first['seconds']:.2f} s | SAELens "
        f"{other['seconds']:.2f} s | {other['seconds'] / first['seconds']:.2f} x |",
        f"| … peak memory of the first load and a forward, as a share of the weights | "
        f"{first['peak_with_forward_of_held']:.2f} | SAELens "
        f"{other['peak_with_forward_of_held']:.2f} | |",
    ]


def _topk_inference(result: dict[str, Any]) -> list[str]:
    ms = {row["what"]: row["milliseconds"] for row in result["rows"]}
    sparse, dense = ms["saezoo decode, sparse"], ms["dense product, f @ W_dec + b_dec"]
    given_dense = ms["saezoo decode of the same features as a dense tensor"]
    ours = ms["saezoo forward"]
    lines = [
        f"| topk decode of `SparseFeatures` | {sparse:.1f} ms | dense product {dense:.0f} ms | "
        f"{dense / sparse:.0f} x |",
        f"| … of a dense tensor | {given_dense:.0f} ms | dense product {dense:.0f} ms | "
        f"{dense / given_dense:.1f} x |",
    ]
    for name, value in ms.items():
        if not name.startswith(("saezoo", "dense")):
            lines.append(
                f"| topk forward | {ours:.0f} ms | {name} {value:.0f} ms | {value / ours:.2f} x |"
            )
    return lines


def _chunked_encode(result: dict[str, Any]) -> list[str]:
    rows = {row["what"]: row for row in result["rows"]}
    dense = rows.pop("dense, topk")
    lines = []
    for what, row in rows.items():
        beside = f"dense product and `torch.topk` {dense['milliseconds']:.0f} ms"
        ratio = f"{dense['milliseconds'] / row['milliseconds']:.2f} x"
        lines += [
            f"| `encode_sparse` in parts, {what} | {row['milliseconds']:.0f} ms | "
            + (f"{beside} | {ratio} |" if what == "topk" else "| |"),
            f"| … memory beyond the output, in parts of {row['part_mb']:.0f} MB of weights | "
            f"{row['parts_of_weights']:.2f} | | |",
        ]
    return lines


def _load_memory(result: dict[str, Any]) -> list[str]:
    worst = max(result["rows"], key=lambda row: row["peak_of_held"])
    formats = len({row["format"] for row in result["rows"]})
    return [
        f"| peak memory of loading, as a share of what the SAE holds: the worst of "
        f"{len(result['rows'])} checkpoints of {formats} formats | "
        f"{worst['peak_of_held']:.2f} | | |"
    ]


def _train_steps(result: dict[str, Any]) -> list[str]:
    ours = {row["d_sae"]: row for row in result["rows"] if row["library"] == "saezoo"}
    return [
        f"| a topk training step on a CPU, d_sae {row['d_sae']:,} | {ours[row['d_sae']]['ms']:.0f} "
        f"ms, {ours[row['d_sae']]['peak_memory_mb']:,.0f} MB | {row['library']} {row['ms']:.0f} "
        f"ms, {row['peak_memory_mb']:,.0f} MB | {row['saezoo_is_faster_by']:.2f} x |"
        for row in result["rows"]
        if row["library"] != "saezoo"
    ]


ROWS = {
    "import_time": _import_time,
    "listing": _listing,
    "load_native": _load_native,
    "second_load": _second_load,
    "topk_inference": _topk_inference,
    "chunked_encode": _chunked_encode,
    "load_memory": _load_memory,
    "train_steps": _train_steps,
}


def _footers(found: dict[str, dict[str, Any]]) -> list[str]:
    """Per benchmark its setting; machine, date and versions once where they are the same."""
    runs = {
        f"Measured {result['date']} on {result['machine']}, Python {result['python']}, "
        + ", ".join(f"{key} {value}" for key, value in result["versions"].items())
        + "."
        for result in found.values()
    }
    settings = [
        f"`{name.replace('train_', 'train/')}.py`: {result['setting']}."
        for name, result in found.items()
    ]
    return [f"- {line}" for line in (*sorted(runs), *settings)]


if __name__ == "__main__":
    sys.stdout.write(make_table() + "\n")
