"""The explicit spec of an SAE: everything that its arithmetic needs, as frozen values, to and from
JSON.

An unknown fact is absent (None, and not written), never 0 or 1.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PositiveInt,
    ValidationError,
    model_validator,
)

from saezoo.errors import ConfigError

Architecture = Literal["relu", "topk", "jumprelu", "gated", "groupmax", "tensor_topk", "custom"]
Point = Literal[
    "embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_in",
    "attn_z",
    "attn_out",
    "mlp_in",
    "mlp_act",
    "mlp_out",
]


class Spec(BaseModel):
    """Frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """The facts that are known, as plain JSON values."""
        return self.model_dump(mode="json", exclude_none=True)


class Site(Spec):
    """Where in a host model the activations come from (or, for a transcoder's output, go to)."""

    model: str | None = None
    """Canonical HuggingFace model id."""
    layer: int | None = Field(default=None, ge=0)
    point: Point | None = None
    module: str | None = None
    """HuggingFace module path, such as `model.layers.15`."""
    side: Literal["input", "output"] = "output"
    """Whether the module's input or its output is meant."""
    hook_name: str | None = None
    """The same place in TransformerLens terms, such as `blocks.15.hook_resid_post`."""
    centred: bool | None = None
    """True: the host's writing weights were centred; on a plain host subtract the per-token mean
    before encode.
    """
    rms_gain: bool | None = None
    """Whether the gain of the RMSNorm before this site is in the activations."""
    revision: str | None = None
    quantisation: str | None = None


class TokenRule(Spec):
    """Which tokens an SAE was trained on, and so on which ones its numbers hold."""

    prepend_bos: bool | None = None
    context: PositiveInt | None = None
    """Tokens per context in training."""
    skip_first: int | None = Field(default=None, ge=0)
    """How many positions at the start of each context are left out (1: position 0 is)."""
    skip_special: bool | None = None
    """Whether BOS, EOS, padding and other special tokens are left out."""
    median_norm: float | None = Field(default=None, gt=0)
    """Median Euclidean norm of the training activations, raw units."""
    max_norm_factor: float | None = Field(default=None, gt=0)
    """Tokens whose norm is above this many times median_norm are left out."""

    @property
    def max_norm(self) -> float | None:
        """The largest norm that is kept, raw units; None when there is no such rule."""
        if self.median_norm is None or self.max_norm_factor is None:
            return None
        return self.median_norm * self.max_norm_factor


class LayerNorm(Spec):
    """z = (x - mean) / (std + eps); the way back is z * std + mean, without eps."""

    kind: Literal["layer_norm"] = "layer_norm"
    eps: float = Field(default=1e-5, ge=0)
    ddof: Literal[0, 1] = 1


class ConstantNorm(Spec):
    """z = x * sqrt(d_in) / |x|, and back."""

    kind: Literal["constant_norm"] = "constant_norm"


class Scale(Spec):
    """z = x * factor, and back."""

    kind: Literal["scale"] = "scale"
    factor: float = Field(gt=0)


InputNorm = Annotated[LayerNorm | ConstantNorm | Scale, Field(discriminator="kind")]


class Origin(Spec):
    """Where the weights come from."""

    source: str | None = None
    revision: str | None = None
    sha256: str | None = None
    licence: str | None = None
    paper: str | None = None
    format: str | None = None
    author: str | None = None


class Custom(Spec):
    """An SAE whose arithmetic only its author's class knows."""

    name: str
    """What the author calls that class: for people to read, never imported."""
    tensors: dict[str, tuple[PositiveInt, ...]]
    """The tensors in the file, with their shapes."""
    options: dict[str, JsonValue] = {}
    """What the class wants to know besides."""


