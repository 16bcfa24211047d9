"""The encoder's product and what of it is kept. The product is dense, but never whole: some tokens
at a time, in memory that is used again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saezoo.sparse import largest

# B tokens, D d_in, M d_sae, K latents per token, N pairs

ROWS = 256
"""Tokens at a time on a CPU: enough for the product's full speed, few enough for little memory."""


@torch.no_grad()
def pre_activations(x_BD: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor) -> Iterator[Tensor]:
    """W_enc x + b_enc of some tokens after others, (b, M) each; a piece is overwritten by the
    next.
    """
    tokens, d_sae = len(x_BD), len(W_enc_MD)
    rows = min(tokens, ROWS) if x_BD.device.type == "cpu" else tokens
    room = x_BD.new_empty(rows, d_sae)
    for x in x_BD.split(rows):
        yield torch.addmm(b_enc_M, x, W_enc_MD.T, out=room[: len(x)])


@torch.no_grad()
def select_top_k(x_BD: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each token and their latents, both (B, k), largest first.
    Exact.
    """
    parts = [largest(pre, k) for pre in pre_activations(x_BD, W_enc_MD, b_enc_M)]
    values_BK, idx_BK = (torch.cat(part) for part in zip(*parts, strict=True))
    return values_BK, idx_BK


@torch.no_grad()
def select_above(
    x_BD: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations above `bound`, which is one number or one a latent, token by token:
    values, tokens and latents, (N,) each.
    """
    d_sae = len(W_enc_MD)
    found: list[tuple[Tensor, Tensor]] = []
    start = 0
    for pre in pre_activations(x_BD, W_enc_MD, b_enc_M):
        place = (pre > bound).view(-1).nonzero().squeeze(-1)
        found.append((pre.view(-1)[place], place + start * d_sae))
        start += len(pre)
    values_N, place_N = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values_N, place_N // d_sae, place_N % d_sae


@torch.no_grad()
def select_batch_top_k(
    x_BD: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, count: int, guess: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest positive pre-activations of the whole batch, fewer where there are not so
    many: values, tokens and latents, (N,) each, token by token. Exact.

    guess: a number that the smallest of them probably exceeds; what is below it is looked at only
    where it does not. 0 is always right, and slower.
    """
    bound = guess.clamp_min(0)
    values_N, token_N, latent_N = select_above(x_BD, W_enc_MD, b_enc_M, bound)
    if len(values_N) < count and bound > 0:
        values_N, token_N, latent_N = select_above(x_BD, W_enc_MD, b_enc_M, torch.zeros_like(bound))
    if len(values_N) > count:
        kept = values_N.topk(count, sorted=False).indices.sort().values
        values_N, token_N, latent_N = values_N[kept], token_N[kept], latent_N[kept]
    return values_N, token_N, latent_N
