"""Sparse features: how they are chosen, packed, and turned back into dense ones or into a
reconstruction.
"""

import functools
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.gpu import why_no_triton

logger = logging.getLogger(__name__)

GROUP = 32
"""Latents a group in the two-level top-k."""

TIES = 2**22
"""Keys that are looked through at a time where equal ones must be told apart by index."""

DENSE = 2**26
"""Numbers that are made dense at a time where features are not sparse enough to decode row by row.
"""

SPARSE_BELOW = 1 / 24
"""Decode row by row where fewer than this share of features is on; above it a dense product is
faster (measured on CPU).
"""


SUMMED_BY_KERNEL = (torch.float32, torch.float16, torch.bfloat16)
"""Decoders whose rows a GPU's own kernel sums, in float32."""


@dataclass(frozen=True)
class SparseFeatures:
    """Active features of each token, strongest (by magnitude) first; unused slots hold value 0 and
    index 0, and come last.
    """

    values: Tensor
    """(…, k_max)"""
    indices: Tensor
    """(…, k_max) int64"""
    counts: Tensor
    """(…) int64: how many slots are used, which is L0 of each token"""
    d_sae: int

    def to_dense(self) -> Tensor:
        """The same features as (…, d_sae)."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        # added, not written: unused slots all point at feature 0 and must not overwrite it
        return dense.scatter_add(-1, self.indices, self.values)

    def to(self, *args: object, **kwargs: object) -> "SparseFeatures":
        """Move to a device, or change the dtype of the values, as `Tensor.to` does."""
        values = self.values.to(*args, **kwargs)  # type: ignore[call-overload]
        device = values.device
        return SparseFeatures(values, self.indices.to(device), self.counts.to(device), self.d_sae)


def top_k(keys: Tensor, k: int) -> Tensor:
    """Indices (…, k) of the k largest keys of (…, n), largest first; of equal keys the lower
    indices, and those first. Exact.

    The k groups with the largest maxima hold all of the k largest elements, so most of the row is
    read once. One more than k is looked for: whether the last two are equal says whether indices
    decide.
    """
    n = keys.shape[-1]
    more = min(k + 1, n)
    if keys.device.type != "cpu" or n % GROUP or n // GROUP < 4 * k:
        best, indices = keys.topk(more, dim=-1)
    else:
        grouped = keys.unflatten(-1, (n // GROUP, GROUP))
        groups = grouped.amax(-1).topk(more, dim=-1, sorted=False).indices
        places = groups.unsqueeze(-1).expand(*groups.shape, GROUP)
        best, within = grouped.gather(-2, places).flatten(-2).topk(more, dim=-1)
        indices = groups.gather(-1, within // GROUP) * GROUP + within % GROUP
    indices = indices[..., :k].contiguous()
    equal = (best[..., 1:] == best[..., :-1]).any(-1)
    if bool(equal.any()):
        flat, chosen, last = keys.reshape(-1, n), indices.view(-1, k), best[..., k - 1].reshape(-1)
        for rows in equal.reshape(-1).nonzero().squeeze(-1).split(max(1, TIES // n)):
            chosen[rows] = _lower_first(flat[rows], last[rows].unsqueeze(-1), k)
    return indices


def _lower_first(keys: Tensor, last: Tensor, k: int) -> Tensor:
    """Indices of the k largest of keys (rows, n), of which `last` (rows, 1) is the smallest."""
    above = ~(keys <= last)  # NaN is the largest, as it is to torch.topk
    equal = keys == last
    left = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))
    indices = chosen.nonzero()[:, 1].view(-1, k)
    order = keys.gather(-1, indices).argsort(dim=-1, descending=True, stable=True)
    return indices.gather(-1, order)


def pack_chosen(
    values: Tensor, indices: Tensor, d_sae: int, *, in_order: bool = False
) -> SparseFeatures:
    """SparseFeatures from k chosen (values, indices), both (…, k), of which some values may be 0.

    in_order: the values are known to be non-negative and descending already.
    """
    if not in_order:
        order = values.abs().argsort(dim=-1, descending=True, stable=True)
        values, indices = values.gather(-1, order), indices.gather(-1, order)
    used = values != 0
    return SparseFeatures(values, indices.masked_fill(~used, 0), used.sum(-1), d_sae)


def pack_active(dense: Tensor) -> SparseFeatures:
    """Every non-zero of (…, d_sae), never a cut: k_max is the largest count among the tokens."""
    flat = dense.reshape(-1)
    places = flat.nonzero().squeeze(-1)
    return pack_places(flat[places], places, dense.shape)


def pack_places(values: Tensor, places: Tensor, shape: torch.Size) -> SparseFeatures:
    """SparseFeatures of dense ones (…, d_sae) of this shape, of which only `values` at `places`,
    counted through the whole row by row and ascending, are not 0.
    """
    d_sae, lead = shape[-1], shape[:-1]
    rows, columns = places // d_sae, places % d_sae
    counts = torch.bincount(rows, minlength=lead.numel())
    k_max = int(counts.max()) if counts.numel() else 0
    slots = torch.arange(rows.numel(), device=values.device) - (counts.cumsum(0) - counts)[rows]
    packed = values.new_zeros(lead.numel(), k_max).index_put((rows, slots), values)
    indices = columns.new_zeros(lead.numel(), k_max).index_put((rows, slots), columns)
    order = packed.abs().argsort(dim=-1, descending=True, stable=True)
    return SparseFeatures(
        packed.gather(-1, order).reshape(*lead, k_max),
        indices.gather(-1, order).reshape(*lead, k_max),
        counts.reshape(lead),
        d_sae,
    )


def decode_sparse(features: SparseFeatures, W_dec: Tensor) -> Tensor:
    """Sum the chosen decoder rows: out[…] = sum_k values[…, k] * W_dec[indices[…, k]]. W_dec
    (d_sae, d_out); (…, d_out).
    """
    k_max = features.values.shape[-1]
    if k_max == 0:
        return features.values.new_zeros(
            *features.values.shape[:-1], W_dec.shape[1], dtype=W_dec.dtype
        )
    if k_max >= features.d_sae * SPARSE_BELOW:
        return _decode_tiles(features, W_dec)
    values, indices = features.values.reshape(-1, k_max), features.indices.reshape(-1, k_max)
    wants_gradient = torch.is_grad_enabled() and (values.requires_grad or W_dec.requires_grad)
    summable = W_dec.is_contiguous() and W_dec.dtype in SUMMED_BY_KERNEL
    if summable and not wants_gradient and runs_kernels(W_dec.device):
        from saezoo.sparse_gpu import decode

        flat = decode(values.contiguous(), indices.contiguous(), W_dec.detach())
    else:
        flat = F.embedding_bag(
            indices, W_dec, mode="sum", per_sample_weights=values.to(W_dec.dtype)
        )
    return flat.reshape(*features.values.shape[:-1], W_dec.shape[1])


@functools.cache
def runs_kernels(device: torch.device) -> bool:
    """Whether rows are summed by the Triton kernel there: on NVIDIA GPUs that it is compiled for,
    where Triton is installed and its first launch gives what it should. Where that fails, torch's
    own sum is taken, and one warning says why.
    """
    if why_no_triton(device) is not None:
        return False
    try:
        from saezoo.sparse_gpu import decode

        values = torch.tensor([[2.0, 3.0]], device=device)
        rows = torch.tensor([[1.0], [10.0]], device=device)
        works = float(decode(values, torch.tensor([[1, 0]], device=device), rows)) == 23.0
        problem = "its first result is wrong"
    except Exception as error:  # noqa: BLE001 a driver or compiler that does not fit fails in its own ways
        works, problem = False, f"{type(error).__name__}: {error}"
    if not works:
        logger.warning(
            "Triton does not work on %s (%s): features are decoded by torch there, slower",
            device,
            " ".join(problem.split())[:300],
        )
    return works


def _decode_tiles(features: SparseFeatures, W_dec: Tensor) -> Tensor:
    """Through dense features, of some tokens at a time."""
    k_max, tile = features.values.shape[-1], max(1, DENSE // features.d_sae)
    values, indices = (
        column.reshape(-1, k_max).split(tile) for column in (features.values, features.indices)
    )
    out = [
        some.new_zeros(len(some), features.d_sae).scatter_add(-1, index, some).to(W_dec.dtype)
        @ W_dec
        for some, index in zip(values, indices, strict=True)
    ]
    return torch.cat(out).reshape(*features.values.shape[:-1], W_dec.shape[1])


def decode_dense(features: Tensor, W_dec: Tensor) -> Tensor:
    """features (…, d_sae) @ W_dec (d_sae, d_out), reading only the rows in use where those are
    few.
    """
    features = features.to(W_dec.dtype)
    flat = features.reshape(-1, features.shape[-1])
    if int(flat.count_nonzero()) >= flat.numel() * SPARSE_BELOW or not flat.numel():
        return features @ W_dec
    rows, columns = flat.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=flat.shape[0])
    out = F.embedding_bag(
        columns,
        W_dec,
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=flat[rows, columns],
    )
    return out.reshape(*features.shape[:-1], W_dec.shape[1])


FOLD = 8
"""How many keys one maximum stands for, at each level of `largest`."""


def largest(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest keys of (…, n) and their indices, both (…, k), largest first. Exact; of equal
    keys any may be chosen.

    Keys are folded to maxima, again and again. The k largest of a level lie under the k largest
    maxima of the level above, so from the top down only k * FOLD keys are looked at each time, and
    most of a row is read once.
    """
    levels = [keys]
    while keys.device.type == "cpu":
        n = levels[-1].shape[-1]
        if n % FOLD or n < FOLD * k:
            break
        # strided, not adjacent, keys share a maximum: that reads whole vectors
        levels.append(levels[-1].unflatten(-1, (FOLD, n // FOLD)).amax(-2))
    values, chosen = levels.pop().topk(k, dim=-1, sorted=not levels)
    for level in reversed(levels):
        strides = torch.arange(0, level.shape[-1], level.shape[-1] // FOLD).unsqueeze(-1)
        candidates = (chosen.unsqueeze(-2) + strides).flatten(-2)
        values, best = level.gather(-1, candidates).topk(k, dim=-1, sorted=level is keys)
        chosen = candidates.gather(-1, best)
    return values, chosen
