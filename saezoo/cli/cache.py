"""`saezoo cache …`: what lies in the cache, and room made there."""

import sys
from typing import TYPE_CHECKING

import click

from saezoo.cli._print import (
    HELP,
    cache_option,
    human_bytes,
    json_option,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from saezoo.cached import Cached

kind_option = click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="hub, https, kept, hosts, zoos or index; may be given again for more.",
)


@click.group(context_settings=HELP)
def cache() -> None:
    """What lies in the cache, and room made there.

    \b
    Example: saezoo cache ls
             saezoo cache prune --older-than 30
    """


@cache.command(context_settings=HELP)
@kind_option
@cache_option
@json_option
def ls(kinds: tuple[str, ...], cache_dir: str | None, as_json: bool) -> None:
    """List what the cache holds: fetched files, what was unpacked once, language models, zoos.

    \b
    Example: saezoo cache ls
             saezoo cache ls --kind hub
    """
    from saezoo.cached import list_cached
    from saezoo.files import cache_root

    items = list_cached(cache_dir, kinds)
    root, total = cache_root(cache_dir), sum(item.size for item in items)
    if as_json:
        rows = [
            {"kind": item.kind, "what": item.what, "size": item.size, "used": _day(item.used)}
            for item in items
        ]
        print_json({"root": str(root), "total": total, "items": rows})
        return
    if items:
        _show(items)
    click.echo(f"{human_bytes(total)} in {root}")


@cache.command(context_settings=HELP)
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Only what was not used for so long.",
)
@kind_option
@click.option("--dry-run", is_flag=True, help="Show what would go, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask, for scripts.")
@cache_option
def prune(
    older_than: float | None,
    kinds: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    cache_dir: str | None,
) -> None:
    """Remove what was fetched or made, after asking. Pinned zoos stay, unless --kind zoos is given.

    \b
    Example: saezoo cache prune --older-than 30
             saezoo cache prune --kind kept --yes
    """
    from saezoo.cached import list_cached, remove_cached, to_prune

    items = to_prune(list_cached(cache_dir, kinds), older_than=older_than, kinds=kinds)
    if not items:
        click.echo("nothing to remove")
        return
    _show(items)
    total = human_bytes(sum(item.size for item in items))
    if dry_run:
        click.echo(f"{total} would be removed")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("nobody to ask: --yes removes them, --dry-run only shows them")
        click.confirm(f"Remove these, {total}?", abort=True)
    click.echo(f"{human_bytes(remove_cached(items, cache_dir))} removed")


def _show(items: "list[Cached]") -> None:
    rows = [(item.kind, item.what, human_bytes(item.size), _day(item.used)) for item in items]
    print_table(["kind", "what", "size", "last used"], rows, right=["size"])


def _day(used: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(used, UTC).date().isoformat()
