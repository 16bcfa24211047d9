"""The shuffling buffer: two blocks of activations. Batches are drawn from one in a random order
while the other is filled, a little at each step.

A block is a stretch of the stream and its order a function of the seed and the block's number, so
that what a step sees depends on nothing that happened before, nor on timing. A checkpoint therefore
keeps where the block began instead of the block itself, which may be gigabytes; a run that goes on
fills it again.
"""

import random
from collections.abc import Callable, Iterator

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from saezoo.config import Spec
from saezoo_train.activations import Chunk, Position, Source, to_dtype


class BufferPlace(Spec):
    """Where a buffer is: all that it needs to go on."""

    block: NonNegativeInt = 0
    """Blocks before this one."""
    used: NonNegativeInt = 0
    """Batches of this block that were taken."""
    begins: Position = Position()
    """The chunk with this block's first activation …"""
    skip: NonNegativeInt = 0
    """… and how many of its kept activations belong to the block before."""


class Buffer:
    """Shuffled batches of a source's activations, norm outliers left out."""

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        batches: int,
        tokens: int,
        max_norm: float,
        dtype: torch.dtype,
        seed: int,
        place: BufferPlace | None = None,
        stream: Iterator[Chunk] | None = None,
    ) -> None:
        """batches: of the whole run, so that none is filled that nobody takes. tokens: of a block.
        stream: chunks from the place on, where these were read already.
        """
        self.source, self.batch, self.batches = source, batch, batches
        self.per_block = max(1, -(-min(tokens, batch * batches) // batch))
        self.max_norm, self.dtype, self.seed = max_norm, dtype, seed
        self.place = place or BufferPlace()
        self._stream = stream or source.chunks(self.place.begins)
        self._chunk_at = self._chunk_after = self.place.begins
        self._chunk_used = 0
        self._rest: Tensor | None = None
        self._current = self._next = torch.empty(0)
        self._order = torch.empty(0, dtype=torch.int64)
        self._filled = 0
        self._next_begins, self._next_skip = self.place.begins, self.place.skip

    def begin(self, progress: Callable[[int], None] = lambda _tokens: None) -> None:
        """Fill the first block. progress is told how much of it there is, and may raise to stop."""
        self._advance(self.place.skip)
        size = self._size(self.place.block)
        while self._filled < size:
            self._fill(min(self._filled + self.batch, size), size)
            progress(self._filled)
        self._begin_block(self.place.block, self.place.used)

    def next(self) -> Tensor:
        """The next batch (batch, d), float32, raw units."""
        if self._rest is None:
            self.begin()
        if self.place.used == self._size(self.place.block) // self.batch:
            self._begin_block(self.place.block + 1, 0)
        used = self.place.used
        rows = self._order[used * self.batch : (used + 1) * self.batch]
        x = self._current[rows.to(self._current.device)].float()
        self.place = self.place.model_copy(update={"used": used + 1})
        # the next block is filled as fast as this one is used
        size, following = self._size(self.place.block), self._size(self.place.block + 1)
        self._fill(following * (used + 1) * self.batch // size, following)
        return x

    @property
    def block_tokens(self) -> int:
        """Activations of the block that batches are drawn from."""
        return self._size(self.place.block)

    def _size(self, block: int) -> int:
        """Activations in a block: the last is shorter, and after it there is none."""
        left = self.batches - block * self.per_block
        return max(0, min(self.per_block, left)) * self.batch

    def _begin_block(self, block: int, used: int) -> None:
        """Make what was filled the block to draw from."""
        size = self._size(block)
        self._fill(size, size)
        self.place = BufferPlace(
            block=block, used=used, begins=self._next_begins, skip=self._next_skip
        )
        self._current, self._next = self._next, self._current
        self._filled = 0
        seed = random.Random(f"{self.seed}/{block}").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(size, generator=generator)

    def _fill(self, wanted: int, size: int) -> None:
        """Bring the next block, which is to have `size` activations, to at least `wanted`."""
        while self._filled < wanted:
            assert self._rest is not None
            if self._chunk_used == len(self._rest):
                self._advance(0)
                continue
            if not self._filled:
                self._next_begins, self._next_skip = self._chunk_at, self._chunk_used
            rows = self._rest[self._chunk_used :][: size - self._filled]
            if not len(self._next):
                room = self.per_block * self.batch
                self._next = rows.new_empty(room, rows.shape[1])
            self._next[self._filled : self._filled + len(rows)] = rows
            self._filled += len(rows)
            self._chunk_used += len(rows)

    def _advance(self, skip: int) -> None:
        """Take the next chunk from the stream, and of it what is no outlier."""
        self._chunk_at = self._chunk_after
        chunk = next(self._stream)
        kept = chunk.x[chunk.x.float().norm(dim=-1) <= self.max_norm]
        self._rest = to_dtype(kept, self.dtype, self.source.what)
        self._chunk_after, self._chunk_used = chunk.after, skip
