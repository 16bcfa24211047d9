"""The usual reasons why an SAE's numbers are not those that were published, each as one change to
how it is used: another tensor, other tokens, other arithmetic.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from saezoo.config import ConstantNorm, LayerNorm, Point, SAEConfig, Scale, Site, TokenRule
from saezoo.errors import ConfigError
from saezoo.sae import SAE, build_sae

POINTS: tuple[tuple[Point, bool | None], ...] = (
    ("resid_pre", None),
    ("resid_mid", None),
    ("resid_post", None),
    ("attn_out", None),
    ("mlp_out", None),
    ("mlp_in", None),
    ("mlp_in", False),
    ("attn_z", None),
)
"""Points of a layer that SAEs are trained on, and whether the norm's gain is in."""
STEPS = (-1, 1, -2, 2)
"""Layers beside the stated one that are tried."""
OUTLIER = 10.0
"""Times the median norm, where a rule on norms is tried."""


@dataclass(frozen=True)
class Use:
    """One way to use an SAE."""

    what: str
    """What is changed, in words that complete "…explains it"."""
    sae: SAE
    site: Site
    out_site: Site | None
    rule: TokenRule

    @property
    def bos(self) -> bool:
        """Whether contexts begin with BOS."""
        return bool(self.rule.prepend_bos)


def as_stated(sae: SAE) -> Use:
    """As the spec says."""
    assert sae.cfg.site is not None
    rule = sae.cfg.tokens or TokenRule(skip_first=1)
    return Use("as it is stated", sae, sae.cfg.site, sae.cfg.out_site, rule)


def other_tokens(use: Use) -> Iterator[Use]:
    """BOS, position 0, special tokens and outliers, each the other way round."""
    rule = use.rule

    def ruled(what: str, **facts: Any) -> Use:
        return replace(use, what=what, rule=rule.model_copy(update=facts))

    skip = rule.skip_first or 0
    if use.bos:
        yield ruled("leaving BOS away", prepend_bos=False)
    else:
        yield ruled("putting BOS in front of each context", prepend_bos=True)
        if not skip:
            what = "putting BOS in front of each context, without counting it,"
            yield ruled(what, prepend_bos=True, skip_first=1)
    yield (
        ruled("counting position 0", skip_first=0)
        if skip
        else ruled("leaving out position 0", skip_first=1)
    )
    if rule.skip_special:
        yield ruled("counting special tokens", skip_special=False)
    else:
        yield ruled("leaving out special tokens", skip_special=True)
    if rule.max_norm is not None:
        yield ruled("counting tokens of whatever norm", max_norm_factor=None)


def without_outliers(use: Use, median: float) -> Iterator[Use]:
    """A rule on norms, where there is none. median: of the norms at the site."""
    if use.rule.max_norm is None:
        rule = use.rule.model_copy(update={"median_norm": median, "max_norm_factor": OUTLIER})
        yield replace(
            use, what=f"leaving out tokens above {OUTLIER:g} times the median norm", rule=rule
        )


def other_sites(use: Use) -> Iterator[Use]:
    """Layers and points beside the stated ones, and centring; of a transcoder's output too."""
    for what, site in _beside(use.site, "reading "):
        yield replace(use, what=what, site=site)
    if use.out_site is not None:
        for what, site in _beside(use.out_site, "taking as its target "):
            yield replace(use, what=what, out_site=site)
    elif not use.sae.cfg.is_transcoder and (layer := _layer(use.site)) is not None:
        what = f"taking mlp_out of layer {layer} as its target, as a transcoder's,"
        yield replace(use, what=what, out_site=Site(layer=layer, point="mlp_out"))


def _beside(site: Site, doing: str) -> Iterator[tuple[str, Site]]:
    layer = _layer(site)
    if layer is not None:
        for step in STEPS:
            if layer + step >= 0:
                moved = _moved(site, layer, layer + step)
                yield f"{doing}layer {layer + step} in place of {layer}", moved
        for point, gain in POINTS:
            if (point, gain) != (site.point, site.rms_gain):
                named = f"{point} without the norm's gain" if gain is False else point
                facts: dict[str, Any] = {"layer": layer, "point": point, "rms_gain": gain}
                yield (
                    f"{doing}{named} of layer {layer} in place of {_name(site)}",
                    Site(model=site.model, centred=site.centred, **facts),
                )
    words = "without centring" if site.centred else "centred (less the mean of each token)"
    centred = site.model_copy(update={"centred": not site.centred})
    yield f"{doing}the same tensor {words}", centred


