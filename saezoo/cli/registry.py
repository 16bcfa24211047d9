"""`saezoo registry …`: care of the registry itself."""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from saezoo.cli._print import (
    HELP,
    console,
    json_option,
    print_json,
    print_rows,
    print_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from saezoo.verify import Verdict


@click.group(context_settings=HELP)
def registry() -> None:
    """Care of the registry itself, for those who keep it.

    \b
    Example: saezoo registry verify
             saezoo registry verify --fill
             saezoo registry add hf://my-org/my-saes
    """


@registry.command(context_settings=HELP)
@click.argument("releases", nargs=-1, metavar="[RELEASE…]")
@click.option(
    "--fill",
    is_flag=True,
    help="Write commit, size and sha256 into the YAML that lacks them (in a checkout).",
)
@json_option
def verify(releases: tuple[str, ...], fill: bool, as_json: bool) -> None:
    """Ask the hosts whether the files of each RELEASE (all without names) are there and as stated.
    Nothing is fetched. Exit code 1 if anything is dead or changed.

    \b
    Example: saezoo registry verify
             saezoo registry verify openai-gpt2-small gemma-scope-2b-pt-res
             saezoo registry verify --fill gemma-scope-2b-pt-res
    """
    from saezoo.verify import verify_releases

    verdicts: list[Verdict] = []
    try:
        with _bar(releases) as advance:
            for verdict in verify_releases(releases, fill=fill, tell=lambda _: advance()):
                verdicts.append(verdict)
    except KeyboardInterrupt:
        # what is done is done: releases are written one by one, each whole
        if not as_json:
            _print(verdicts, fill)
        raise
    if as_json:
        print_rows([row.to_json() for verdict in verdicts for row in verdict.findings])
    else:
        _print(verdicts, fill)
    if any(verdict.count("dead") or verdict.count("changed") for verdict in verdicts):
        sys.exit(1)


@registry.command(context_settings=HELP)
@click.argument("source", metavar="STANZA|hf://org/repo")
@json_option
def add(source: str, as_json: bool) -> None:
    """Put published SAEs into registry/ of a checkout, for a pull request: those of a YAML file
    that `saezoo publish` printed, or of the saezoo.yaml of a Hub repo, pinned at its commit.

    \b
    Example: saezoo registry add hf://my-org/my-saes
             saezoo registry add stanza.yaml
    """
    from saezoo.publishing.registering import add_to_registry

    added = add_to_registry(source)
    if as_json:
        print_json({key: str(v) if key == "path" else v for key, v in vars(added).items()})
        return
    what = "wrote" if added.new_release else "added to"
    click.echo(f"{what} {added.path.parent.name}/{added.path.name}: {len(added.ids)} SAEs")
    click.echo("next: `make docs`, count them in tests/test_registry.py, then `make test`")


@contextmanager
def _bar(releases: tuple[str, ...]) -> "Iterator[Callable[[], Any]]":
    """A progress bar on stderr where that is a terminal; gives what moves it on by one SAE."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from saezoo.index import read_index

    known = read_index()["releases"]
    total = sum(known[name]["count"] for name in releases or known if name in known)
    columns = (TextColumn("SAEs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(err=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _print(verdicts: "list[Verdict]", fill: bool) -> None:
    """A row a release, then each SAE that is not ok, then each host that could not be reached."""
    columns = ["release", "ok", "dead", "changed", "unknown", *(["filled"] if fill else [])]
    print_table(columns, [_row(verdict, fill) for verdict in verdicts], right=columns[1:5])
    findings = [row for verdict in verdicts for row in verdict.findings if row.status != "ok"]
    silent = Counter(row.detail for row in findings if row.status == "unknown")
    for row in findings:
        if row.status != "unknown":
            click.echo(f"{row.status}: {row.entry.name}: {row.detail}")
    for reason, count in silent.items():
        click.echo(f"unknown: {reason}: {count:,} SAE{'s' if count > 1 else ''}")
    if any(verdict.filled for verdict in verdicts):
        click.echo("look at what was written with `git diff`, then run `make docs` and `make test`")


def _row(verdict: "Verdict", fill: bool) -> list[object]:
    if verdict.is_open and not verdict.findings:
        return [verdict.release, *(["open"] + [""] * 3), *([""] if fill else [])]
    counts = [verdict.count(status) or "" for status in ("ok", "dead", "changed", "unknown")]
    filled = verdict.not_filled or ("yes" if verdict.filled else "nothing to fill")
    return [verdict.release, *counts, *([filled] if fill else [])]
