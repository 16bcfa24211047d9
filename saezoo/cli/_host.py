"""What commands share that run an SAE in its language model: options, loading, a progress bar."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import click

from saezoo.cli._print import console

if TYPE_CHECKING:
    from saezoo.host import Host
    from saezoo.sae import SAE

model_option = click.option(
    "--model", help="A HuggingFace id or a folder, instead of the model that the SAE names."
)
dataset_option = click.option(
    "--dataset",
    help="A .jsonl, .txt, .md or .parquet file, a folder of them, or a dataset of the Hub; "
    "without it a short text that ships with saezoo.",
)
column_option = click.option(
    "--column", default="text", show_default=True, help="Where a dataset keeps its text."
)


def load_all(
    names: Sequence[str], model: str | None, cache_dir: str | None
) -> tuple[dict[str, "SAE"], "Host"]:
    """SAEs by name, and the one language model that they read."""
    from saezoo.errors import CaptureError
    from saezoo.host import load_host
    from saezoo.load import load_sae, need_sae

    with console(err=True).status("loading the SAE and its language model"):
        saes = {
            name: need_sae(load_sae(name, cache_dir=cache_dir), name, "this command")
            for name in names
        }
        hosts = {sae.cfg.model_name for sae in saes.values()}
        if model is None and len(hosts) > 1:
            said = ", ".join(str(host) for host in hosts)
            raise CaptureError(f"these SAEs are of different models ({said}): one at a time")
        chosen = model or next(iter(hosts))
        if chosen is None:
            raise CaptureError(f"{names[0]} does not say which model it reads: give --model")
        host = load_host(chosen, cache_dir=cache_dir)
    click.echo(f"model: {host.took}", err=True)
    return saes, host


def texts_of(dataset: str | None, column: str) -> tuple[Iterator[str], str]:
    """The documents of --dataset, and what they are in words. Raises DataError where there are
    none: before a model is loaded for them.
    """
    from saezoo.documents import read_documents
    from saezoo.errors import DataError
    from saezoo.evaluation import OWN_TEXT, own_text

    if dataset is None:
        return iter([own_text()]), OWN_TEXT
    documents = read_documents(dataset, column=column)
    first = next(documents, None)
    if first is None:
        raise DataError(f"{dataset} holds no text")
    return chain([first], documents), dataset


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal; gives what is to be told (done, total)."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(err=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
