"""One torch module for every SAE and transcoder: encode, decode, forward, as its spec says and
nothing else.

Shapes: `…` any leading shape, d_in, d_sae, d_out as in the spec. Both matrices are kept
feature-major (a contiguous row per feature), because every sparse operation gathers whole rows;
`sae.W_enc` is the (d_in, d_sae) view that papers write.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saezoo.config import ConstantNorm, LayerNorm, SAEConfig, Scale
from saezoo.custom import needs_class
from saezoo.errors import ConfigError, FormatError, InputError
from saezoo.sparse import (
    SparseFeatures,
    decode_dense,
    decode_sparse,
    pack_active,
    pack_chosen,
    pack_places,
    top_k,
    top_of_all,
)

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

MATRICES = ("W_enc_rows", "W_dec", "W_skip")
"""Tensors that follow the dtype asked for; all others stay float32, because a 16-bit threshold
flips features.
"""

CHOOSING = ("topk", "groupmax", "tensor_topk")
"""Architectures that choose a number of features, and so never need the dense ones."""

CHUNK = 2**25
"""Pre-activations computed at a time when no gradient is wanted: bounds memory at 128 MB
float32.
"""


class SAE(nn.Module):
    """A sparse autoencoder or transcoder. Keeps no state between calls.

    Made by `load_sae`; `SAE(cfg)` alone has zero weights. Inputs are `(…, d_in)` of any float dtype
    on the module's device.
    """

    W_enc_rows: Tensor
    W_dec: Tensor
    b_dec: Tensor
    b_enc: Tensor
    threshold: Tensor
    b_gate: Tensor
    r_mag: Tensor
    b_mag: Tensor
    b_in: Tensor
    W_skip: Tensor

    def __init__(self, cfg: SAEConfig, *, device: str | torch.device | None = None) -> None:
        super().__init__()
        if cfg.custom is not None:
            raise ConfigError(needs_class(cfg, "this SAE"))
        self.cfg = cfg
        self.d_in, self.d_sae, self.d_out = cfg.d_in, cfg.d_sae, cfg.d_out or cfg.d_in
        for name, shape in cfg.tensor_shapes().items():
            self.register_parameter(
                name, nn.Parameter(torch.zeros(shape, device=device), requires_grad=False)
            )
        self.folder: Path | None = None
        """Where its files lie, when it was loaded from files: what stands beside the weights."""
        self._told = False
        self.eval()

    @classmethod
    def from_pretrained(
        cls, release: "str | Path", sae_id: str | None = None, **options: Any
    ) -> "SAE":
        """`load_sae` under the name that SAELens uses. Returns the SAE alone, not a tuple."""
        from saezoo.load import load_sae

        return load_sae(release, sae_id, **options)

    @property
    def W_enc(self) -> Tensor:
        """(d_in, d_sae), a view of the feature-major rows."""
        return self.W_enc_rows.T

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the products are computed in."""
        return self.W_enc_rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc_rows.device

    def encode(self, x: Tensor) -> Tensor:
        """Features of activations (…, d_in) as dense (…, d_sae)."""
        self._check_input(x)
        if self.cfg.architecture in CHOOSING:
            return self._encode_chosen(x).to_dense()
        return self._encode_dense(x)

    def encode_sparse(self, x: Tensor) -> SparseFeatures:
        """Features of activations (…, d_in) as the active ones only, strongest first, none left
        out.
        """
        self._check_input(x)
        if self.cfg.architecture in CHOOSING:
            return self._encode_chosen(x)
        return pack_active(self._encode_dense(x))

    def decode(self, features: Tensor | SparseFeatures, x: Tensor | None = None) -> Tensor:
        """Reconstruction (…, d_out) from dense or sparse features.

        An SAE that normalises every token, or has a skip connection, needs the activations `x` for
        its complete output: without them the reconstruction is in normalised units and without the
        skip. `forward(x)` is the whole.
        """
        self._check_features(features)
        self._contiguous_decoder()
        values = features.values if isinstance(features, SparseFeatures) else features
        if self.cfg.decoder_norm == "scale":
            features = _times(features, self._decoder_norms().reciprocal())
        decode = decode_sparse if isinstance(features, SparseFeatures) else decode_dense
        out = decode(features, self.W_dec) + self.b_dec  # type: ignore[arg-type]
        if isinstance(self.cfg.input_norm, Scale):
            out = out / self.cfg.input_norm.factor
        if x is None:
            self._tell_incomplete()
            return out.to(values.dtype)
        self._check_input(x)
        return self._complete(out, x).to(x.dtype)

    def decode_change(self, features: Tensor, change: Tensor, x: Tensor) -> Tensor:
        """decode(f + change, x) - decode(f, x) for the same x, whatever f: what `change` (…, n) of
        the n features called `features` adds to the reconstruction (…, d_out), in the compute dtype
        or float32 if that is wider. Exactly zero where change is.
        """
        self._check_input(x)
        rows = self.W_dec[features].to(self.b_dec.dtype)
        if self.cfg.decoder_norm == "scale":
            rows = rows / rows.norm(dim=1, keepdim=True)
        out = change.to(rows.dtype) @ rows
        z = x.to(out.dtype)
        match self.cfg.input_norm:
            case Scale(factor=factor):
                out = out / factor
            case LayerNorm(ddof=ddof):
                out = out * z.std(-1, correction=ddof, keepdim=True)
            case ConstantNorm():
                out = out * (z.norm(dim=-1, keepdim=True) / self.d_in**0.5)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """The complete reconstruction (…, d_out) of (…, d_in): normalisation undone, skip added, in
        x's dtype.
        """
        self._check_input(x)
        if self.cfg.architecture in CHOOSING:
            return self.decode(self._encode_chosen(x), x)
        return self.decode(self._encode_dense(x), x)

    def _encode_dense(self, x: Tensor) -> Tensor:
        cfg, pre = self.cfg, self._pre(self._inward(x))
        if cfg.architecture == "gated":
            on = pre + self.b_gate > 0
            features = on * F.relu(pre * self.r_mag.exp() + self.b_mag)
        else:
            norms = self._decoder_norms() if cfg.decoder_norm != "none" else None
            pre = pre if norms is None else pre * norms
            features = F.relu(pre) if cfg.relu_after else pre
            if cfg.architecture == "jumprelu":
                features = features * (pre > self.threshold)
            features = (
                features / norms if cfg.decoder_norm == "rank" and norms is not None else features
            )
        return features.to(self.dtype)

    def _encode_chosen(self, x: Tensor) -> SparseFeatures:
        """Those of CHOOSING, some tokens at a time when no gradient is wanted."""
        flat = x.reshape(-1, self.d_in)
        rows = max(1, CHUNK // self.d_sae)
        whole = torch.is_grad_enabled() and x.requires_grad or flat.shape[0] <= rows
        pieces = (flat,) if whole else flat.split(rows)
        if self.cfg.architecture == "tensor_topk":
            return self._choose_of_all(pieces, torch.Size((*x.shape[:-1], self.d_sae)))
        parts = [self._choose(piece) for piece in pieces]
        values, indices = (torch.cat(column) for column in zip(*parts, strict=True))
        shape = (*x.shape[:-1], values.shape[-1])
        in_order = (
            self.cfg.architecture == "topk"
            and self.cfg.relu_after
            and self.cfg.decoder_norm != "rank"
        )
        return pack_chosen(
            values.reshape(shape), indices.reshape(shape), self.d_sae, in_order=in_order
        )

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices (tokens, k) of the features that are on."""
        cfg, pre = self.cfg, self._pre(self._inward(x))
        assert cfg.k is not None
        norms = self._decoder_norms() if cfg.decoder_norm != "none" else None
        pre = pre if norms is None else pre * norms
        if cfg.architecture == "groupmax":
            size = self.d_sae // cfg.k
            groups = F.relu(pre) if cfg.relu_after else pre
            values, within = groups.unflatten(-1, (cfg.k, size)).max(-1)
            indices = within + torch.arange(0, self.d_sae, size, device=x.device)
        else:
            keys = pre.detach()
            indices = top_k(keys.abs() if cfg.signed else keys, cfg.k)
            values = pre.gather(-1, indices)
            values = F.relu(values) if cfg.relu_after else values
        if cfg.decoder_norm == "rank" and norms is not None:
            values = values / norms[indices]
        return values.to(self.dtype), indices

    def _choose_of_all(self, pieces: Sequence[Tensor], shape: torch.Size) -> SparseFeatures:
        """tensor_topk: of all tokens' pre-activations together the k * tokens largest."""
        assert self.cfg.k is not None
        norms = self._decoder_norms() if self.cfg.decoder_norm != "none" else None
        pres = (self._pre(self._inward(piece)) for piece in pieces)
        scaled = pres if norms is None else (pre * norms for pre in pres)
        values, places = top_of_all(scaled, self.cfg.k * shape[:-1].numel())
        if self.cfg.decoder_norm == "rank" and norms is not None:
            values = values / norms[places % self.d_sae]
        return pack_places(values.to(self.dtype), places, shape)

    def _inward(self, x: Tensor) -> Tensor:
        """x as the encoder wants it: normalised, biases subtracted, in the compute dtype."""
        z = x.to(torch.promote_types(self.dtype, torch.float32))
        match self.cfg.input_norm:
            case LayerNorm(eps=eps, ddof=ddof):
                centred = z - z.mean(-1, keepdim=True)
                z = centred / (z.std(-1, correction=ddof, keepdim=True) + eps)
            case ConstantNorm():
                z = z * (self.d_in**0.5 / z.norm(dim=-1, keepdim=True))
            case Scale(factor=factor):
                z = z * factor
        if self.cfg.subtract_b_dec:
            z = z - self.b_dec
        elif self.cfg.input_bias:
            z = z - self.b_in
        return z.to(self.dtype)

    def _complete(self, out: Tensor, x: Tensor) -> Tensor:
        """Undo a per-token normalisation and add the skip."""
        z = x.to(out.dtype)
        match self.cfg.input_norm:
            case LayerNorm(ddof=ddof):
                out = out * z.std(-1, correction=ddof, keepdim=True) + z.mean(-1, keepdim=True)
            case ConstantNorm():
                out = out * (z.norm(dim=-1, keepdim=True) / self.d_in**0.5)
        if self.cfg.skip:
            out = out + x.to(self.dtype) @ self.W_skip
        return out

    def _pre(self, z: Tensor) -> Tensor:
        """Pre-activations (…, d_sae), the bias added in float32."""
        if self.cfg.architecture == "gated":
            return F.linear(z, self.W_enc_rows).to(self.b_gate.dtype)
        if self.b_enc.dtype == self.dtype:
            return F.linear(z, self.W_enc_rows, self.b_enc)
        return F.linear(z, self.W_enc_rows).to(self.b_enc.dtype) + self.b_enc

    def _decoder_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.W_dec, dim=1, dtype=self.b_dec.dtype)

    def _contiguous_decoder(self) -> None:
        # gathering rows of a strided W_dec would copy the whole matrix at each call; so it is
        # copied once, when first needed
        if not self.W_dec.is_contiguous():
            tied = self._is_tied()
            self.W_dec.data = self.W_dec.data.contiguous()
            if tied:
                self.W_enc_rows.data = self.W_dec.data

    def _is_tied(self) -> bool:
        """Whether both matrices are one in memory, as they are of a file that has one for both."""
        a, b = self.W_dec, self.W_enc_rows
        return not a.is_meta and (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride())

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise InputError(f"expected a tensor (…, {self.d_in}), got {type(x).__name__}")
        if not x.is_floating_point():
            raise InputError(
                f"expected activations of a float dtype (…, {self.d_in}), got {x.dtype}"
            )
        if x.shape[-1:] != (self.d_in,):
            heads = x.dim() > 1 and x.shape[-1] * x.shape[-2] == self.d_in
            hint = "; these look like (…, heads, d_head): use x.flatten(-2)" if heads else ""
            raise InputError(f"expected activations (…, {self.d_in}), got {tuple(x.shape)}{hint}")
        if x.device != self.device:
            raise InputError(
                f"the SAE is on {self.device}, the activations are on {x.device}: use .to(…)"
            )

    def _check_features(self, features: Tensor | SparseFeatures) -> None:
        if isinstance(features, SparseFeatures):
            values, width = features.values, features.d_sae
        elif isinstance(features, Tensor):
            values, width = features, features.shape[-1] if features.dim() else 0
        else:
            raise InputError(
                f"expected features as a tensor or SparseFeatures, got {type(features).__name__}"
            )
        if width != self.d_sae:
            raise InputError(f"expected features (…, {self.d_sae}), got {width} of them")
        if not values.is_floating_point():
            raise InputError(
                f"expected features of a float dtype (…, {self.d_sae}), got {values.dtype}"
            )
        if values.device != self.device:
            raise InputError(
                f"the SAE is on {self.device}, the features are on {values.device}: use .to(…)"
            )

    def _tell_incomplete(self) -> None:
        per_token = isinstance(self.cfg.input_norm, LayerNorm | ConstantNorm)
        if self._told or not (per_token or self.cfg.skip):
            return
        self._told = True
        lacks = " and ".join(
            ["the normalisation undone"] * per_token + ["the skip connection"] * self.cfg.skip
        )
        logger.warning(
            "decode(features) without x lacks %s; decode(features, x) or sae(x) is complete", lacks
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SAE":
        """`.to`, `.half`, `.bfloat16` …: thresholds and biases move, but never go below float32;
        tied matrices stay one.
        """
        tied = self._is_tied()
        if tied:
            self.W_dec.data = self.W_dec.data.new_empty(0)
        before = {
            name: value.data for name, value in self.named_parameters() if name not in MATRICES
        }
        super()._apply(fn, recurse)
        for name, value in self.named_parameters():
            if name in before and value.dtype in (torch.float16, torch.bfloat16):
                value.data = before[name].to(device=value.device)
        if tied:
            self.W_dec.data = self.W_enc_rows.data
        return self

    def extra_repr(self) -> str:
        """What a person wants to see of an SAE in one line."""
        cfg = self.cfg
        site = f", site={cfg.site.module or cfg.site.hook_name}" if cfg.site else ""
        k = f", k={cfg.k}" if cfg.k else ""
        wide = f", d_out={self.d_out}" if self.d_out != self.d_in else ""
        return (
            f"{cfg.architecture}, d_in={self.d_in}, d_sae={self.d_sae}{wide}{k}, {self.dtype}{site}"
        )


def _times(features: Tensor | SparseFeatures, factors: Tensor) -> Tensor | SparseFeatures:
    """Features times one factor each, factors (d_sae,)."""
    if isinstance(features, SparseFeatures):
        values = features.values * factors[features.indices]
        return SparseFeatures(values, features.indices, features.counts, features.d_sae)
    return features * factors


def build_sae(
    cfg: SAEConfig,
    tensors: Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    where: str = "these tensors",
) -> SAE:
    """The module over these tensors, frozen and in eval mode; nothing is copied that need not be.

    dtype=None keeps the stored dtype, except that 16-bit weights become float32 on a CPU, whose
    16-bit products are slow. Raises FormatError when tensors are missing, unknown, of the wrong
    shape or not floating point, ConfigError for architecture custom.
    """
    if cfg.custom is not None:
        raise ConfigError(needs_class(cfg, where))
    check_tensors(cfg, tensors, where)
    device = torch.device(device)
    stored = tensors["W_enc_rows"].dtype
    for name in MATRICES:
        if name in tensors:
            stored = torch.promote_types(stored, tensors[name].dtype)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" and stored.itemsize < 4 else stored
    small = torch.promote_types(dtype, torch.float32)
    state = {
        name: value.to(device=device, dtype=dtype if name in MATRICES else small)
        for name, value in tensors.items()
        if name != "W_dec" or value is not tensors["W_enc_rows"]
    }
    state.setdefault("W_dec", state["W_enc_rows"])
    sae = SAE(cfg, device="meta")
    sae.load_state_dict(state, assign=True, strict=True)
    return sae.requires_grad_(False).eval()


def check_tensors(cfg: SAEConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise FormatError unless the tensors are exactly those the spec requires."""
    shapes = cfg.tensor_shapes()
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise FormatError(
            f"{where}: {cfg.architecture} needs {', '.join(missing)}, which the file does not have"
        )
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise FormatError(
            f"{where}: tensors that {cfg.architecture} does not have: {', '.join(unknown)}"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise FormatError(f"{where}: {name} is {tuple(tensors[name].shape)}, expected {shape}")
        if cfg.custom is None and not tensors[name].is_floating_point():
            raise FormatError(f"{where}: {name} is {tensors[name].dtype}, expected a float dtype")
