"""`saezoo cite NAME`"""

import click

from saezoo.cli._print import HELP, cache_option, json_option, print_json


@click.command(context_settings=HELP)
@click.argument("name")
@cache_option
@json_option
def cite(name: str, cache_dir: str | None, as_json: bool) -> None:
    """Print BibTeX for an SAE: the paper it is from, if one is known, and the weights themselves.

    \b
    Example: saezoo cite openai-gpt2-small/resid_post_mlp_v5_32k/8
             saezoo cite hf://org/repo/path > sae.bib
    """
    from saezoo.cite import cite_sae

    citations = cite_sae(name, cache_dir=cache_dir)
    if as_json:
        print_json([citation.to_json() for citation in citations])
        return
    click.echo("\n\n".join(citation.to_bibtex() for citation in citations))
