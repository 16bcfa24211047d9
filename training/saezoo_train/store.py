"""Keep one pass of a language model's activations on disk, so that a run which sees them several
times reads each text once. A store that was stopped goes on at its last whole shard.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saezoo.errors import DataError
from saezoo.shards import INDEX, KEYS, ShardIndex, read_index, write_index, write_shard
from saezoo_train.activations import Chunk, ModelSource, Position, refuse_too_few, to_dtype
from saezoo_train.data import fingerprint

SHARD = 16_384
"""Activations of a shard, at least: at most so many are lost when a store is stopped."""


def store_pass(
    source: ModelSource,
    folder: Path,
    *,
    replace: bool = False,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> ShardIndex:
    """Write a pass of `source` as shards under `folder`, or what of it is not there yet. replace:
    other activations that lie there may go.

    progress is called with the number of activations so far, and may raise to stop: whole shards
    stay. Raises DataError when the folder holds other activations, or when the pass is too small.
    """
    store = _Store(source, folder, replace)
    if store.index is not None and store.index.complete:
        return store.index
    start = Position()
    if store.index is not None:
        start = Position.model_validate(store.index.facts["after"])
    pending: list[Chunk] = []
    tokens = start.tokens
    for chunk in source.one_pass(start):
        pending.append(chunk)
        tokens = chunk.after.tokens
        progress(tokens)
        if tokens - store.tokens >= SHARD:
            store.append(pending)
            pending = []
    refuse_too_few(source.what, tokens, source.recipe.batch)
    if tokens > store.tokens:
        store.append(pending)
    return store.finish()


class _Store:
    """A folder of shards that grows."""

    def __init__(self, source: ModelSource, folder: Path, replace: bool) -> None:
        self.source, self.folder = source, folder
        self.dtype: torch.dtype = getattr(torch, source.recipe.buffer.dtype)
        recipe = source.recipe
        self.facts: dict[str, Any] = {
            "data": recipe.data.model_dump(mode="json"),
            "seed": recipe.seed,
            "source": fingerprint(recipe.data),
        }
        self.index = read_index(folder) if (folder / INDEX).is_file() else None
        if self.index is not None and not self._is_ours(self.index):
            if not replace:
                raise DataError(
                    f"{folder}: holds the activations of other data or another site; "
                    "name another --out, or start over with --fresh"
                )
            shutil.rmtree(folder)
            self.index = None

    def _is_ours(self, index: ShardIndex) -> bool:
        facts = {key: index.facts.get(key) for key in self.facts}
        same = (index.site, index.rule) == (self.source.site, self.source.recipe.tokens)
        return same and facts == self.facts

    @property
    def tokens(self) -> int:
        """Activations in whole shards."""
        return self.index.tokens if self.index else 0

    def append(self, chunks: list[Chunk]) -> None:
        """Another shard."""
        shards = self.index.shards if self.index else ()
        x = torch.cat([to_dtype(chunk.x, self.dtype, self.source.what).cpu() for chunk in chunks])
        facts = {
            key: torch.cat([chunk.facts[key].cpu() for chunk in chunks])
            for key in KEYS
            if key != "x"
        }
        shard = write_shard(self.folder, len(shards), {"x": x, **facts})
        recipe, last = self.source.recipe, chunks[-1]
        self.index = ShardIndex(
            site=self.source.site,
            rule=recipe.tokens,
            d=x.shape[1],
            dtype=recipe.buffer.dtype,
            shards=(*shards, shard),
            documents=last.documents,
            facts=self.facts | {"after": last.after.model_dump()},
        )
        write_index(self.folder, self.index)

    def finish(self) -> ShardIndex:
        """The index, which says from now on that the pass is whole."""
        assert self.index is not None, "a pass that is large enough has written a shard"
        self.index = self.index.model_copy(update={"complete": True})
        write_index(self.folder, self.index)
        return self.index
