"""The tables of docs/training.md, made from results/train_*.json and nothing else."""

import json
from typing import Any

from benchmarks._run import RESULTS

Row = dict[str, Any]
SCHEDULE = {"warmup": "warmup_steps", "decay": "decay_share"}
"""Options of one.py, and what a recipe calls them."""


def tables() -> dict[str, str]:
    """Markdown by the name of its place in the page; only of what was measured."""
    made = {
        "ablation": (_ablation, "ablation"),
        "variants": (_variants, "quality"),
        "quality": (_quality, "quality"),
        "steps": (_steps, "steps"),
    }
    return {
        name: make(json.loads(path.read_text()))
        for name, (make, file) in made.items()
        if (path := RESULTS / f"train_{file}.json").is_file()
    }


def _ablation(result: Row) -> str:
    base = next(row for row in result["rows"] if row["change"] == "none")
    lines = ["| change | FVU | against none | dead |", "|---|---|---|---|"]
    for row in result["rows"]:
        against = "" if row is base else f"{100 * (row['fvu'] / base['fvu'] - 1):+.1f} %"
        change = row["change"] if row is base else f"`{row['change']}`"
        lines.append(f"| {change} | {row['fvu']:.4f} | {against} | {100 * row['dead']:.1f} % |")
    return _with_setting(lines, result)


def _quality(result: Row) -> str:
    lines = ["| architecture | library | FVU | seeds | L0 | dead |", "|---|---|---|---|---|---|"]
    order = ["topk", "batchtopk", "jumprelu", "gated"]

    def place(row: Row) -> tuple[int, bool, str, float]:
        library = row["library"]
        return order.index(row["architecture"]), library != "saezoo", library, row.get("lr", 0)

    for row in sorted(result["rows"], key=place):
        options = json.loads(row.get("options", "{}"))
        if (options or row.keys() & {*SCHEDULE, "steps"}) and len(row["fvu_of_seeds"]) < 3:
            continue  # see `variants`
        told = {key: row[key] for key in ("lr", "k", "penalty") if key in row} | options
        more = ", ".join(f"{key.split('.')[-1]} {_shown(value)}" for key, value in told.items())
        lines.append(
            f"| {row['architecture']} | {row['library']}{f' ({more})' if more else ''} | "
            f"{row['fvu']:.4f} | {_seeds(row['fvu_of_seeds'])} | {row['l0']:.1f} | "
            f"{100 * row['dead']:.1f} % |"
        )
    return _with_setting(lines, result)


def _variants(result: Row) -> str:
    """This project's TopK with other options, at the width of the quality runs, on their tokens or
    several times these.
    """
    lines = ["| passes | `optimiser.lr` | options | FVU | dead |", "|---|---|---|---|---|"]
    ours = [
        row for row in result["rows"] if (row["library"], row["architecture"]) == ("saezoo", "topk")
    ]
    for row in sorted(ours, key=lambda row: (row.get("steps", 0), row.get("lr", 0), row["fvu"])):
        options = {f"optimiser.{SCHEDULE[key]}": row[key] for key in SCHEDULE if key in row}
        for key, value in json.loads(row.get("options", "{}")).items():
            options[key if "." in key else f"sae.{key}"] = value
        words = " ".join(f"`{key}={_shown(value)}`" for key, value in options.items())
        rate = f"{row['lr']:g}" if "lr" in row else "default"
        passes = max(1, round(row.get("steps", 0) * 1024 / 1_000_000))
        lines.append(
            f"| {passes} | {rate} | {words} | {row['fvu']:.4f} | {100 * row['dead']:.1f} % |"
        )
    return "\n".join(lines)


def _shown(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seeds(values: list[float]) -> str:
    """How many, and from where to where they reach."""
    reach = f": {min(values):.4f} to {max(values):.4f}" if len(values) > 1 else ""
    return f"{len(values)}{reach}"


def _steps(result: Row) -> str:
    lines = [
        "| d_sae | library | ms a step | saezoo is faster by | memory |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        faster = "" if row["library"] == "saezoo" else f"{row['saezoo_is_faster_by']:.2f} x"
        lines.append(
            f"| {row['d_sae']:,} | {row['library']} | {row['ms']:.0f} | {faster} | "
            f"{row['peak_memory_mb']:,.0f} MB |"
        )
    return _with_setting(lines, result)


def _with_setting(lines: list[str], result: Row) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    return "\n".join(
        [*lines, "", f"{result['setting']}. {result['date']}, {result['machine']}; {versions}."]
    )
