"""`saezoo features NAME`"""

from pathlib import Path

import click

from saezoo.cli._host import load_all, model_option
from saezoo.cli._print import HELP, cache_option, console, json_option, print_json


@click.command(context_settings=HELP)
@click.argument("name")
@click.option("--text", help="The text to look at.")
@click.option(
    "--file",
    "file_",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file to look at.",
)
@click.option("--top", default=5, show_default=True, help="Features shown of each token.")
@click.option("--tokens", default=200, show_default=True, help="How many tokens to look at.")
@model_option
@cache_option
@json_option
def features(
    name: str,
    text: str | None,
    file_: Path | None,
    top: int,
    tokens: int,
    model: str | None,
    cache_dir: str | None,
    as_json: bool,
) -> None:
    """Show which features of the SAE NAME each token of a text lights, strongest first.

    \b
    Example: saezoo features smollm2-135m-instruct/layer_15_resid_post --text "A cat sat."
    """
    from dataclasses import asdict

    from saezoo.cli.demo import print_tokens
    from saezoo.errors import InputError
    from saezoo.features import look_at_tokens
    from saezoo.guard import check_host

    if (text is None) == (file_ is None):
        raise click.UsageError("give --text or --file")
    if file_ is not None:
        try:
            text = file_.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{file_} is not UTF-8 text") from None
    saes, host = load_all([name], model, cache_dir)
    check_host(host.model, saes[name].cfg, guard="warn", tokenizer=host.tokenizer)
    seen = look_at_tokens(host.model, host.tokenizer, saes[name], text or "", tokens=tokens)
    if as_json:
        print_json([asdict(token) for token in seen])
    else:
        print_tokens(console(), seen, len(seen), top)
