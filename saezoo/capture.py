"""Activations at one site of a HuggingFace model, and the rule for which tokens count.

Works on any torch module that takes `input_ids` and `attention_mask`; transformers is not imported
here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.config import Site, TokenRule
from saezoo.errors import CaptureError


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


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, with or without the wrapper's own prefix. Raises CaptureError,
    naming the nearest.
    """
    modules = dict(model.named_modules())
    for candidate in (
        path,
        f"model.{path}",
        f"transformer.{path}",
        f"gpt_neox.{path}",
        # Gemma 3 from 4B on is a model of text and images, its layers one step further in
        path.replace("model.", "model.language_model.", 1),
        path.partition(".")[2],
    ):
        if candidate and candidate in modules:
            return modules[candidate]
    import difflib

    close = difflib.get_close_matches(path, modules, n=3, cutoff=0.3)
    raise CaptureError(
        f"{type(model).__name__} has no module {path!r}. Closest: {', '.join(close) or 'none'}"
    )


@contextmanager
def hook_site(
    model: nn.Module, site: Site, see: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """Show each tensor that passes the site to `see`; what it returns (if not None) goes on in its
    place.

    Raises CaptureError if the site's module is not named, not found, or never ran inside the
    `with`.
    """
    if site.module is None:
        raise CaptureError(
            "the site names no module: give Site(module='model.layers.15', side='output')"
        )
    fired = 0

    def swap(value: object) -> object:
        nonlocal fired
        fired += 1
        tensor = value[0] if isinstance(value, tuple) else value
        if not isinstance(tensor, Tensor):
            raise CaptureError(
                f"{site.module}: the {site.side} is {type(tensor).__name__}, not a tensor"
            )
        new = see(tensor)
        if new is None:
            return None
        return (new, *value[1:]) if isinstance(value, tuple) else new

    def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if args:
            new = swap(args)
            return None if new is None else (new, kwargs)
        new = swap(kwargs["hidden_states"]) if "hidden_states" in kwargs else swap(None)
        return None if new is None else (args, kwargs | {"hidden_states": new})

    module = find_module(model, site.module)
    if site.side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda _module, _args, output: swap(output))
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise CaptureError(
            f"{site.module} never ran in the forward pass, so nothing was captured or replaced"
        )


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
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
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
