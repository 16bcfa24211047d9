"""`saezoo download NAME…`"""

import click

from saezoo.cli._print import HELP, cache_option, json_option, offline_option, print_json


@click.command(context_settings=HELP)
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@click.option("--refresh", is_flag=True, help="Ask again which commit a branch points to.")
@click.option("--revision", help="Branch, tag or commit of a Hub repo.")
@cache_option
@offline_option
@json_option
def download(
    names: tuple[str, ...],
    refresh: bool,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Fetch SAEs into the cache, so that they load with no network. Only the files needed are
    fetched.

    \b
    Example: saezoo download openai-gpt2-small/resid_post_mlp_v5_32k/8
             saezoo download hf://EleutherAI/sae-llama-3-8b-32x/layers.10
    """
    from saezoo.find import find_sae
    from saezoo.hub import fetch

    done = []
    for name in names:
        entry = find_sae(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=offline,
            refresh=refresh,
        )
        fetched = fetch(
            entry, cache_dir=cache_dir, local_files_only=offline, refresh=refresh, extras=True
        )
        done.append(
            {
                "name": entry.name,
                "path": str(fetched.path),
                "format": fetched.format,
                "how": fetched.how,
            }
        )
        if not as_json:
            click.echo(f"{entry.name}\n  {fetched.path}\n  {fetched.format}; {fetched.how}")
    if as_json:
        print_json(done)
