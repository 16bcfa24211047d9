"""Am I using this SAE right? Its L0 and FVU on a few thousand tokens against the declared ones; and
where they differ, which of the usual mistakes explains it.

Another text moves both numbers, so that they count as those declared when L0 is within a factor of
1.5, and FVU between declared / 2.5 and the larger of declared x 1.6 and declared + 0.1. An SAE that
declares neither is a miss when it explains less than a fifth of the variance.

A suspect explains a miss when the numbers with its one change are as declared; of several, the one
whose numbers are nearest. That is evidence, no proof.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.bench import Bench
from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import CaptureError
from saezoo.evaluation import Progress, silent
from saezoo.metrics import in_chunks
from saezoo.passes import site_of
from saezoo.sae import CHOOSING, SAE
from saezoo.suspects import (
    Use,
    as_stated,
    other_arithmetic,
    other_sites,
    other_tokens,
    scaled,
    with_threshold,
    without_outliers,
)

FEW = 1024
"""Tokens on which each suspect is tried first; the best are then measured on all."""
FINALISTS = 4
UNDECLARED = 0.8
"""The FVU above which an SAE that declares nothing is a miss."""


@dataclass(frozen=True)
class Declared:
    """What the SAE's folder or the registry says of it."""

    l0: float | None
    fvu: float | None

    def miss(self, l0: float, fvu: float) -> float:
        """How far numbers are from these: up to 1 they are as declared."""
        if not math.isfinite(fvu) or l0 <= 0:
            return math.inf
        if self.fvu is None and self.l0 is None:
            return fvu / UNDECLARED
        misses = [0.0]
        if self.l0 is not None:
            misses.append(abs(math.log(l0 / max(self.l0, 1e-9))) / math.log(1.5))
        if self.fvu is not None:
            # under a hundredth, how far under says nothing
            stated = max(self.fvu, 0.01)
            high = max(1.6 * stated, stated + 0.1)
            over = math.log(max(fvu, 0.01) / stated)
            misses.append(over / math.log(high / stated) if over > 0 else -over / math.log(2.5))
        return max(misses)


@dataclass(frozen=True)
class Trial:
    """What was measured with one change."""

    what: str
    l0: float
    fvu: float
    miss: float
    """Distance from what is declared: up to 1 is as declared."""


@dataclass(frozen=True)
class SelfCheck:
    """The verdict."""

    ok: bool
    declared: Declared
    measured: Trial
    trials: list[Trial]
    """The suspects, those nearest to what is declared first; empty when all is well."""
    explained_by: str | None
    sentence: str
    tokens: int
    text: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite is null."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, list):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        made: dict[str, Any] = plain(asdict(self))
        return made


def declared_of(cfg: SAEConfig, entry: Entry | None = None) -> Declared:
    """What the SAE's own folder says, and else the registry; the k of a top-k where neither has
    L0.
    """
    stated = cfg.metrics or {}

    def number(*names: str) -> float | None:
        values = (stated.get(name) for name in names)
        return next((float(v) for v in values if isinstance(v, int | float)), None)

    l0, fvu = number("l0", "sparsity"), number("fvu")
    explained = number("explained_variance", "variance_explained")
    if explained is None and entry is not None:
        explained = entry.variance_explained
    if fvu is None and explained is not None:
        fvu = 1 - explained
    if l0 is None and entry is not None:
        l0 = entry.l0
    if l0 is None and cfg.architecture in CHOOSING:
        l0 = cfg.k
    return Declared(l0, fvu)


@torch.no_grad()
def self_check(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    texts: Iterable[str],
    *,
    entry: Entry | None = None,
    tokens: int = 4096,
    text: str = "",
    progress: Progress = silent,
) -> SelfCheck:
    """Measure L0 and FVU, compare them with what `declared_of` says, and on a miss try the usual
    suspects one at a time.

    Raises DataError for texts without a context, CaptureError where the SAE's site is not found,
    has another width or carries NaN, or where no token counts.
    """
    site_of(sae)
    declared, use = declared_of(sae.cfg, entry), as_stated(sae)
    bench = Bench(model, tokenizer, list(_some(texts, tokens)), tokens)
    bench.collect([use], strict=True)
    counted = bench.counted(use)
    if not counted:
        raise CaptureError("no token counts: the SAE's token rule leaves out all of them")
    measured = _tried(bench, declared, use)
    trials = _try_all(bench, declared, use, progress) if measured.miss > 1 else []
    found = next((one for one in trials if one.miss <= 1), None)
    return SelfCheck(
        ok=measured.miss <= 1,
        declared=declared,
        measured=measured,
        trials=trials,
        explained_by=found.what if found else None,
        sentence=_sentence(declared, measured, trials, found),
        tokens=counted,
        text=text,
    )


