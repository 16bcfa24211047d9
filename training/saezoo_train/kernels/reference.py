"""What every kernel computes, in plain torch: the truth that they are tested against.

A function here has the name, the arguments and the results of the kernel's own wrapper (without
`out=`). Sums are taken in float32 whatever the dtype; nothing here is meant to be fast.

Lists: each token has K slots, a value and the index of a latent each, by rising index. A slot that
is not used has value 0 and index M, one past the last latent, so that all shapes are known
beforehand; such slots are the last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo_train.kernels.rows import Extra, Rows

# B tokens, D d_in, M d_sae, G groups of latents, K slots of a token, N = B K, A dead latents

GROUP = 32
"""Latents a group."""


def centre(x_BD: Tensor, b_dec_D: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x - b_dec, or x alone, in the dtype: (B, D)."""
    return (x_BD.float() if b_dec_D is None else x_BD.float() - b_dec_D).to(dtype)


def encode(
    x_BD: Tensor, W_enc_MD: Tensor, bias_M: Tensor, *, offset_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pre-activations W_enc x + bias, (B, M), rounded to x's dtype; and the largest of each 32
    latents of what was stored, minus their offset, (B, G) float32.
    """
    pre_BM = (x_BD.float() @ W_enc_MD.float().T + bias_M.float()).to(x_BD.dtype)
    above_BM = pre_BM.float() if offset_M is None else pre_BM.float() - offset_M.float()
    padded = F.pad(above_BM, (0, -above_BM.shape[1] % GROUP), value=-torch.inf)
    maxima_BG = padded.unflatten(1, (-1, GROUP)).amax(-1)
    return pre_BM, maxima_BG.to(x_BD.dtype) if offset_M is None else maxima_BG


def select_top_k(
    pre_BM: Tensor, maxima_BG: Tensor, k: int, *, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """The k largest of each token, of equal ones the lower index first, in the order of their
    indices: values (B, k) float32, 0 instead of what is negative where `relu`, and indices (B, k)
    int32.
    """
    del maxima_BG
    order_BM = pre_BM.float().sort(dim=-1, descending=True, stable=True).indices
    idx_BK = order_BM[:, :k].sort(dim=-1).values
    values_BK = pre_BM.float().gather(1, idx_BK)
    return values_BK.relu() if relu else values_BK, idx_BK.int()


def select_batch_top_k(
    pre_BM: Tensor, maxima_BG: Tensor, count: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `count` largest positive ones of the whole batch, of equal ones the lower place (token,
    then latent) first: values (B, capacity) float32 and indices (B, capacity) int32.

    Then the smallest value that was kept, () float32, 0 where there is none; and by how many slots
    the lists were too short for the token with the most, () int32. What did not fit is left out,
    highest index first.
    """
    del maxima_BG
    flat = pre_BM.float().flatten()
    order = flat.sort(descending=True, stable=True).indices[:count]
    order = order[flat[order] > 0]
    on_BM = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, order, True).view_as(pre_BM)
    smallest = flat[order].min() if len(order) else flat.new_zeros(())
    values_BK, idx_BK, counts_B = _lists(pre_BM, on_BM, capacity)
    return values_BK, idx_BK, smallest, _lacking(counts_B, capacity)


