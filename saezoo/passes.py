"""The forward passes of an evaluation: each batch's clean one once for all SAEs, then one for each
splice and each ablation, from the site's layer on where the model can be resumed there.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.attaching import check_tensor
from saezoo.capture import Dropped, keep_tokens
from saezoo.config import SAEConfig, Site, TokenRule
from saezoo.errors import CaptureError, InputError
from saezoo.hooks import hook_place
from saezoo.metrics import ReconstructionSums, kl_divergence, next_token_loss, recovered
from saezoo.resume import Resume, state_bytes
from saezoo.sae import SAE
from saezoo.sites import Place, find_place, run_model

KEPT_STATES = 2**30
"""Bytes of hidden states kept for the ablation by the mean, which is known only at the end; beyond
them it runs the whole model.
"""


class Part:
    """One SAE while it is measured: where it reads and writes, and its sums.

    Raises CaptureError for a site that is not stated or not found.
    """

    def __init__(self, model: nn.Module, sae: SAE, *, pca: bool = False) -> None:
        site, out_site = site_of(sae), sae.cfg.out_site
        if sae.cfg.is_transcoder and out_site is None:
            raise CaptureError("the transcoder does not say where its output goes: no out_site")
        self.sae, self.pca = sae, pca
        self.rule = sae.cfg.tokens or TokenRule(skip_first=1)
        self.place = find_place(model, site)
        self.out_place = self.place if out_site is None else find_place(model, out_site)
        d_out = sae.cfg.d_out or sae.cfg.d_in
        self.sums = ReconstructionSums(d_out, sae.d_sae, covariance=pca, norms=True)
        self.dropped = Dropped()
        self.resume = Resume(model, self.place)
        self.spliced, self.kl = 0.0, 0.0

    def add(self, x: Tensor, y: Tensor, ids: Tensor, mask: Tensor, special: Tensor) -> Tensor:
        """Count a batch (batch, positions, d); returns ŷ at all of its tokens."""
        check_tensor(x, self.sae.d_in, self.place)
        keep, dropped = keep_tokens(self.rule, ids, mask, special, x)
        self.dropped.add(dropped)
        # a 16-bit model's activations are exact in float32, and their reconstruction is not rounded
        x, y = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (x, y))
        target = None if self.out_place is self.place else y.flatten(0, 1)
        out = self.sums.add(self.sae, x.flatten(0, 1), target=target, keep=keep.flatten())
        return out.view(*x.shape[:2], -1)

    @property
    def by_zeros(self) -> Hashable:
        """What an ablation by zeros depends on: where."""
        return _where(self.out_place)

    @property
    def by_mean(self) -> Hashable:
        """What an ablation by the mean depends on: where, and over which tokens."""
        return _where(self.out_place), self.rule.model_dump_json()


def site_of(sae: Any) -> Site:
    """The site that an SAE reads. Raises CaptureError where it does not say, InputError for what
    reads several layers.
    """
    if not isinstance(sae.cfg, SAEConfig):
        raise InputError(
            f"a {type(sae).__name__} spans several layers or models; this is for SAEs and "
            "transcoders of one layer"
        )
    if sae.cfg.site is None:
        raise CaptureError("the SAE does not say which site it reads: give site=Site(module=…)")
    return sae.cfg.site


class Passes:
    """The sums of losses over all batches, for SAEs that share their contexts."""

    def __init__(
        self, model: nn.Module, parts: Sequence[Part], special: Tensor, *, losses: bool
    ) -> None:
        self.model, self.parts, self.special, self.losses = model, parts, special, losses
        self.targets, self.clean = 0, 0.0
        self._resumes: dict[int, Resume] = {}
        for part in parts:
            part.resume = self._resumes.setdefault(part.resume.start, part.resume)
        self.ablated: dict[Hashable, float] = {}
        self._places = {
            _where(place): place for part in parts for place in (part.place, part.out_place)
        }
        self._batches: list[tuple[Tensor, Tensor, dict[Resume, Any]]] = []
        self._bytes = 0

    def add(self, ids: Tensor, mask: Tensor) -> None:
        """Run a batch of contexts (batch, positions): as it is, and with each replacement."""
        if not self.losses:
            self._count(see_places(self.model, self._places, ids, mask), ids, mask)
            return
        if not self._batches:
            for resume in self._resumes.values():
                resume.prove(self.model, ids, mask)
        with ExitStack() as stack:
            kept = {
                key: stack.enter_context(resume.recorded()) for key, resume in self._resumes.items()
            }
            seen: dict[Hashable, Tensor] = {}
            for key, place in self._places.items():
                stack.callback(hook_place(place, _keeper(seen, key)).remove)
            logits = run_model(self.model, ids, mask)
        _refuse_silent(self._places, seen)
        states = {self._resumes[key]: found[0] for key, found in kept.items()}
        loss, count = next_token_loss(logits, ids, mask)
        self.clean += loss
        self.targets += count
        ablated = set()
        for part, x_hat in zip(self.parts, self._count(seen, ids, mask), strict=True):
            state = states[part.resume]
            spliced = self._replaced(part, state, ids, mask, x_hat[:, 1:])
            part.spliced += next_token_loss(spliced, ids, mask)[0]
            part.kl += kl_divergence(logits, spliced, mask)
            if part.by_zeros not in ablated:
                ablated.add(part.by_zeros)
                self._ablate(part, part.by_zeros, state, ids, mask, x_hat.new_zeros(()))
        self._keep(ids, mask, states)

    def ablate_by_mean(self) -> Iterator[int]:
        """Run all batches again with the mean in place. Yields how many tokens each has."""
        parts = {part.by_mean: part for part in self.parts}
        for ids, mask, states in self._batches:
            for key, part in parts.items():
                state = states.get(part.resume)
                self._ablate(part, key, state, ids, mask, part.sums.mean.to(ids.device))
            yield int(mask.sum())

    def losses_of(self, part: Part) -> dict[str, Any]:
        """The second group of metrics, by the names of `Metrics`; empty where none was wanted."""
        if not self.losses or not self.targets:
            return {}
        sums = (self.clean, part.spliced, self.ablated[part.by_zeros], self.ablated[part.by_mean])
        clean, spliced, zero, mean = (value / self.targets for value in sums)
        return {
            "loss_clean": clean,
            "loss_spliced": spliced,
            "loss_zero": zero,
            "loss_mean": mean,
            "loss_recovered": recovered(clean, spliced, zero),
            "loss_recovered_mean": recovered(clean, spliced, mean),
            "kl": part.kl / self.targets,
        }

    def _count(self, seen: dict[Hashable, Tensor], ids: Tensor, mask: Tensor) -> list[Tensor]:
        return [
            part.add(
                seen[_where(part.place)], seen[_where(part.out_place)], ids, mask, self.special
            )
            for part in self.parts
        ]

    def _ablate(
        self, part: Part, key: Hashable, state: Any, ids: Tensor, mask: Tensor, value: Tensor
    ) -> None:
        logits = self._replaced(part, state, ids, mask, value)
        self.ablated[key] = self.ablated.get(key, 0.0) + next_token_loss(logits, ids, mask)[0]

    def _replaced(self, part: Part, state: Any, ids: Tensor, mask: Tensor, new: Tensor) -> Tensor:
        """Logits with `new`, broadcast, at every position >= 1 of where the SAE writes."""

        def see(y: Tensor) -> Tensor:
            return torch.cat([y[:, :1], new.to(y.dtype).expand_as(y[:, 1:])], 1)

        handle = hook_place(part.out_place, see)
        try:
            with part.resume.resumed(state):
                return run_model(self.model, ids, mask)
        finally:
            handle.remove()

    def _keep(self, ids: Tensor, mask: Tensor, states: dict[Resume, Any]) -> None:
        self._bytes += sum(map(state_bytes, states.values()))
        self._batches.append((ids, mask, states if self._bytes <= KEPT_STATES else {}))


class _AllSeen(BaseException):
    """Ends a forward pass. Not an Exception, so that no model code swallows it."""


def see_places(
    model: nn.Module,
    places: dict[Hashable, Place],
    ids: Tensor,
    mask: Tensor,
    *,
    all_of_them: bool = True,
) -> dict[Hashable, Tensor]:
    """The tensors (batch, positions, d) of several places, without gradient, from one forward pass
    that ends when all were seen. Raises CaptureError for a place that did not run; it is left out
    without `all_of_them`.
    """
    seen: dict[Hashable, Tensor] = {}

    def stop_at_last(key: Hashable) -> Any:
        keep = _keeper(seen, key)

        def see(x: Tensor) -> None:
            keep(x)
            if len(seen) == len(places):
                raise _AllSeen

        return see

    with torch.no_grad(), ExitStack() as stack, suppress(_AllSeen):
        for key, place in places.items():
            stack.callback(hook_place(place, stop_at_last(key)).remove)
        run_model(model, ids, mask)
    if all_of_them:
        _refuse_silent(places, seen)
    return seen


def _keeper(seen: dict[Hashable, Tensor], key: Hashable) -> Any:
    def see(x: Tensor) -> None:
        seen[key] = x.detach()

    return see


def _refuse_silent(places: dict[Hashable, Place], seen: dict[Hashable, Tensor]) -> None:
    if silent := [place.name for key, place in places.items() if key not in seen]:
        raise CaptureError(
            f"{', '.join(silent)} never ran in the forward pass, so nothing was captured there"
        )


def _where(place: Place) -> Hashable:
    return id(place.module), place.side, place.kind, place.centred
