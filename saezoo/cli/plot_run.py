"""`saezoo plot-run FOLDER`"""

from pathlib import Path

import click

from saezoo.cli._print import HELP


@click.command("plot-run", context_settings=HELP)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The PNG; default: curves.png in the run's folder.",
)
def plot_run(folder: Path, out: Path | None) -> None:
    """Draw the curves of a training run: FVU, L0, dead features, learning rate, speed.

    FOLDER is what was trained, or the .run folder beside it.

    \b
    Example: saezoo plot-run my-sae
    """
    from saezoo_train.plot import plot_run as draw

    click.echo(f"wrote {draw(folder, out)}")
