"""Which latents are on for which tokens: pairs, listed by token, and the same pairs listed by
latent.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SPARSE_BELOW = 1 / 16
"""The share of pairs that are on, from which dense products are faster (measured on a CPU)."""


@dataclass(frozen=True)
class ByLatent:
    """The pairs in the order of their latents, tokens ascending within each: a weight gradient's
    row m is then a sum over one stretch of them.
    """

    order_N: Tensor
    """Where the n-th pair of this order stands in the order of tokens."""
    starts_M: Tensor
    """Where each latent's stretch begins."""


class Active:
    """N pairs of a bag and a latent, bag by bag.

    A bag is what is summed by the decoder. It is a token, or one of several nested groups of a
    token's latents: bag = group * tokens + token.
    """

    def __init__(
        self, latent_N: Tensor, starts: Tensor, tokens: int, d_sae: int, bag_N: Tensor | None = None
    ) -> None:
        """latent_N: int64. starts: where each bag's pairs begin, (bags,) int64; bags is a multiple
        of tokens. bag_N: each pair's bag, where it is known already.
        """
        self.latent_N, self.starts, self.tokens, self.d_sae = latent_N, starts, tokens, d_sae
        if bag_N is not None:
            self.bag_N = bag_N

    @classmethod
    def from_chosen(cls, idx_BK: Tensor, d_sae: int) -> "Active":
        """The same number of latents for every token: idx (B, K)."""
        tokens, k = idx_BK.shape
        starts = torch.arange(0, tokens * k, k, device=idx_BK.device)
        return cls(idx_BK.flatten(), starts, tokens, d_sae)

    @classmethod
    def from_pairs(
        cls, bag_N: Tensor, latent_N: Tensor, tokens: int, d_sae: int, groups: int = 1
    ) -> "Active":
        """Any number for every token: pairs that are sorted by bag."""
        counts = torch.bincount(bag_N, minlength=groups * tokens)
        return cls(latent_N, counts.cumsum(0) - counts, tokens, d_sae, bag_N)

    @property
    def is_sparse(self) -> bool:
        """Whether so little is on that going through the pairs pays."""
        return len(self.latent_N) < len(self.starts) * self.d_sae * SPARSE_BELOW

    @cached_property
    def bag_N(self) -> Tensor:
        """The bag of each pair."""
        bags = torch.arange(len(self.starts), device=self.starts.device)
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([len(self.latent_N)])])
        return bags.repeat_interleave(ends - self.starts, output_size=len(self.latent_N))

    @cached_property
    def token_N(self) -> Tensor:
        """The token of each pair."""
        return self.bag_N if len(self.starts) == self.tokens else self.bag_N % self.tokens

    @cached_property
    def by_latent(self) -> ByLatent:
        """The pairs grouped by latent. The sort is stable: sums over a stretch are always taken in
        the same order.
        """
        counts = torch.bincount(self.latent_N, minlength=self.d_sae)
        order_N = self.latent_N.sort(stable=True).indices
        return ByLatent(order_N, counts.cumsum(0) - counts)
