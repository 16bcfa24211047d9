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
from saezoo.errors import CaptureError, DataError
from saezoo.hooks import hook_site as hook_site
from saezoo.sae import SAE
from saezoo.sites import find_module as find_module
from saezoo.sites import find_place, run_model

CONTEXT = 256
"""Tokens a context where neither caller nor rule says it."""

DEFAULT_RULE = TokenRule(skip_first=1)
"""Which tokens count where nobody says it."""


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

    def __str__(self) -> str:
        reasons = {
            "at the start of a context": self.first,
            "special": self.special,
            "of outlying norm": self.outlier,
        }
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        whole = self.seen - self.padding
        return f"{self.kept:,} of {whole:,} tokens kept" + (f"; left out: {why}" if why else "")


@dataclass
class ActivationBatch:
    """Kept tokens of some contexts, flat, in reading order."""

    x: Tensor
    """(tokens, d), in the model's dtype."""
    token_ids: Tensor
    """(tokens,) int64."""
    positions: Tensor
    """(tokens,) position within the context, int64."""
    documents: Tensor
    """(tokens,) which text of the input each token is from, int64."""
    dropped: Dropped = field(default_factory=Dropped)


class Activations:
    """A stream of ActivationBatch, read once, and what it left out so far."""

    def __init__(self, site: Site, rule: TokenRule, batches: Iterator[ActivationBatch]) -> None:
        self.site, self.rule = site, rule
        self.dropped = Dropped()
        """Of all batches that were read; `print` says it in words."""
        self._batches = batches

    def __iter__(self) -> Iterator[ActivationBatch]:
        for batch in self._batches:
            self.dropped.add(batch.dropped)
            if len(batch.x):
                yield batch
        if not self.dropped.seen:
            raise DataError("no text, so no activations")
        if not self.dropped.kept:
            raise CaptureError(f"no token counts under the rule: {self.dropped}")


def activations(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Iterable[str],
    site: Site | SAE,
    *,
    rule: TokenRule | None = None,
    context: int | None = None,
    batch_size: int = 8,
) -> Activations:
    """Stream the activations of texts at a site, as batches of flat tokens (tokens, d) with their
    ids, their positions and which text they are from.

    site: a Site, or an SAE, whose site, token rule and width are then those to go by. rule: which
    tokens count; of a bare Site, all but position 0, whose norm in most models dwarfs the others.
    context: tokens a context; None: the rule's, else 256. batch_size: contexts at a time.

    `.dropped` of what is returned says how many tokens were left out, and why. Raises CaptureError
    for a site that the model does not have, another width, NaN, or when no token counts; DataError
    when there is no text.
    """
    sae = None if isinstance(site, Site) else site
    if sae is not None:
        if sae.cfg.site is None:
            raise CaptureError("the SAE does not say which site it reads: give a Site")
        site, rule = sae.cfg.site, rule or sae.cfg.tokens
    assert isinstance(site, Site)
    rule = rule or DEFAULT_RULE
    find_place(model, site)  # now, and not when the first batch is asked for
    pieces = contexts(
        tokenizer,
        [texts] if isinstance(texts, str) else texts,
        context or rule.context or CONTEXT,
        prepend_bos=bool(rule.prepend_bos),
        smallest=1,
    )
    batches = capture_pieces(model, tokenizer, pieces, site, rule, batch_size=batch_size)
    return Activations(site, rule, batches if sae is None else _of_width(batches, site, sae.d_in))


def _of_width(
    batches: Iterator[ActivationBatch], site: Site, d_in: int
) -> Iterator[ActivationBatch]:
    for batch in batches:
        if batch.x.shape[-1] != d_in:
            raise CaptureError(
                f"{site.module or site.hook_name or site.point} is {batch.x.shape[-1]} wide, but "
                f"the SAE reads {d_in}: another model, or another site"
            )
        yield batch


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
        if not bool(x[keep].isfinite().all()):
            where = site.module or site.hook_name or site.point
            raise CaptureError(f"{where} carries NaN or infinity, in tokens that count")
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
