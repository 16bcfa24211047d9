"""What an SAE sees in a text: per token its strongest features, and how much of the model survives
the reconstruction.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from saezoo.capture import contexts
from saezoo.config import TokenRule
from saezoo.errors import CaptureError
from saezoo.evaluation import context_length, evaluate_pieces
from saezoo.features import TokenSeen, look_at_tokens, promoted_tokens
from saezoo.metrics import Metrics
from saezoo.passes import site_of
from saezoo.sae import SAE

if TYPE_CHECKING:
    from saezoo.host import Host

BUNDLED = "smollm2-135m-instruct/layer_15_resid_post"
MAX_CONTEXTS = 16
"""Longer texts are cut after this many contexts: a demo should not run for an hour."""


@dataclass(frozen=True)
class FeatureInText:
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
    features: list[FeatureInText]
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
    site_of(sae)
    rule = sae.cfg.tokens or TokenRule(skip_first=1)
    length, bos = context_length(host.model, rule), bool(rule.prepend_bos)
    found = contexts(host.tokenizer, [text], length, prepend_bos=bos, smallest=3)
    pieces = [piece for _, piece in found]
    if not pieces:
        raise CaptureError("the text has fewer than three tokens: give a sentence or two")
    run = pieces[:MAX_CONTEXTS]
    special = host.tokenizer.all_special_ids
    measured = evaluate_pieces(host.model, {"": sae}, run, special_ids=special, losses=True)
    first = len(run[0])
    tokens = look_at_tokens(host.model, host.tokenizer, sae, text, tokens=first)
    features = _features(sae, host, tokens, show)
    return Seen(tokens, features, measured[""].metrics, len(pieces) - len(run))


def _features(sae: SAE, host: "Host", tokens: list[TokenSeen], show: int) -> list[FeatureInText]:
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
        FeatureInText(
            key, sorted(where[key], key=lambda spot: -spot[1])[:5], _promotes(sae, host, key)
        )
        for key in best
    ]


def _promotes(sae: SAE, host: "Host", feature: int) -> list[str]:
    found = promoted_tokens(host.model, host.tokenizer, sae, feature, 4)
    return [] if found is None else [token for token, _ in found.up]
