"""Streams of activations, endless and in an order that the recipe alone decides: from a language
model that reads text, or from shards on disk.

Both give one Chunk after another and say where the next begins, so that a run goes on anywhere.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from saezoo.capture import ActivationBatch, capture_pieces
from saezoo.config import Site, Spec
from saezoo.errors import DataError
from saezoo.shards import ShardIndex, read_index, read_shard
from saezoo_train.config import Recipe
from saezoo_train.data import Words, breadth_first, documents, held_out, windows

SLICE = 4096
"""Neighbouring rows of a shard that are read together."""


class Position(Spec):
    """Where a chunk of a stream begins."""

    epoch: NonNegativeInt = 0
    """Passes before this one."""
    document: NonNegativeInt = 0
    """Documents of this pass before its window, those held out too."""
    chunk: NonNegativeInt = 0
    """Chunks of this window (or, from shards, of this pass) before it."""
    tokens: NonNegativeInt = 0
    """Activations of this pass before it."""


@dataclass(frozen=True)
class Chunk:
    """Neighbouring activations of a stream."""

    x: Tensor
    """(tokens, d), raw, norm outliers among them."""
    after: Position
    """Where the next chunk begins."""
    documents: int = 0
    """Documents of this pass that were read by now."""
    facts: dict[str, Tensor] = field(default_factory=dict)
    """token_ids, positions and documents of these tokens, (tokens,) int32 each, where text was
    read.
    """


class Source(Protocol):
    """A stream of activations."""

    what: str
    """In words, for errors."""

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """Chunks from there on, pass after pass. Each is a function of the recipe and where it
        begins.
        """
        ...


class ModelSource:
    """Activations of a language model that reads the recipe's documents."""

    def __init__(self, recipe: Recipe, site: Site, model: nn.Module, tokenizer: Any) -> None:
        self.recipe, self.site, self.model, self.tokenizer = recipe, site, model, tokenizer
        self.what = recipe.data.dataset

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """See Source. A chunk is what goes through the model together."""
        for epoch in itertools.count(start.epoch):
            begin = start if epoch == start.epoch else Position(epoch=epoch)
            tokens = begin.tokens
            for chunk in self.one_pass(begin):
                tokens = chunk.after.tokens
                yield chunk
            refuse_too_few(self.what, tokens, self.recipe.batch)

    def one_pass(self, start: Position) -> Iterator[Chunk]:
        """The rest of a pass: the windows of documents, and each one's contexts."""
        data = self.recipe.data
        limit = data.tokens or 2**62
        first, skip, tokens = start.document, start.chunk, start.tokens
        for window in windows(itertools.islice(documents(data), first, None)):
            if tokens >= limit:
                return
            end = first + len(window)
            batches = self._window(window, start.epoch, first, skip)
            for number, batch in enumerate(batches, skip + 1):
                x = batch.x[: limit - tokens]
                tokens += len(x)
                after = Position(epoch=start.epoch, document=first, chunk=number, tokens=tokens)
                facts = {
                    "token_ids": batch.token_ids,
                    "positions": batch.positions,
                    "documents": batch.documents + first,
                }
                short = {key: value[: len(x)].int() for key, value in facts.items()}
                yield Chunk(x, after, end, short)
                if tokens >= limit:
                    return
            first, skip = end, 0

    def _window(
        self, window: list[Any], epoch: int, first: int, skip: int
    ) -> Iterator[ActivationBatch]:
        """Activations of a window's contexts, `batch_contexts` at a time, the first `skip` times
        left out.
        """
        recipe = self.recipe
        one_in, size = recipe.data.held_out_one_in, recipe.data.batch_contexts
        # what is measured on elsewhere needs nothing held out here
        kept = [item for item in window if recipe.data.measure_on or not held_out(item, one_in)]
        words = Words(self.tokenizer, vocabulary(self.model))
        pieces = breadth_first(words, kept, recipe.tokens, f"{recipe.seed}/{epoch}/{first}")
        todo = itertools.islice(pieces, skip * size, None)
        yield from capture_pieces(
            self.model, self.tokenizer, todo, self.site, recipe.tokens, batch_size=size
        )


class ShardSource:
    """Activations from shards on disk, some thousand neighbours at a time, in an order that mixes
    all shards.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, hold_out: bool) -> None:
        """hold_out: leave the documents out that are to be measured on."""
        self.recipe, self.folder = recipe, folder
        self.index: ShardIndex = read_index(folder)
        self.what = str(folder)
        self._one_in = recipe.data.held_out_one_in if hold_out else None

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """See Source."""
        slices = self._slices()
        for epoch in itertools.count(start.epoch):
            order = random.Random(f"{self.recipe.seed}/{epoch}").sample(slices, len(slices))
            begin, tokens = (start.chunk, start.tokens) if epoch == start.epoch else (0, 0)
            for number in range(begin, len(order)):
                x = self._rows(*order[number])
                tokens += len(x)
                after = Position(epoch=epoch, chunk=number + 1, tokens=tokens)
                yield Chunk(x, after)
            refuse_too_few(self.what, tokens, self.recipe.batch)

    def held_out(self) -> Iterator[Tensor]:
        """The activations that are left out of training, a slice at a time."""
        for number, row in self._slices():
            tensors = read_shard(self.folder, self.index, number)
            rows = slice(row, row + SLICE)
            yield tensors["x"][rows][self._is_out(tensors["documents"][rows])]

    def _slices(self) -> list[tuple[int, int]]:
        """(shard, first row) of every slice, up to the tokens of a pass."""
        left = self.recipe.data.tokens or self.index.tokens
        found = []
        for number, shard in enumerate(self.index.shards):
            take = min(shard.tokens, left)
            found += [(number, row) for row in range(0, take, SLICE)]
            left -= take
        return found

    def _rows(self, number: int, row: int) -> Tensor:
        tensors = read_shard(self.folder, self.index, number)
        rows = slice(row, row + SLICE)
        x = tensors["x"][rows]
        return x if self._one_in is None else x[~self._is_out(tensors["documents"][rows])]

    def _is_out(self, numbers: Tensor) -> Tensor:
        """Which rows are of held-out documents: these have no text here, so that their number
        decides.
        """
        mixed = (numbers.long() * 2_654_435_761) % 2**32 // 2**8
        return mixed % (self._one_in or 20) == 0


def vocabulary(model: nn.Module) -> int:
    """How many tokens a language model knows."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return int(getattr(embeddings, "num_embeddings", 2**31))


def refuse_too_few(what: str, tokens: int, batch: int) -> None:
    """Raises DataError when a whole pass gives less than one batch."""
    if tokens < batch:
        raise DataError(
            f"{what}: gave {tokens:,} activations, and a batch is {batch:,}: "
            "give more text, or a smaller batch"
        )


def to_dtype(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """x in the buffer's dtype. Raises DataError when a value has no place in it."""
    small = x.to(dtype)
    if not bool(small.isfinite().all()):
        if not bool(x.isfinite().all()):
            raise DataError(
                f"{what}: activations that are not finite; the language model is broken"
            )
        raise DataError(
            f"{what}: an activation of {float(x.abs().max()):.0f} does not fit {dtype}: "
            "set buffer.dtype=float32"
        )
    return small
