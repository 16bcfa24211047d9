"""One torch module for every SAE and transcoder: encode, decode, forward, as its spec says and
nothing else.

Shapes: `…` any leading shape, d_in, d_sae, d_out as in the spec. Both matrices are kept
feature-major (a contiguous row per feature), because every sparse operation gathers whole rows;
`sae.W_enc` is the (d_in, d_sae) view that papers write.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saezoo.chunked import (
    ACCELERATED,
    Parts,
    choose_group_max,
    choose_of_all,
    choose_top_k,
    cut,
    decode_kept,
    decode_parts,
    fill_parts,
    pack_parts,
    row_norms,
    whole,
)
from saezoo.config import ConstantNorm, LayerNorm, SAEConfig, Scale
from saezoo.custom import needs_class
from saezoo.errors import ConfigError, FormatError, PartialSAE
from saezoo.inputs import check_features, check_input
from saezoo.placing import MATRICES, DTypes, choose_dtypes, feature_rows, place
from saezoo.sparse import (
    SparseFeatures,
    decode_dense,
    decode_sparse,
    pack_active,
    pack_chosen,
    pack_places,
)

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

CHOOSING = ("topk", "groupmax", "tensor_topk")
"""Architectures that choose a number of features, and so never need the dense ones."""

ALL = slice(None)


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

    feature_ids: Tensor | None
    """(n,) int64 where only some features were loaded: which ones, in their order. None: all."""
    decoder_norms: Tensor | None
    """Of an SAE without a decoder whose arithmetic needs its norms: those, (d_sae,)."""

    def __init__(
        self,
        cfg: SAEConfig,
        *,
        device: str | torch.device | None = None,
        feature_ids: Tensor | None = None,
        encoder_only: bool = False,
    ) -> None:
        super().__init__()
        if cfg.custom is not None:
            raise ConfigError(needs_class(cfg, "this SAE"))
        self.cfg, self.encoder_only = cfg, encoder_only
        self.d_in, self.d_sae, self.d_out = cfg.d_in, cfg.d_sae, cfg.d_out or cfg.d_in
        if feature_ids is not None:
            self.d_sae = len(feature_ids)
        self.register_buffer("feature_ids", feature_ids, persistent=False)
        self.register_buffer("decoder_norms", None, persistent=False)
        for name, (first, *rest) in cfg.tensor_shapes().items():
            if not (encoder_only and name in ("W_dec", "W_skip")):
                rows = self.d_sae if _by_feature(name) else first
                zeros = torch.zeros(rows, *rest, device=device)
                self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        self.folder: Path | None = None
        """Where its files lie, when it was loaded from files: what stands beside the weights."""
        self._told = False
        self._computed: torch.dtype | None = None
        self.eval()

    @classmethod
    def from_pretrained(
        cls, release: "str | Path", sae_id: str | None = None, **options: Any
    ) -> "SAE":
        """`load_sae` under the name that SAELens uses. Returns the SAE alone, not a tuple."""
        from saezoo.load import load_sae, need_sae

        return need_sae(load_sae(release, sae_id, **options), str(release), "SAE.from_pretrained")

    @property
    def W_enc(self) -> Tensor:
        """(d_in, d_sae), a view of the feature-major rows."""
        return self.W_enc_rows.T

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the products are computed in. Matrices may be kept in another: then they
        are converted a part at a time.
        """
        return self._computed or self.W_enc_rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc_rows.device

    def encode(self, x: Tensor) -> Tensor:
        """Features of activations (…, d_in) as dense (…, d_sae)."""
        check_input(x, self.d_in, self.device)
        self._check_choice()
        if self.cfg.architecture in CHOOSING:
            return self._encode_chosen(x).to_dense()
        return self._encode_dense(x)

    def encode_sparse(self, x: Tensor) -> SparseFeatures:
        """Features of activations (…, d_in) as the active ones only, strongest first, none left
        out.

        Without a gradient some features are computed at a time: (…, d_sae) is never in memory.
        """
        check_input(x, self.d_in, self.device)
        self._check_choice()
        if self.cfg.architecture in CHOOSING:
            return self._encode_chosen(x)
        if _wants_gradient(x):
            return pack_active(self._encode_dense(x))
        z, shape = self._inward(x.reshape(-1, self.d_in)), torch.Size((*x.shape[:-1], self.d_sae))
        return pack_parts(self._features, z, self._parts(x), shape)

    def pre_activations(self, x: Tensor) -> Tensor:
        """What features are decided by, dense (…, d_sae): W_enc times the normalised input, and
        b_enc (not of gated, which has two biases), before any norm of the decoder.
        """
        check_input(x, self.d_in, self.device)
        if _wants_gradient(x):
            return self._pre(self._inward(x))
        z, out = self._inward(x.reshape(-1, self.d_in)), self._empty(x, self.b_dec.dtype)
        fill_parts(self._pre_of, z, self._parts(x), out)
        return out.reshape(*x.shape[:-1], self.d_sae)

    def decode(self, features: Tensor | SparseFeatures, x: Tensor | None = None) -> Tensor:
        """Reconstruction (…, d_out) from dense or sparse features.

        An SAE that normalises every token, or has a skip connection, needs the activations `x` for
        its complete output: without them the reconstruction is in normalised units and without the
        skip. `forward(x)` is the whole. Of some features loaded alone: what these add, and b_dec.
        """
        check_features(features, self.d_sae, self.device)
        self._check_decoder("decode")
        values = features.values if isinstance(features, SparseFeatures) else features
        if self.cfg.decoder_norm == "scale":
            features = _times(features, self._decoder_norms().reciprocal())
        if self.W_dec.dtype != self.dtype:
            out = decode_kept(features, self.W_dec, self.dtype)
        else:
            self._contiguous_decoder()
            decode = decode_sparse if isinstance(features, SparseFeatures) else decode_dense
            out = decode(features, self.W_dec)  # type: ignore[arg-type]
        if x is not None:
            check_input(x, self.d_in, self.device)
        return self._finish(out, x).to(values.dtype if x is None else x.dtype)

    def decode_change(self, features: Tensor, change: Tensor, x: Tensor) -> Tensor:
        """decode(f + change, x) - decode(f, x) for the same x, whatever f: what `change` (…, n) of
        the n features called `features` adds to the reconstruction (…, d_out), in the compute dtype
        or float32 if that is wider. Exactly zero where change is.
        """
        check_input(x, self.d_in, self.device)
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
        check_input(x, self.d_in, self.device)
        self._check_decoder("forward")
        if self.feature_ids is not None:
            raise PartialSAE(
                f"forward needs all {self.cfg.d_sae:,} features, and {self.d_sae:,} were loaded; "
                "sae.decode(sae.encode(x), x) is what these alone give"
            )
        if self.cfg.architecture in CHOOSING:
            return self.decode(self._encode_chosen(x), x)
        parts = self._parts(x)
        if parts.one:
            return self.decode(self._encode_dense(x), x)
        z = self._inward(x.reshape(-1, self.d_in))
        wide = torch.promote_types(self.dtype, torch.float32)
        out = torch.zeros(len(z), self.d_out, dtype=wide, device=z.device)
        decode_parts(self._features, self._decoder, z, parts, out)
        return self._finish(out.reshape(*x.shape[:-1], self.d_out), x).to(x.dtype)

    def _parts(self, x: Tensor) -> Parts:
        """How a call is cut: not at all where a gradient is wanted."""
        tokens = x.numel() // self.d_in
        if _wants_gradient(x):
            return whole(tokens, self.d_sae)
        group = self.d_sae // (self.cfg.k or 1) if self.cfg.architecture == "groupmax" else 1
        times = 1 if self.device.type == "cpu" else ACCELERATED
        return cut(tokens, self.d_sae, max(self.d_in, self.d_out), group, times)

    def _encode_dense(self, x: Tensor) -> Tensor:
        parts = self._parts(x)
        if len(parts.features) == 1:
            return self._features(ALL)(self._inward(x))
        z, out = self._inward(x.reshape(-1, self.d_in)), self._empty(x, self.dtype)
        fill_parts(self._features, z, parts, out)
        return out.reshape(*x.shape[:-1], self.d_sae)

    def _empty(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for (tokens, d_sae)."""
        return torch.empty(x.numel() // self.d_in, self.d_sae, dtype=dtype, device=x.device)

    def _features(self, part: slice) -> Callable[[Tensor], Tensor]:
        """relu, jumprelu, gated: what makes dense features (…, n) of z, for some features."""
        cfg, pre_of = self.cfg, self._pre_of(part)
        norms = self._decoder_norms(part) if cfg.decoder_norm != "none" else None

        def gated(z: Tensor) -> Tensor:
            pre = pre_of(z)
            magnitude = F.relu(pre * self.r_mag[part].exp() + self.b_mag[part])
            return ((pre + self.b_gate[part] > 0) * magnitude).to(self.dtype)

        def others(z: Tensor) -> Tensor:
            pre = pre_of(z)
            pre = pre if norms is None else pre * norms
            features = F.relu(pre) if cfg.relu_after else pre
            if cfg.architecture == "jumprelu":
                features = features * (pre > self.threshold[part])
            if cfg.decoder_norm == "rank" and norms is not None:
                features = features / norms
            return features.to(self.dtype)

        return gated if cfg.architecture == "gated" else others

    def _encode_chosen(self, x: Tensor) -> SparseFeatures:
        """Those of CHOOSING."""
        cfg, z, parts = self.cfg, self._inward(x.reshape(-1, self.d_in)), self._parts(x)
        assert cfg.k is not None
        if cfg.architecture == "tensor_topk":
            values, places = choose_of_all(self._scores, z, parts, self.d_sae, cfg.k * len(z))
            if cfg.decoder_norm == "rank":
                values = values / self._decoder_norms()[places % self.d_sae]
            shape = torch.Size((*x.shape[:-1], self.d_sae))
            return pack_places(values.to(self.dtype), places, shape)
        if cfg.architecture == "groupmax":
            values, indices = choose_group_max(self._scores, z, parts, self.d_sae, cfg.k)
        else:
            values, indices = choose_top_k(self._scores, z, parts, cfg.k)
        values = F.relu(values) if cfg.relu_after else values
        if cfg.decoder_norm == "rank":
            values = values / self._decoder_norms()[indices]
        lead = x.shape[:-1]
        in_order = cfg.architecture == "topk" and cfg.relu_after and cfg.decoder_norm != "rank"
        return pack_chosen(
            values.to(self.dtype).reshape(*lead, values.shape[-1]),
            indices.reshape(*lead, values.shape[-1]),
            self.d_sae,
            in_order=in_order,
        )

    def _scores(self, part: slice) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Of CHOOSING: what makes keys to choose by, and values, (tokens, n) of z."""
        pre_of = self._pre_of(part)
        norms = self._decoder_norms(part) if self.cfg.decoder_norm != "none" else None

        def scores(z: Tensor) -> tuple[Tensor, Tensor]:
            pre = pre_of(z)
            pre = pre if norms is None else pre * norms
            return pre.detach().abs() if self.cfg.signed else pre, pre

        return scores

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

    def _finish(self, out: Tensor, x: Tensor | None) -> Tensor:
        """Of features times decoder rows, the reconstruction; complete if x is given."""
        out = out + self.b_dec
        if isinstance(self.cfg.input_norm, Scale):
            out = out / self.cfg.input_norm.factor
        if x is None:
            self._tell_incomplete()
            return out
        return self._complete(out, x)

    def _complete(self, out: Tensor, x: Tensor) -> Tensor:
        """Undo a per-token normalisation and add the skip."""
        z = x.to(out.dtype)
        match self.cfg.input_norm:
            case LayerNorm(ddof=ddof):
                out = out * z.std(-1, correction=ddof, keepdim=True) + z.mean(-1, keepdim=True)
            case ConstantNorm():
                out = out * (z.norm(dim=-1, keepdim=True) / self.d_in**0.5)
        if self.cfg.skip:
            out = out + x.to(self.dtype) @ self.W_skip.to(self.dtype)
        return out

    def _pre(self, z: Tensor) -> Tensor:
        """Pre-activations (…, d_sae), the bias added in float32."""
        return self._pre_of(ALL)(z)

    def _pre_of(self, part: slice) -> Callable[[Tensor], Tensor]:
        """What makes pre-activations (…, n) of z, for some features, whose weights are converted
        here where they are kept in another dtype.
        """
        rows = self.W_enc_rows[part].to(self.dtype)
        if self.cfg.architecture == "gated":
            return lambda z: F.linear(z, rows).to(self.b_dec.dtype)
        bias = self.b_enc[part]
        if bias.dtype == rows.dtype:
            return lambda z: F.linear(z, rows, bias)
        return lambda z: F.linear(z, rows).to(bias.dtype) + bias

    def _decoder(self, part: slice) -> Tensor:
        """Some decoder rows as features are multiplied with: over their norms where those scale."""
        rows = self.W_dec[part].to(self.dtype)
        if self.cfg.decoder_norm != "scale":
            return rows
        return (rows / self._decoder_norms(part).unsqueeze(1)).to(self.dtype)

    def _decoder_norms(self, part: slice = ALL) -> Tensor:
        if self.decoder_norms is not None:
            return self.decoder_norms[part]
        return row_norms(self.W_dec[part], self.b_dec.dtype)

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
        if self.encoder_only or self.W_dec.is_meta:
            return False
        a, b = self.W_dec, self.W_enc_rows
        return (a.data_ptr(), a.stride(), a.dtype) == (b.data_ptr(), b.stride(), b.dtype)

    def _check_choice(self) -> None:
        """Raise PartialSAE where the features that are on depend on others that are not here."""
        if self.feature_ids is not None and self.cfg.architecture in CHOOSING:
            raise PartialSAE(
                f"which features are on is chosen among all {self.cfg.d_sae:,} "
                f"({self.cfg.architecture}, k={self.cfg.k}), and {self.d_sae:,} were loaded; "
                "sae.pre_activations(x) is what can be said of these"
            )

    def _check_decoder(self, what: str) -> None:
        if self.encoder_only:
            raise PartialSAE(f"{what} needs the decoder, and encoder_only=True left it out")

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
        if tied := self._is_tied():
            self.W_dec.data = self.W_dec.data.new_empty(0)
        before = {
            name: value.data for name, value in self.named_parameters() if name not in MATRICES
        }
        if self.decoder_norms is not None:
            before["decoder_norms"] = self.decoder_norms
        dtype = self.W_enc_rows.dtype
        super()._apply(fn, recurse)
        for name in before:
            value = getattr(self, name)
            if value.dtype in (torch.float16, torch.bfloat16):
                value.data = before[name].to(device=value.device)
        if tied:
            self.W_dec.data = self.W_enc_rows.data
        if self.W_enc_rows.dtype != dtype:
            self._computed = None  # a dtype that is asked for is that of the products too
        return self

    def __getattr__(self, name: str) -> Any:
        """Parameters and buffers; of an SAE without a decoder, that it was left out."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("W_dec", "W_skip") and self.__dict__.get("encoder_only"):
                raise AttributeError(f"there is no {name}: encoder_only=True left it out") from None
            raise

    def extra_repr(self) -> str:
        """What a person wants to see of an SAE in one line."""
        cfg = self.cfg
        site = f", site={cfg.site.module or cfg.site.hook_name}" if cfg.site else ""
        k = f", k={cfg.k}" if cfg.k else ""
        wide = f", d_out={self.d_out}" if self.d_out != self.d_in else ""
        some = f" of {cfg.d_sae}" if self.feature_ids is not None else ""
        less = ", encoder only" if self.encoder_only else ""
        return (
            f"{cfg.architecture}, d_in={self.d_in}, d_sae={self.d_sae}{some}{wide}{k}, {self.dtype}"
            f"{less}{site}"
        )


def _times(features: Tensor | SparseFeatures, factors: Tensor) -> Tensor | SparseFeatures:
    """Features times one factor each, factors (d_sae,)."""
    if isinstance(features, SparseFeatures):
        values = features.values * factors[features.indices]
        return SparseFeatures(values, features.indices, features.counts, features.d_sae)
    return features * factors


def check_whole(sae: SAE, what: str) -> None:
    """Raise PartialSAE unless every feature is there, with its decoder. what: needs it."""
    if sae.encoder_only or sae.feature_ids is not None:
        raise PartialSAE(f"{what} needs the whole SAE, and this was loaded in part: load it anew")


def _by_feature(name: str) -> bool:
    """Whether a tensor has a row for each feature."""
    return name not in ("b_dec", "b_in", "W_skip")


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def build_sae(
    cfg: SAEConfig,
    tensors: MutableMapping[str, Tensor] | Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: DTypes = None,
    where: str = "these tensors",
    features: Iterable[int] | Tensor | None = None,
    encoder_only: bool = False,
    consume: bool = False,
) -> SAE:
    """The module over these tensors, frozen and in eval mode; nothing is copied that need not be.

    dtype, features, encoder_only: see `load_sae`. consume: each tensor is taken out of `tensors` as
    it is placed, so that one that had to be converted is freed.

    Raises FormatError when tensors are missing, unknown, of the wrong shape or not floating point,
    InputError for features or dtypes that there are not, ConfigError for architecture custom.
    """
    if cfg.custom is not None:
        raise ConfigError(needs_class(cfg, where))
    check_tensors(cfg, tensors, where)
    device = torch.device(device)
    rows = None if features is None else feature_rows(features, cfg.d_sae)
    sae = SAE(cfg, device="meta", feature_ids=rows, encoder_only=encoder_only)
    names = [name for name, _ in sae.named_parameters()]
    matrices = {name: tensors[name].dtype for name in MATRICES if name in tensors}
    numbers = sum(getattr(sae, name).numel() for name in names if name in matrices)
    kept, computed = choose_dtypes(matrices, numbers, device, dtype)
    small = torch.promote_types(computed, torch.float32)
    if encoder_only and cfg.decoder_norm != "none":
        # of the decoder as it would be kept
        some = tensors["W_dec"] if rows is None else tensors["W_dec"][rows]
        sae.decoder_norms = row_norms(some, small, kept["W_dec"]).to(device)
    tied = not encoder_only and tensors["W_dec"] is tensors["W_enc_rows"]
    tied = tied and kept["W_dec"] == kept["W_enc_rows"]
    state = {}
    for name in names:
        if not (tied and name == "W_dec"):
            wanted = rows if _by_feature(name) else None
            state[name] = place(tensors[name], device, kept.get(name, small), wanted)
        if consume and isinstance(tensors, MutableMapping):
            del tensors[name]
    if tied:
        state["W_dec"] = state["W_enc_rows"]
    sae.load_state_dict(state, assign=True, strict=True)
    if rows is not None:
        sae.feature_ids = rows.to(device)
    sae._computed = None if computed == sae.W_enc_rows.dtype else computed
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
