"""How good an SAE is: each number defined once, summed in float64 over a stream of tokens.

FVU             sum ‖x - x̂‖² / sum ‖x - mean(x)‖², raw units, over all counted tokens
L0              mean number of features that are not zero
dead fraction   share of features that fired on none of the counted tokens
PCA-k FVU       the FVU of the best k-dimensional affine subspace fitted to the same tokens: no
                linear method does better
loss recovered  (zero - spliced) / (zero - clean) of the mean next-token loss in nats, where the
                site's tensor is replaced at every position >= 1 by its reconstruction (spliced)
                or by zeros (zero)
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saezoo.capture import Dropped, hook_site, keep_tokens, padded
from saezoo.config import Site, TokenRule
from saezoo.errors import CaptureError
from saezoo.sae import SAE

VERSION = 1
"""Of the definitions above; written beside every number that is published."""


@dataclass(frozen=True)
class Metrics:
    """What `evaluate` measured. Losses are nats per predicted token."""

    fvu: float
    l0: float
    dead_fraction: float
    pca_k: int
    pca_fvu: float
    loss_clean: float
    loss_spliced: float
    loss_zero: float
    loss_recovered: float
    tokens: int
    contexts: int
    outlier_share: float
    """Share of otherwise counted tokens that the rule on norms left out of FVU and L0."""
    version: int = VERSION


class ReconstructionSums:
    """Running sums for FVU, L0, dead features and PCA over batches of tokens."""

    def __init__(self, d_in: int, d_sae: int, *, covariance: bool = False) -> None:
        self.tokens, self.error, self.squares, self.active = 0, 0.0, 0.0, 0
        self.total = torch.zeros(d_in, dtype=torch.float64)
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.strongest = torch.zeros(d_sae)
        self.outer = torch.zeros(d_in, d_in, dtype=torch.float64) if covariance else None

    @torch.no_grad()
    def add(self, sae: SAE, x: Tensor) -> None:
        """Count the tokens x (tokens, d_in), raw activations."""
        if not len(x):
            return
        features = sae.encode_sparse(x)
        out = sae.decode(features, x)
        x64 = x.double().cpu()
        self.tokens += len(x)
        self.error += float((x64 - out.double().cpu()).pow(2).sum())
        self.squares += float(x64.pow(2).sum())
        self.total += x64.sum(0)
        self.active += int(features.counts.sum())
        on = features.values != 0
        index, value = features.indices[on].cpu(), features.values[on].float().cpu()
        self.fired += torch.bincount(index, minlength=len(self.fired))
        self.strongest.scatter_reduce_(0, index, value, "amax")
        if self.outer is not None:
            self.outer += x64.T @ x64

    @property
    def variance(self) -> float:
        """sum ‖x - mean‖² over the tokens so far."""
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
    def dead_fraction(self) -> float:
        """Share of features that never fired."""
        return float((self.fired == 0).double().mean())

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


def next_token_loss(logits: Tensor, input_ids: Tensor, mask: Tensor) -> tuple[float, int]:
    """Sum of next-token cross entropies in nats over real targets, and how many there are."""
    target = input_ids[:, 1:]
    real = mask[:, 1:].bool()
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), target.flatten(), reduction="none"
    )
    return float(losses.view_as(target)[real].double().sum()), int(real.sum())


def after_first(replace: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `replace` makes of a (batch, positions, d) tensor, position 0 left as it is."""

    def swap(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], replace(x[:, 1:]).to(x.dtype)], dim=1)

    return swap


@torch.no_grad()
def evaluate(
    model: nn.Module,
    sae: SAE,
    pieces: Iterable[list[int]],
    *,
    special_ids: Iterable[int],
    site: Site | None = None,
    rule: TokenRule | None = None,
    pad_id: int = 0,
    pca_k: int = 32,
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda _contexts: None,
) -> Metrics:
    """Measure an SAE on token lists `pieces`, each one context, in a model it was trained for.

    site, rule: those of the SAE's own spec unless given. Raises CaptureError when there is no site,
    or no token counts.
    """
    site, rule = site or sae.cfg.site, rule or sae.cfg.tokens or TokenRule(skip_first=1)
    if site is None:
        raise CaptureError("the SAE does not say which site it reads: give site=Site(module=…)")
    device = next(model.parameters()).device
    special = torch.tensor(sorted(set(special_ids)), dtype=torch.int64, device=device)
    sums = ReconstructionSums(sae.d_in, sae.d_sae, covariance=True)
    dropped, done, pending = Dropped(), 0, list(pieces)
    losses = dict.fromkeys(("clean", "spliced", "zero"), 0.0)
    targets = 0
    for start in range(0, len(pending), batch_size):
        part = pending[start : start + batch_size]
        ids, mask = (value.to(device) for value in padded(part, pad_id))
        seen: list[Tensor] = []
        with hook_site(model, site, seen.append):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss, count = next_token_loss(logits, ids, mask)
        losses["clean"] += loss
        targets += count
        for name, replace in (("spliced", sae), ("zero", torch.zeros_like)):
            with hook_site(model, site, after_first(replace)):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            losses[name] += next_token_loss(logits, ids, mask)[0]
        keep, counts = keep_tokens(rule, ids, mask, special, seen[0])
        dropped.add(counts)
        sums.add(sae, seen[0][keep])
        done += len(part)
        progress(done)
    if not sums.tokens or not targets:
        raise CaptureError(f"no token counts under the SAE's rule: {asdict(dropped)}")
    clean, spliced, zero = (losses[name] / targets for name in ("clean", "spliced", "zero"))
    return Metrics(
        fvu=sums.fvu,
        l0=sums.l0,
        dead_fraction=sums.dead_fraction,
        pca_k=pca_k,
        pca_fvu=sums.pca_fvu(pca_k),
        loss_clean=clean,
        loss_spliced=spliced,
        loss_zero=zero,
        loss_recovered=(zero - spliced) / (zero - clean),
        tokens=sums.tokens,
        contexts=done,
        outlier_share=dropped.outlier / max(dropped.outlier + dropped.kept, 1),
    )
