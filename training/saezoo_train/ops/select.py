"""The encoder's product and what of it is kept. The product is dense, but never whole: some tokens
at a time, in memory that is used again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saezoo.sparse import top_k

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
    values, chosen = [], []
    for pre in pre_activations(x_BD, W_enc_MD, b_enc_M):
        idx = top_k(pre, k)
        values.append(pre.gather(-1, idx))
        chosen.append(idx)
    return torch.cat(values), torch.cat(chosen)
