"""From a batch to the gradients of its lists' entries, for each architecture that has kernels: the
same formulas as in `saezoo_train.architectures`, written as gradients.

Nothing here waits for the device, and no shape depends on data. What changes from step to step is a
tensor, so that a captured graph reads it anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo_train.kernels.rows import Rows

# B tokens, D d_in, M d_sae, K slots of a token


@dataclass
class Entries:
    """What one batch gives. Losses are scalars on the device."""

    idx_BK: Tensor
    values_BK: Tensor
    """What the decoder sums."""
    grad_BD: Tensor
    """Of the loss by the reconstruction."""
    dpre_BK: Tensor
    """Of the loss by what a row of W_enc gives."""
    fired_BK: Tensor
    """bool: which latents count as on."""
    loss: Tensor
    fvu: Tensor
    vectors: dict[str, Tensor | None]
    """Gradients of the entries by one number of their latent, (B, K), by the parameter's name;
    None: the same as dpre.
    """
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """What every architecture's formula is given."""

    kit: ModuleType
    """The kernels, or the reference with functions of the same names."""
    model: Any
    rows: Rows
    x_BD: Tensor
    """About b_dec where the encoder subtracts it."""
    variance: float
    sparsity: Tensor
    """How much of a sparsity penalty is in force, () float32."""
    k: int
    """Latents of a token: exactly, or on average."""
    capacity: int
    """Slots of a token."""

    @property
    def scale(self) -> float:
        """Of an error, in the gradient of the FVU by the reconstruction."""
        return 2 / (len(self.x_BD) * self.variance)

    def fvu(self, loss_B: Tensor) -> Tensor:
        """From the squared errors of the tokens."""
        return loss_B.sum() / (len(self.x_BD) * self.variance)

    def of_latents(self, vector_M: Tensor, idx_BK: Tensor) -> Tensor:
        """A number of each entry's latent, 0 at unused slots: (B, K)."""
        return F.pad(vector_M, (0, 1)).take(idx_BK.long())


@dataclass(frozen=True)
class Kept:
    """Which pre-activations of a batch were kept, and their values."""

    values_BK: Tensor
    idx_BK: Tensor
    lacking: Tensor | None = None
    """By how many slots the lists were too short, () int32; None: they never are."""
    smallest: Tensor | None = None
    """BatchTopK: the smallest value, 0 where there is none."""


def keep_top_k(at: Batch) -> Kept:
    """The k largest of each token."""
    pre, maxima = at.kit.encode(at.x_BD, at.rows.W_enc_c, at.model.b_enc.data)
    return Kept(*at.kit.select_top_k(pre, maxima, at.k))


def keep_batch_top_k(at: Batch) -> Kept:
    """As many as k of each token, the largest of the whole batch."""
    pre, maxima = at.kit.encode(at.x_BD, at.rows.W_enc_c, at.model.b_enc.data)
    count = at.k * len(at.x_BD)
    values, idx, smallest, lacking = at.kit.select_batch_top_k(pre, maxima, count, at.capacity)
    return Kept(values, idx, lacking, smallest)


def keep_near_threshold(at: Batch) -> Kept:
    """Those above their threshold, or within half a bandwidth below it."""
    model = at.model
    bound_M = model.threshold.data - model.options.bandwidth / 2
    pre, maxima = at.kit.encode(at.x_BD, at.rows.W_enc_c, model.b_enc.data, offset_M=bound_M)
    values, idx, _, lacking = at.kit.select_above(pre, maxima, bound_M, at.capacity)
    return Kept(values, idx, lacking)


def keep_open_gates(at: Batch) -> Kept:
    """The gates above 0."""
    b_gate_M = at.model.b_gate.data
    pre, maxima = at.kit.encode(at.x_BD, at.rows.W_enc_c, b_gate_M)
    zeros_M = torch.zeros_like(b_gate_M)
    values, idx, _, lacking = at.kit.select_above(pre, maxima, zeros_M, at.capacity)
    return Kept(values, idx, lacking)


def top_k(at: Batch, kept: Kept) -> Entries:
    """TopK: see `saezoo_train.architectures.topk`."""
    values, idx = kept.values_BK, kept.idx_BK
    grad, loss_B, dpre = at.kit.decode_loss(
        values, idx, at.rows.W_dec_c, at.x_BD, at.scale, relu=True
    )
    fvu = at.fvu(loss_B)
    return Entries(idx, values, grad, dpre, values > 0, fvu, fvu, {"b_enc": None})


