"""Token shards: documents that are tokenised already.

    tokens.json        {"saezoo_tokens": 1, "shards": ["a.npy", …], "separator": 0 or absent}
    a.npy, …           integers, (tokens,) or (contexts, length); in .safetensors they are `ids`

A row of a two-dimensional shard is a document. A one-dimensional shard is cut into documents at the
separator, a token id that stands between them (it is left out); without one it is a single
document. Files are mapped: nothing is read before it is used.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open

from saezoo.config import Spec, one_line
from saezoo.errors import DataError

INDEX = "tokens.json"


class TokenIndex(Spec):
    """What a folder of token shards holds."""

    saezoo_tokens: Literal[1]
    shards: tuple[str, ...] = Field(min_length=1)
    separator: NonNegativeInt | None = None
    tokenizer: str | None = None
    """The Hub id of the model whose tokens these are."""


def read_token_index(folder: Path) -> TokenIndex:
    """The index of a folder of token shards. Raises DataError unless it is whole."""
    path = folder / INDEX
    try:
        index = TokenIndex.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: {one_line(error)}") from None
    for name in index.shards:
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"{path}: names {name!r}, which is no file beside it")
    return index


def token_documents(folder: Path) -> Iterator[list[int]]:
    """The documents of a folder of token shards, in order, those without tokens left out."""
    index = read_token_index(folder)
    for name in index.shards:
        ids = _read(folder / name)
        if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(
                f"{folder / name}: {ids.dtype} of shape {ids.shape}; token ids are integers of "
                "shape (tokens,) or (contexts, length)"
            )
        rows = ids if ids.ndim == 2 else _split(ids, index.separator)
        for row in rows:
            if len(row):
                yield row.tolist()


def _split(ids: np.ndarray, separator: int | None) -> Iterator[np.ndarray]:
    if separator is None:
        yield ids
        return
    start = 0
    for place in np.flatnonzero(ids == separator).tolist():
        yield ids[start:place]
        start = place + 1
    yield ids[start:]


def _read(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with safe_open(path, framework="np") as file:
            return file.get_tensor("ids")
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as token ids ({error})") from None
