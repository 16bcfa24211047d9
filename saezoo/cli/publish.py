"""`saezoo publish FOLDER TARGET`"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from saezoo.cli._print import (
    HELP,
    console,
    human_bytes,
    json_option,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from saezoo.publishing.pipeline import Published


@click.command(context_settings=HELP)
@click.argument("folder")
@click.argument("target")
@click.option(
    "--path",
    metavar="P",
    help="Where in TARGET; of many SAEs, what comes before each one's own folder.",
)
@click.option("--private", is_flag=True, help="Make a new repo private.")
@click.option(
    "--licence",
    "--license",
    metavar="L",
    help="Such as Apache-2.0 or CC-BY-4.0; else what the folder says.",
)
@click.option("--branch", metavar="B", help="Commit to this branch instead of main.")
@click.option("--pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option(
    "--dry-run", is_flag=True, help="Show files, card and registry stanza; write nothing."
)
@click.option(
    "--exports",
    metavar="FORMAT,…",
    help="Put the SAE in these formats beside it, each proven: saelens, sparsify …",
)
@click.option("--without-metrics", is_flag=True, help="Publish although the numbers are lacking.")
@json_option
def publish(
    folder: str,
    target: str,
    path: str | None,
    private: bool,
    licence: str | None,
    branch: str | None,
    pr: bool,
    dry_run: bool,
    exports: str | None,
    without_metrics: bool,
    as_json: bool,
) -> None:
    """Publish the SAE in FOLDER, or all that lie below it, to TARGET, so that anyone can load it by
    name.

    TARGET is org/repo on the HuggingFace Hub, or a folder (./zoo-dir), which gets the same tree.
    What is fetched again is compared with what was sent. The token is the one of `hf auth login` or
    HF_TOKEN.

    \b
    Example: saezoo publish ./my-sae my-org/my-saes --path layer_15 --dry-run
             saezoo publish ./my-sae my-org/my-saes --path layer_15 --exports saelens
             saezoo publish ./my-sae ./zoo-dir
    """
    from saezoo.errors import NotPublishable
    from saezoo.publishing.pipeline import publish_sae

    try:
        with _bar() as progress:
            done = publish_sae(
                folder,
                target,
                path=path,
                private=private,
                licence=licence,
                branch=branch,
                pr=pr,
                dry_run=dry_run,
                exports=[name.strip() for name in (exports or "").split(",") if name.strip()],
                without_metrics=without_metrics,
                progress=progress,
            )
    except NotPublishable as error:
        # a line for each: they are mended one by one
        for problem in error.problems[:-1]:
            click.echo(f"saezoo: {' '.join(problem.split())}", err=True)
        raise NotPublishable(error.problems[-1:]) from None
    if as_json:
        print_json(done.to_json())
    else:
        _print(done)


@contextmanager
def _bar() -> "Iterator[Callable[[str, int, int], None]]":
    """What shows how many bytes are there: a bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console(err=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield show


def _print(done: "Published") -> None:
    rows = [(file.path, human_bytes(file.size), file.state) for file in done.files]
    print_table(["file", "size", ""], rows, right=["size"])
    total = sum(file.size for file in done.files)
    sent = sum(file.size for file in done.files if file.state != "same")
    click.echo(f"{len(done.files)} files, {human_bytes(total)}, {human_bytes(sent)} of it new")
    for name in done.left_out:
        click.echo(f"left out, since nobody needs it: {name}")
    if done.note:
        click.echo(done.note)
    if done.dry_run:
        for title, text in (("README.md", done.card), ("registry stanza", done.stanza)):
            click.echo(f"\n----- {title}\n{text.rstrip()}")
        click.echo(f"-----\nnothing was written to {done.target}: this was a dry run")
        return
    looked = [finding.ok for finding in done.findings if finding.ok is not None]
    click.echo(f"read again: {sum(looked)} of {len(looked)} things looked at are as they were sent")
    if done.pull_request:
        click.echo(f"pull request: {done.pull_request}")
    if done.revision:
        click.echo(f"revision: {done.revision}\n{done.url}")
    for name in done.names[:10]:
        click.echo(f'load_sae("{name}")')
    if len(done.names) > 10:
        click.echo(f"… and {len(done.names) - 10} more")
    if done.revision:
        click.echo(
            f"\n----- for the registry: saezoo registry add {done.target}\n{done.stanza}", nl=False
        )
