"""The products of a sparse step: each touches only the rows that are on.

They are plain functions of tensors, so that a kernel can take the place of any of them. No sum's
order depends on timing: results repeat bitwise for a fixed number of threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo_train.ops.active import Active

# N pairs, B tokens, D d_in or d_out, M d_sae; bags see Active


def decode(values_N: Tensor, active: Active, W_dec_MD: Tensor) -> Tensor:
    """out[bag] = sum of values[n] * W_dec[latent[n]] over the bag's pairs: (bags, D)."""
    return F.embedding_bag(
        active.latent_N, W_dec_MD, active.starts, mode="sum", per_sample_weights=values_N
    )


def pair_products(rows: Tensor, W_MD: Tensor, active: Active) -> Tensor:
    """out[n] = rows[bag[n]] . W[latent[n]] with rows (bags, D): (N,). What `decode` gives back to
    its values.
    """
    # torch's own formula for the gradient of embedding_bag's weights: no row is copied
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(), W_MD, active.latent_N, active.starts, active.bag_N, 0
    )


def weight_gradient(values_N: Tensor, rows: Tensor, row_N: Tensor, active: Active) -> Tensor:
    """out[m] = sum of values[n] * rows[row_N[n]] over the pairs of latent m: (M, D)."""
    group = active.by_latent
    return F.embedding_bag(
        row_N[group.order_N],
        rows,
        group.starts_M,
        mode="sum",
        per_sample_weights=values_N[group.order_N],
    )


def latent_sums(values_N: Tensor, active: Active) -> Tensor:
    """out[m] = sum of values[n] over the pairs of latent m: (M,)."""
    group = active.by_latent
    places_N = torch.arange(len(values_N), device=values_N.device)
    ordered_N1 = values_N[group.order_N].unsqueeze(-1)
    return F.embedding_bag(places_N, ordered_N1, group.starts_M, mode="sum").squeeze(-1)
