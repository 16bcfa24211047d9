"""Looking at features: what each token of a text lights, where a feature is strongest, and which
next tokens its direction makes likelier.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.attaching import check_tensor
from saezoo.capture import keep_tokens, padded
from saezoo.config import Point, Site, TokenRule
from saezoo.errors import CaptureError, InputError
from saezoo.evaluation import (
    BATCH_TOKENS,
    Progress,
    batches,
    context_length,
    silent,
    take_pieces,
)
from saezoo.metrics import in_chunks, sparse_or_dense
from saezoo.passes import see_places, site_of
from saezoo.sae import SAE
from saezoo.sites import Place, find_module, find_place
from saezoo.sparse import SparseFeatures

FINAL_NORMS = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm")
STREAM: set[Point | None] = {
    None, "embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"
}  # fmt: skip
"""Points whose tensor is of the residual stream, or is added to it as it is."""


@dataclass(frozen=True)
class TokenSeen:
    """One token of a text and its features, strongest first."""

    text: str
    left_out: str | None
    """Why the SAE's token rule leaves it out; None where it counts."""
    features: list[tuple[int, float]]
    """(feature, activation)."""
    norm: float
    error: float | None
    """‖y - ŷ‖² / ‖y - mean‖², mean over the counted tokens of its context; None where that has no
    value.
    """


@dataclass(frozen=True)
class Example:
    """A stretch of text around the place where a feature is strongest in its context."""

    tokens: list[str]
    activations: list[float]
    peak: int
    """Which of the tokens."""
    position: int
    """Of the peak, in its context."""

    @property
    def strongest(self) -> float:
        """The activation at the peak."""
        return self.activations[self.peak]


@dataclass(frozen=True)
class FeatureSeen:
    """Where one feature fires in a text, strongest first."""

    feature: int
    examples: list[Example]
    density: float
    """Share of counted tokens on which it fires."""
    tokens: int
    """Tokens that counted."""


@dataclass(frozen=True)
class Promoted:
    """Next tokens that a feature's direction makes likelier, and less likely: (token, logit for
    each unit of the final norm's output along it, less the mean over all tokens).
    """

    up: list[tuple[str, float]]
    down: list[tuple[str, float]]


@torch.no_grad()
def look_at_tokens(
    model: nn.Module, tokenizer: Any, sae: SAE, text: str, *, tokens: int | None = None
) -> list[TokenSeen]:
    """The tokens of a text in contexts of the SAE's length, up to `tokens` of them.

    Raises DataError for a text of one token, CaptureError for a site that is not there.
    """
    walk, found = _Walk(model, tokenizer, sae), []
    length = context_length(model, walk.rule)
    bos = bool(walk.rule.prepend_bos)
    for piece in take_pieces(tokenizer, [text], length, prepend_bos=bos, tokens=tokens):
        found += _tokens_of(walk, piece)
    return found


def _tokens_of(walk: "_Walk", piece: list[int]) -> list[TokenSeen]:
    """One context."""
    sae, rule = walk.sae, walk.rule
    ids, x, y, keep = walk.run([piece])
    features, out = sae.encode_sparse(x[0]), sae(x[0])
    counted = y[0][keep[0]]
    spread = float((counted - counted.mean(0)).pow(2).sum(-1).mean()) if len(counted) > 1 else 0.0
    found = []
    for place, token in enumerate(ids[0].tolist()):
        used = int(features.counts[place])
        pairs = zip(
            features.indices[place, :used].tolist(),
            features.values[place, :used].tolist(),
            strict=True,
        )
        norm = float(x[0, place].norm())
        reason = None if bool(keep[0, place]) else _reason(rule, place, norm)
        error = float((y[0, place] - out[place]).pow(2).sum()) / spread if spread else None
        found.append(TokenSeen(walk.decode(token), reason, list(pairs), norm, error))
    return found


def _reason(rule: TokenRule, place: int, norm: float) -> str:
    if place < (rule.skip_first or 0):
        return f"position {place}"
    return f"norm {norm:.0f}" if rule.max_norm and norm > rule.max_norm else "special token"


@torch.no_grad()
def top_examples(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    feature: int,
    texts: Iterable[str],
    *,
    tokens: int | None = None,
    count: int = 10,
    before: int = 24,
    after: int = 8,
    progress: Progress = silent,
) -> FeatureSeen:
    """Where a feature is strongest in texts: the best place of each context, the best `count` of
    these, with `before` and `after` tokens around it. Tokens that the SAE's rule leaves out do not
    count.

    Raises InputError for a feature that is not there, DataError for texts without a context,
    CaptureError for a site that is not there, or when no token counts.
    """
    refuse_feature(sae, feature)
    walk = _Walk(model, tokenizer, sae)
    pieces = take_pieces(
        tokenizer,
        texts,
        context_length(model, walk.rule),
        prepend_bos=bool(walk.rule.prepend_bos),
        tokens=tokens,
    )
    best: list[tuple[float, int, Example]] = []
    fired = counted = done = 0
    total = sum(map(len, pieces))
    for batch in batches(pieces, BATCH_TOKENS):
        ids, x, _, keep = walk.run(batch)
        strength = _strength(sae, feature, x).masked_fill(~keep, 0)
        fired += int((strength != 0).sum())
        counted += int(keep.sum())
        for row in range(len(batch)):
            example = _example(walk, ids[row], strength[row], len(batch[row]), before, after)
            if example.strongest > 0 and all(example.tokens != one.tokens for *_, one in best):
                # the number settles ties, so that examples are never compared
                heapq.heappush(best, (example.strongest, -done - row, example))
                best = best if len(best) <= count else heapq.nlargest(count, best)
                heapq.heapify(best)
        done += sum(map(len, batch))
        progress(done, total)
    if not counted:
        raise CaptureError("no token counts: the SAE's token rule leaves out all of them")
    ordered = [example for *_, example in sorted(best, key=lambda item: item[:2], reverse=True)]
    return FeatureSeen(feature, ordered, fired / counted, counted)


