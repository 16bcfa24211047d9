"""What commands share in how they speak: JSON for scripts, tables for people."""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from rich.console import Console

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Every command answers to both."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
cache_option = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False),
    help="Instead of $SAEZOO_CACHE or the platform's cache folder.",
)
offline_option = click.option("--offline", is_flag=True, help="Use only what is in the cache.")
format_option = click.option(
    "--from", "format_", metavar="FORMAT", help="The format of the files, where they do not say it."
)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A JSON list, one object a line; thousands of them in one line, which takes a third of the
    time.
    """
    if len(rows) > 1000:
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    click.echo(f"[\n{lines}\n]" if rows else "[]")


def console(*, err: bool = False) -> "Console":
    """A rich console; in a pipe it is 120 columns wide and has no colour."""
    import sys

    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(
        stderr=err, highlight=False, width=None if stream.isatty() else 120, soft_wrap=False
    )


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> None:
    """A table without lines: columns named in `right` are set to the right."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        # a name may be folded, since no_wrap would cut it; a number in two lines is two numbers
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name in right)
    for row in rows:
        table.add_row(*["" if value is None else escape(str(value)) for value in row])
    out = console()
    if not out.is_terminal:
        # a pipe has room for whole rows
        out.width = max(120, out.measure(table, options=out.options.update(width=9999)).maximum)
    out.print(table)


def human_bytes(count: int | None) -> str:
    """A size for people: 151 MB."""
    if count is None:
        return ""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
