"""One layer of a cross-layer transcoder: exact features, and what they add to each target.

Shapes: `…` any leading shape, d_in, d_sae (features of a layer), d_out as in the spec. Decoders, by
far the largest part, stay in their files: only the rows of features that are on are read. Encoders
are multiplied some rows at a time, so neither needs to be in memory as a whole.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.config_multi import CLTConfig
from saezoo.errors import InputError
from saezoo.rows import (
    Active,
    Decoder,
    RowModule,
    active_in_pieces,
    active_of,
    check_activations,
    join_active,
    pack,
    step_for,
    sum_rows,
)
from saezoo.sparse import SparseFeatures, pack_chosen


class CLTLayer(RowModule):
    """One layer of a cross-layer transcoder: exact `encode`, and `decode` to each of its `targets`.

    There is no forward: what arrives at a layer is the sum over all layers that write to it.
    """

    W_enc_rows: Tensor
    b_enc: Tensor
    threshold: Tensor

    def __init__(
        self, cfg: CLTConfig, layer: int, decoder: Decoder, dtype: torch.dtype, **tensors: Tensor
    ) -> None:
        super().__init__(dtype)
        self.cfg, self.layer, self.decoder = cfg, layer, decoder
        self.d_in, self.d_sae, self.d_out = cfg.d_in, cfg.d_sae, cfg.width_out
        self.targets = tuple(cfg.targets(layer))
        self.keep(**tensors)
        self._norms: Tensor | None = None
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the encoder is, and where activations must be."""
        return self.W_enc_rows.device

    @property
    def W_enc(self) -> Tensor:
        """(d_in, d_sae), a view of the feature-major rows, in the dtype of the file."""
        return self.W_enc_rows.T

    def encode(self, x: Tensor) -> Tensor:
        """Features (…, d_sae) of this layer's activations (…, d_in). Raises InputError where the
        top k are chosen among all layers together.
        """
        self._check(x)
        if self.cfg.architecture == "topk":
            return self.encode_sparse(x).to_dense()
        z = self._inward(x)
        parts = [self._act(z, part) for part in self._chunks()]
        return torch.cat(parts, -1).to(self.dtype).unflatten(0, x.shape[:-1])

    def encode_sparse(self, x: Tensor) -> SparseFeatures:
        """The active ones of this layer's features, strongest first, none left out; never holds
        (tokens, d_sae).
        """
        self._check(x)
        if self.cfg.k_over == "layers":
            raise InputError(
                f"the top {self.cfg.k} are chosen among all layers together: use encode of the "
                "whole transcoder"
            )
        return self.strongest(x)

    def strongest(self, x: Tensor) -> SparseFeatures:
        """encode_sparse; with topk, the k strongest of this layer alone."""
        z = self._inward(x)
        if self.cfg.architecture == "topk":
            values, indices = self._choose(z)
            shape = (*x.shape[:-1], values.shape[-1])
            return pack_chosen(values.reshape(shape), indices.reshape(shape), self.d_sae)
        return pack(self._active(z), x.shape[:-1], self.d_sae)

    def decode(self, features: Tensor | SparseFeatures) -> Tensor:
        """What this layer's features add to each of `targets`: (…, targets, d_out), without the
        biases b_dec, which belong to the targets and are added once by the whole transcoder.
        """
        values = _values(features, self.d_sae, self.device)
        active = active_of(features)
        lead = values.shape[:-1]
        out = sum_rows(active, lead.numel(), self.decoder, self.dtype, self.device)
        if self.cfg.output_scale is not None:
            scale = [self.cfg.output_scale[target] for target in self.targets]
            out = out / out.new_tensor(scale).unsqueeze(-1)
        return out.to(values.dtype).unflatten(0, lead)

    def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
        """Raises InputError: one layer gives no reconstruction."""
        raise InputError(
            f"layer {self.layer} of a cross-layer transcoder has no forward: what arrives at a "
            f"layer is the sum over all that write to it. Use encode and decode (to layers "
            f"{_span(self.targets)}), or load the whole transcoder"
        )

    def decoder_norms(self) -> Tensor:
        """(d_sae,) the norm of each feature's decoders to all targets together. Read once, kept."""
        if self._norms is None or self._norms.dtype != self.small_dtype:
            self._norms = self.decoder.norms(self.small_dtype).norm(dim=-1)
        return self._norms.to(self.device)

    def _inward(self, x: Tensor) -> Tensor:
        """(tokens, d_in) in the compute dtype, in the units of the encoder."""
        z = x.to(self.small_dtype).reshape(-1, self.d_in)
        if self.cfg.input_scale is not None:
            z = z * self.cfg.input_scale[self.layer]
        return z.to(self.dtype)

    def _chunks(self) -> Iterator[slice]:
        """Slices of the features, of which the encoder rows fit into a chunk."""
        step = step_for(self.d_in)
        for start in range(0, self.d_sae, step):
            yield slice(start, min(start + step, self.d_sae))

    def _pre(self, z: Tensor, part: slice) -> Tensor:
        """Pre-activations (tokens, part), the bias added in at least float32."""
        products = F.linear(z, self.W_enc_rows[part].to(self.dtype))
        return products.to(self.small_dtype) + self.b_enc[part]

    def _act(self, z: Tensor, part: slice) -> Tensor:
        """relu and jumprelu: features (tokens, part)."""
        cfg, pre = self.cfg, self._pre(z, part)
        norms = self.decoder_norms()[part] if cfg.decoder_norm == "rank" else None
        keys = pre if norms is None else pre * norms
        features = F.relu(keys) if cfg.relu_after else keys
        if cfg.architecture == "jumprelu":
            features = features * (keys > self.threshold[part])
        return features if norms is None else features / norms

    def _active(self, z: Tensor) -> Active:
        """relu and jumprelu: what is on, some features and some tokens at a time."""
        parts = []
        for part in self._chunks():
            width = part.stop - part.start

            def features(z: Tensor, part: slice = part) -> Tensor:
                return self._act(z, part).to(self.dtype)

            here = active_in_pieces(z, width, features)
            parts.append(Active(here.tokens, here.features + part.start, here.values))
        return join_active(parts)

    def _choose(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """topk: (tokens, k) values and features, by a running top k over parts of the features."""
        cfg = self.cfg
        assert cfg.k is not None
        norms = self.decoder_norms() if cfg.decoder_norm == "rank" else None
        keys = z.new_empty(len(z), 0, dtype=self.small_dtype)
        indices = torch.empty(len(z), 0, dtype=torch.int64, device=z.device)
        for part in self._chunks():
            pre = self._pre(z, part)
            pre = pre if norms is None else pre * norms[part]
            best = pre.topk(min(cfg.k, pre.shape[-1]), dim=-1)
            keys = torch.cat([keys, best.values], -1)
            indices = torch.cat([indices, best.indices + part.start], -1)
            keys, order = keys.topk(min(cfg.k, keys.shape[-1]), dim=-1)
            indices = indices.gather(-1, order)
        values = F.relu(keys) if cfg.relu_after else keys
        return (values if norms is None else values / norms[indices]).to(self.dtype), indices

    def _check(self, x: Tensor) -> None:
        words = f"the activations of layer {self.layer} alone"
        check_activations(x, (self.d_in,), words, self.device)

    def extra_repr(self) -> str:
        """What a person wants to see of a layer in one line."""
        return (
            f"layer {self.layer} of {self.cfg.layers}, {self.cfg.architecture}, d_in={self.d_in}, "
            f"d_sae={self.d_sae}, to layers {_span(self.targets)}, {self.dtype}"
        )


def _values(features: object, d_sae: int, device: torch.device) -> Tensor:
    """The values of dense or sparse features. Raises InputError for what is no features."""
    if isinstance(features, SparseFeatures):
        if features.d_sae != d_sae:
            raise InputError(f"expected features (…, {d_sae}), got {features.d_sae} of them")
        return features.values
    check_activations(features, (d_sae,), "features of this layer", device)
    assert isinstance(features, Tensor)
    return features


def _span(targets: Sequence[int]) -> str:
    return f"{targets[0]} to {targets[-1]}" if len(targets) > 1 else str(targets[0])