def select_above(
    pre_BM: Tensor, maxima_BG: Tensor, bound_M: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What exceeds its latent's bound: values (B, capacity) float32 and indices (B, capacity)
    int32; how many there were of each token, (B,) int32, whether they fitted or not; and by how
    many slots the lists were too short, () int32.
    """
    del maxima_BG
    values_BK, idx_BK, counts_B = _lists(pre_BM, pre_BM.float() > bound_M.float(), capacity)
    return values_BK, idx_BK, counts_B, _lacking(counts_B, capacity)


def _lists(pre_BM: Tensor, on_BM: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    d_sae = pre_BM.shape[1]
    places_BM = torch.arange(d_sae, device=pre_BM.device).where(on_BM, d_sae)
    short = max(0, capacity - d_sae)
    idx_BK = F.pad(places_BM.sort(dim=-1).values[:, :capacity], (0, short), value=d_sae)
    values_BK = F.pad(pre_BM.float(), (0, 1)).gather(1, idx_BK)
    return values_BK, idx_BK.int(), on_BM.sum(-1).int()


def _lacking(counts_B: Tensor, capacity: int) -> Tensor:
    return (counts_B.amax() - capacity).clamp_min(0).int()


def csc(idx_BK: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """The slots by latent, within one by place: their places in the flat list, (N,) int32, unused
    ones last; and where each latent's stretch begins, (M + 1,) int32, the last being where the
    unused begin.
    """
    flat_N = idx_BK.flatten().long()
    order_N = flat_N.sort(stable=True).indices
    counts = torch.bincount(flat_N, minlength=d_sae + 1)[:d_sae]
    return order_N.int(), F.pad(counts.cumsum(0), (1, 0)).int()


def decode(
    values_BK: Tensor, idx_BK: Tensor, W_dec_MD: Tensor, bias_D: Tensor | None = None
) -> Tensor:
    """out[b] = sum_k values[b, k] * W_dec[idx[b, k]] (+ bias), (B, D) in W_dec's dtype."""
    out_BD = torch.einsum("bk,bkd->bd", values_BK.float(), _rows(W_dec_MD, idx_BK))
    return (out_BD if bias_D is None else out_BD + bias_D.float()).to(W_dec_MD.dtype)


def decode_loss(
    values_BK: Tensor,
    idx_BK: Tensor,
    W_dec_MD: Tensor,
    x_BD: Tensor,
    scale: float,
    bias_D: Tensor | None = None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """With e = decode(values) (+ bias) - x, not rounded: scale * e in x's dtype, (B, D), which is
    dL/dout of L = scale / 2 * sum e²; the squared error ‖e‖² of each token, (B,) float32; and
    dL/dvalues, (B, K) float32, from dL/dout as it was rounded.

    relu: the values are those of a ReLU, and the gradient is that of what it was taken of: 0 where
    values <= 0.
    """
    rows_BKD = _rows(W_dec_MD, idx_BK)
    error_BD = torch.einsum("bk,bkd->bd", values_BK.float(), rows_BKD) - x_BD.float()
    if bias_D is not None:
        error_BD = error_BD + bias_D.float()
    grad_BD = (scale * error_BD).to(x_BD.dtype)
    dvalues_BK = torch.einsum("bd,bkd->bk", grad_BD.float(), rows_BKD)
    if relu:
        dvalues_BK = dvalues_BK * (values_BK > 0)
    return grad_BD, error_BD.pow(2).sum(-1), dvalues_BK


def pair_products(rows_BD: Tensor, idx_BK: Tensor, W_MD: Tensor) -> Tensor:
    """out[b, k] = rows[b] . W[idx[b, k]], (B, K) float32; 0 at unused slots."""
    return torch.einsum("bd,bkd->bk", rows_BD.float(), _rows(W_MD, idx_BK))


def _rows(W_MD: Tensor, idx_BK: Tensor) -> Tensor:
    """W[idx], (B, K, D) float32, zeros at unused slots."""
    return F.pad(W_MD.float(), (0, 0, 0, 1))[idx_BK.long()]


def latent_sums(values_BK: Tensor, order_N: Tensor, starts_M1: Tensor) -> Tensor:
    """out[m] = sum of the values in the slots of latent m: (M,) float32."""
    return _by_latent(values_BK.float().flatten()[:, None], order_N, starts_M1).squeeze(1)


def weight_gradient(
    values_BK: Tensor, rows_BD: Tensor, idx_BK: Tensor, order_N: Tensor, starts_M1: Tensor
) -> Tensor:
    """out[m] = sum of values[b, k] * rows[b] over the slots of latent m: (M, D) float32."""
    del idx_BK
    rows_ND = rows_BD.float().repeat_interleave(values_BK.shape[1], 0)
    return _by_latent(values_BK.float().flatten()[:, None] * rows_ND, order_N, starts_M1)


def _by_latent(parts_ND: Tensor, order_N: Tensor, starts_M1: Tensor) -> Tensor:
    """Sums of each latent's slots, (M, D)."""
    places_N = torch.arange(len(order_N), device=order_N.device)
    latent_N = torch.searchsorted(starts_M1[1:].long(), places_N, right=True)
    out = parts_ND.new_zeros(len(starts_M1), parts_ND.shape[1])
    return out.index_add(0, latent_N, parts_ND[order_N.long()])[:-1]


def weighted_rows(weights_M: Tensor, W_MD: Tensor) -> Tensor:
    """sum_m weights[m] * W[m], (D,) float32."""
    return weights_M.float() @ W_MD.float()


def update_vector(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    rates_2: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    least: float | None = None,
) -> None:
    """Adam on a vector, in place; all float32. least: what p is kept at or above afterwards."""
    _adam(p, m, v, grad.float(), rates_2, betas, eps)
    if least is not None:
        p.clamp_(min=least)


def update_rows(
    rows: Rows,
    x_BD: Tensor,
    grad_BD: Tensor,
    values_BK: Tensor,
    dpre_BK: Tensor,
    idx_BK: Tensor,
    order_N: Tensor,
    starts_M1: Tensor,
    rates_2: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    unit_rows: bool = True,
    extra: Extra | None = None,
    pull_M: Tensor | None = None,
    norms_M: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole update of both matrices, in place: see `saezoo_train.kernels.update`."""
    del seed
    enc_MD = weight_gradient(dpre_BK, x_BD, idx_BK, order_N, starts_M1)
    dec_MD = weight_gradient(values_BK, grad_BD, idx_BK, order_N, starts_M1)
    gb_M = latent_sums(dpre_BK, order_N, starts_M1)
    if extra is not None:
        chosen_M = extra.slot_M >= 0
        slots = extra.slot_M[chosen_M].long()
        enc_MD[chosen_M] += extra.dW_enc_AD.float()[slots]
        dec_MD[chosen_M] += extra.dW_dec_AD.float()[slots]
        gb_M[chosen_M] += extra.db_A[slots]
    enc_part_D = weighted_rows(gb_M, rows.W_enc_c)
    if pull_M is not None:
        norm_M1 = rows.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        dec_MD += pull_M[:, None] * rows.W_dec / norm_M1
    if unit_rows:
        dec_MD -= (dec_MD * rows.W_dec).sum(-1, keepdim=True) * rows.W_dec
    _adam(rows.W_enc, rows.enc_m, rows.enc_v, enc_MD, rates_2, betas, eps)
    _adam(rows.W_dec, rows.dec_m, rows.dec_v, dec_MD, rates_2, betas, eps)
    if unit_rows:
        rows.W_dec.div_(rows.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    if norms_M is not None:
        norms_M.copy_(rows.W_dec.norm(dim=-1))
    rows.W_enc_c.copy_(rows.W_enc)
    rows.W_dec_c.copy_(rows.W_dec)
    return gb_M, enc_part_D


def _adam(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    rates_2: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """torch.optim.Adam's arithmetic. Moments in bfloat16 are rounded to the nearest here; the
    kernel rounds them up or down by chance, so that small changes are not lost.
    """
    wide_m = m.float() + (grad - m.float()) * (1 - betas[0])
    wide_v = v.float() * betas[1] + grad * grad * (1 - betas[1])
    m.copy_(wide_m)
    v.copy_(wide_v)
    p -= rates_2[0] * wide_m / (wide_v.sqrt() / rates_2[1] + eps)


def keep_largest(pre_BA: Tensor, k: int) -> Tensor:
    """ReLU of what is among the k largest of its row, of equal ones the lower index first, else 0.
    In pre's dtype.
    """
    order_BK = pre_BA.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    kept_BA = torch.zeros_like(pre_BA, dtype=torch.bool).scatter(1, order_BK, True)
    return pre_BA.relu().where(kept_BA, 0)


def dead_rows(silent_M: Tensor, after: int, capacity: int) -> Tensor:
    """The latents that were silent for more than `after` tokens, rising, (capacity,) int32; M where
    there are no more. Those that find no room are left out.
    """
    dead = (silent_M > after).nonzero().flatten()[:capacity]
    return F.pad(dead, (0, capacity - len(dead)), value=len(silent_M)).int()


def auxk(
    xc_BD: Tensor,
    grad_BD: Tensor,
    scale: float,
    W_enc_c: Tensor,
    b_enc_M: Tensor,
    W_dec_c: Tensor,
    dead_A: Tensor,
    k: int,
    coefficient: float,
) -> tuple[Tensor, Extra]:
    """AuxK of the latents in dead_A, before its coefficient, and the gradients of coefficient *
    AuxK: see `saezoo_train.architectures.auxk`. The error is -grad / scale, held fixed. Which k are
    kept is decided by pre-activations as they are rounded to xc's dtype.
    """
    used_A, d_sae = dead_A < len(W_enc_c), len(W_enc_c)
    rows_A = dead_A.long().clamp_max(d_sae - 1)
    leaves = [part.float()[rows_A].requires_grad_() for part in (W_enc_c, b_enc_M, W_dec_c)]
    enc_AD, bias_A, dec_AD = leaves
    error_BD = grad_BD.float() / -scale
    with torch.enable_grad():
        pre_BA = F.linear(xc_BD.float(), enc_AD, bias_A)
        rounded_BA = pre_BA.detach().to(xc_BD.dtype).where(used_A, -torch.inf)
        acts_BA = pre_BA * (keep_largest(rounded_BA, min(k, len(dead_A))) > 0)
        missed = (acts_BA @ dec_AD - error_BD).pow(2).sum(-1).mean()
        spread = (error_BD - error_BD.mean(0)).pow(2).sum(-1).mean()
        loss = missed / spread if spread > 0 and used_A.any() else missed * 0
        dW_enc_AD, db_A, dW_dec_AD = torch.autograd.grad(coefficient * loss, leaves)
    slot_M = torch.full((d_sae,), -1, dtype=torch.int32, device=dead_A.device)
    slots_A = torch.arange(len(dead_A), dtype=torch.int32, device=dead_A.device)
    slot_M[dead_A[used_A].long()] = slots_A[used_A]
    return loss.detach(), Extra(slot_M, dW_enc_AD, dW_dec_AD, db_A)