def batch_top_k(at: Batch, kept: Kept) -> Entries:
    """BatchTopK: see `saezoo_train.architectures.batchtopk`."""
    model, smallest = at.model, kept.smallest
    assert smallest is not None
    entries = top_k(at, kept)
    any_on = smallest > 0
    model.smallest.copy_(smallest.where(any_on, model.smallest))
    moved = model.threshold.lerp(smallest, 1 - model.options.threshold_beta)
    moved = smallest.where(model.threshold < 0, moved)
    model.threshold.copy_(moved.where(any_on, model.threshold))
    entries.logs["threshold"] = model.threshold.clone()
    return entries


def jump_relu(at: Batch, kept: Kept) -> Entries:
    """JumpReLU: see `saezoo_train.architectures.jumprelu`."""
    model, options = at.model, at.model.options
    width, theta_M = options.bandwidth, model.threshold.data
    z, idx = kept.values_BK, kept.idx_BK
    used, theta = idx < len(theta_M), at.of_latents(theta_M, idx)
    on = used & (z > theta)
    features = z * on
    bias = None if options.subtract_b_dec else model.b_dec.data
    grad, loss_B, dfeatures = at.kit.decode_loss(
        features, idx, at.rows.W_dec_c, at.x_BD, at.scale, bias
    )
    l0 = on.sum() / len(at.x_BD)
    if options.target_l0 is None:
        penalty, slope = options.l0_coefficient * l0, torch.full_like(l0, options.l0_coefficient)
    else:
        over = l0 / options.target_l0 - 1
        penalty = options.target_coefficient * over.pow(2)
        slope = options.target_coefficient * 2 / options.target_l0 * over
    penalty, slope = penalty * at.sparsity, slope * at.sparsity / len(at.x_BD)
    window = used & ((z - theta).abs() < width / 2)
    through = (dfeatures * theta + slope) / width * window
    dz = dfeatures * on
    if options.ste_to_input:
        dz = dz + through
    fvu = at.fvu(loss_B)
    logs = {"penalty": penalty, "threshold": theta_M.mean(), "pre_act": torch.zeros_like(fvu)}
    vectors = {"b_enc": None, "threshold": -through}
    return Entries(idx, features, grad, dz, on, fvu + penalty, fvu, vectors, logs)


def gated(at: Batch, kept: Kept) -> Entries:
    """Gated: see `saezoo_train.architectures.gated`."""
    model = at.model
    b_gate_M = model.b_gate.data
    gate, idx = kept.values_BK, kept.idx_BK
    used = idx < len(b_gate_M)
    projected = gate - at.of_latents(b_gate_M, idx)
    factor = at.of_latents(model.r_mag.data.exp(), idx)
    magnitude = factor * projected + at.of_latents(model.b_mag.data, idx)
    features = magnitude.relu()
    rows = at.rows.W_dec_c
    grad, loss_B, dfeatures = at.kit.decode_loss(features, idx, rows, at.x_BD, at.scale)
    # the decoder and b_dec are held fixed in this one
    _, frozen_B, dgate = at.kit.decode_loss(gate, idx, rows, at.x_BD, at.scale)
    l1 = gate.sum() / len(at.x_BD)
    weight = model.penalty_weight(at.sparsity)
    dgate = (dgate + weight / len(at.x_BD)) * used
    fired = magnitude > 0
    dmagnitude = dfeatures * fired
    dpre = dmagnitude * factor + dgate
    fvu, auxiliary = at.fvu(loss_B), at.fvu(frozen_B)
    vectors = {
        "b_gate": dgate,
        "r_mag": dmagnitude * factor * projected,
        "b_mag": dmagnitude,
    }
    logs = {"l1": l1, "auxiliary": auxiliary}
    logs |= model.search(fired.sum() / len(at.x_BD), at.sparsity)
    loss = fvu + weight * l1 + auxiliary
    return Entries(idx, features, grad, dpre, fired, loss, fvu, vectors, logs)


@dataclass(frozen=True)
class Formula:
    """An architecture in two parts: what is kept, and what becomes of it."""

    keep: Callable[[Batch], Kept]
    entries: Callable[[Batch, Kept], Entries]


FORMULAS: dict[str, Formula] = {
    "TopK": Formula(keep_top_k, top_k),
    "BatchTopK": Formula(keep_batch_top_k, batch_top_k),
    "JumpReLU": Formula(keep_near_threshold, jump_relu),
    "Gated": Formula(keep_open_gates, gated),
}
"""By the name of the architecture's class."""