def _some(texts: Iterable[str], tokens: int) -> Iterator[str]:
    """Texts until they surely hold `tokens`: no token is longer than some dozen characters on
    average.
    """
    have = 0
    for text in texts:
        yield text
        have += len(text)
        if have > 16 * tokens:
            return


def _tried(bench: Bench, declared: Declared, use: Use, tokens: int | None = None) -> Trial:
    l0, fvu = bench.measure(use, tokens)
    return Trial(use.what, l0, fvu, declared.miss(l0, fvu))


def _try_all(bench: Bench, declared: Declared, use: Use, progress: Progress) -> list[Trial]:
    """Every suspect on a few tokens, the best of them on all; nearest to the declared first."""
    uses = [*other_tokens(use), *other_sites(use), *other_arithmetic(use, declared.l0)]
    uses = bench.collect(uses)
    uses += _fitted(bench, declared, use)
    first: list[tuple[Trial, Use]] = []
    for number, one in enumerate(uses):
        first.append((_tried(bench, declared, one, FEW), one))
        progress(number + 1, len(uses) + FINALISTS)
    first.sort(key=lambda pair: pair[0].miss)
    best = [_tried(bench, declared, one) for _, one in first[:FINALISTS]]
    progress(1, 1)
    return sorted(best, key=lambda one: one.miss) + [one for one, _ in first[FINALISTS:]]


def _sentence(declared: Declared, measured: Trial, trials: list[Trial], found: Trial | None) -> str:
    before = _numbers(declared, measured)
    if measured.miss <= 1:
        if declared.l0 is None and declared.fvu is None:
            return f"nothing is declared to compare with; measured: {before}"
        return f"as declared: {before}"
    if found is None:
        nearest = "".join(
            f"; the nearest is {one.what} (FVU {one.fvu:.3g}, L0 {one.l0:.4g})"
            for one in trials[:1]
        )
        return (
            f"not as declared: {before}; none of the {len(trials)} usual suspects explains it"
            f"{nearest}"
        )
    return (
        f"{found.what} explains it: FVU {measured.fvu:.3g} -> {found.fvu:.3g}"
        f"{_said(declared.fvu)}, L0 {measured.l0:.4g} -> {found.l0:.4g}{_said(declared.l0)}"
    )


def _numbers(declared: Declared, one: Trial) -> str:
    return f"FVU {one.fvu:.3g}{_said(declared.fvu)}, L0 {one.l0:.4g}{_said(declared.l0)}"


def _said(value: float | None) -> str:
    return " (none declared)" if value is None else f" (declared {value:.4g})"


def _fitted(bench: Bench, declared: Declared, use: Use) -> list[Use]:
    """Suspects that have a number of their own, taken from what was captured."""
    x = torch.cat([x for x, _ in bench.rows(use, FEW)])
    norms = x.float().norm(dim=-1)
    found = [*without_outliers(use, float(norms.median()))]
    if declared.l0 is not None:
        found += with_threshold(use, _threshold(use.sae, x, declared.l0))
    usual = use.sae.d_in**0.5 / float(norms.mean())
    found += scaled(use, usual, f"multiplying x by {usual:.3g}, sqrt(d) / mean norm,")
    return [*found, *_best_scale(bench, declared, use, usual)]


def _best_scale(bench: Bench, declared: Declared, use: Use, usual: float) -> Iterator[Use]:
    """The factor on x with the smallest miss: powers of two first, then finer. Nothing where that
    is one, or the usual.
    """
    grid, best = [2.0**power for power in range(-10, 11)], 1.0
    for _ in range(3):
        uses = [one for factor in grid for one in scaled(use, factor)]
        if not uses:
            return
        misses = [declared.miss(*bench.measure(one, FEW)) for one in uses]
        best, step = grid[misses.index(min(misses))], grid[1] / grid[0]
        grid = [best * step ** (part / 4) for part in range(-4, 5)]
    if not 0.95 < best < 1.05 and not 0.9 < best / usual < 1.1:
        yield from scaled(use, best)


def _threshold(sae: SAE, x: Tensor, l0: float) -> float:
    """The value that so many features of a token exceed, on average."""
    values = torch.cat([sae.encode(part).flatten() for (part,) in in_chunks(sae, x[:256])])
    count = min(max(round(l0 * min(len(x), 256)), 1), len(values) - 1)
    return max(float(values.topk(count + 1).values[-1]), 0.0)
