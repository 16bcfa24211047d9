"""Which tensor of a model a Site means: the module that carries it, and what is done to it before
an SAE reads it and after an SAE wrote it. Plain HuggingFace models and TransformerLens' alike.

A Site is looked up by its own words: on a HuggingFace model the module path and side, or else layer
and point by the table FAMILIES; on TransformerLens the hook's name, or else layer and point.

hook_z              the input of o_proj (c_proj, dense), heads flattened into one axis
rms_gain: false     the norm's input, normalised with the norm's own eps, without gain and bias: no
                    module gives that tensor, so it is computed, and gain and bias are applied to
                    what is put back
centred             less the mean of each token; the mean is added back to what is put back
resid_mid           what the norm after it reads is only one of its two ways on, so what is put
                    back goes into the tensor itself
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from saezoo.config import Point, Site
from saezoo.errors import CaptureError
from saezoo.formats._hooks import GEMMA2, GPT2, LLAMA, NEOX, Places, Side, site_of_hook
from saezoo.numerics import TOLERANCE, largest_difference

NAME_IT = "name the module: Site(module='model.layers.15', side='output')"


@dataclass(frozen=True)
class Place:
    """A tensor of one model, found."""

    name: str
    """For messages: the module's path or the hook's name."""
    module: nn.Module
    side: Side = "output"
    kind: Literal["plain", "normalised", "in place"] = "plain"
    """normalised: `module` is a norm, and its output without gain and bias is meant. in place: what
    is put back overwrites the tensor, for those who hold it too.
    """
    centred: bool = False
    gain: Tensor | None = None
    """Of a normalised place: what the norm multiplies by (d,)."""

    def after_norm(self, value: Tensor) -> Tensor:
        """`value` (…, d), normalised, as the norm gives it on: times its gain, plus its bias."""
        assert self.gain is not None
        bias = getattr(self.module, "bias", None)
        out = value.to(torch.promote_types(value.dtype, self.gain.dtype)) * self.gain
        return out if bias is None else out + bias


class Family(NamedTuple):
    """Where an architecture of transformers keeps its tensors."""

    stack: str
    places: Places
    norms: dict[Point, str]
    """Point -> the norm whose output it is."""
    embed: tuple[str, Side]


_LLAMA_NORMS: dict[Point, str] = {
    "attn_in": ".input_layernorm",
    "mlp_in": ".post_attention_layernorm",
}
_GEMMA2_NORMS: dict[Point, str] = {
    "attn_in": ".input_layernorm",
    "mlp_in": ".pre_feedforward_layernorm",
}
# Gemma's embeddings are scaled after the module that holds them
_GEMMA_EMBED: tuple[str, Side] = ("model.layers.0", "input")
_LLAMA = Family("model.layers", LLAMA, _LLAMA_NORMS, ("model.embed_tokens", "output"))
_GEMMA2 = Family("model.layers", GEMMA2, _GEMMA2_NORMS, _GEMMA_EMBED)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "transformer.h",
        GPT2,
        {"attn_in": ".ln_1", "mlp_in": ".ln_2"},
        ("transformer.wte", "output"),
    ),
    "gpt_neox": Family("gpt_neox.layers", NEOX, _LLAMA_NORMS, ("gpt_neox.embed_in", "output")),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA._replace(embed=_GEMMA_EMBED),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gemma3": _GEMMA2,
}
"""By `model.config.model_type`."""

HOOKS: dict[Point, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_act": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
}
"""Point -> what follows `blocks.N.` in TransformerLens and names a row of Places."""

NORM_HOOKS: dict[Point, str] = {"attn_in": "ln1.hook_normalized", "mlp_in": "ln2.hook_normalized"}
"""The same for points that are meant without the norm's gain."""

FLAGS = {
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "attn.hook_result": "use_attn_result",
}
"""TransformerLens' hooks that stay silent unless a flag of the model's config is set."""


def is_lens(model: nn.Module) -> bool:
    """Whether this is TransformerLens' HookedTransformer or TransformerBridge."""
    return hasattr(model, "hook_dict") and hasattr(model, "cfg")


