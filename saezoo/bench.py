"""The tensors of every site that a self-check asks for, run once, and an SAE measured on them."""

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saezoo.attaching import check_tensor
from saezoo.capture import keep_tokens, padded
from saezoo.config import Site
from saezoo.errors import CaptureError
from saezoo.evaluation import BATCH_TOKENS, batches, context_length, take_pieces
from saezoo.metrics import ReconstructionSums
from saezoo.passes import see_places
from saezoo.sites import Place, find_place
from saezoo.suspects import Use


class Batch(NamedTuple):
    """Some contexts, and the tensors (batch, positions, d) of sites, by `_key`."""

    ids: Tensor
    mask: Tensor
    seen: dict[Hashable, Tensor]


class Bench:
    """The tensors of every site that is asked for, with and without BOS; and the sums of any use
    over them.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, texts: list[str], tokens: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.texts, self.tokens = texts, tokens
        self.device = next(model.parameters()).device
        special = sorted(set(tokenizer.all_special_ids))
        self.special = torch.tensor(special, dtype=torch.int64, device=self.device)
        self._batches: dict[bool, list[Batch]] = {}
        self._places: dict[str, Place] = {}

    def collect(self, uses: list[Use], *, strict: bool = False) -> list[Use]:
        """Run the model for what these uses need. Returns those that the model can give: a place
        it has, of the right width. strict: raises CaptureError where it cannot.
        """
        able = []
        for use in uses:
            try:
                for site in (use.site, use.out_site):
                    if site is not None:
                        self._places.setdefault(_key(site), find_place(self.model, site))
            except CaptureError:
                if strict:
                    raise
                continue
            if use.bos and self.tokenizer.bos_token_id is None:
                if strict:
                    raise CaptureError("the SAE wants BOS in front, and this tokeniser has none")
                continue
            able.append(use)
        for bos in {use.bos for use in able}:
            group = [use for use in able if use.bos == bos]
            sites = [site for use in group for site in (use.site, use.out_site)]
            wanted = {_key(site) for site in sites if site is not None}
            length = min(context_length(self.model, use.rule) for use in group)
            self._run(bos, length, wanted, strict)
        return [use for use in able if self._fits(use, strict)]

    def _run(self, bos: bool, length: int, wanted: set[str], strict: bool) -> None:
        have = self._batches.get(bos)
        if have is None:
            pieces = take_pieces(
                self.tokenizer, self.texts, length, prepend_bos=bos, tokens=self.tokens
            )
            have = [
                Batch(ids.to(self.device), mask.to(self.device), {})
                for ids, mask in (padded(part, 0) for part in batches(pieces, BATCH_TOKENS))
            ]
            self._batches[bos] = have
        for batch in have:
            lacking: dict[Hashable, Place] = {
                key: self._places[key] for key in wanted if key not in batch.seen
            }
            if lacking:
                seen = see_places(self.model, lacking, batch.ids, batch.mask, all_of_them=strict)
                batch.seen.update(seen)

    def _fits(self, use: Use, strict: bool) -> bool:
        x_key, y_key = _key(use.site), _key(use.out_site or use.site)
        if strict:
            for batch in self._batches[use.bos]:
                check_tensor(batch.seen[x_key], use.sae.d_in, self._places[x_key])
        seen = self._batches[use.bos][0].seen
        if not {x_key, y_key} <= seen.keys():
            return False
        return (seen[x_key].shape[-1], seen[y_key].shape[-1]) == (use.sae.d_in, use.sae.d_out)

    def rows(self, use: Use, tokens: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """x and y (tokens, d) of the tokens that count, a batch at a time."""
        have = 0
        for batch in self._batches[use.bos]:
            x, y = batch.seen[_key(use.site)], batch.seen[_key(use.out_site or use.site)]
            keep, _ = keep_tokens(use.rule, batch.ids, batch.mask, self.special, x)
            yield x[keep], y[keep]
            have += int(keep.sum())
            if tokens is not None and have >= tokens:
                return

    def counted(self, use: Use) -> int:
        """Tokens that count."""
        return sum(len(x) for x, _ in self.rows(use))

    def measure(self, use: Use, tokens: int | None = None) -> tuple[float, float]:
        """L0 and FVU of one use, on about so many tokens, or on all."""
        sums = ReconstructionSums(use.sae.d_out, use.sae.d_sae)
        for x, y in self.rows(use, tokens):
            sums.add(use.sae, x, target=None if use.out_site is None else y)
        return sums.l0, sums.fvu


def _key(site: Site) -> str:
    return site.model_dump_json()
