"""Harvest: run the host over documents once and keep its activations as shards on disk.

A shard is `shard-00007.npy`, (tokens, d) float16; `index.json` says what is whole. Documents are
taken breadth-first (one context of every document, then a second …), so that a harvest stopped
early has still seen all of them.
"""

import hashlib
import json
import lzma
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from saezoo.capture import Dropped, capture_pieces, contexts
from saezoo.config import Site, TokenRule
from saezoo.files import write_file

SHARD = 131_072  # tokens a shard
BLOCK = 512  # contexts that are sorted by length together


def read_documents(path: Path) -> Iterator[str]:
    """Texts of a .jsonl or .jsonl.xz file, one object with a `text` a line."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def held_out(text: str, one_in: int = 20) -> bool:
    """Whether a document is for measuring only. Decided by its content, so that copies of it go the
    same way.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % one_in == 0


def breadth_first(
    tokenizer: Any, texts: list[str], length: int, *, smallest: int, seed: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """Contexts in a random order that takes one of every document before a second of any.

    Neighbours in the stream have like lengths (sorted within blocks), so that little padding is
    computed.
    """
    shuffle = random.Random(seed).shuffle
    by_document: dict[int, list[list[int]]] = {}
    for number, piece in contexts(tokenizer, texts, length, smallest=smallest):
        by_document.setdefault(number, []).append(piece)
    for pieces in by_document.values():
        shuffle(pieces)
    while by_document:
        order = [(number, pieces.pop()) for number, pieces in by_document.items()]
        shuffle(order)
        for start in range(0, len(order), BLOCK):
            yield from sorted(order[start : start + BLOCK], key=lambda item: len(item[1]))
        by_document = {number: pieces for number, pieces in by_document.items() if pieces}


def harvest(
    model: nn.Module,
    tokenizer: Any,
    texts: list[str],
    site: Site,
    rule: TokenRule,
    out: Path,
    *,
    max_tokens: int,
    batch_size: int = 8,
    say: Callable[[str], None] = lambda _line: None,
) -> None:
    """Write up to `max_tokens` activations at `site` as shards under `out`. Stopped early, whole
    shards remain.
    """
    length = rule.context or 256
    dropped, written, pending, shards = Dropped(), 0, [], 0
    started = time.monotonic()
    pieces = breadth_first(tokenizer, texts, length, smallest=min(16, length))
    for batch in capture_pieces(model, tokenizer, pieces, site, rule, batch_size=batch_size):
        dropped.add(batch.dropped)
        pending.append(batch.x.to(torch.float16).numpy())
        if sum(len(part) for part in pending) < min(SHARD, max_tokens - written):
            continue
        block = np.concatenate(pending)[: max_tokens - written]
        with write_file(out / f"shard-{shards:05d}.npy") as work, work.open("wb") as file:
            np.save(file, block)
        shards, written, pending = shards + 1, written + len(block), []
        with write_file(out / "index.json") as work:
            work.write_text(
                json.dumps({"shards": shards, "tokens": written, "dropped": asdict(dropped)})
            )
        say(f"{written:,} tokens in {time.monotonic() - started:.0f} s")
        if written >= max_tokens:
            return