def find_place(model: nn.Module, site: Site) -> Place:
    """The place of a site in a model. Raises CaptureError when the model has none, saying what it
    has or how to name it.
    """
    if site.hook_name is not None and (site.layer is None or site.point is None):
        told = site_of_hook(site.hook_name)
        site = site.model_copy(
            update={
                "layer": told.layer if site.layer is None else site.layer,
                "point": site.point or told.point,
                "rms_gain": told.rms_gain if site.rms_gain is None else site.rms_gain,
            }
        )
    ambiguous = (site.hook_name or "").endswith(".hook_mlp_in")
    if ambiguous and (site.module is None or is_lens(model)):
        site = _after_the_norm(model, site)
    place = _lens_place(model, site) if is_lens(model) else _module_place(model, site)
    return replace(place, centred=bool(site.centred))


def _after_the_norm(model: nn.Module, site: Site) -> Site:
    """A site called hook_mlp_in, which TransformerLens has before the norm: where the site says
    that a norm's gain is in or out it is after it, as others use the name. Raises CaptureError for
    a plain model, where neither is certain.
    """
    if site.rms_gain is not None:
        return site.model_copy(update={"hook_name": None})
    if is_lens(model):
        return site
    raise CaptureError(
        f"{site.hook_name} is before the norm in TransformerLens, and others use the name for "
        "after it: give rms_gain, or name the module: "
        "Site(module='model.layers.15.mlp', side='input')"
    )


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, with or without the wrapper's own prefix. Raises CaptureError,
    naming the nearest.
    """
    modules = dict(model.named_modules())
    for candidate in (
        path,
        f"model.{path}",
        f"transformer.{path}",
        f"gpt_neox.{path}",
        # Gemma 3 from 4B on is a model of text and images, its layers one step further in
        path.replace("model.", "model.language_model.", 1),
        path.partition(".")[2],
    ):
        if candidate and candidate in modules:
            return modules[candidate]
    close = difflib.get_close_matches(path, modules, n=3, cutoff=0.3)
    raise CaptureError(
        f"{type(model).__name__} has no module {path!r}. Closest: {', '.join(close) or 'none'}"
    )


def layer_count(model: nn.Module) -> int | None:
    """How many layers the model says it has; None where it says nothing."""
    config = getattr(model, "cfg", None) if is_lens(model) else getattr(model, "config", None)
    # a model of text and images keeps the text's facts one step further in
    config = getattr(config, "text_config", None) or config
    for name in ("num_hidden_layers", "n_layer", "n_layers"):
        if isinstance(count := getattr(config, name, None), int):
            return count
    return None


def run_model(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """One forward pass without a cache: logits (batch, positions, vocabulary), or what a model
    without a head gives.
    """
    if is_lens(model):
        out = model(input_ids, attention_mask=attention_mask)
    else:
        out = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return out if isinstance(out, Tensor) else getattr(out, "logits", out)


def normalised(norm: nn.Module, value: Tensor) -> Tensor:
    """What a LayerNorm or RMSNorm makes of `value` before gain and bias, in value's dtype."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(norm, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _eps(norm))).to(value.dtype)


def _module_place(model: nn.Module, site: Site) -> Place:
    """In a plain HuggingFace model."""
    count = layer_count(model)
    if site.layer is not None and count is not None and site.layer >= count:
        raise CaptureError(
            f"{type(model).__name__} has {count} layers, 0 to {count - 1}: no layer {site.layer}"
        )
    if site.rms_gain is False:
        return _norm_place(model, site)
    path, side = (site.module, site.side) if site.module else _by_point(model, site)
    kind: Any = "in place" if (site.point, side) == ("resid_mid", "input") else "plain"
    return Place(f"{path} ({side})", find_module(model, path), side, kind)


def _by_point(model: nn.Module, site: Site) -> tuple[str, Side]:
    """Module and side of a site that says only layer and point, or embed."""
    if site.point is None or (site.layer is None and site.point != "embed"):
        said = site.hook_name or (f"layer {site.layer}" if site.layer is not None else "nothing")
        raise CaptureError(f"the site says {said}, which names no module of this model: {NAME_IT}")
    family = _family(model)
    if site.point == "embed":
        return family.embed
    hook = HOOKS.get(site.point)
    if hook not in family.places:
        raise CaptureError(
            f"{type(model).__name__} gives {site.point} in no module that is known: {NAME_IT}"
        )
    submodule, side = family.places[hook]
    return f"{family.stack}.{site.layer}{submodule}", side


