"""What an evaluation looks like: how often features fire, how many are on, and how long the
reconstruction is.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saezoo.errors import InputError, MissingExtra
from saezoo.evaluation import Evaluation
from saezoo.files import write_file
from saezoo.metrics import DENSE, density_histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#3b6ea5", "#d1803c", "#8a8a8a"
DOTS = 4000
"""Tokens shown of the norms: more would only be ink."""
SUFFIXES = (".png", ".pdf", ".svg")


def plot_evaluations(found: Mapping[str, Evaluation], path: str | Path) -> None:
    """Draw a row of three panels for each SAE, by name, into a .png, .pdf or .svg.

    Raises MissingExtra without matplotlib, InputError for another kind of file.
    """
    path = Path(path)
    refuse_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(found)
    figure = Figure(figsize=(12, 3.7 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    for strip, (name, evaluation) in zip(
        figure.subfigures(rows, 1, squeeze=False)[:, 0], found.items(), strict=True
    ):
        m = evaluation.metrics
        strip.suptitle(
            f"{name}   {m.tokens:,} tokens of {evaluation.text or 'a text'}",
            fontsize=10,
            parse_math=False,
        )
        left, middle, right = strip.subplots(1, 3)
        _density(left, evaluation.density, m.dense_fraction)
        _l0(middle, evaluation)
        _norms(right, evaluation)
    with write_file(path) as work:
        figure.savefig(work, dpi=150, format=path.suffix[1:].lower())


def plot_density(density: torch.Tensor, path: str | Path) -> None:
    """Draw how often features fire, density (d_sae,) being each one's share of tokens, into a .png,
    .pdf or .svg. The same density gives the same file.

    Raises MissingExtra without matplotlib, InputError for another kind of file.
    """
    path = Path(path)
    refuse_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    _density(figure.subplots(), density, float((density > DENSE).double().mean()))
    with write_file(path) as work:
        # a version of matplotlib in it would make it another file
        said: Any = {"Software": None} if path.suffix.lower() == ".png" else None
        figure.savefig(work, dpi=150, format=path.suffix[1:].lower(), metadata=said)


def refuse_plot(path: Path) -> None:
    """Raise unless a plot can be written to `path`: before the work, not after it."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a plot is written as {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.absolute().parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("a plot needs matplotlib: pip install 'saezoo[plot]'")


def _density(axes: "Axes", density: torch.Tensor, share: float) -> None:
    shown: Any = density_histogram(density)
    edges = shown["edges"]
    widths = [high - low for low, high in zip(edges, edges[1:], strict=False)]
    axes.bar(edges[:-1], shown["counts"], widths, align="edge", color=BLUE, edgecolor="white")
    axes.set_xscale("log")
    axes.axvline(DENSE, color=GREY, linestyle=":", linewidth=1)
    axes.text(
        DENSE, 0.98, f" dense: {share:.1%}", color=GREY, fontsize=8, va="top", **_upward(axes)
    )
    never = shown["never"]
    axes.text(
        0.02,
        0.98,
        f"{never:,} of {len(density):,} never fire",
        transform=axes.transAxes,
        color=GREY,
        fontsize=8,
        va="top",
    )
    # room for the words above the bars
    axes.set_ylim(0, 1.18 * max(*shown["counts"], 1))
    _finish(axes, "How often features fire", "share of tokens", "features")


def _upward(axes: "Axes") -> dict[str, Any]:
    """x in data, y as a share of the panel's height."""
    return {"transform": axes.get_xaxis_transform()}


def _l0(axes: "Axes", evaluation: Evaluation) -> None:
    l0, mean = evaluation.l0.double(), evaluation.metrics.l0
    low, high = int(l0.min()), int(l0.max())
    bins = min(40, high - low + 1)
    # whole numbers stand in the middle of their bars
    step = max((high - low + 1) / bins, 1)
    edges = [low - 0.5 + step * number for number in range(bins + 1)]
    axes.hist(l0.tolist(), edges, color=BLUE, edgecolor="white", linewidth=0.5)
    if high - low < 4:
        axes.set_xlim(low - 3, high + 3)
        axes.set_xticks(range(low - 2, high + 3))
    axes.axvline(mean, color=ORANGE, linewidth=1.5)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    axes.text(mean, 0.98, f" mean {mean:.1f}", color=ORANGE, fontsize=8, va="top", **_upward(axes))
    _finish(axes, "How many features are on (L0)", "features on a token", "tokens")


def _norms(axes: "Axes", evaluation: Evaluation) -> None:
    norms = evaluation.norms
    if len(norms) > DOTS:
        chosen = torch.linspace(0, len(norms) - 1, DOTS).long()
        norms = norms[chosen]
    x, out = norms[:, 0].tolist(), norms[:, 1].tolist()
    axes.scatter(x, out, s=5, color=BLUE, alpha=0.35, linewidths=0)
    low, high = min(x + out) * 0.95, max(x + out) * 1.05
    axes.plot([low, high], [low, high], color=GREY, linestyle=":", linewidth=1)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    bias = evaluation.metrics.relative_reconstruction_bias
    if bias is not None:
        axes.text(
            0.02,
            0.98,
            f"reconstruction bias {bias:.3f}",
            transform=axes.transAxes,
            color=GREY,
            fontsize=8,
            va="top",
        )
    _finish(
        axes, "How long the reconstruction is", "norm of the original", "norm of the reconstruction"
    )


def _finish(axes: "Axes", title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
