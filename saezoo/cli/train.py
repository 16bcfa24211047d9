"""`saezoo train RECIPE`"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from saezoo.cli._print import HELP, console, human_bytes, json_option, print_json, print_table

if TYPE_CHECKING:
    from saezoo_train.dry import Estimate
    from saezoo_train.run import Trained


@click.command(context_settings=HELP)
@click.argument("recipe", required=False)
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The folder to write; default: the recipe's name.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything, estimate memory, disk and time; start nothing.",
)
@click.option(
    "--print-config",
    is_flag=True,
    help="Print the recipe with every field, as YAML; start nothing.",
)
@click.option("--fresh", is_flag=True, help="Start over instead of going on with an earlier run.")
@click.option("--no-triton", is_flag=True, help="Make updates by torch ops, also on a GPU.")
@click.option("--list", "list_", is_flag=True, help="The recipes that come with saezoo.")
@json_option
def train(
    recipe: str | None,
    changes: tuple[str, ...],
    out: Path | None,
    dry_run: bool,
    print_config: bool,
    fresh: bool,
    no_triton: bool,
    list_: bool,
    as_json: bool,
) -> None:
    """Train an SAE from RECIPE: a YAML file, or the name of one that comes with saezoo (--list).

    KEY=VALUE changes a field, such as sae.k=64. The same command again goes on with a run that was
    stopped or killed; Ctrl-C saves it.

    \b
    Example: saezoo train smollm2-tiny --out my-sae
             saezoo train my-recipe.yaml optimiser.lr=5e-4 data.dataset=texts/ --dry-run
    """
    from saezoo_train.config import resolve
    from saezoo_train.display import make_watch
    from saezoo_train.dry import dry_run as try_out
    from saezoo_train.reading import bundled_recipes, parse_change, read_recipe, to_yaml
    from saezoo_train.run import train_sae

    from saezoo.errors import Stopped

    if list_:
        print_table(["recipe", "what it trains"], bundled_recipes().items())
        return
    if recipe is None:
        raise click.UsageError("name a recipe: a YAML file, or one of saezoo train --list")
    changed = dict(map(parse_change, changes)) | ({"run.triton": False} if no_triton else {})
    chosen = resolve(read_recipe(recipe, changed))
    if print_config:
        click.echo(to_yaml(chosen), nl=False)
        return
    watch = make_watch(chosen.name)
    if dry_run:
        _show_estimate(try_out(chosen, out, watch=watch), as_json)
        return
    try:
        done = train_sae(chosen, out, fresh=fresh, watch=watch)
    except Stopped as error:
        words = ["saezoo", "train", recipe, *changes]
        words += ["--out", str(out)] if out else []
        words += ["--no-triton"] if no_triton else []
        click.echo(f"{error}; to go on: {shlex.join(words)}", err=True)
        raise click.exceptions.Exit(130) from None
    _show_result(done, as_json)


def _show_estimate(estimate: "Estimate", as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json(asdict(estimate))
        return
    out = console()
    out.print(f"{estimate.d_in:,} -> {estimate.d_sae or 0:,} features on the {estimate.site}")
    rows = [
        ("time", _words(estimate.seconds), f"{estimate.steps:,} steps"),
        ("", "", f"training: {estimate.train_speed:,.0f} tokens/s"),
    ]
    if estimate.host_speed:
        words = (
            f"language model: {estimate.host_speed:,.0f} tokens/s, {estimate.host_tokens:,} tokens"
        )
        rows.append(("", "", words))
    rows += [
        ("memory", human_bytes(estimate.memory), "SAE with Adam, buffer, language model"),
        ("disk", human_bytes(estimate.disk), f"{human_bytes(estimate.free)} are free"),
    ]
    for label, value, words in rows:
        out.print(f"  {label:<8}{value:>12}  [dim]{words}[/dim]")
    out.print("nothing was started; the same command without --dry-run starts it")


def _show_result(done: "Trained", as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(done.folder), "was_done": done.was_done, **done.metrics})
        return
    if done.was_done:
        click.echo(f"{done.folder} is finished already; --fresh trains it again")
    facts = done.metrics
    shown = (
        ("FVU", "fvu", ".4f", "fraction of variance unexplained, on held-out documents"),
        ("L0", "l0", ".1f", "features on per token"),
        ("dead", "dead_fraction", ".1%", "features that never fired there"),
        ("loss recovered", "loss_recovered", ".1%", "of the model's, reconstruction in place"),
    )
    out = console()
    for label, key, form, words in shown:
        if key in facts:
            out.print(f"  {label:<15}{format(facts[key], form):>8}  [dim]{words}[/dim]")
    click.echo(f'{done.folder}: load_sae("{_loadable(done.folder)}")')


def _loadable(folder: Path) -> str:
    """The folder as a name that is taken for a folder."""
    return str(folder) if folder.is_absolute() or str(folder).startswith(".") else f"./{folder}"


def _words(seconds: float) -> str:
    """A time for people."""
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return (
                f"{seconds / size:.1f} {unit}"
                if seconds < 10 * size
                else f"{seconds / size:.0f} {unit}"
            )
    return f"{seconds:.0f} seconds"
