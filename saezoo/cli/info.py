"""`saezoo info NAME`"""

import click

from saezoo.cli._print import HELP, cache_option, json_option, print_json


@click.command(context_settings=HELP)
@click.argument("name")
@cache_option
@json_option
def info(name: str, cache_dir: str | None, as_json: bool) -> None:
    """Show what is known of an SAE, without fetching it: where it is, its site, its numbers, what
    is cached.

    \b
    Example: saezoo info openai-gpt2-small/resid_post_mlp_v5_32k/8
    """
    from saezoo.find import find_sae
    from saezoo.formats import is_read, unread_format
    from saezoo.hub import peek

    entry = find_sae(name, cache_dir=cache_dir)
    facts = entry.to_json()
    if entry.format is None or is_read(entry.format):
        cached = peek(entry, cache_dir=cache_dir)
    else:
        why = unread_format(entry.format, entry.name)
        cached = str(why).removeprefix(f"{entry.name}: ")
    if as_json:
        print_json(facts | {"name": entry.name, "cached": cached})
        return
    if entry.neuronpedia:
        facts["neuronpedia"] = f"https://www.neuronpedia.org/{entry.neuronpedia}"
    click.echo(entry.name)
    for key, value in facts.items():
        if key not in ("release", "id") and value != "":
            click.echo(f"  {key:<20}{_words(value)}")
    click.echo(f"  {'files':<20}{cached}")


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
