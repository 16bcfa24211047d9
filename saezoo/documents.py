"""Texts to train or measure on, one after another: local files, or a dataset of the HuggingFace
Hub, streamed.
"""

import gzip
import importlib.util
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from saezoo.errors import DataError, MissingExtra

SUFFIXES = (".jsonl", ".ndjson", ".txt", ".md", ".parquet")
"""What a local file may be called, the first two and the text files also with .gz or .xz behind."""

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


def read_documents(
    source: str | Path,
    *,
    column: str = "text",
    split: str = "train",
    subset: str | None = None,
    token: str | None = None,
) -> Iterator[str]:
    """The documents of `source`, in its order, those without text left out.

    source: a .jsonl, .txt, .md or .parquet file (.jsonl and text also as .gz or .xz), a folder of
    them (taken in the order of their names), or the name of a Hub dataset, which is streamed. A
    text file is one document. column: the key of the text in JSON lines, parquet and datasets.
    split, subset, token: of a Hub dataset.

    Raises DataError for what is not there, cannot be read or lacks the column; MissingExtra without
    pyarrow (parquet) or datasets (the Hub).
    """
    path = Path(source)
    if path.is_dir():
        files = [item for item in sorted(path.iterdir()) if _kind(item) is not None]
        if not files:
            raise DataError(f"{path}: no {', '.join('*' + end for end in SUFFIXES)} in this folder")
    elif path.is_file():
        if _kind(path) is None:
            raise DataError(
                f"{path}: cannot read text from this; it should end in {', '.join(SUFFIXES)}"
            )
        files = [path]
    elif _looks_local(str(source)):
        raise DataError(f"{path}: no such file or folder")
    else:
        yield from _hub_documents(str(source), column, split, subset, token)
        return
    for file in files:
        yield from _file_documents(file, column)


def _kind(path: Path) -> str | None:
    """Which of SUFFIXES a file is, packed or not; None for others."""
    ends = path.suffixes
    last = ends[-2] if len(ends) > 1 and ends[-1] in _OPENERS else path.suffix
    return last if last in SUFFIXES and not (last == ".parquet" and last != path.suffix) else None


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or _kind(Path(source)) is not None


def _file_documents(path: Path, column: str) -> Iterator[str]:
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet_documents(path, column)
        return
    opener = _OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if kind in (".jsonl", ".ndjson"):
                yield from _lines(file, path, column)
            elif text := file.read():
                yield text
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _lines(file: IO[str], path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}, line {number}: not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            has = f"it has {', '.join(row)}" if isinstance(row, dict) else "it is no object"
            raise DataError(f"{path}, line {number}: no text under {column!r}; {has}")
        if row[column]:
            yield row[column]


def _parquet_documents(path: Path, column: str) -> Iterator[str]:
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtra(f"reading {path.name} needs pyarrow: pip install 'saezoo[train]'")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"{path}: no column {column!r}; it has {', '.join(names)}")
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


def _hub_documents(
    name: str, column: str, split: str, subset: str | None, token: str | None
) -> Iterator[str]:
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra(
            f"{name!r} is no local file, and the Hub's datasets need: pip install 'saezoo[train]'"
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = load_dataset(name, subset, split=split, streaming=True, token=token)
        for row in rows:
            if column not in row:
                raise DataError(f"{name}: no column {column!r}; it has {', '.join(row)}")
            if row[column]:
                yield row[column]
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        first = str(error).strip().splitlines()[0]
        raise DataError(f"the dataset {name!r} could not be read: {first}") from None
