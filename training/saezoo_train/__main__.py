"""`python -m saezoo_train RECIPE --text FILE --work FOLDER --out FOLDER`: harvest, train, measure,
write.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click
import yaml

from saezoo.errors import SaezooError
from saezoo_train.config import Recipe, read_recipe


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("changes", nargs=-1)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="JSONL with a `text` a line, or .jsonl.xz.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    required=True,
    help="Where activations are kept; used again if whole.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The native folder to write."
)
@click.option(
    "--documents", default=240, show_default=True, help="Held-out documents to measure on."
)
def main(
    recipe: Path, changes: tuple[str, ...], text: Path, work: Path, out: Path, documents: int
) -> None:
    """Train a TopK SAE from a RECIPE. CHANGES are key=value, such as optimiser.lr=5e-4.

    Example: python -m saezoo_train recipes/smollm2-135m-instruct-layer-15.yaml --text docs.jsonl
    --work acts --out my-sae
    """
    try:
        chosen = read_recipe(recipe, dict(_change(item) for item in changes))
        run(chosen, text, work, out, documents)
    except SaezooError as error:
        raise click.ClickException(str(error)) from error


def run(recipe: Recipe, text: Path, work: Path, out: Path, documents: int) -> None:
    """The whole way. Every step says what it does on stderr; training rows go to OUT's neighbour as
    JSON lines.
    """
    from saezoo.host import load_host
    from saezoo_train.activations import harvest, held_out, read_documents
    from saezoo_train.finish import write_result
    from saezoo_train.trainer import train

    host = load_host(recipe.site.model or "")
    say(host.took)
    kept: list[str] = []
    unseen: list[str] = []
    for document in read_documents(text):
        (unseen if held_out(document, recipe.data.held_out_one_in) else kept).append(document)
    if not (work / "index.json").is_file():
        say(f"harvesting {recipe.data.tokens:,} activations from {len(kept):,} documents")
        harvest(
            host.model,
            host.tokenizer,
            kept,
            recipe.site,
            recipe.tokens,
            work,
            max_tokens=recipe.data.tokens,
            say=say,
        )
    with out.with_name(out.name + ".log.jsonl").open("w") as file:
        trained, moments = train(recipe, work, log=lambda row: log_row(row, file))
    say(f"measuring on {min(documents, len(unseen))} held-out documents")
    metrics = write_result(
        recipe,
        trained,
        moments,
        work,
        host.model,
        host.tokenizer,
        unseen[:documents],
        out,
        progress=lambda done: say(f"{done} contexts") if done % 40 == 0 else None,
    )
    say(f"{out}: FVU {metrics.fvu:.4f}, loss recovered {metrics.loss_recovered:.4f}")


def log_row(row: dict[str, float], file: Any) -> None:
    """One row of training numbers: to the log whole, to a person short."""
    file.write(json.dumps(row) + "\n")
    file.flush()
    say(
        f"{row['tokens']:>12,} tokens  FVU {row['fvu']:.4f}  dead {row['dead']:.1%}"
        f"  {row['seconds']:.0f} s"
    )


def say(line: str) -> None:
    """A line for the person who waits."""
    click.echo(line, err=True)
    sys.stderr.flush()


def _change(item: str) -> tuple[str, Any]:
    key, sign, value = item.partition("=")
    if not sign:
        raise click.UsageError(f"{item!r} is not key=value")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    main()
