"""A cross-layer transcoder: encode each layer, decode to every target; and one layer of it alone.

Shapes: `…` any leading shape, layers, d_in, d_sae (features of a layer), d_out as in the spec.
Decoders, by far the largest part, stay in their files: only the rows of features that are on are
read. Encoders are multiplied some rows at a time, so neither needs to be in memory as a whole.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saezoo.config_multi import CLTConfig
from saezoo.errors import FormatError, InputError
from saezoo.rows import (
    Active,
    Decoder,
    RowModule,
    active_in_pieces,
    active_of,
    check_activations,
    compute_dtype,
    join_active,
    pack,
    step_for,
    sum_rows,
)
from saezoo.sparse import SparseFeatures, pack_chosen

logger = logging.getLogger(__name__)

LAYER_TENSORS = ("b_enc", "threshold")
"""Small tensors that encoding a layer takes, where its spec has them."""


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


class CrossLayerTranscoder(RowModule):
    """All layers of a cross-layer transcoder. Made by `load_sae`.

    Inputs are (…, layers, d_in), outputs (…, layers, d_out): what is predicted at every out_site.
    `layers[i]` is one layer.
    """

    b_dec: Tensor

    def __init__(
        self, cfg: CLTConfig, layers: Sequence[CLTLayer], b_dec: Tensor, skips: Sequence[Tensor]
    ) -> None:
        super().__init__(layers[0].dtype)
        self.cfg = cfg
        self.d_in, self.d_sae, self.d_out = cfg.d_in, cfg.d_sae, cfg.width_out
        self.layers = nn.ModuleList(layers)
        self.keep(b_dec=b_dec)
        self._told = False
        self.W_skip = nn.ParameterList(nn.Parameter(skip, requires_grad=False) for skip in skips)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the encoders are, and where activations must be."""
        return self.b_dec.device

    def layer(self, index: int) -> CLTLayer:
        """One layer, with its own encode and decode."""
        found = self.layers[index]
        assert isinstance(found, CLTLayer)
        return found

    def encode(self, x: Tensor) -> Tensor:
        """Features (…, layers, d_sae) of activations (…, layers, d_in); `layer(i).encode` takes one
        layer's alone.
        """
        return torch.stack([part.to_dense() for part in self.encode_sparse(x)], -2)

    def encode_sparse(self, x: Tensor) -> tuple[SparseFeatures, ...]:
        """The active features of each layer, none left out; never holds (tokens, d_sae)."""
        self._check(x)
        found = [self.layer(at).strongest(x[..., at, :]) for at in range(self.cfg.layers)]
        return tuple(self._among_layers(found) if self.cfg.k_over == "layers" else found)

    def decode(
        self, features: Tensor | Sequence[SparseFeatures], x: Tensor | None = None
    ) -> Tensor:
        """Outputs (…, layers, d_out) from dense (…, layers, d_sae) or sparse features.

        With a skip connection, the complete output needs the activations x (…, layers, d_in):
        without them it lacks the skip.
        """
        parts = self._parts(features)
        if x is not None:
            self._check(x)
        first_part = parts[0]
        values = first_part.values if isinstance(first_part, SparseFeatures) else first_part
        out = self._biases().expand(*values.shape[:-1], *self.b_dec.shape).clone()
        for at, part in enumerate(parts):
            layer = self.layer(at)
            first = layer.targets[0]
            out[..., first:, :] = out[..., first:, :] + layer.decode(part)
        if x is None:
            self._tell_incomplete()
            return out.to(values.dtype)
        return self._with_skip(out, x).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """What is predicted at every out_site, (…, layers, d_out), skip included, in x's dtype."""
        return self.decode(self.encode_sparse(x), x)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "CrossLayerTranscoder":
        super()._apply(fn, recurse)
        self.dtype = self.layer(0).dtype
        return self

    def _biases(self) -> Tensor:
        if self.cfg.output_scale is None:
            return self.b_dec
        return self.b_dec / self.b_dec.new_tensor(self.cfg.output_scale).unsqueeze(-1)

    def _with_skip(self, out: Tensor, x: Tensor) -> Tensor:
        if not self.cfg.skip:
            return out
        parts = [x[..., at, :].to(self.dtype) @ skip for at, skip in enumerate(self.W_skip)]
        return out + torch.stack(parts, -2)

    def _tell_incomplete(self) -> None:
        if self.cfg.skip and not self._told:
            self._told = True
            logger.warning(
                "decode(features) without x lacks the skip connection; decode(features, x) or "
                "clt(x) is complete"
            )

    def _among_layers(self, found: list[SparseFeatures]) -> list[SparseFeatures]:
        """Of the k strongest features of each layer, the k strongest of all layers together."""
        assert self.cfg.k is not None
        keys = [part.values for part in found]
        if self.cfg.decoder_norm == "rank":
            keys = [
                key * self.layer(at).decoder_norms()[found[at].indices]
                for at, key in enumerate(keys)
            ]
        # a slot that is not used holds 0, which may not win over a negative value
        keys = [
            key.masked_fill(part.values == 0, -torch.inf)
            for key, part in zip(keys, found, strict=True)
        ]
        every = torch.cat(keys, -1)
        chosen = torch.zeros_like(every, dtype=torch.bool).scatter(
            -1, every.topk(min(self.cfg.k, every.shape[-1]), dim=-1).indices, True
        )
        split = chosen.split([key.shape[-1] for key in keys], -1)
        return [
            pack_chosen(part.values * mask, part.indices, part.d_sae)
            for part, mask in zip(found, split, strict=True)
        ]

    def _parts(
        self, features: Tensor | Sequence[SparseFeatures]
    ) -> Sequence[Tensor | SparseFeatures]:
        if isinstance(features, Tensor):
            words = "features of every layer"
            check_activations(features, (self.cfg.layers, self.d_sae), words, self.device)
            return features.unbind(-2)
        if len(features) != self.cfg.layers:
            raise InputError(
                f"expected the features of {self.cfg.layers} layers, got {len(features)}"
            )
        return features

    def _check(self, x: Tensor) -> None:
        words = "the activations of every layer at its site, none left out"
        check_activations(x, (self.cfg.layers, self.d_in), words, self.device)

    def extra_repr(self) -> str:
        """What a person wants to see of a transcoder in one line."""
        skip = ", with a skip" if self.cfg.skip else ""
        return (
            f"{self.cfg.layers} layers of {self.d_sae} features, {self.cfg.architecture}, "
            f"d_in={self.d_in}, d_out={self.d_out}{skip}, {self.dtype}"
        )


