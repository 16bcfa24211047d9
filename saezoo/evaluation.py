"""Measure SAEs in the models they were made for, by the definitions of `saezoo.metrics`: from texts
to numbers. The forward passes are those of `saezoo.passes`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.capture import Dropped, contexts, padded
from saezoo.config import TokenRule
from saezoo.errors import CaptureError, DataError
from saezoo.guard import Guard, check_host
from saezoo.metrics import Metrics, density_histogram
from saezoo.passes import Part, Passes, site_of
from saezoo.sae import SAE

CONTEXT = 512
"""Tokens a context, for an SAE that does not say on how many it was trained."""
BATCH_TOKENS = 1024
"""Tokens that go through the model at once, padding counted."""
OWN_TEXT = "the text that ships with saezoo"

Progress = Callable[[int, int], None]
"""Told (done, total): how many tokens went through the model, counted once for the batch's own
passes and once for the ablation by the mean.
"""


def silent(_done: int, _total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one SAE, and what they sum up."""

    metrics: Metrics
    text: str
    """On which text, in words."""
    density: Tensor
    """(d_sae,) share of counted tokens on which each feature fires."""
    max_activation: Tensor
    """(d_sae,)"""
    l0: Tensor
    """(tokens,) features that are on at each counted token."""
    norms: Tensor
    """(tokens, 2) of y and ŷ."""

    def to_json(self) -> dict[str, Any]:
        """The metrics, the text, and short forms of the rest."""
        quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
        l0 = torch.quantile(self.l0.double(), quantiles).tolist() if len(self.l0) < 2**24 else None
        return self.metrics.to_json() | {
            "text": self.text,
            "density_histogram": density_histogram(self.density),
            "l0_quantiles": {"of": quantiles.tolist(), "are": l0},
        }


def own_text() -> str:
    """A text that ships with saezoo, written for it, so that nothing was trained on it."""
    return (Path(__file__).parent / "texts" / "eval.txt").read_text(encoding="utf-8")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    texts: Iterable[str],
    *,
    tokens: int | None = None,
    text: str = "",
    losses: bool | None = None,
    pca: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    guard: Guard = "error",
    progress: Progress = silent,
) -> Evaluation:
    """Measure one SAE on texts, in contexts of the length, and with the BOS, that its token rule
    says.

    tokens: contexts are taken until they hold so many. text: what the texts are, in words, to stand
    beside the numbers. losses: the second group of metrics; None: where the model is one that
    generates. pca: too, the FVU of as many principal components as there are features on.
    guard: see `saezoo.guard.check_host`.

    Raises DataError for texts without a context, CaptureError when the site is not found, has
    another width or carries NaN, or when the token rule leaves no token.
    """
    return evaluate_many(
        model,
        tokenizer,
        {"": sae},
        texts,
        tokens=tokens,
        text=text,
        losses=losses,
        pca=pca,
        batch_tokens=batch_tokens,
        guard=guard,
        progress=progress,
    )[""]


def evaluate_many(
    model: nn.Module,
    tokenizer: Any,
    saes: Mapping[str, SAE],
    texts: Iterable[str],
    *,
    tokens: int | None = None,
    text: str = "",
    losses: bool | None = None,
    pca: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    guard: Guard = "error",
    progress: Progress = silent,
) -> dict[str, Evaluation]:
    """`evaluate` for several SAEs of one model. Those that want the same contexts share each
    batch's clean forward pass.
    """
    for sae in saes.values():
        site_of(sae)
        check_host(model, sae.cfg, guard=guard, tokenizer=tokenizer)
    wanted: dict[tuple[bool, int], dict[str, SAE]] = {}
    for name, sae in saes.items():
        rule = sae.cfg.tokens or TokenRule()
        key = (bool(rule.prepend_bos), context_length(model, rule))
        wanted.setdefault(key, {})[name] = sae
    if len(wanted) > 1 and tokens is None:
        texts = list(texts)
    elif len(wanted) > 1:
        texts = _enough(texts, tokenizer, tokens or 0)
    found: dict[str, Evaluation] = {}
    for (bos, length), group in wanted.items():
        pieces = take_pieces(tokenizer, texts, length, prepend_bos=bos, tokens=tokens)
        found |= evaluate_pieces(
            model,
            group,
            pieces,
            special_ids=tokenizer.all_special_ids,
            text=text,
            losses=losses,
            pca=pca,
            batch_tokens=batch_tokens,
            progress=progress,
        )
    return {name: found[name] for name in saes}


def context_length(model: nn.Module, rule: TokenRule) -> int:
    """Tokens a context: those of the rule, never more than the model takes."""
    config = getattr(model, "config", None) or getattr(model, "cfg", None)
    config = getattr(config, "text_config", None) or config
    most = next(
        (
            value
            for name in ("max_position_embeddings", "n_positions", "n_ctx")
            if isinstance(value := getattr(config, name, None), int) and value > 1
        ),
        CONTEXT,
    )
    return min(rule.context or CONTEXT, most)


