"""`saezoo list`"""

import os
from typing import TYPE_CHECKING, Any

import click

from saezoo.cli._print import HELP, human_bytes, json_option, print_rows, print_table

if TYPE_CHECKING:
    from saezoo.entry import Entry
    from saezoo.search import Listing

PAGE = 40


@click.command(name="list", context_settings=HELP)
@click.argument("release", required=False)
@click.option("--model", help="A HuggingFace id, or its last part.")
@click.option("--layer", type=int, multiple=True, help="A layer; may be given again for more.")
@click.option("--site", help="Such as resid_post, mlp_out, attn_out.")
@click.option("--width", help="How many features: a number, or 16k.")
@click.option("--l0", help="A range such as 50..150.")
@click.option("--search", help="Words that must all appear.")
@click.option("--names", is_flag=True, help="Only the names, one a line, all of them.")
@json_option
def list_(
    release: str | None,
    model: str | None,
    layer: tuple[int, ...],
    site: str | None,
    width: str | None,
    l0: str | None,
    search: str | None,
    names: bool,
    as_json: bool,
) -> None:
    """List releases, or the SAEs of a RELEASE or of a search.

    \b
    Example: saezoo list
             saezoo list openai-gpt2-small
             saezoo list --model gemma-2-2b --layer 12 --width 16k
    """
    from saezoo.search import find_all

    narrowed = any((release, model, layer, site, width, l0, search))
    if not narrowed and not names and not as_json:
        _print_releases()
        return
    filters = {
        "model": model,
        "layer": layer or None,
        "site": site,
        "width": width,
        "l0": l0,
        "search": search,
        "release": release,
    }
    found = find_all(**filters, list_files=_list_files)  # type: ignore[arg-type]
    _say_not_listed(found.not_listed)
    if as_json:
        print_rows(found.rows)
    elif names:
        click.echo("".join(f"{row['name']}\n" for row in found.rows), nl=False)
    else:
        _print_entries(found, filters)


def _say_not_listed(not_listed: dict[str, str]) -> None:
    """One line on stderr for each reason, with the releases it holds for."""
    for reason in dict.fromkeys(not_listed.values()):
        names = [name for name, why in not_listed.items() if why == reason]
        who = f"{names[0]} is" if len(names) == 1 else f"{len(names)} open releases are"
        click.echo(f"saezoo: {who} not listed ({reason}); names of them need no listing", err=True)


def _list_files(entry: "Entry") -> list[str]:
    from saezoo.hub import list_files

    return list_files(entry)


def _print_releases() -> None:
    """Releases with their counts, those of one model and format in one row, a page at most."""
    from saezoo.index import read_index

    releases = read_index()["releases"]
    groups: dict[tuple[str, str], list[str]] = {}
    for name, facts in releases.items():
        groups.setdefault((facts["model"] or "", facts["format"] or ""), []).append(name)
    rows = []
    for (model, form), names in groups.items():
        start = os.path.commonprefix(names)
        counts = [releases[name]["count"] for name in names]
        shown = names[0] if len(names) == 1 else f"{start}… ({len(names)} releases)"
        some_open = any(releases[name]["open"] for name in names)
        count = f"{sum(counts):,}" if sum(counts) else ""
        rows.append(
            (sum(counts), shown, f"{count} open".strip() if some_open else count, model, form)
        )
    rows.sort(key=lambda row: -row[0])
    print_table(
        ["release", "SAEs", "model", "format"], [row[1:] for row in rows[:PAGE]], right=["SAEs"]
    )
    total = sum(facts["count"] for facts in releases.values())
    if len(rows) > PAGE:
        click.echo(f"… and {len(rows) - PAGE} more rows of fewer SAEs: --search, or docs/zoo.md")
    click.echo(
        f"{total:,} SAEs in {len(releases)} releases, not counting what open ones have besides: "
        "`saezoo list RELEASE` shows the SAEs of one, `saezoo list --model MODEL` those of a model."
    )


def _print_entries(found: "Listing", filters: dict[str, Any]) -> None:
    from saezoo.search import what_narrows, what_widens

    rows = [
        (
            row["name"],
            (row.get("site") or {}).get("point"),
            (row.get("site") or {}).get("layer"),
            f"{row['d_sae']:,}" if "d_sae" in row else None,
            f"{sparsity:g}" if (sparsity := row.get("k") or row.get("l0")) else None,
            human_bytes(row.get("size")),
        )
        for row in found.rows[:PAGE]
    ]
    if not rows:
        click.echo(
            f"no registered SAE fits all of this ({what_widens(filters)}); "
            "`saezoo list` shows the releases"
        )
        return
    print_table(
        ["name", "site", "layer", "features", "k or L0", "size"],
        rows,
        right=["layer", "features", "k or L0", "size"],
    )
    if len(found.rows) > PAGE:
        more = len(found.rows) - PAGE
        click.echo(
            f"… and {more:,} more: narrow it by {what_narrows(found.rows)}; "
            "--names or --json for all"
        )
