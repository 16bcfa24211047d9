"""Activations kept on disk: a folder of shards and an index that says which of them are whole.

    index.json                    ShardIndex: the site, the token rule, and a row for each shard
    shard-00000.safetensors …     x (tokens, d), token_ids, positions, documents (tokens,) int32

A shard counts only once the index names it, and the index is replaced whole: a writer that dies
leaves what was whole before. Readers map the files: nothing is read before it is used.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saezoo.config import Site, Spec, TokenRule, one_line
from saezoo.errors import DataError
from saezoo.files import write_file

INDEX = "index.json"
KEYS = ("x", "token_ids", "positions", "documents")


class Shard(Spec):
    """One file of activations."""

    name: str = Field(pattern=r"^shard-\d{5}\.safetensors$")
    tokens: PositiveInt


class ShardIndex(Spec):
    """What a folder of activations holds."""

    saezoo_shards: Literal[1] = 1
    site: Site
    rule: TokenRule
    """Which tokens were kept."""
    d: PositiveInt
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    shards: tuple[Shard, ...] = ()
    documents: NonNegativeInt = 0
    """How many documents of the source these shards are from: where a writer goes on."""
    complete: bool = False
    """Whether the writer reached what it was asked for, or the end of its source."""
    dropped: dict[str, int] = {}
    """Tokens that the rule left out, by reason."""
    facts: dict[str, Any] = {}
    """What else the writer wants to find again: dataset, tokens asked for, context length …"""

    @property
    def tokens(self) -> int:
        """How many activations there are."""
        return sum(shard.tokens for shard in self.shards)


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder of shards. Raises DataError unless it is whole and all its files are
    there.
    """
    path = folder / INDEX
    try:
        index = ShardIndex.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: no {INDEX}, so no activations") from None
    except ValidationError as error:
        raise DataError(f"{path}: {one_line(error)}") from None
    for shard in index.shards:
        if not (folder / shard.name).is_file():
            raise DataError(f"{folder}: the index names {shard.name}, which is not there")
    return index


def write_index(folder: Path, index: ShardIndex) -> None:
    """Replace the index, whole or not at all."""
    with write_file(folder / INDEX) as work:
        work.write_text(index.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> Shard:
    """Write KEYS as the shard of this number; the index, which makes it count, is the caller's."""
    assert set(tensors) == set(KEYS), f"a shard holds {KEYS}, got {sorted(tensors)}"
    name = f"shard-{number:05d}.safetensors"
    with write_file(folder / name) as work:
        save_file({key: value.contiguous() for key, value in tensors.items()}, work)
    return Shard(name=name, tokens=len(tensors["x"]))


def read_shard(folder: Path, index: ShardIndex, number: int) -> dict[str, Tensor]:
    """The tensors of a shard, mapped. Raises DataError when the file is not what the index says."""
    shard = index.shards[number]
    path = folder / shard.name
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    expected = {"x": (shard.tokens, index.d)} | dict.fromkeys(KEYS[1:], (shard.tokens,))
    if shapes != expected:
        raise DataError(f"{path}: holds {shapes}, but the index says {expected}")
    return tensors