def take_pieces(
    tokenizer: Any,
    texts: Iterable[str],
    length: int,
    *,
    prepend_bos: bool = False,
    tokens: int | None = None,
) -> list[list[int]]:
    """Contexts of `length` tokens, in the order of the texts, until they hold `tokens` together.

    Raises DataError when there is none.
    """
    pieces: list[list[int]] = []
    left = tokens if tokens is not None else -1
    for _, piece in contexts(tokenizer, texts, length, prepend_bos=prepend_bos):
        pieces.append(piece if left < 0 else piece[:left])
        left = left - len(pieces[-1]) if left >= 0 else left
        if 0 <= left < 2:
            break
    if not pieces or len(pieces[0]) < 2:
        raise DataError("the text has no context of at least two tokens, so nothing is measured")
    return pieces


def _enough(texts: Iterable[str], tokenizer: Any, tokens: int) -> list[str]:
    """The first texts that hold `tokens`, whatever the length of a context."""
    taken, have = [], 0
    for text in texts:
        taken.append(text)
        # half of each text, because a remainder of one token is left out of every text
        have += len(tokenizer(text, add_special_tokens=False)["input_ids"]) // 2
        if have >= tokens:
            break
    return taken


@torch.no_grad()
def evaluate_pieces(
    model: nn.Module,
    saes: Mapping[str, SAE],
    pieces: Sequence[list[int]],
    *,
    special_ids: Iterable[int],
    text: str = "",
    losses: bool | None = None,
    pca: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> dict[str, Evaluation]:
    """Measure SAEs on token lists, each one context. The rest as `evaluate` has it."""
    device = next(model.parameters()).device
    special = torch.tensor(sorted(set(special_ids)), dtype=torch.int64, device=device)
    parts = {name: Part(model, sae, pca=pca) for name, sae in saes.items()}
    losses = generates(model) if losses is None else losses
    passes = Passes(model, list(parts.values()), special, losses=losses)
    done, total = 0, sum(map(len, pieces)) * (1 + losses)
    for batch in batches(pieces, batch_tokens):
        ids, mask = (value.to(device) for value in padded(batch, 0))
        passes.add(ids, mask)
        done += sum(map(len, batch))
        progress(done, total)
    for name, part in parts.items():
        if not part.sums.tokens:
            raise CaptureError(_all_left_out(name, part.dropped))
    for tokens in passes.ablate_by_mean() if losses else ():
        done += tokens
        progress(done, total)
    return {
        name: _result(part, passes.losses_of(part), len(pieces), text)
        for name, part in parts.items()
    }


def generates(model: nn.Module) -> bool:
    """Whether next-token losses mean something: a causal language model."""
    tells = getattr(model, "can_generate", None)
    return bool(tells()) if callable(tells) else hasattr(model, "generate")


def batches(pieces: Sequence[list[int]], tokens: int) -> Iterator[list[list[int]]]:
    """Contexts of like length together, the longest first, `tokens` with padding at a time."""
    batch: list[list[int]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _all_left_out(name: str, dropped: Dropped) -> str:
    said = (
        f"{dropped.first} as first of their context, {dropped.special} as special, "
        f"{dropped.outlier} for their norm"
    )
    who = f"{name}: " if name else ""
    return (
        f"{who}no token counts: the SAE's token rule leaves out all "
        f"{dropped.seen - dropped.padding} ({said})"
    )


def _result(part: Part, losses: dict[str, Any], contexts_run: int, text: str) -> Evaluation:
    """Everything put together."""
    sums, dropped = part.sums, part.dropped
    pca_k = (part.sae.cfg.k or max(round(sums.l0), 1)) if part.pca else None
    metrics = Metrics(
        fvu=_known(sums.fvu),
        explained_variance=_known(1 - sums.fvu),
        l0=sums.l0,
        l1=sums.l1,
        cosine=sums.cosine,
        relative_reconstruction_bias=_known(sums.bias),
        dead_fraction=sums.dead_fraction,
        dense_fraction=sums.dense_fraction,
        tokens=sums.tokens,
        contexts=contexts_run,
        outlier_share=dropped.outlier / max(dropped.outlier + dropped.kept, 1),
        pca_k=pca_k,
        pca_fvu=sums.pca_fvu(pca_k) if pca_k else None,
    )
    metrics = replace(metrics, **losses)
    norms = torch.cat(sums.norms)
    return Evaluation(metrics, text, sums.density, sums.strongest, torch.cat(sums.counts), norms)


def _known(value: float) -> float | None:
    return value if value == value else None
