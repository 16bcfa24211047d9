"""The explicit specs of what spans several layers or models: cross-layer transcoders and
crosscoders. Like SAEConfig, they say everything that the arithmetic needs.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from saezoo.config import ConstantNorm, Origin, SAEConfig, Site, Spec, TokenRule, one_line
from saezoo.errors import ConfigError

MOST = 1024
"""Layers or models: far more than any host has, and few enough that a lie costs nothing."""

Count = Annotated[int, Field(gt=0, le=MOST)]

MultiArchitecture = Literal["relu", "jumprelu", "topk"]


class MultiConfig(Spec):
    """What both kinds say."""

    title: ClassVar[str]

    architecture: MultiArchitecture
    d_in: PositiveInt
    d_sae: PositiveInt
    """Features of a layer of a cross-layer transcoder; of a crosscoder as a whole."""
    d_out: PositiveInt | None = None
    """None means d_in."""
    k: PositiveInt | None = None
    relu_after: bool = True
    """jumprelu: ReLU(a)*(a > threshold); False keeps a where a > threshold. topk: ReLU on what was
    chosen.
    """
    sites: tuple[Site, ...] | None = None
    """Where each input comes from."""
    tokens: TokenRule | None = None
    origin: Origin | None = None
    metrics: dict[str, float | int | str] | None = None
    """Only measured or published facts."""
    notes: dict[str, str] | None = None

    @property
    def width_out(self) -> int:
        """d_out, or d_in where that is the same."""
        return self.d_out or self.d_in

    @property
    def model_name(self) -> str | None:
        """The HuggingFace id of the (first) host model, if known."""
        return self.sites[0].model if self.sites else None

    @property
    def site(self) -> Site | None:
        """None: there are several, in `sites`."""
        return None

    def check_shared(self) -> None:
        """What a k and an activation must agree on. Raises ValueError."""
        if (self.architecture == "topk") != (self.k is not None):
            raise ValueError(f"architecture {self.architecture} with k={self.k}")
        if self.architecture == "relu" and not self.relu_after:
            raise ValueError("relu_after: false has no meaning for relu")


class CLTConfig(MultiConfig):
    """The arithmetic of a cross-layer transcoder: features of each layer read that layer's site and
    write to several layers' out_sites.

    With z_l = x_l * input_scale[l], D[l, m] the decoder from layer l to m, and layers m >= l only
    where `causal`:
        f_l = act(z_l W_enc[l] + b_enc[l])
        y_m = (sum_l f_l D[l, m] + b_dec[m]) / output_scale[m] + x_m W_skip[m]
    """

    title = "a cross-layer transcoder"

    kind: Literal["clt"] = "clt"
    layers: Count
    """Sources and targets."""
    layer: int | None = Field(default=None, ge=0)
    """Only this layer is here: its encoder, and its decoders to all of its targets."""
    causal: bool = True
    """Features write to their own and later layers; False: to every layer."""
    k_over: Literal["layer", "layers"] = "layer"
    """topk: k features of each layer, or k of all layers together."""
    decoder_norm: Literal["none", "rank"] = "none"
    """rank: with |d| the norm of a feature's decoders to all targets together, a*|d| is what the
    activation decides by, and a what it returns.
    """
    input_scale: tuple[PositiveFloat, ...] | None = None
    output_scale: tuple[PositiveFloat, ...] | None = None
    skip: bool = False
    """x_m @ W_skip[m] is added to the output of layer m (x as given); not kept of one layer
    alone, which has no output of its own.
    """
    out_sites: tuple[Site, ...] | None = None

    def targets(self, layer: int) -> range:
        """The layers that features of `layer` write to."""
        return range(layer if self.causal else 0, self.layers)

    @property
    def held(self) -> tuple[int, ...]:
        """The layers whose weights are here."""
        return tuple(range(self.layers)) if self.layer is None else (self.layer,)

    def alone(self, layer: int, where: str = "this transcoder") -> "CLTConfig":
        """The spec of one layer. Raises ConfigError where there is none, or it has no encode."""
        return CLTConfig.from_json(self.to_json() | {"layer": layer}, where)

    @model_validator(mode="after")
    def _consistent(self) -> "CLTConfig":
        self.check_shared()
        among = self.d_sae * (self.layers if self.k_over == "layers" else 1)
        if self.k is not None and self.k > among:
            raise ValueError(f"k={self.k} is more than d_sae={among}")
        if self.layer is not None and self.layer >= self.layers:
            raise ValueError(f"layer {self.layer} of {self.layers} (the first is 0)")
        if self.layer is not None and self.k_over == "layers":
            raise ValueError(
                "its top k are chosen among all layers together, so no layer encodes by itself: "
                "load the whole"
            )
        for name in ("sites", "out_sites", "input_scale", "output_scale"):
            _expect_length(name, getattr(self, name), self.layers)
        return self

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer; W_dec is (d_sae, targets, d_out)."""
        n, d_in, d_out = self.d_sae, self.d_in, self.width_out
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc_rows": (n, d_in),
            "b_enc": (n,),
            "W_dec": (n, len(self.targets(layer)), d_out),
        }
        if self.architecture == "jumprelu":
            shapes["threshold"] = (n,)
        if self.skip and self.layer is None:
            shapes["W_skip"] = (d_in, d_out)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that this spec requires, those of layer l as `layers.l.NAME`.

        A W_dec may instead be one (d_sae, d_out) tensor a target, `layers.l.W_dec.m`: so files that
        keep a target's decoders together are read without a copy.
        """
        shapes = {
            f"layers.{layer}.{name}": shape
            for layer in self.held
            for name, shape in self.layer_shapes(layer).items()
        }
        return (
            shapes if self.layer is not None else shapes | {"b_dec": (self.layers, self.width_out)}
        )

    @classmethod
    def from_json(cls, data: object, where: str = "config") -> "CLTConfig":
        """Validate plain JSON values. Raises ConfigError in one line that names `where`."""
        return _validated(cls, data, where)


class SourceScale(Spec):
    """z_s = x_s * factors[s], and back."""

    kind: Literal["scale"] = "scale"
    factors: tuple[PositiveFloat, ...]


class Standardise(Spec):
    """z_s = (x_s - in_mean[s]) * in_scale[s]; the way back is z_s / (in_scale[s] + eps) +
    in_mean[s].
    """

    kind: Literal["standardise"] = "standardise"
    eps: float = Field(default=1e-8, ge=0)


SourceNorm = Annotated[SourceScale | Standardise | ConstantNorm, Field(discriminator="kind")]


class CrosscoderConfig(MultiConfig):
    """The arithmetic of a crosscoder: one set of features reads all sources (layers, or models) and
    reconstructs each.

        a = sum_s z_s W_enc[s] + b_enc,   f = act(a),   y_s = f W_dec[s] + b_dec[s]
    with z and y in the units of `input_norm`. code_norm says what the activation decides by: a*c
    instead of a (a stays what is returned), with |d_s| the norm of a feature's decoder to s:
        sum    c = sum_s |d_s|
        joint  c = the norm of all d_s together
        mixed  c = mixed[0] * joint + mixed[1] * sum
        each   c_s = |d_s|: every source decides by itself, so features are (…, sources, d_sae)
    """

    title = "a crosscoder"

    kind: Literal["crosscoder"] = "crosscoder"
    sources: Count
    reads: tuple[int, ...] | None = None
    """The sources that are encoded; None: all. All are reconstructed."""
    code_norm: Literal["none", "sum", "joint", "mixed", "each"] = "none"
    mixed: tuple[float, float] | None = None
    input_norm: SourceNorm | None = None

    @property
    def encoded(self) -> tuple[int, ...]:
        """The sources that are encoded."""
        return tuple(range(self.sources)) if self.reads is None else self.reads

    @property
    def per_source(self) -> bool:
        """Whether features are (…, sources, d_sae)."""
        return self.code_norm == "each"

    @model_validator(mode="after")
    def _consistent(self) -> "CrosscoderConfig":
        self.check_shared()
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k={self.k} is more than d_sae={self.d_sae}")
        if (self.code_norm == "mixed") != (self.mixed is not None):
            raise ValueError(f"code_norm {self.code_norm} with mixed={self.mixed}")
        _expect_length("sites", self.sites, self.sources)
        if isinstance(self.input_norm, SourceScale):
            _expect_length("input_norm.factors", self.input_norm.factors, self.sources)
        if self.input_norm is not None and self.width_out != self.d_in:
            raise ValueError("input_norm is undone on the output, so it needs d_out == d_in")
        if self.reads is not None and (
            not self.reads
            or list(self.reads) != sorted(set(self.reads))
            or not 0 <= self.reads[0] <= self.reads[-1] < self.sources
        ):
            raise ValueError(f"reads {self.reads} are not rising numbers below {self.sources}")
        return self

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that this spec requires, no more and no less."""
        n, d_out = self.d_sae, self.width_out
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc_rows": (len(self.encoded), n, self.d_in),
            "b_enc": (n,),
            "W_dec": (n, self.sources, d_out),
            "b_dec": (self.sources, d_out),
        }
        if self.architecture == "jumprelu":
            shapes["threshold"] = (self.sources, n) if self.per_source else (n,)
        if isinstance(self.input_norm, Standardise):
            shapes |= {"in_mean": (self.sources, self.d_in), "in_scale": (self.sources,)}
        return shapes

    @classmethod
    def from_json(cls, data: object, where: str = "config") -> "CrosscoderConfig":
        """Validate plain JSON values. Raises ConfigError in one line that names `where`."""
        return _validated(cls, data, where)


AnyConfig = SAEConfig | CLTConfig | CrosscoderConfig

KINDS: dict[object, type[CLTConfig] | type[CrosscoderConfig]] = {
    "clt": CLTConfig,
    "crosscoder": CrosscoderConfig,
}
"""The `kind` of a native config -> its spec; an SAE's has none."""


def config_from_json(data: dict[str, Any], where: str) -> AnyConfig:
    """The spec of a native config, by its `kind`. Raises ConfigError."""
    if "kind" not in data:
        return SAEConfig.from_json(data, where=where)
    if not isinstance(data["kind"], str) or data["kind"] not in KINDS:
        raise ConfigError(
            f"{where}: kind {data['kind']!r} is not known here ({', '.join(map(str, KINDS))} are): "
            "upgrade saezoo"
        )
    return KINDS[data["kind"]].from_json(data, where=where)


def _validated(cls: type[Any], data: object, where: str) -> Any:
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {one_line(error)}") from None


def _expect_length(name: str, values: Sequence[object] | None, count: int) -> None:
    if values is not None and len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries, not {count}")