def _name(site: Site) -> str:
    if site.point is not None:
        return f"{site.point} without the norm's gain" if site.rms_gain is False else site.point
    return f"the {site.side} of {site.module}" if site.module else str(site.hook_name)


def _layer(site: Site) -> int | None:
    """The layer of a site: as stated, or as its path or hook has it."""
    if site.layer is not None:
        return site.layer
    found = re.search(r"\.(\d+)(?=\.|$)", site.module or site.hook_name or "")
    return int(found[1]) if found else None


def _moved(site: Site, old: int, new: int) -> Site:
    """The same place of another layer."""

    def renumbered(path: str | None) -> str | None:
        return path and re.sub(rf"\.{old}(?=\.|$)", f".{new}", path, count=1)

    return site.model_copy(
        update={
            "layer": new,
            "module": renumbered(site.module),
            "hook_name": renumbered(site.hook_name),
        }
    )


def other_arithmetic(use: Use, l0: float | None) -> Iterator[Use]:
    """Normalisation, biases, activation function, decoder norms and skip, each another way.

    l0: as declared, for a top-k in place of a ReLU.
    """
    cfg = use.sae.cfg
    for norm in (None, LayerNorm(), ConstantNorm()):
        kind = norm.kind if norm else "none"
        if kind != (cfg.input_norm.kind if cfg.input_norm else "none"):
            words = f"normalising x ({kind})" if norm else "leaving x as it is, not normalised,"
            yield from _changed(use, words, input_norm=norm)
    if not cfg.input_bias:
        words = "not subtracting b_dec from x" if cfg.subtract_b_dec else "subtracting b_dec from x"
        yield from _changed(use, words, subtract_b_dec=not cfg.subtract_b_dec)
    if cfg.architecture == "jumprelu":
        yield from _changed(use, "leaving out the threshold", architecture="relu", relu_after=True)
    if cfg.architecture in ("jumprelu", "topk", "groupmax") and not cfg.signed:
        words = "no ReLU after the choice" if cfg.relu_after else "a ReLU after the choice"
        yield from _changed(use, words, relu_after=not cfg.relu_after)
    if cfg.architecture in ("topk", "groupmax"):
        relu: dict[str, Any] = {"architecture": "relu", "k": None, "relu_after": True}
        yield from _changed(use, "a ReLU in place of the choice of k", signed=False, **relu)
    elif cfg.architecture == "relu" and l0 is not None and 1 <= round(l0) <= cfg.d_sae:
        words = f"a top-k of {round(l0)} in place of the ReLU"
        yield from _changed(use, words, architecture="topk", k=round(l0))
    if cfg.architecture != "gated":
        for way in get_args(SAEConfig.model_fields["decoder_norm"].annotation):
            if way != cfg.decoder_norm:
                yield from _changed(use, f"decoder_norm {way!r}", decoder_norm=way)
    if cfg.skip:
        yield from _changed(use, "leaving out the skip", skip=False)


def with_threshold(use: Use, threshold: float) -> Iterator[Use]:
    """One threshold on all features of a ReLU SAE."""
    if use.sae.cfg.architecture == "relu":
        words = f"a threshold of {threshold:.3g} on every feature"
        yield from _changed(use, words, architecture="jumprelu", threshold=threshold)


def scaled(use: Use, factor: float, words: str | None = None) -> Iterator[Use]:
    """x times a factor on the way in, and back on the way out."""
    if use.sae.cfg.input_norm is None or isinstance(use.sae.cfg.input_norm, Scale):
        words = words or f"multiplying x by {factor:.3g}"
        yield from _changed(use, words, input_norm=Scale(factor=factor))


def _changed(use: Use, what: str, threshold: float | None = None, **facts: Any) -> Iterator[Use]:
    """The SAE with some facts of its spec changed; nothing where they contradict the others, or
    the tensors for them are not there.
    """
    old = use.sae
    norm = facts.get("input_norm")
    plain = facts | ({"input_norm": norm.to_json()} if norm is not None else {})
    try:
        cfg = SAEConfig.from_json(old.cfg.to_json() | plain)
    except ConfigError:
        return
    have: dict[str, Tensor] = dict(old.named_parameters())
    if threshold is not None:
        have["threshold"] = torch.full_like(old.b_enc, threshold)
    needed = cfg.tensor_shapes()
    if needed.keys() <= have.keys():
        sae = build_sae(cfg, {name: have[name] for name in needed}, device=old.device)
        yield replace(use, what=what, sae=sae)