def build_clt(
    cfg: CLTConfig,
    tensors: Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    where: str = "these tensors",
) -> CrossLayerTranscoder | CLTLayer:
    """The module over these tensors, frozen and in eval mode: a CLTLayer where the spec names one.

    dtype is that of the products; None: the stored one, except that 16-bit weights are computed
    with in float32 on a CPU. Encoders go to `device`, decoders stay where they are. Raises
    FormatError when tensors are missing, unknown, of the wrong shape or not floating point.
    """
    check_clt_tensors(cfg, tensors, where)
    device = torch.device(device)
    dtype = compute_dtype(tensors[f"layers.{cfg.held[0]}.W_enc_rows"].dtype, device, dtype)
    layers = [_build_layer(cfg, at, tensors, device, dtype) for at in cfg.held]
    if cfg.layer is not None:
        return layers[0]
    small = torch.promote_types(dtype, torch.float32)
    skips = [
        tensors[f"layers.{at}.W_skip"].to(device=device, dtype=dtype)
        for at in range(cfg.layers * cfg.skip)
    ]
    b_dec = tensors["b_dec"].to(device=device, dtype=small)
    return CrossLayerTranscoder(cfg, layers, b_dec, skips)


def _build_layer(
    cfg: CLTConfig,
    at: int,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> CLTLayer:
    small = torch.promote_types(dtype, torch.float32)
    start = f"layers.{at}."
    decoder = Decoder(decoder_parts(cfg, at, tensors))
    encoder = tensors[f"{start}W_enc_rows"]
    if device.type != "cpu":
        encoder = encoder.to(device=device, dtype=dtype)
    own: dict[str, Any] = {
        name: tensors[start + name].to(device=device, dtype=small)
        for name in LAYER_TENSORS
        if start + name in tensors
    }
    return CLTLayer(cfg, at, decoder, dtype, W_enc_rows=encoder, **own)


def decoder_parts(cfg: CLTConfig, layer: int, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The decoder of a layer as (d_sae, targets, d_out), or as one (d_sae, d_out) a target."""
    name = f"layers.{layer}.W_dec"
    if name in tensors:
        return [tensors[name]]
    return [tensors[f"{name}.{target}"] for target in cfg.targets(layer)]


def check_clt_tensors(cfg: CLTConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise FormatError unless the tensors are exactly those the spec requires."""
    shapes = cfg.tensor_shapes()
    for layer in cfg.held:
        name = f"layers.{layer}.W_dec"
        if name not in tensors:
            d_sae, _, d_out = shapes.pop(name)
            shapes |= {f"{name}.{target}": (d_sae, d_out) for target in cfg.targets(layer)}
    check_shapes(shapes, tensors, f"{where}: {cfg.title}")


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raise FormatError unless the tensors have these names and shapes, and a float dtype."""
    if missing := [name for name in shapes if name not in tensors]:
        raise FormatError(f"{where} needs {_some(missing)}, which the files do not have")
    if unknown := [name for name in tensors if name not in shapes]:
        raise FormatError(f"{where} has no {_some(unknown)}, which the files have")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise FormatError(f"{where}: {name} is {tuple(tensors[name].shape)}, expected {shape}")
        if not tensors[name].is_floating_point():
            raise FormatError(f"{where}: {name} is {tensors[name].dtype}, expected a float dtype")


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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
