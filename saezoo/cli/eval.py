"""`saezoo eval NAME…`"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saezoo.cli._host import (
    column_option,
    dataset_option,
    load_all,
    model_option,
    progress_bar,
    texts_of,
)
from saezoo.cli._print import HELP, cache_option, json_option, print_json, print_table

if TYPE_CHECKING:
    from saezoo.evaluation import Evaluation
    from saezoo.sae import SAE

ROWS = (
    ("FVU", "fvu", ".4f", "variance unexplained: 0 is perfect, 1 is predicting the mean"),
    ("explained variance", "explained_variance", ".4f", "1 - FVU"),
    ("cosine", "cosine", ".4f", "of x and its reconstruction"),
    ("reconstruction bias", "relative_reconstruction_bias", ".4f", "under 1: it has shrunk"),
    ("L0", "l0", ".2f", "features on a token, of {d_sae:,}"),
    ("L1", "l1", ".2f", "sum of their activations"),
    ("dead features", "dead_fraction", ".2%", "fired on none of these tokens"),
    ("dense features", "dense_fraction", ".2%", "fired on more than a tenth of them"),
    ("loss, model as it is", "loss_clean", ".4f", "nats per next token"),
    ("loss, reconstruction in place", "loss_spliced", ".4f", ""),
    ("loss, mean in place", "loss_mean", ".4f", ""),
    ("loss, zeros in place", "loss_zero", ".4f", ""),
    ("loss recovered, against mean", "loss_recovered_mean", ".2%", ""),
    ("loss recovered, against zeros", "loss_recovered", ".2%", ""),
    ("KL", "kl", ".4f", "of the predictions with it in place, nats"),
)
"""Label, key of Metrics, form, what it says."""
SHORT = ("l0", "fvu", "cosine", "dead_fraction", "dense_fraction", "loss_recovered", "kl")


@click.command(name="eval", context_settings=HELP)
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@model_option
@dataset_option
@column_option
@click.option(
    "--tokens",
    type=click.IntRange(2),
    default=65_536,
    show_default=True,
    help="Contexts are taken until they hold so many.",
)
@click.option("--no-loss", is_flag=True, help="Only what needs no splice into the model.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw densities, L0 and norms into this .png, .pdf or .svg.",
)
@cache_option
@json_option
def eval_(
    names: tuple[str, ...],
    model: str | None,
    dataset: str | None,
    column: str,
    tokens: int,
    no_loss: bool,
    plot: Path | None,
    cache_dir: str | None,
    as_json: bool,
) -> None:
    """Measure SAEs in their language model: FVU, L0, dead and dense features, loss recovered, KL.

    \b
    Example: saezoo eval smollm2-135m-instruct/layer_15_resid_post
             saezoo eval NAME --dataset documents.jsonl --tokens 200000 --plot out.png
    """
    from saezoo.evaluation import evaluate_many
    from saezoo.figure import plot_evaluations, refuse_plot

    if plot is not None:
        refuse_plot(plot)
    texts, said = texts_of(dataset, column)
    saes, host = load_all(names, model, cache_dir)
    with progress_bar("measuring") as progress:
        found = evaluate_many(
            host.model,
            host.tokenizer,
            saes,
            texts,
            tokens=tokens,
            text=said,
            losses=False if no_loss else None,
            guard="error" if model is None else "warn",
            progress=progress,
        )
    if plot is not None:
        plot_evaluations(found, plot)
    if as_json:
        print_json([{"name": name, "host": host.took} | found[name].to_json() for name in found])
    elif len(found) == 1:
        _print_one(*next(iter(found.items())), saes[names[0]])
    else:
        _print_many(found)
    if plot is not None:
        click.echo(f"drawn: {plot}", err=True)


def _print_one(name: str, evaluation: "Evaluation", sae: "SAE") -> None:
    """Every metric, beside what the SAE's own folder says of it."""
    m, stated = evaluation.metrics, sae.cfg.metrics or {}
    click.echo(f"{name}\n{_where(evaluation)}")
    rows = []
    for label, key, form, about in ROWS:
        value = getattr(m, key)
        if value is not None:
            rows.append(
                [
                    label,
                    f"{value:{form}}",
                    _stated(stated, key, form),
                    about.format(d_sae=sae.d_sae),
                ]
            )
    columns = ["", "measured", "published", ""]
    if not any(row[2] for row in rows):
        rows, columns = [[row[0], row[1], row[3]] for row in rows], ["", "measured", ""]
    print_table(columns, rows, right=["measured", "published"])


def _stated(stated: dict[str, Any], key: str, form: str) -> str:
    value = stated.get(key)
    return f"{value:{form}}" if isinstance(value, int | float) else ""


def _print_many(found: "dict[str, Evaluation]") -> None:
    """A row an SAE."""
    labels = {key: (label, form) for label, key, form, _ in ROWS}
    keys = [
        key for key in SHORT if any(getattr(one.metrics, key) is not None for one in found.values())
    ]
    titles = [labels[key][0].split(",")[0] for key in keys]
    rows = [
        [name, *(_value(one.metrics, key, labels[key][1]) for key in keys)]
        for name, one in found.items()
    ]
    print_table(["name", *titles], rows, right=titles)
    click.echo(_where(next(iter(found.values()))))


def _value(metrics: object, key: str, form: str) -> str:
    value = getattr(metrics, key)
    return "" if value is None else f"{value:{form}}"


def _where(evaluation: "Evaluation") -> str:
    m = evaluation.metrics
    left = f", {m.outlier_share:.2%} of tokens left out for their norm" if m.outlier_share else ""
    return (
        f"{m.tokens:,} tokens in {m.contexts:,} contexts of {evaluation.text}{left}; "
        f"definitions: docs/evaluation.md, version {m.version}"
    )
