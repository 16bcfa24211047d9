"""`saezoo top NAME FEATURE`"""

from typing import TYPE_CHECKING

import click

from saezoo.cli._host import (
    column_option,
    dataset_option,
    load_all,
    model_option,
    progress_bar,
    texts_of,
)
from saezoo.cli._print import HELP, cache_option, console, json_option, print_json

if TYPE_CHECKING:
    from saezoo.features import Example, FeatureSeen, Promoted


@click.command(context_settings=HELP)
@click.argument("name")
@click.argument("feature", type=int)
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
@click.option("--count", default=10, show_default=True, help="How many examples.")
@cache_option
@json_option
def top(
    name: str,
    feature: int,
    model: str | None,
    dataset: str | None,
    column: str,
    tokens: int,
    count: int,
    cache_dir: str | None,
    as_json: bool,
) -> None:
    """Show where one FEATURE of the SAE NAME is strongest in texts, and which next tokens it
    promotes and suppresses.

    \b
    Example: saezoo top smollm2-135m-instruct/layer_15_resid_post 828
             saezoo top NAME 828 --dataset documents.jsonl --count 20
    """
    from dataclasses import asdict

    from saezoo.features import promoted_tokens, refuse_feature, top_examples
    from saezoo.guard import check_host

    texts, said = texts_of(dataset, column)
    saes, host = load_all([name], model, cache_dir)
    sae = saes[name]
    refuse_feature(sae, feature)
    check_host(host.model, sae.cfg, guard="warn", tokenizer=host.tokenizer)
    with progress_bar("reading") as progress:
        seen = top_examples(
            host.model,
            host.tokenizer,
            sae,
            feature,
            texts,
            tokens=tokens,
            count=count,
            progress=progress,
        )
    promoted = promoted_tokens(host.model, host.tokenizer, sae, feature)
    if as_json:
        facts = asdict(seen) | {"text": said}
        print_json(facts | {"promotes": asdict(promoted) if promoted else None})
        return
    _print(seen, promoted, said)


def _print(seen: "FeatureSeen", promoted: "Promoted | None", said: str) -> None:
    """What the feature is, then its examples, the strongest first."""
    from rich.markup import escape

    from saezoo.cli.demo import visible

    out = console()
    out.print(
        f"[bold]feature #{seen.feature}[/bold]   on at {seen.density:.2%} of {seen.tokens:,} "
        f"tokens of {escape(said)}"
    )
    if promoted is None:
        out.print(
            "its direction is not of the residual stream: what it promotes cannot be read off"
        )
    else:
        for word, tokens in (("promotes", promoted.up), ("suppresses", promoted.down)):
            shown = "  ".join(escape(visible(token)) for token, _ in tokens)
            out.print(f"  {word:<11}{shown}")
    if not seen.examples:
        out.print("it is on nowhere in this text: give more of it (--dataset, --tokens)")
        return
    out.print()
    highest = seen.examples[0].strongest
    for example in seen.examples:
        line = _coloured(example, highest) if out.is_terminal else _marked(example)
        out.print(f"{example.strongest:8.2f}  {line}", soft_wrap=not out.is_terminal)


def _coloured(example: "Example", highest: float) -> str:
    """Rich markup: the stronger a token, the deeper the orange behind it; the peak is bold."""
    from rich.markup import escape

    parts = []
    for place, (token, value) in enumerate(zip(example.tokens, example.activations, strict=True)):
        text = escape(_on_one_line(token))
        if value <= 0:
            parts.append(text)
            continue
        share = min(value / highest, 1.0)
        red, green, blue = 255, round(245 - 115 * share), round(225 - 205 * share)
        weight = "bold " if place == example.peak else ""
        parts.append(f"[{weight}black on rgb({red},{green},{blue})]{text}[/]")
    return "".join(parts)


def _marked(example: "Example") -> str:
    """Plain text: active tokens in ⟦ ⟧, the peak doubly so."""
    from rich.markup import escape

    parts = []
    for place, (token, value) in enumerate(zip(example.tokens, example.activations, strict=True)):
        text = _on_one_line(token)
        if value > 0:
            depth, word = 2 if place == example.peak else 1, text.lstrip(" ")
            space = text[: len(text) - len(word)]
            text = space + "⟦" * depth + word + "⟧" * depth
        parts.append(escape(text))
    return "".join(parts)


def _on_one_line(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥")
