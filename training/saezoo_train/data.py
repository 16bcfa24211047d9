"""The documents of a recipe: which kind of data it names, which of them are held out, and their
contexts in the order of training.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saezoo.capture import contexts
from saezoo.config import TokenRule
from saezoo.documents import read_documents
from saezoo.errors import DataError
from saezoo.shards import INDEX as SHARD_INDEX
from saezoo_train.config import STDLIB, Data
from saezoo_train.stdlib_text import stdlib_documents, stdlib_version
from saezoo_train.tokens import INDEX as TOKEN_INDEX
from saezoo_train.tokens import token_documents

Document = str | list[int]
"""Text, or token ids."""

WINDOW_DOCUMENTS, WINDOW_SIZE = 2048, 16_000_000
"""Documents whose contexts are mixed, and characters or tokens of them at most: bounds memory."""
LONGEST_TEXT, LONGEST_TOKENS = 20_000, 4096
"""A longer document, such as a book in one file, is taken as several: characters, token ids."""
BLOCK = 512
"""Contexts that are sorted by length together, so that little padding is computed."""


def kind_of(data: Data) -> Literal["stdlib", "activations", "tokens", "text"]:
    """What `data.dataset` names, by what lies there."""
    folder = Path(data.dataset)
    if data.dataset == STDLIB:
        return "stdlib"
    if (folder / SHARD_INDEX).is_file():
        return "activations"
    return "tokens" if (folder / TOKEN_INDEX).is_file() else "text"


def documents(data: Data, dataset: str | None = None) -> Iterator[Document]:
    """All documents of `data.dataset` (or of another dataset with its options), in order, long ones
    in parts.
    """
    name = dataset or data.dataset
    kind = kind_of(data.model_copy(update={"dataset": name}))
    found: Iterator[Any]
    if kind == "stdlib":
        found = stdlib_documents()
    elif kind == "tokens":
        found = token_documents(Path(name))
    elif kind == "activations":
        raise DataError(f"{name}: holds activations, not text")
    else:
        found = read_documents(name, column=data.column, split=data.split, subset=data.subset)
    for document in found:
        yield from _parts(document)


def _parts(document: Document) -> Iterator[Document]:
    """A document, or pieces of a long one: text is cut at the end of a line where there is one."""
    if isinstance(document, list):
        for start in range(0, len(document), LONGEST_TOKENS):
            yield document[start : start + LONGEST_TOKENS]
        return
    start = 0
    while len(document) - start > LONGEST_TEXT:
        end = document.rfind("\n", start + LONGEST_TEXT // 2, start + LONGEST_TEXT) + 1
        end = end or start + LONGEST_TEXT
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:]


def fingerprint(data: Data) -> dict[str, Any]:
    """What tells that local data is still what it was: names and sizes of files. Of a Hub dataset
    nothing is known.
    """
    path = Path(data.dataset)
    if data.dataset == STDLIB:
        return {"python": stdlib_version()}
    if not path.exists():
        return {}
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    sizes = [(item.name, item.stat().st_size) for item in files]
    names = hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]
    return {"files": len(files), "bytes": sum(size for _, size in sizes), "names": names}


def held_out(document: Document, one_in: int = 20) -> bool:
    """Whether a document is for measuring only. Decided by its content, so that copies of it go the
    same way.
    """
    content = (
        document.encode() if isinstance(document, str) else np.asarray(document, "<i8").tobytes()
    )
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % one_in == 0


def held_out_documents(data: Data) -> list[Document]:
    """The documents to measure on, at most `data.held_out_documents`: all of `measure_on`, or the
    first of the data that are held out.
    """
    found: list[Document] = []
    for document in documents(data, data.measure_on):
        if data.measure_on or held_out(document, data.held_out_one_in):
            found.append(document)
            if len(found) == data.held_out_documents:
                break
    return found


class Words:
    """A tokenizer that takes documents of both kinds. Raises DataError for ids that the model does
    not have.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.bos_token_id = tokenizer.bos_token_id

    def __call__(self, document: Document, add_special_tokens: bool = False) -> dict[str, list]:
        """`input_ids` of a document, as tokenizers give them."""
        if isinstance(document, str):
            return {"input_ids": self._ids(document, add_special_tokens)}
        if max(document) >= self.vocabulary or min(document) < 0:
            raise DataError(
                f"a token id of {max(document)}, but the model has {self.vocabulary} tokens: these "
                "shards are of another tokenizer"
            )
        return {"input_ids": document}

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # a document is longer than the model's context on purpose: it is cut here, and the
        # tokenizer's advice on that is for others
        quiet = {"verbose": False} if hasattr(self.tokenizer, "is_fast") else {}
        return self.tokenizer(text, add_special_tokens=add_special_tokens, **quiet)["input_ids"]


def windows(items: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents that fit in memory: what decides is their number and content alone."""
    window: list[Document] = []
    size = 0
    for document in items:
        window.append(document)
        size += len(document)
        if len(window) == WINDOW_DOCUMENTS or size >= WINDOW_SIZE:
            yield window
            window, size = [], 0
    if window:
        yield window


def breadth_first(
    tokenizer: Any, window: Iterable[Document], rule: TokenRule, seed: str
) -> Iterator[tuple[int, list[int]]]:
    """Contexts of a window in a random order that takes one of every document before a second of
    any. Neighbours have like lengths.
    """
    length = rule.context or 256
    smallest = max(min(16, length), (rule.skip_first or 0) + 1)
    shuffle = random.Random(seed).shuffle
    by_document: dict[int, list[list[int]]] = {}
    texts: Any = window  # `contexts` only hands them to the tokenizer
    pieces = contexts(
        tokenizer, texts, length, prepend_bos=bool(rule.prepend_bos), smallest=smallest
    )
    for number, piece in pieces:
        by_document.setdefault(number, []).append(piece)
    for of_one in by_document.values():
        shuffle(of_one)
    while by_document:
        order = [(number, of_one.pop()) for number, of_one in by_document.items()]
        shuffle(order)
        for start in range(0, len(order), BLOCK):
            yield from sorted(order[start : start + BLOCK], key=lambda item: len(item[1]))
        by_document = {number: of_one for number, of_one in by_document.items() if of_one}
