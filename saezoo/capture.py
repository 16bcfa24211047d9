"""Activations at one site of a language model, and the rule for which tokens count.

Works on HuggingFace and TransformerLens models; neither package is imported here.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.config import Site, TokenRule
from saezoo.hooks import hook_site as hook_site
from saezoo.sites import find_module as find_module
from saezoo.sites import run_model


class _Stop(BaseException):
    """Ends a forward pass once the site was seen. Not an Exception, so that no model code swallows
    it.
    """


@dataclass
class Dropped:
    """How many tokens the rule left out, by the first reason that held."""

    seen: int = 0
    kept: int = 0
    padding: int = 0
    first: int = 0
    special: int = 0
    outlier: int = 0

    def add(self, other: "Dropped") -> None:
        """Sum counts in place."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class ActivationBatch:
    """Kept tokens of some contexts, flat, in reading order."""

    x: Tensor
    """(tokens, d), float32 unless the model computes in another dtype."""
    token_ids: Tensor
    """(tokens,) int64."""
    positions: Tensor
    """(tokens,) position within the context, int64."""
    documents: Tensor
    """(tokens,) which text of the input each token is from, int64."""
    dropped: Dropped = field(default_factory=Dropped)


def capture(
    model: nn.Module, site: Site, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """The activations (batch, positions, d) at `site`, without gradient. The layers after it are
    not run.
    """
    caught: list[Tensor] = []

    def see(tensor: Tensor) -> None:
        caught.append(tensor.detach())
        raise _Stop

    with torch.no_grad(), hook_site(model, site, see), suppress(_Stop):
        run_model(model, input_ids, attention_mask)
    return caught[0]


def keep_tokens(
    rule: TokenRule,
    input_ids: Tensor,
    attention_mask: Tensor,
    special_ids: Tensor,
    x: Tensor | None = None,
) -> tuple[Tensor, Dropped]:
    """Which tokens (batch, positions) count under `rule`, as a bool mask, and how many were left
    out and why.

    x (batch, positions, d): raw activations; without them the rule on norms is not applied.
    """
    real = attention_mask.bool()
    place = (
        attention_mask.long().cumsum(-1) - 1
    )  # position among the real tokens, so that left padding does no harm
    first = real & (place < (rule.skip_first or 0))
    left = real & ~first
    special = (
        left & torch.isin(input_ids, special_ids) if rule.skip_special else torch.zeros_like(left)
    )
    left &= ~special
    outlier = torch.zeros_like(left)
    if x is not None and rule.max_norm is not None:
        outlier = left & (x.float().norm(dim=-1) > rule.max_norm)
        left &= ~outlier
    counts = [int(mask.sum()) for mask in (left, ~real, first, special, outlier)]
    return left, Dropped(input_ids.numel(), *counts)


def contexts(
    tokenizer: Any,
    texts: Iterable[str],
    length: int,
    *,
    prepend_bos: bool = False,
    smallest: int = 2,
) -> Iterator[tuple[int, list[int]]]:
    """Cut texts into contexts of at most `length` tokens: (which text, token ids). Pieces under
    `smallest` are left out.
    """
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
        step = length - len(bos)
        for start in range(0, len(ids), step):
            piece = bos + ids[start : start + step]
            if len(piece) >= smallest:
                yield number, piece


def padded(pieces: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-pad token lists: input_ids and attention_mask, both (batch, longest) int64."""
    longest = max(len(piece) for piece in pieces)
    ids = torch.full((len(pieces), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = torch.tensor(piece)
        mask[row, : len(piece)] = 1
    return ids, mask


def capture_pieces(
    model: nn.Module,
    tokenizer: Any,
    pieces: Iterable[tuple[int, list[int]]],
    site: Site,
    rule: TokenRule,
    *,
    batch_size: int = 8,
) -> Iterator[ActivationBatch]:
    """Stream the kept tokens of `pieces` (what `contexts` yields), `batch_size` contexts at a
    time.
    """
    special_ids = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    device = next(model.parameters()).device
    pending: list[tuple[int, list[int]]] = []

    def flush() -> ActivationBatch:
        ids, mask = padded([piece for _, piece in pending], pad_id)
        x = capture(model, site, ids.to(device), mask.to(device))
        keep, dropped = keep_tokens(
            rule, ids.to(x.device), mask.to(x.device), special_ids.to(x.device), x
        )
        places = torch.arange(ids.shape[1]).expand_as(ids).to(x.device)
        documents = (
            torch.tensor([number for number, _ in pending]).unsqueeze(1).expand_as(ids).to(x.device)
        )
        return ActivationBatch(
            x[keep], ids.to(x.device)[keep], places[keep], documents[keep], dropped
        )

    for item in pieces:
        pending.append(item)
        if len(pending) == batch_size:
            yield flush()
            pending = []
    if pending:
        yield flush()
