"""`saezoo demo`: what a real SAE sees in a real model's activations."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from saezoo.cli._print import HELP, console, json_option, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from saezoo.demo import Seen
    from saezoo.features import TokenSeen
    from saezoo.sae import SAE

ROWS = 40


@click.command(context_settings=HELP)
@click.option("--text", help="The text to look at.")
@click.option(
    "--file",
    "file_",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file to look at.",
)
@click.option(
    "--name",
    help="Another SAE than the bundled one; its host model is loaded by its HuggingFace id.",
)
@click.option("--tokens", default=ROWS, show_default=True, help="How many tokens to show.")
@json_option
def demo(
    text: str | None, file_: Path | None, name: str | None, tokens: int, as_json: bool
) -> None:
    """Load an SAE and its language model, and show what the SAE sees in a text.

    \b
    Example: saezoo demo
             saezoo demo --text "The capital of France is Paris."
    """
    from dataclasses import asdict

    from saezoo.demo import BUNDLED, demo_text, look
    from saezoo.errors import InputError
    from saezoo.host import SMOLLM2, load_host
    from saezoo.load import load_sae, need_sae

    if text is not None and file_ is not None:
        raise click.UsageError("give --text or --file, not both")
    if file_ is not None:
        try:
            text = file_.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{file_} is not UTF-8 text") from None
    screen = console(err=True)
    with screen.status(
        "loading the SAE and its language model (the first time takes about a minute)"
    ):
        sae = need_sae(load_sae(name or BUNDLED), name or BUNDLED, "saezoo demo")
        host = load_host(sae.cfg.model_name or SMOLLM2)
    screen.print(f"model: {host.took}", style="dim")
    with screen.status(
        "running the model: as it is, with the reconstruction in place, with zeros in place"
    ):
        seen = look(sae, host, text if text is not None else demo_text())
    if as_json:
        print_json(asdict(seen))
        return
    show(console(), seen, sae, name or BUNDLED, tokens)


def show(out: "Console", seen: "Seen", sae: "SAE", name: str, tokens: int) -> None:
    """Print everything: the idea, the tokens, the features, the numbers."""
    _explain(out, sae, name)
    print_tokens(out, seen.tokens, tokens)
    _print_features(out, seen)
    _print_numbers(out, seen, sae)


def _explain(out: "Console", sae: "SAE", name: str) -> None:
    site = sae.cfg.site.module if sae.cfg.site else "?"
    k = f"{sae.cfg.k} of " if sae.cfg.k else "a few of "
    out.print(
        f"\n[bold]{name}[/bold]\n{sae.cfg.architecture} SAE, {sae.d_in} -> {sae.d_sae:,} features\n"
    )
    out.print(
        f"At every token the model carries a vector of {sae.d_in} numbers through "
        f"[bold]{site}[/bold]. The sparse autoencoder (SAE) writes that vector as a sum of "
        f"{k}{sae.d_sae:,} learned directions, its [bold]features[/bold]: each is on or off at a "
        "token, and most mean something. Below, the strongest at each token, with how strong."
    )


def print_tokens(out: "Console", seen: "list[TokenSeen]", count: int, top: int = 4) -> None:
    """A row a token: its strongest features, how many are on, and what they leave unexplained."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("token")
    for title in ("strongest features  #feature activation", "on", "unexplained"):
        table.add_column(title, justify="left" if title.startswith("strongest") else "right")
    for token in seen[:count]:
        shown = "  ".join(
            f"[cyan]#{feature:<5}[/cyan]{value:6.1f}" for feature, value in token.features[:top]
        )
        if token.left_out:
            table.add_row(
                escape(visible(token.text)), f"[dim]left out: {token.left_out}[/dim]", "", ""
            )
        else:
            table.add_row(
                escape(visible(token.text)),
                shown,
                str(len(token.features)),
                "" if token.error is None else f"{token.error:.2f}",
            )
    out.print()
    out.print(table)
    if len(seen) > count:
        everything = len(seen)
        out.print(f"[dim]… and {everything - count} more (--tokens {everything} shows all)[/dim]")


def _print_features(out: "Console", seen: "Seen") -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("feature", "where in this text it is on", "makes these next tokens likelier"):
        table.add_column(title)
    for feature in seen.features:
        spots = "  ".join(
            f"{escape(visible(text))} [dim]{value:.0f}[/dim]" for text, value in feature.where
        )
        table.add_row(
            f"[cyan]#{feature.feature}[/cyan]",
            spots,
            escape("  ".join(map(visible, feature.promotes))),
        )
    out.print("\n[bold]Features that mark out parts of this text[/bold]\n")
    out.print(table)


def _print_numbers(out: "Console", seen: "Seen", sae: "SAE") -> None:
    m = seen.metrics
    clean, spliced, zero = (loss or 0.0 for loss in (m.loss_clean, m.loss_spliced, m.loss_zero))
    out.print(
        f"\n[bold]How much of the model survives[/bold]   ({m.tokens:,} tokens of this text)\n"
    )
    rows = [
        ("L0", f"{m.l0:.1f}", f"features on per token, of {sae.d_sae:,}"),
        (
            "FVU",
            f"{m.fvu:.3f}",
            "fraction of variance unexplained: 0 is perfect, 1 is predicting the mean",
        ),
        ("", "", ""),
        ("loss, model as it is", f"{clean:.3f}", bar(clean, zero)),
        (
            "loss, reconstruction in place",
            f"{spliced:.3f}",
            bar(spliced, zero),
        ),
        ("loss, zeros in place", f"{zero:.3f}", bar(zero, zero)),
        (
            "loss recovered",
            f"{m.loss_recovered:.1%}",
            "1 - (reconstruction - model) / (zeros - model)",
        ),
    ]
    for label, value, words in rows:
        out.print(f"  {label:<31}{value:>8}  [dim]{words}[/dim]")
    if seen.cut:
        out.print(f"[dim]the text was cut: {seen.cut} contexts of it were not run[/dim]")


def bar(value: float, largest: float, width: int = 40) -> str:
    """A bar as long as value is to largest."""
    return "█" * max(1, round(width * value / largest)) if largest > 0 else ""


def visible(text: str) -> str:
    """A token on one line, its white space to be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"
