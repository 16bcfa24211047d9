"""Run a model over documents once and keep its activations at a site as shards on disk.

A shard ends with the document in which it became full, and the next one begins with nothing left
over; so what a shard holds depends on its first document alone, and a run that was interrupted goes
on to the very same bytes.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saezoo.capture import CONTEXT, Dropped, capture, capture_pieces, contexts
from saezoo.config import Site, TokenRule
from saezoo.errors import CaptureError, DataError
from saezoo.shards import INDEX, KEYS, ShardIndex, read_index, write_index, write_shard

Dtype = Literal["float16", "bfloat16", "float32"]

SHARD_TOKENS = 131_072
"""A shard is written once it has as many."""


@dataclass(frozen=True)
class Plan:
    """What is to be written, and what is there already."""

    index: ShardIndex
    tokens: int
    """How many are asked for in all."""
    needed: int
    """Bytes on disk that are still to be written, at most."""
    free: int
    """Bytes that the disk has."""


def plan_cache(
    model: nn.Module,
    site: Site,
    rule: TokenRule,
    folder: Path,
    tokens: int,
    *,
    context: int | None = None,
    batch_size: int = 8,
    shard_tokens: int = SHARD_TOKENS,
    dtype: Dtype = "float16",
    facts: dict[str, Any] | None = None,
) -> Plan:
    """What `write_cache` will do, and the disk it needs. Nothing is written.

    facts: what else tells one run from another: model, dataset … Raises CaptureError for a site
    that the model does not have; DataError when the folder holds something else than the beginning
    of this very run, or when the disk has not enough room.
    """
    if tokens < 1:
        raise DataError(f"{tokens} tokens asked for: give at least one")
    device = next(model.parameters()).device
    d = capture(model, site, torch.zeros(1, 1, dtype=torch.int64, device=device)).shape[-1]
    known = {
        "tokens": tokens,
        "context": context or rule.context or CONTEXT,
        "batch_size": batch_size,
        "shard_tokens": shard_tokens,
    }
    index = ShardIndex(site=site, rule=rule, d=d, dtype=dtype, facts=known | (facts or {}))
    if (folder / INDEX).is_file():
        index = _same_run(read_index(folder), index, folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty and holds no activations: choose another folder")
    left = 0 if index.complete else max(tokens - index.tokens, 0)
    needed = left * (d * getattr(torch, dtype).itemsize + 4 * (len(KEYS) - 1)) + (
        2**16 if left else 0
    )
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise DataError(
            f"{folder}: {needed:,} bytes are needed for {left:,} tokens, and the disk has {free:,}"
        )
    return Plan(index, tokens, needed, free)


def write_cache(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    folder: Path,
    plan: Plan,
    *,
    progress: Callable[[int], None] = lambda _tokens: None,
) -> ShardIndex:
    """Write what `plan` says from `documents`, all of them from the first on: those of whole shards
    are passed over. progress gets the number of tokens so far.

    Stops at the tokens asked for, or with the documents. Raises DataError when there were none, or
    for activations that the dtype cannot hold; CaptureError for NaN, or when no token counts.
    """
    index = plan.index
    if index.complete:
        return index
    rest = iter(documents)
    skipped = sum(1 for _ in islice(rest, index.documents))
    if skipped < index.documents:
        raise DataError(f"{folder} is from {index.documents} documents, the source has {skipped}")
    first = list(islice(rest, 1))
    if not first and not index.documents:
        raise DataError("no text, so no activations")
    rest = chain(first, rest)
    # before any shard, so that a folder whose first one was never whole is known for what it is
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, index)
    writer = _Writer(model, tokenizer, index, progress)
    while not index.complete:
        number = len(index.shards)
        tensors, index = writer.next_shard(rest, index, plan.tokens)
        if len(tensors["x"]):
            shard = write_shard(folder, number, tensors)
            index = index.model_copy(update={"shards": (*index.shards, shard)})
        if index.complete and not index.shards:
            raise CaptureError(f"no token counts under the rule: {Dropped(**index.dropped)}")
        write_index(folder, index)
    return index


class _Writer:
    """Makes one shard after another."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, index: ShardIndex, progress: Callable[[int], None]
    ) -> None:
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.site, self.rule, self.facts = index.site, index.rule, index.facts
        self.dtype = getattr(torch, index.dtype)

    def next_shard(
        self, documents: Iterator[str], index: ShardIndex, tokens: int
    ) -> tuple[dict[str, Tensor], ShardIndex]:
        """The tensors of the next shard, and the index with what was read for it: documents,
        dropped tokens, whether that was all.
        """
        parts: list[dict[str, Tensor]] = []
        dropped = Dropped(**index.dropped)
        want = tokens - index.tokens
        goal, kept, read, ended = min(self.facts["shard_tokens"], want), 0, 0, True
        pending: list[tuple[int, list[int]]] = []

        def run(pieces: list[tuple[int, list[int]]]) -> None:
            nonlocal kept
            for batch in capture_pieces(
                self.model,
                self.tokenizer,
                pieces,
                self.site,
                self.rule,
                batch_size=self.facts["batch_size"],
            ):
                dropped.add(batch.dropped)
                kept += len(batch.x)
                found = (batch.x, batch.token_ids, batch.positions, batch.documents)
                parts.append({k: self._stored(k, v) for k, v in zip(KEYS, found, strict=True)})
                self.progress(min(index.tokens + kept, tokens))

        for text in documents:
            number = index.documents + read
            read += 1
            pending += [(number, piece) for piece in self._contexts(text)]
            while len(pending) >= self.facts["batch_size"]:
                run(pending[: self.facts["batch_size"]])
                pending = pending[self.facts["batch_size"] :]
            if kept >= goal:
                ended = False
                break
        run(pending)
        tensors = (
            {key: torch.cat([part[key] for part in parts])[:want] for key in KEYS}
            if parts
            else {"x": torch.empty(0)}
        )
        update = {
            "documents": index.documents + read,
            "dropped": vars(dropped),
            "complete": ended or kept >= want,
        }
        return tensors, index.model_copy(update=update)

    def _contexts(self, text: str) -> list[list[int]]:
        bos = bool(self.rule.prepend_bos)
        pieces = contexts(
            self.tokenizer, [text], self.facts["context"], prepend_bos=bos, smallest=1
        )
        return [piece for _, piece in pieces]

    def _stored(self, key: str, value: Tensor) -> Tensor:
        if key != "x":
            return value.to("cpu", torch.int32)
        stored = value.to("cpu", self.dtype)
        if not bool(stored.isfinite().all()):
            name = str(self.dtype).removeprefix("torch.")
            raise DataError(
                f"activations up to {float(value.abs().max()):.0f} do not fit {name}: write "
                "bfloat16 or float32, or leave outliers out"
            )
        return stored


def _same_run(found: ShardIndex, wanted: ShardIndex, folder: Path) -> ShardIndex:
    """What is there, if it is the beginning of what is wanted. Raises DataError saying what is
    not.
    """
    for key in ("site", "rule", "d", "dtype"):
        if getattr(found, key) != getattr(wanted, key):
            raise _another(folder, key, getattr(found, key), getattr(wanted, key))
    for key in sorted(found.facts.keys() | wanted.facts.keys()):
        if found.facts.get(key) != wanted.facts.get(key):
            raise _another(folder, key, found.facts.get(key), wanted.facts.get(key))
    return found


def _another(folder: Path, key: str, there: object, wanted: object) -> DataError:
    return DataError(
        f"{folder} holds another run: its {key} is {there}, not {wanted}; choose another folder"
    )


def _existing(folder: Path) -> Path:
    """The folder or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
