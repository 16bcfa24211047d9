"""A cross-layer transcoder: encode each layer, decode to every target.

Shapes: `…` any leading shape, layers, d_in, d_sae (features of a layer), d_out as in the spec.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.clt_layer import CLTLayer
from saezoo.config_multi import CLTConfig
from saezoo.errors import InputError
from saezoo.rows import Decoder, RowModule, check_activations, check_shapes, compute_dtype
from saezoo.sparse import SparseFeatures, pack_chosen

logger = logging.getLogger(__name__)

LAYER_TENSORS = ("b_enc", "threshold")
"""Small tensors that encoding a layer takes, where its spec has them."""


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
