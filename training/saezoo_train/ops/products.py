"""The products of a sparse step: each touches only the rows that are on.

They are plain functions of tensors, so that a kernel can take the place of any of them. No sum's
order depends on timing: results repeat bitwise for a fixed number of threads. Where so much is on
that dense products are faster, as at the start of a run with an L1 penalty, they are taken, some
bags at a time.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo_train.ops.active import Active
from saezoo_train.ops.select import ROWS

# N pairs, D d_in or d_out, M d_sae, R bags or tokens; for bags see Active


def decode(values_N: Tensor, active: Active, W_dec_MD: Tensor) -> Tensor:
    """out[bag] = sum of values[n] * W_dec[latent[n]] over the bag's pairs: (bags, D)."""
    if not active.is_sparse:
        return torch.cat([dense @ W_dec_MD for _, _, dense in _pieces(values_N, active)])
    return F.embedding_bag(
        active.latent_N, W_dec_MD, active.starts, mode="sum", per_sample_weights=values_N
    )


def pair_products(rows: Tensor, W_MD: Tensor, active: Active) -> Tensor:
    """out[n] = rows[bag[n]] . W[latent[n]] with rows (bags, D): (N,). What `decode` gives back to
    its values.
    """
    if not active.is_sparse:
        parts = []
        for bags, pairs in _slices(active):
            place = (active.bag_N[pairs] - bags.start) * active.d_sae + active.latent_N[pairs]
            parts.append((rows[bags] @ W_MD.T).view(-1)[place])
        return torch.cat(parts)
    # torch's own formula for the gradient of embedding_bag's weights: no row is copied
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(), W_MD, active.latent_N, active.starts, active.bag_N, 0
    )


def weight_gradient(values_N: Tensor, rows_RD: Tensor, active: Active) -> Tensor:
    """out[m] = sum of values[n] * rows[n's bag or token] over the pairs of latent m: (M, D).

    rows: one a bag, or one a token.
    """
    row_N = active.bag_N if len(rows_RD) == len(active.starts) else active.token_N
    if not active.is_sparse:
        out = rows_RD.new_zeros(active.d_sae, rows_RD.shape[1])
        for bags, _, dense in _pieces(values_N, active):
            places = torch.arange(bags.start, bags.stop, device=rows_RD.device) % len(rows_RD)
            out.addmm_(dense.T, rows_RD[places])
        return out
    group = active.by_latent
    return F.embedding_bag(
        row_N[group.order_N],
        rows_RD,
        group.starts_M,
        mode="sum",
        per_sample_weights=values_N[group.order_N],
    )


def latent_sums(values_N: Tensor, active: Active) -> Tensor:
    """out[m] = sum of values[n] over the pairs of latent m: (M,)."""
    if not active.is_sparse:
        sums = values_N.new_zeros(active.d_sae)
        for _, _, dense in _pieces(values_N, active):
            sums += dense.sum(0)
        return sums
    group = active.by_latent
    places_N = torch.arange(len(values_N), device=values_N.device)
    ordered_N1 = values_N[group.order_N].unsqueeze(-1)
    return F.embedding_bag(places_N, ordered_N1, group.starts_M, mode="sum").squeeze(-1)


def _slices(active: Active) -> Iterator[tuple[slice, slice]]:
    """Some bags after others, and where their pairs are."""
    bags = len(active.starts)
    edges = [*range(0, bags, ROWS), bags]
    ends = [*active.starts[edges[:-1]].tolist(), len(active.latent_N)]
    for at in range(len(edges) - 1):
        yield slice(edges[at], edges[at + 1]), slice(ends[at], ends[at + 1])


def _pieces(values_N: Tensor, active: Active) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some bags after others, their pairs, and these as dense (b, M); a piece is overwritten by the
    next.
    """
    room = values_N.new_empty(min(ROWS, len(active.starts)), active.d_sae)
    for bags, pairs in _slices(active):
        dense = room[: bags.stop - bags.start].zero_()
        place = (active.bag_N[pairs] - bags.start) * active.d_sae + active.latent_N[pairs]
        dense.view(-1)[place] = values_N[pairs]
        yield bags, pairs, dense
