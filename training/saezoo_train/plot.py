"""The curves of a run, as a PNG."""

import importlib.util
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from saezoo.errors import DataError, MissingExtra
from saezoo.files import write_file
from saezoo_train.metrics_log import NAME, read_rows
from saezoo_train.watch import Row

KNOWN = {"step", "tokens", "fvu", "l0", "dead", "loss", "lr", "tokens_per_second", "seconds"}
INK, GREY = "#1f4e79", "#8a8a8a"


def plot_run(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draw FVU, L0, dead features, learning rate and speed over tokens, and what else the
    architecture logged. Returns the PNG.

    folder: a result of `train_sae`, the `.run` folder beside it, or a metrics.jsonl. out: default
    is curves.png beside the metrics. Raises DataError where there are no metrics, MissingExtra
    without matplotlib.
    """
    path = find_metrics(Path(folder))
    rows = read_rows(path)
    if len(rows) < 2:
        raise DataError(f"{path}: has {len(rows)} rows of metrics, too few for a curve")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("curves need matplotlib: pip install 'saezoo[plot]'")
    target = Path(out) if out is not None else path.with_name("curves.png")
    with write_file(target) as work:
        _draw(rows, path.parent.name.removesuffix(".run"), work)
    return target


def find_metrics(folder: Path) -> Path:
    """The metrics.jsonl of a run. Raises DataError naming where it was looked for."""
    places = [folder, folder / NAME, folder.with_name(folder.name + ".run") / NAME]
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"{folder}: no metrics of a run, neither there nor in {places[-1].parent}")


def _draw(rows: list[Row], name: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    extra = sorted({key for row in rows for key in row} - KNOWN)
    extra = [key for key in extra if any(row.get(key) for row in rows)]
    panels: list[tuple[str, str, Callable[[Row], float], str]] = [
        ("FVU of the batches", "fvu", itemgetter("fvu"), "log"),
        ("L0, features per token", "l0", itemgetter("l0"), "linear"),
        ("dead features, %", "dead", lambda row: 100 * row["dead"], "linear"),
        ("learning rate", "lr", itemgetter("lr"), "linear"),
        ("speed, tokens/s", "tokens_per_second", itemgetter("tokens_per_second"), "linear"),
    ]
    panels += [(key.replace("_", " "), key, itemgetter(key), "linear") for key in extra]
    columns = 3
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(12, 2.9 * lines + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (title, key, value, scale) in zip(axes, panels, strict=False):
        points = [row for row in rows if key in row]
        _curve(axis, title, points, value, scale)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    last = rows[-1]
    figure.suptitle(
        f"{name}: FVU {last['fvu']:.4f}, L0 {last['l0']:.1f}, "
        f"{last['dead']:.1%} dead after {_tokens(last['tokens'])} tokens",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.savefig(path, format="png")


def _curve(
    axis: Any, title: str, rows: list[Row], value: Callable[[Row], float], scale: str
) -> None:
    """One panel: a curve over tokens, its last value written at its end."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    x, y = [row["tokens"] for row in rows], [value(row) for row in rows]
    axis.plot(x, y, color=INK, linewidth=1.4)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("tokens", fontsize=8, color=GREY)
    axis.set_xlim(0, x[-1] * 1.02)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    low, high = min(y), max(y)
    if scale == "log" and low > 0:
        axis.set_yscale("log")
        subs = (1.0, 2.0, 3.0, 5.0, 7.0) if high < 20 * low else (1.0, 2.0, 5.0)
        axis.yaxis.set_major_locator(LogLocator(subs=subs if high < 200 * low else (1.0,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.minorticks_off()
        axis.set_ylim(low * 0.9, high * 1.1)
    else:
        # from 0, so that the height of a curve says something
        axis.set_ylim(min(0.0, 1.1 * low), 1.1 * high if high > 0 else 1.0)
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_major_formatter(EngFormatter(sep="") if high >= 1000 else "{x:g}")
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axis.tick_params(labelsize=8, colors="#444444", length=2)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#bbbbbb")


def _tokens(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
