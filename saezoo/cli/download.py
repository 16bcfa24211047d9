"""`saezoo download NAME…`"""

import sys
from typing import TYPE_CHECKING, Any

import click

from saezoo.cli._print import (
    HELP,
    cache_option,
    console,
    human_bytes,
    json_option,
    offline_option,
    print_json,
)

if TYPE_CHECKING:
    from saezoo.entry import Entry
    from saezoo.errors import SaezooError
    from saezoo.fetched import Fetched


@click.command(context_settings=HELP)
@click.argument("names", nargs=-1, metavar="[NAME…]")
@click.option("--model", help="Registered SAEs of this model.")
@click.option("--layers", help="Only of these layers: 12, or 5,12 or 5..12.")
@click.option("--site", help="Only of this site, such as resid_post.")
@click.option("--width", help="Only of this many features: a number, or 16k.")
@click.option("--l0", help="Only of an L0 in a range such as 50..150.")
@click.option("--release", help="Only of this release.")
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
    **filters: str | None,
) -> None:
    """Fetch SAEs into the cache, so that they load with no network: those named, or all that fit
    --model and the options after it. Only the files needed are fetched; the bytes are shown first.

    \b
    Example: saezoo download openai-gpt2-small/resid_post_mlp_v5_32k/8
             saezoo download hf://EleutherAI/sae-llama-3-8b-32x/layers.10
             saezoo download --model gemma-2-2b --layers 5..12 --width 16k --l0 50..150
    """
    from saezoo.find import find_sae
    from saezoo.hub import fetch

    filtered = any(filters.values())
    if bool(names) == filtered:
        raise click.UsageError("give names, or --model with what narrows it")
    if filtered:
        _download_all(_matching(filters), cache_dir, offline, as_json)
        return
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
        done.append(_facts(entry, fetched))
        if not as_json:
            click.echo(f"{entry.name}\n  {fetched.path}\n  {fetched.format}; {fetched.how}")
    if as_json:
        print_json(done)


def _matching(filters: dict[str, Any]) -> "list[Entry]":
    """The registered SAEs that fit, of formats that are read. Raises UnknownSAE for none."""
    from saezoo.errors import UnknownSAE
    from saezoo.formats import is_read
    from saezoo.hub import list_files
    from saezoo.search import find_all, parse_layers, what_widens

    layers = filters.pop("layers")
    wanted = filters | {"layer": parse_layers(layers) if layers else None}
    entries = [
        entry
        for entry in find_all(**wanted, list_files=list_files).entries
        if is_read(entry.format)
    ]
    if not entries:
        raise UnknownSAE(
            f"no registered SAE of a format that is read fits ({what_widens(wanted)}); "
            "`saezoo list` shows the releases"
        )
    return entries


def _download_all(
    entries: "list[Entry]", cache_dir: str | None, offline: bool, as_json: bool
) -> None:
    """Tell the bytes, fetch what is not cached, several at once, and end with 1 if any failed."""
    from rich.progress import Progress

    from saezoo.errors import SaezooError
    from saezoo.many import fetch_many, plan

    screen = console(err=True)
    with screen.status(f"asking how large {len(entries)} SAEs are"):
        wanted = plan(entries, cache_dir=cache_dir, local_files_only=offline)
    lacking = [item for item in wanted if not item.cached]
    known = sum(item.size or 0 for item in lacking)
    unsure = "" if all(item.size is not None for item in lacking) else " at least"
    screen.print(
        f"{len(wanted)} SAEs, {len(wanted) - len(lacking)} of them cached;{unsure} "
        f"{human_bytes(known)} to fetch",
        markup=False,
    )
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("fetching", total=len(wanted))

        def done(_entry: "Entry", _result: "Fetched | SaezooError") -> None:
            bar.advance(task)

        results = fetch_many(entries, cache_dir=cache_dir, local_files_only=offline, done=done)
    failed = [
        (entry, result)
        for entry, result in zip(entries, results, strict=True)
        if isinstance(result, SaezooError)
    ]
    if as_json:
        print_json(
            [
                {"name": entry.name, "error": str(result)}
                if isinstance(result, SaezooError)
                else _facts(entry, result)
                for entry, result in zip(entries, results, strict=True)
            ]
        )
    else:
        click.echo(f"{len(results) - len(failed)} of {len(results)} SAEs are in the cache")
    for entry, error in failed:
        click.echo(f"saezoo: {entry.name}: {' '.join(str(error).split())}", err=True)
    if failed:
        sys.exit(1)


def _facts(entry: "Entry", fetched: "Fetched") -> dict[str, str]:
    return {
        "name": entry.name,
        "path": str(fetched.path),
        "format": fetched.format,
        "how": fetched.how,
    }
