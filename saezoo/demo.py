"""What an SAE sees in a text: per token its strongest features, and how much of the model survives
the reconstruction.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from saezoo.capture import capture, contexts, keep_tokens, padded
from saezoo.config import TokenRule
from saezoo.errors import CaptureError
from saezoo.evaluation import evaluate_pieces
from saezoo.metrics import Metrics
from saezoo.sae import SAE

if TYPE_CHECKING:
    from saezoo.host import Host

BUNDLED = "smollm2-135m-instruct/layer_15_resid_post"
MAX_CONTEXTS = 16
"""Longer texts are cut after this many contexts: a demo should not run for an hour."""


@dataclass(frozen=True)
class TokenSeen:
    """One token of the text and its features, strongest first."""

    text: str
    left_out: str | None
    """Why the SAE's token rule leaves it out; None where it counts."""
    features: list[tuple[int, float]]
    """(feature, activation)."""
    norm: float
    error: float
    """‖x - x̂‖² / ‖x - mean‖², mean over the counted tokens of this text."""


@dataclass(frozen=True)
class FeatureSeen:
    """One feature, and where in the text it is on."""

    feature: int
    where: list[tuple[str, float]]
    """(token, activation), strongest first."""
    promotes: list[str]
    """Tokens that its decoder row pushes towards, read off the model's unembedding."""


@dataclass(frozen=True)
class Seen:
    """Everything that the demo shows."""

    tokens: list[TokenSeen]
    features: list[FeatureSeen]
    metrics: Metrics
    cut: int
    """Contexts of the text that were not run."""


def demo_text() -> str:
    """The text that ships with saezoo."""
    return (Path(__file__).parent / "texts" / "demo.txt").read_text(encoding="utf-8")


@torch.no_grad()
def look(
    sae: SAE,
    host: "Host",
    text: str,
    *,
    show: int = 12,
) -> Seen:
    """Run the host on `text` and take apart what it carries at the SAE's site.

    Raises CaptureError for a text of fewer than three tokens, or an SAE that does not know its
    site.
    """
    site, rule = sae.cfg.site, sae.cfg.tokens or TokenRule(skip_first=1)
    if site is None or site.module is None:
        raise CaptureError(
            "this SAE does not say which module of its model it reads, so it cannot be shown"
        )
    pieces = [
        piece for _, piece in contexts(host.tokenizer, [text], rule.context or 512, smallest=3)
    ]
    if not pieces:
        raise CaptureError("the text has fewer than three tokens: give a sentence or two")
    run = pieces[:MAX_CONTEXTS]
    special = host.tokenizer.all_special_ids
    measured = evaluate_pieces(host.model, {"": sae}, run, special_ids=special, losses=True)
    ids, mask = padded(run[:1], 0)
    x = capture(host.model, site, ids, mask)
    keep, _ = keep_tokens(rule, ids, mask, torch.tensor(special), x)
    tokens = _tokens(sae, host, rule, x[0], ids[0], keep[0])
    return Seen(
        tokens, _features(sae, host, tokens, show), measured[""].metrics, len(pieces) - len(run)
    )


def _tokens(
    sae: SAE, host: "Host", rule: TokenRule, x: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor
) -> list[TokenSeen]:
    """Every token of the first context, (positions, d) activations and (positions,) ids."""
    features, out = sae.encode_sparse(x), sae(x)
    counted = x[keep] if bool(keep.any()) else x
    spread = float((counted - counted.mean(0)).pow(2).sum(-1).mean())
    seen = []
    for place, token in enumerate(ids.tolist()):
        used = int(features.counts[place])
        pairs = zip(
            features.indices[place, :used].tolist(),
            features.values[place, :used].tolist(),
            strict=True,
        )
        norm = float(x[place].norm())
        reason = None if bool(keep[place]) else _reason(rule, place, norm)
        error = float((x[place] - out[place]).pow(2).sum()) / spread
        seen.append(TokenSeen(host.tokenizer.decode([token]), reason, list(pairs), norm, error))
    return seen


def _reason(rule: TokenRule, place: int, norm: float) -> str:
    if place < (rule.skip_first or 0):
        return f"position {place}"
    return f"norm {norm:.0f}" if rule.max_norm and norm > rule.max_norm else "special token"


def _features(sae: SAE, host: "Host", tokens: list[TokenSeen], show: int) -> list[FeatureSeen]:
    """The features that mark out parts of this text: strong where they fire, and silent on most
    tokens.
    """
    where: dict[int, list[tuple[str, float]]] = {}
    for token in tokens:
        if token.left_out is None:
            for feature, value in token.features:
                where.setdefault(feature, []).append((token.text, value))
    few = max(2, len(tokens) // 8)
    telling = {key: spots for key, spots in where.items() if 2 <= len(spots) <= few} or where
    best = sorted(telling, key=lambda key: -max(value for _, value in telling[key]))[:show]
    return [
        FeatureSeen(
            key, sorted(where[key], key=lambda spot: -spot[1])[:5], promoted_tokens(sae, host, key)
        )
        for key in best
    ]


def promoted_tokens(sae: SAE, host: "Host", feature: int, count: int = 4) -> list[str]:
    """Tokens whose unembedding lies most along a feature's decoder row, after removing the mean row
    ("logit lens").

    The final norm's gain is applied; what later layers do to the direction is not.
    """
    head = host.model.get_output_embeddings()
    if head is None or head.weight.shape[1] != sae.d_out:
        return []
    row = sae.W_dec[feature].float()
    norm = getattr(getattr(host.model, "model", None), "norm", None)
    row = row * norm.weight.float() if norm is not None and hasattr(norm, "weight") else row
    unembed = head.weight.float()
    scores = unembed @ row - unembed.mean(0) @ row
    return [host.tokenizer.decode([token]) for token in scores.topk(count).indices.tolist()]