def _strength(sae: SAE, feature: int, x: Tensor) -> Tensor:
    """(batch, positions) activation of one feature."""
    parts = []
    for (part,) in in_chunks(sae, x.flatten(0, 1)):
        features = sparse_or_dense(sae, part)
        if isinstance(features, SparseFeatures):
            parts.append((features.values * (features.indices == feature)).sum(-1))
        else:
            parts.append(features[:, feature])
    return torch.cat(parts).view(x.shape[:2])


def _example(
    walk: "_Walk", ids: Tensor, strength: Tensor, length: int, before: int, after: int
) -> Example:
    peak = int(strength[:length].argmax())
    start, end = max(peak - before, 0), min(peak + after + 1, length)
    shown = [walk.decode(token) for token in ids[start:end].tolist()]
    return Example(shown, strength[start:end].float().tolist(), peak - start, peak)


def refuse_feature(sae: SAE, feature: int) -> None:
    """Raise InputError unless the SAE has this feature."""
    if not 0 <= feature < sae.d_sae:
        raise InputError(f"there is no feature {feature}: this SAE has 0 to {sae.d_sae - 1}")


@torch.no_grad()
def promoted_tokens(
    model: nn.Module, tokenizer: Any, sae: SAE, feature: int, count: int = 8
) -> Promoted | None:
    """Tokens whose unembedding lies most along a feature's decoder row, and most against it, less
    the mean over all tokens ("logit lens"). None where the row is not of the residual stream, or
    the model has no head.

    The final norm's gain is applied; what later layers do to the direction is not.
    """
    refuse_feature(sae, feature)
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    site = sae.cfg.out_site or sae.cfg.site or Site()
    if head is None or head.weight.shape[1] != sae.d_out or site.point not in STREAM:
        return None
    row = _through_final_norm(model, sae.W_dec[feature].float())
    unembed = head.weight.float()
    scores = unembed @ row - unembed.mean(0) @ row
    return Promoted(_named(tokenizer, scores, count), _named(tokenizer, -scores, count, -1))


def _named(tokenizer: Any, scores: Tensor, count: int, sign: int = 1) -> list[tuple[str, float]]:
    best = scores.topk(min(count, len(scores)))
    return [
        (tokenizer.decode([token]), sign * value)
        for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _through_final_norm(model: nn.Module, row: Tensor) -> Tensor:
    """A direction (d,) times the gain of the norm before the unembedding, less its mean where that
    norm takes it away; as it is where no such norm is known.
    """
    for path in FINAL_NORMS:
        try:
            norm = find_module(model, path)
        except CaptureError:
            continue
        gain = find_place(model, Site(module=path, rms_gain=False)).gain
        row = row - row.mean() if isinstance(norm, nn.LayerNorm) else row
        return row if gain is None else row * gain.float()
    return row


class _Walk:
    """An SAE in its model, to be run over contexts."""

    def __init__(self, model: nn.Module, tokenizer: Any, sae: SAE) -> None:
        site = site_of(sae)
        self.model, self.tokenizer, self.sae = model, tokenizer, sae
        self.rule = sae.cfg.tokens or TokenRule(skip_first=1)
        self.place = find_place(model, site)
        self.places: dict[Any, Place] = {"x": self.place}
        if sae.cfg.out_site is not None:
            self.places["y"] = find_place(model, sae.cfg.out_site)
        self.device = next(model.parameters()).device
        special = sorted(set(tokenizer.all_special_ids))
        self.special = torch.tensor(special, dtype=torch.int64, device=self.device)

    def run(self, pieces: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids, x, y, and which tokens count."""
        ids, mask = (value.to(self.device) for value in padded(pieces, 0))
        seen = see_places(self.model, self.places, ids, mask)
        check_tensor(seen["x"], self.sae.d_in, self.place)
        keep, _ = keep_tokens(self.rule, ids, mask, self.special, seen["x"])
        return ids, seen["x"].float(), seen.get("y", seen["x"]).float(), keep

    def decode(self, token: int) -> str:
        """One token's text."""
        text: str = self.tokenizer.decode([token])
        return text
