"""A crosscoder: one set of features that reads several layers or models at once and reconstructs
each of them.

Shapes: `…` any leading shape, sources (layers or models), d_in, d_sae, d_out as in the spec.
Only the decoder rows of features that are on are read.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.config import ConstantNorm
from saezoo.config_multi import CrosscoderConfig, SourceScale, Standardise
from saezoo.errors import InputError
from saezoo.rows import (
    Active,
    Decoder,
    RowModule,
    active_in_pieces,
    active_of,
    check_activations,
    check_shapes,
    compute_dtype,
    pack,
    step_for,
    sum_rows,
)
from saezoo.sparse import SparseFeatures


class Crosscoder(RowModule):
    """A crosscoder. Keeps no state between calls. Made by `load_sae`.

    Inputs are (…, sources, d_in): every source, in the order of `cfg.sites`. Features are
    (…, d_sae), or (…, sources, d_sae) where each source's activation decides by itself
    (`cfg.per_source`).
    """

    W_enc_rows: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    in_mean: Tensor
    in_scale: Tensor

    def __init__(
        self, cfg: CrosscoderConfig, decoder: Decoder, dtype: torch.dtype, **tensors: Tensor
    ) -> None:
        super().__init__(dtype)
        self.cfg, self.decoder = cfg, decoder
        self.sources, self.d_in = cfg.sources, cfg.d_in
        self.d_sae, self.d_out = cfg.d_sae, cfg.width_out
        self.keep(**tensors)
        self._norms: Tensor | None = None
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the encoder is, and where activations must be."""
        return self.W_enc_rows.device

    def encode(self, x: Tensor) -> Tensor:
        """Features of activations (…, sources, d_in), dense."""
        self._check(x)
        flat = x.reshape(-1, self.sources, self.d_in)
        width = self.d_sae * (self.sources if self.cfg.per_source else 1)
        parts = [self._features(part) for part in flat.split(step_for(width))]
        return torch.cat(parts).unflatten(0, x.shape[:-2])

    def encode_sparse(self, x: Tensor) -> SparseFeatures:
        """The active features, strongest first, none left out; dense ones of some tokens at a time
        are in memory.
        """
        self._check(x)
        flat = x.reshape(-1, self.sources, self.d_in)
        each = self.sources if self.cfg.per_source else 1
        active = active_in_pieces(flat, self.d_sae * each, self._features, each)
        return pack(active, x.shape[: -1 if self.cfg.per_source else -2], self.d_sae)

    def decode(self, features: Tensor | SparseFeatures, x: Tensor | None = None) -> Tensor:
        """Reconstructions (…, sources, d_out) of every source, from dense or sparse features, the
        normalisation undone.

        A crosscoder that normalises every token needs the activations x for that: without them,
        InputError is raised.
        """
        values = self._check_features(features)
        if x is not None:
            self._check(x)
        lead = values.shape[: values.dim() - (2 if self.cfg.per_source else 1)]
        out = self._sum(features, lead.numel()) + self.b_dec
        out = self._outward(out, x).unflatten(0, lead)
        return out.to(values.dtype if x is None else x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The complete reconstruction (…, sources, d_out), in x's dtype."""
        return self.decode(self.encode_sparse(x), x)

    def decoder_norms(self) -> Tensor:
        """(d_sae, sources) the norm of each feature's decoder to each source. Read once, kept."""
        if self._norms is None or self._norms.dtype != self.small_dtype:
            self._norms = self.decoder.norms(self.small_dtype)
        return self._norms.to(self.device)

    def _features(self, x: Tensor) -> Tensor:
        """Dense features of (tokens, sources, d_in)."""
        cfg = self.cfg
        pre = self._pre(self._inward(x))
        code = self._code_norms()
        if cfg.per_source:
            pre = pre.unsqueeze(-2)
        keys = pre if code is None else pre * code
        if cfg.architecture == "topk":
            assert cfg.k is not None
            best = keys.topk(cfg.k, dim=-1)
            keys = torch.zeros_like(keys).scatter(-1, best.indices, best.values)
        values = F.relu(keys) if cfg.relu_after else keys
        if cfg.architecture == "jumprelu":
            values = values * (keys > self.threshold)
        return (values if code is None else values / code).to(self.dtype)

    def _pre(self, z: Tensor) -> Tensor:
        """Pre-activations (tokens, d_sae), summed over the sources that are read."""
        pre = self.b_enc
        for place, source in enumerate(self.cfg.encoded):
            product = F.linear(z[:, source].to(self.dtype), self.W_enc_rows[place].to(self.dtype))
            pre = pre + product.to(self.small_dtype)
        return pre

    def _code_norms(self) -> Tensor | None:
        """What pre-activations are multiplied by before the activation decides: (d_sae,), or
        (sources, d_sae).
        """
        if self.cfg.code_norm == "none":
            return None
        norms = self.decoder_norms()
        match self.cfg.code_norm:
            case "each":
                return norms.T
            case "sum":
                return norms.sum(-1)
            case "joint":
                return norms.norm(dim=-1)
        assert self.cfg.mixed is not None
        joint, total = self.cfg.mixed
        return norms.norm(dim=-1) * joint + norms.sum(-1) * total

    def _inward(self, x: Tensor) -> Tensor:
        """(tokens, sources, d_in) in the units of the encoder, in at least float32."""
        z = x.to(self.small_dtype)
        match self.cfg.input_norm:
            case SourceScale(factors=factors):
                return z * z.new_tensor(factors).unsqueeze(-1)
            case Standardise():
                return (z - self.in_mean) * self.in_scale.unsqueeze(-1)
            case ConstantNorm():
                return z * (self.d_in**0.5 / z.norm(dim=-1, keepdim=True))
        return z

    def _outward(self, out: Tensor, x: Tensor | None) -> Tensor:
        """(tokens, sources, d_out) from the units of the decoder to those of the activations."""
        match self.cfg.input_norm:
            case SourceScale(factors=factors):
                return out / out.new_tensor(factors).unsqueeze(-1)
            case Standardise(eps=eps):
                return out / (self.in_scale.unsqueeze(-1) + eps) + self.in_mean
            case ConstantNorm():
                if x is None:
                    raise InputError(
                        "this crosscoder normalises every token: decode(features, x) undoes it"
                    )
                z = x.to(out.dtype).reshape(-1, self.sources, self.d_in)
                return out * (z.norm(dim=-1, keepdim=True) / self.d_in**0.5)
        return out

    def _sum(self, features: Tensor | SparseFeatures, count: int) -> Tensor:
        """Decoder rows of active features, summed: (count, sources, d_out)."""
        active = active_of(features)
        if not self.cfg.per_source:
            return sum_rows(active, count, self.decoder, self.dtype, self.device)
        # a row of tokens is (token, source): each source sums its own part of a feature's row
        parts = []
        for source in range(self.sources):
            own = active.tokens % self.sources == source
            mine = Active(
                active.tokens[own] // self.sources, active.features[own], active.values[own]
            )
            decoder = self.decoder.of_target(source)
            parts.append(sum_rows(mine, count, decoder, self.dtype, self.device))
        return torch.cat(parts, 1)

    def _check(self, x: Tensor) -> None:
        words = "the activations of every source, none left out or masked"
        check_activations(x, (self.sources, self.d_in), words, self.device)

    def _check_features(self, features: Tensor | SparseFeatures) -> Tensor:
        """The values of dense or sparse features. Raises InputError for what is no features."""
        tail = (self.sources, self.d_sae) if self.cfg.per_source else (self.d_sae,)
        if not isinstance(features, SparseFeatures):
            check_activations(features, tail, "features", self.device)
            return features
        shape = (*features.values.shape[:-1], features.d_sae)
        if shape[-len(tail) :] != tail:
            raise InputError(f"expected features (…, {', '.join(map(str, tail))}), got {shape}")
        return features.values

    def extra_repr(self) -> str:
        """What a person wants to see of a crosscoder in one line."""
        return (
            f"{self.sources} sources, {self.cfg.architecture}, d_in={self.d_in}, "
            f"d_sae={self.d_sae}, {self.dtype}"
        )


def build_crosscoder(
    cfg: CrosscoderConfig,
    tensors: Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    where: str = "these tensors",
) -> Crosscoder:
    """The module over these tensors, frozen and in eval mode.

    dtype is that of the products; None: the stored one, except that 16-bit weights are computed
    with in float32 on a CPU. The encoder goes to `device`, the decoder stays where it is. Raises
    FormatError when tensors are missing, unknown, of the wrong shape or not floating point.
    """
    check_shapes(cfg.tensor_shapes(), tensors, f"{where}: {cfg.title}")
    device = torch.device(device)
    encoder = tensors["W_enc_rows"]
    dtype = compute_dtype(encoder.dtype, device, dtype)
    if device.type != "cpu":
        encoder = encoder.to(device=device, dtype=dtype)
    small = torch.promote_types(dtype, torch.float32)
    own = {
        name: tensors[name].to(device=device, dtype=small)
        for name in cfg.tensor_shapes()
        if name not in ("W_enc_rows", "W_dec")
    }
    return Crosscoder(cfg, Decoder([tensors["W_dec"]]), dtype, W_enc_rows=encoder, **own)