def _family(model: nn.Module) -> Family:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise CaptureError(
            f"where {type(model).__name__} (model_type {kind!r}) keeps its layers is not known: "
            f"{NAME_IT}; `print(model)` shows the paths"
        )
    return FAMILIES[kind]


def _norm_place(model: nn.Module, site: Site) -> Place:
    """The norm whose output without gain is meant."""
    if site.module is not None:
        path, norm = site.module, find_module(model, site.module)
    elif site.layer is not None and site.point in ("attn_in", "mlp_in"):
        family = _family(model)
        path = f"{family.stack}.{site.layer}{family.norms[site.point]}"
        norm = find_module(model, path)
    else:
        raise CaptureError(
            "a site with rms_gain: false needs its norm named: "
            "Site(module='model.layers.15.pre_feedforward_layernorm', rms_gain=False)"
        )
    return Place(f"{path} (without gain)", norm, kind="normalised", gain=_gain(norm, path))


def _eps(norm: nn.Module) -> float:
    eps = getattr(norm, "eps", None)
    return float(getattr(norm, "variance_epsilon", 0.0) if eps is None else eps)


def _gain(norm: nn.Module, path: str) -> Tensor:
    """A norm's gain (d,): its weight, or as Gemma has it 1 + weight, by what the norm gives for a
    vector. Raises CaptureError for a module that does neither.
    """
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        with torch.no_grad():
            bias = getattr(norm, "bias", None)
            # not constant, so that a LayerNorm leaves something of it
            probe = torch.arange(1, len(weight) + 1, device=weight.device).to(weight.dtype)
            told = norm.forward(probe).float() - (0 if bias is None else bias.float())
            plain = normalised(norm, probe.float())
            gains = (weight.detach(), weight.detach().float() + 1)
            off = [largest_difference(plain * gain.float(), told) for gain in gains]
            if min(off) <= TOLERANCE[weight.dtype]:
                return gains[off.index(min(off))]
    raise CaptureError(
        f"{path}: {type(norm).__name__} is no LayerNorm or RMSNorm whose gain can be left out"
    )


def _lens_place(model: Any, site: Site) -> Place:
    """In a TransformerLens model: the hook, which is a module whose output is the tensor."""
    if site.layer is not None and site.layer >= model.cfg.n_layers:
        raise CaptureError(
            f"{type(model).__name__} has {model.cfg.n_layers} layers, 0 to "
            f"{model.cfg.n_layers - 1}: no layer {site.layer}"
        )
    hook, names = site.hook_name, NORM_HOOKS if site.rms_gain is False else HOOKS
    if hook is None and site.layer is not None and site.point in names:
        hook = f"blocks.{site.layer}.{names[site.point]}"
    if hook is None:
        raise CaptureError(
            "the site names no hook of TransformerLens: give "
            "Site(hook_name='blocks.15.hook_resid_post')"
        )
    flag = FLAGS.get(re.sub(r"^blocks\.\d+\.", "", hook))
    if flag is not None and not getattr(model.cfg, flag, False):
        raise CaptureError(f"{hook} stays silent unless the model's cfg.{flag} is True: set it")
    if hook in model.hook_dict:
        # in a bridge this hook is on one of the tensor's two ways on, as in the model it wraps
        one_way = hook.endswith(".hook_resid_mid") and hasattr(model, "original_model")
        return Place(hook, model.hook_dict[hook], kind="in place" if one_way else "plain")
    if site.point == "mlp_in" and site.rms_gain is not False:
        return _lens_mlp_input(model, site, hook)
    close = difflib.get_close_matches(hook, model.hook_dict, n=3, cutoff=0.3)
    raise CaptureError(
        f"{type(model).__name__} has no hook {hook!r}. Closest: {', '.join(close) or 'none'}"
    )


def _lens_mlp_input(model: Any, site: Site, hook: str) -> Place:
    """HookedTransformer has no hook on what its MLP reads: the MLP's own input is taken."""
    if str(model.cfg.normalization_type).endswith("Pre"):
        raise CaptureError(
            f"{hook}: the norm's gain was folded into the weights, so no tensor of this model "
            "carries it: load the model with fold_ln=False"
        )
    path = f"blocks.{site.layer}.mlp"
    return Place(f"{path} (input)", find_module(model, path), "input")
