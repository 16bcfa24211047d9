"""How good an SAE is: each number defined once, summed in float64 over a stream of tokens.

x is what the SAE reads, y what it is to give: x itself, and for a transcoder the tensor at its
output site. ŷ is sae(x), f its features. The first group is over the counted tokens: those that the
SAE's token rule leaves.

FVU                  sum ‖y - ŷ‖² / sum ‖y - mean(y)‖², raw units
explained variance   1 - FVU
L0                   mean number of features that are not zero
L1                   mean of sum |f|
cosine               mean of y·ŷ / (‖y‖ ‖ŷ‖), 0 where either is zero
reconstruction bias  sum ‖ŷ‖² / sum y·ŷ: the factor by which ŷ is too long; under 1 it has shrunk
                     (Rajamanoharan et al. 2024, arXiv:2404.16014, equation 10)
dead fraction        share of features that fired on none of the counted tokens
dense fraction       share of features that fired on more than DENSE of them
PCA-k FVU            the FVU of the best k-dimensional affine subspace fitted to the same tokens: no
                     linear method does better

The second group is over every next token of a language model, in nats. The site's tensor is
replaced at every position >= 1: by ŷ (spliced), by zeros (zero), by the mean of y over the counted
tokens (mean).

loss recovered       (zero - spliced) / (zero - clean), and with the mean in place of zeros
KL                   mean over positions of sum p log(p / q), p the model's prediction as it is, q
                     that with ŷ in place

Version 2 adds explained variance, L1, cosine, reconstruction bias, dense fraction, mean ablation,
KL and transcoders. What version 1 had means the same in both.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.errors import InputError
from saezoo.sae import CHOOSING, SAE
from saezoo.sparse import SparseFeatures

VERSION = 2
"""Of the definitions above; written beside every number that is published."""

CHUNK = 2**25
"""Dense features at a time: 128 MB of float32."""

DENSE = 0.1
"""A feature that fires on a larger share of tokens is dense."""


@dataclass(frozen=True)
class Metrics:
    """What was measured; None for what was not, or has no value."""

    fvu: float | None
    explained_variance: float | None
    l0: float
    l1: float
    cosine: float
    relative_reconstruction_bias: float | None
    dead_fraction: float
    dense_fraction: float
    tokens: int
    contexts: int
    outlier_share: float
    """Share of otherwise counted tokens that the rule on norms left out of the first group."""
    pca_k: int | None = None
    pca_fvu: float | None = None
    loss_clean: float | None = None
    loss_spliced: float | None = None
    loss_zero: float | None = None
    loss_mean: float | None = None
    loss_recovered: float | None = None
    loss_recovered_mean: float | None = None
    kl: float | None = None
    version: int = VERSION

    def to_json(self) -> dict[str, float | int]:
        """What is known, as plain JSON values."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class ReconstructionSums:
    """Running sums of everything that needs no second run of the model, over batches of tokens."""

    def __init__(
        self, d_out: int, d_sae: int, *, covariance: bool = False, norms: bool = False
    ) -> None:
        self.tokens, self.active = 0, 0
        self.error, self.squares, self.out_squares, self.products = 0.0, 0.0, 0.0, 0.0
        self.absolute, self.cosines = 0.0, 0.0
        self.total = torch.zeros(d_out, dtype=torch.float64)
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.strongest = torch.zeros(d_sae)
        self.counts: list[Tensor] = []
        self.norms: list[Tensor] = []
        """Of y and ŷ (tokens, 2) float32, where wanted."""
        self.outer = torch.zeros(d_out, d_out, dtype=torch.float64) if covariance else None
        self._keeps_norms = norms

    @torch.no_grad()
    def add(
        self, sae: SAE, x: Tensor, *, target: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Count the tokens x (tokens, d_in), raw activations, for which keep (tokens,) holds: all
        of them without it. Returns sae(x) (tokens, d_out), of all of them.

        target: (tokens, d_out) what a transcoder's output is to be near; x itself for an SAE.
        """
        y = x if target is None else target
        if y.shape[:-1] != x.shape[:-1] or y.shape[-1] != len(self.total):
            raise InputError(
                f"the target is {tuple(y.shape)}, expected {(*x.shape[:-1], len(self.total))}"
            )
        keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if keep is None else keep
        parts = []
        for x_part, y_part, kept in in_chunks(sae, x, y, keep):
            features = sparse_or_dense(sae, x_part)
            out = sae.decode(features, x_part)
            parts.append(out)
            self._count_features(features, kept)
            self._count_vectors(y_part[kept], out[kept])
        return torch.cat(parts) if parts else x.new_zeros(0, len(self.total))

    def _count_features(self, features: Tensor | SparseFeatures, keep: Tensor) -> None:
        """(tokens, …) features of the tokens that count."""
        if isinstance(features, SparseFeatures):
            values, index = features.values[keep], features.indices[keep]
            counts, on = features.counts[keep], values != 0
            index, values = index[on].cpu(), values[on].float().cpu()
            self.fired += torch.bincount(index, minlength=len(self.fired))
            self.strongest.scatter_reduce_(0, index, values, "amax")
            self.absolute += float(values.abs().sum(dtype=torch.float64))
        else:
            values = features[keep]
            on = values != 0
            counts = on.sum(-1)
            self.fired += on.sum(0).cpu()
            if len(values):
                self.strongest = torch.maximum(self.strongest, values.amax(0).float().cpu())
            self.absolute += float(values.abs().sum(dtype=torch.float64))
        self.active += int(counts.sum())
        self.counts.append(counts.cpu())

    def _count_vectors(self, y: Tensor, out: Tensor) -> None:
        """Both (tokens, d_out)."""
        y64, out64 = _wide(y), _wide(out)
        y_squares, out_squares = y64.pow(2).sum(-1), out64.pow(2).sum(-1)
        products = (y64 * out64).sum(-1)
        self.tokens += len(y64)
        self.error += float((y64 - out64).pow(2).sum())
        self.squares += float(y_squares.sum())
        self.out_squares += float(out_squares.sum())
        self.products += float(products.sum())
        lengths = (y_squares * out_squares).sqrt()
        self.cosines += float((products / lengths).masked_fill(lengths == 0, 0).sum())
        self.total += y64.sum(0).cpu()
        if self._keeps_norms:
            self.norms.append(torch.stack([y_squares, out_squares], 1).sqrt().float().cpu())
        if self.outer is not None:
            self.outer += (y64.T @ y64).cpu()

    @property
    def mean(self) -> Tensor:
        """(d_out,) float64: mean(y) over the tokens so far."""
        return self.total / max(self.tokens, 1)

    @property
    def variance(self) -> float:
        """sum ‖y - mean‖² over the tokens so far."""
        return self.squares - float(self.total.pow(2).sum()) / max(self.tokens, 1)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained, about the mean: 0 is perfect, 1 is predicting the
        mean.
        """
        return self.error / self.variance if self.variance else float("nan")

    @property
    def l0(self) -> float:
        """Mean number of active features."""
        return self.active / max(self.tokens, 1)

    @property
    def l1(self) -> float:
        """Mean sum of the features' magnitudes."""
        return self.absolute / max(self.tokens, 1)

    @property
    def cosine(self) -> float:
        """Mean cosine of y and ŷ."""
        return self.cosines / max(self.tokens, 1)

    @property
    def bias(self) -> float:
        """The factor by which ŷ is too long."""
        return self.out_squares / self.products if self.products else float("nan")

    @property
    def dead_fraction(self) -> float:
        """Share of features that never fired."""
        return float((self.fired == 0).double().mean())

    @property
    def dense_fraction(self) -> float:
        """Share of features that fired on more than DENSE of the tokens."""
        return float((self.fired > DENSE * self.tokens).double().mean())

    @property
    def density(self) -> Tensor:
        """(d_sae,) share of tokens on which each feature fires, float32."""
        return (self.fired.double() / max(self.tokens, 1)).float()

    def pca_fvu(self, k: int) -> float:
        """FVU of the best k-dimensional affine subspace for these very tokens."""
        assert self.outer is not None, "ReconstructionSums(covariance=True) is needed for PCA"
        scatter = self.outer - torch.outer(self.total, self.total) / self.tokens
        values = torch.linalg.eigvalsh(scatter)
        return float(values[:-k].clamp_min(0).sum() / values.sum())


def _wide(x: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def sparse_or_dense(sae: SAE, x: Tensor) -> Tensor | SparseFeatures:
    """Features of x (tokens, d_in): sparse where the architecture is, or is one of one's own;
    packing what is dense only costs.
    """
    chosen = sae.cfg.architecture in (*CHOOSING, "custom")
    return sae.encode_sparse(x) if chosen else sae.encode(x)


def in_chunks(sae: SAE, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some tokens at a time, so that dense features stay within CHUNK numbers; all at once where
    what is on for one depends on the others.
    """
    together = sae.cfg.architecture == "tensor_topk"
    rows = max(1, len(tensors[0]) if together else CHUNK // sae.d_sae)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def density_histogram(density: Tensor) -> dict[str, list[float] | list[int] | int]:
    """How many features fire how often: {edges, counts, never}, half a decade a bin.

    edges (n + 1): shares of tokens, from at most the rarest that occurs up to 1.
    """
    alive = density[density > 0].double()
    lowest = math.floor(2 * math.log10(float(alive.min()))) if len(alive) else -2
    steps = torch.arange(min(lowest, -2), 1, dtype=torch.float64) / 2
    edges = 10**steps
    # a feature that is always on belongs into the last bin, whose upper edge is 1
    bins = (torch.bucketize(alive, edges, right=True) - 1).clamp(0, len(edges) - 2)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "never": int((density == 0).sum()),
    }


def next_token_loss(logits: Tensor, input_ids: Tensor, mask: Tensor) -> tuple[float, int]:
    """Sum of next-token cross entropies in nats over real targets, and how many there are."""
    target = input_ids[:, 1:]
    real = mask[:, 1:].bool()
    total = 0.0
    # a row at a time: a copy of all logits would be the largest tensor of an evaluation
    for row in range(len(logits)):
        chosen = logits[row, :-1][real[row]].float()
        losses = F.cross_entropy(chosen, target[row][real[row]], reduction="none")
        total += float(losses.sum(dtype=torch.float64))
    return total, int(real.sum())


def kl_divergence(clean: Tensor, other: Tensor, mask: Tensor) -> float:
    """Sum of KL(clean ‖ other) in nats over the positions that have a real next token. Logits
    (batch, positions, vocabulary).
    """
    real = mask[:, 1:].bool()
    total = 0.0
    for row in range(len(clean)):
        log_p = clean[row, :-1][real[row]].float().log_softmax(-1)
        log_q = other[row, :-1][real[row]].float().log_softmax(-1)
        p = log_p.exp()
        # 0 log 0 is 0: a model may forbid tokens outright
        terms = torch.where(p > 0, p * (log_p - log_q), 0)
        total += float(terms.sum(dtype=torch.float64))
    return total


def recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """Share of the loss that ablation costs and the reconstruction saves; None where it costs
    nothing.
    """
    return (ablated - spliced) / (ablated - clean) if ablated != clean else None