class SAEConfig(Spec):
    """The arithmetic of one SAE or transcoder, and what is known about it.

    Raises ConfigError from `from_json` when keys are unknown or contradict each other.
    """

    architecture: Architecture
    """tensor_topk: the k * tokens largest of all pre-activations of a call are kept: what is on for
    one token depends on those that are encoded with it, and k is a mean over them. custom: see
    `custom`; `load_sae(…, custom=…)` needs the class.
    """
    d_in: PositiveInt
    d_sae: PositiveInt
    d_out: PositiveInt | None = None
    """None means d_in: an SAE. Read `sae.d_out` for the number."""
    k: PositiveInt | None = None
    relu_after: bool = True
    """topk, groupmax: ReLU on what was chosen. jumprelu: ReLU(a)*(a > threshold); False keeps a
    where a > threshold.
    """
    signed: bool = False
    """topk: choose by magnitude and keep the sign."""
    decoder_norm: Literal["none", "rank", "scale"] = "none"
    """With |d| the norm of a feature's decoder row: rank decides by a*|d| and returns a; scale
    returns a*|d|.
    """
    input_norm: InputNorm | None = None
    subtract_b_dec: bool = False
    input_bias: bool = False
    """A separate input bias b_in (d_in) is subtracted before encoding."""
    skip: bool = False
    """x @ W_skip is added to the output (x before any bias or normalisation)."""
    custom: Custom | None = None
    """Where architecture is custom, and only there."""
    site: Site | None = None
    out_site: Site | None = None
    """Transcoders: where the output goes."""
    tokens: TokenRule | None = None
    origin: Origin | None = None
    metrics: dict[str, float | int | str] | None = None
    """Only measured or published facts."""
    notes: dict[str, str] | None = None

    @property
    def hook_name(self) -> str | None:
        """The TransformerLens name of the input site, if known."""
        return self.site.hook_name if self.site else None

    @property
    def model_name(self) -> str | None:
        """The HuggingFace id of the host model, if known."""
        return self.site.model if self.site else None

    @property
    def is_transcoder(self) -> bool:
        """Whether the output is another tensor than the input."""
        return self.out_site is not None or self.skip or (self.d_out or self.d_in) != self.d_in

    @model_validator(mode="after")
    def _consistent(self) -> "SAEConfig":
        if (self.architecture == "custom") != (self.custom is not None):
            raise ValueError("architecture custom and the key custom go together")
        chooses_k = self.architecture in ("topk", "groupmax", "tensor_topk")
        if chooses_k and self.k is None:
            raise ValueError(f"architecture {self.architecture} needs k")
        if not chooses_k and self.k is not None:
            raise ValueError(f"architecture {self.architecture} has no k, but k={self.k} is given")
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k={self.k} is more than d_sae={self.d_sae}")
        if self.architecture == "groupmax" and self.k and self.d_sae % self.k:
            raise ValueError(f"groupmax needs d_sae={self.d_sae} to be a multiple of k={self.k}")
        if self.signed and (self.architecture != "topk" or self.relu_after):
            raise ValueError("signed is for topk with relu_after: false")
        if not self.relu_after and self.architecture not in ("topk", "groupmax", "jumprelu"):
            raise ValueError(f"relu_after: false has no meaning for {self.architecture}")
        if self.decoder_norm != "none" and self.architecture == "gated":
            raise ValueError("decoder_norm has no meaning for gated")
        if self.subtract_b_dec and (self.d_out or self.d_in) != self.d_in:
            raise ValueError(
                f"subtract_b_dec needs d_out == d_in, but they are {self.d_out} and {self.d_in}"
            )
        if self.subtract_b_dec and self.input_bias:
            raise ValueError("subtract_b_dec and input_bias exclude each other")
        if self.input_norm is not None and (self.d_out or self.d_in) != self.d_in:
            raise ValueError("input_norm is undone on the output, so it needs d_out == d_in")
        return self

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that this spec requires, no more and no less, with their shapes (rows are
        features).
        """
        if self.custom is not None:
            return dict(self.custom.tensors)
        d_in, d_out, n = self.d_in, self.d_out or self.d_in, self.d_sae
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc_rows": (n, d_in),
            "W_dec": (n, d_out),
            "b_dec": (d_out,),
        }
        if self.architecture == "gated":
            shapes |= {"b_gate": (n,), "r_mag": (n,), "b_mag": (n,)}
        else:
            shapes["b_enc"] = (n,)
        if self.architecture == "jumprelu":
            shapes["threshold"] = (n,)
        if self.input_bias:
            shapes["b_in"] = (d_in,)
        if self.skip:
            shapes["W_skip"] = (d_in, d_out)
        return shapes

    @classmethod
    def from_json(cls, data: object, where: str = "config") -> "SAEConfig":
        """Validate plain JSON values. Raises ConfigError in one line that names `where` and each
        wrong key.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{where}: {one_line(error)}") from None


def one_line(error: ValidationError) -> str:
    """What is wrong with a pydantic model, as one line: `key: problem (value)`, the first five."""
    parts = []
    for item in error.errors(include_url=False)[:5]:
        place = ".".join(
            str(part) for part in item["loc"] if part not in ("layer_norm", "constant_norm")
        )
        value = repr(item.get("input"))
        shown = f" (got {value[:60]})" if item["type"] != "missing" and len(value) < 200 else ""
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{place}: {message}{shown}" if place else message)
    more = error.error_count() - len(parts)
    return "; ".join(parts) + (f" (and {more} more)" if more > 0 else "")
