"""What a card says of one SAE: its spec, tokens, training and what was measured, in words."""

import json
import re
from collections.abc import Mapping
from typing import Any

from saezoo.config import ConstantNorm, LayerNorm, SAEConfig, Site, TokenRule

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""A model or data set of the HuggingFace Hub, by the look of its name."""

MEASURED = (
    ("FVU: variance unexplained, 0 is perfect", "fvu", ".4f"),
    ("FVU of PCA with {pca_k} directions, fitted to these same tokens", "pca_fvu", ".4f"),
    ("cosine of activation and reconstruction", "cosine", ".4f"),
    ("reconstruction bias: under 1 it has shrunk", "relative_reconstruction_bias", ".4f"),
    ("L0: features on per token", "l0", ".2f"),
    ("features that fired on none of these tokens", "dead_fraction", ".2%"),
    ("features that fired on more than a tenth of them", "dense_fraction", ".2%"),
    ("next-token loss of the model, nats", "loss_clean", ".4f"),
    ("… with the reconstruction in place of the site", "loss_spliced", ".4f"),
    ("… with the mean activation in place of the site", "loss_mean", ".4f"),
    ("… with zeros in place of the site", "loss_zero", ".4f"),
    ("loss recovered, against the mean", "loss_recovered_mean", ".4f"),
    ("loss recovered, against zeros", "loss_recovered", ".4f"),
    ("KL of the predictions with the reconstruction in place, nats", "kl", ".4f"),
    ("tokens counted", "tokens", ",d"),
    ("held-out documents, one context each", "held_out_documents", ",d"),
    ("share of tokens left out as norm outliers", "outlier_share", ".3%"),
)
"""What it is, key of the metrics, form. The definitions are those of saezoo.metrics."""


def what_it_is(cfg: SAEConfig) -> str:
    """Kind, size and sparsity: `topk sparse autoencoder with 5,120 features, 32 on per token`."""
    kind = "transcoder" if cfg.is_transcoder else "sparse autoencoder"
    name = f"{cfg.architecture} {kind}" if cfg.custom is None else f"{kind} of its author's own"
    return f"{name} with {cfg.d_sae:,} features, {sparsity(cfg)}"


def sparsity(cfg: SAEConfig) -> str:
    """How many features are on, as far as it is known."""
    if cfg.k:
        return f"{cfg.k} on per token" + (" on average" if "tensor" in cfg.architecture else "")
    facts = cfg.metrics or {}
    return f"{facts['l0']:.1f} on per token" if "l0" in facts else "sparse"


def where_it_reads(cfg: SAEConfig) -> str:
    """The site, and a transcoder's output site: `on the output of \\`model.layers.15\\` (…)`."""
    if cfg.site is None:
        return ""
    text = f" on {_place(cfg.site)}"
    return f"{text}, to {_place(cfg.out_site)}" if cfg.out_site else text


def host_of(cfg: SAEConfig) -> str:
    """The host model, linked where it is one of the Hub, and which weights of it."""
    site = cfg.site or Site()
    if site.model is None:
        return ""
    name = f"[{site.model}]({HUB}/{site.model})" if HUB_ID.fullmatch(site.model) else site.model
    weights = [site.quantisation] if site.quantisation else []
    weights += [f"revision `{site.revision}`"] if site.revision else []
    return f"{name} ({', '.join(weights)})" if weights else name


HUB = "https://huggingface.co"


def _place(site: Site) -> str:
    if site.module is None:
        place = " ".join(
            filter(None, (f"layer {site.layer}" * (site.layer is not None), site.point))
        )
    else:
        place = f"the {site.side} of `{site.module}`"
    return f"{place} (`{site.hook_name}`)" if site.hook_name else place


CHOICES = {
    "relu": "f = ReLU(a)",
    "jumprelu": "f = ReLU(a) where a is above the feature's threshold, else 0",
    "gated": "a gate decides which features are on, a branch of the same directions how strongly",
    "topk": "the {k} largest of a are kept, the others are 0",
    "groupmax": "a is cut into {k} groups, and the largest of each is kept",
    "tensor_topk": "the {k} · tokens largest of a are kept over all tokens of one call: what is on "
    "for a token depends on those that are encoded with it",
}


def spec_in_words(cfg: SAEConfig) -> list[str]:
    """The arithmetic, a line for each step, in its order."""
    if cfg.custom is not None:
        return [f"its arithmetic is that of its author's class `{cfg.custom.name}`"]
    lines = [f"reads x, {cfg.d_in} wide, as the model has it{_centred(cfg)}"]
    match cfg.input_norm:
        case LayerNorm(eps=eps):
            lines.append(
                f"x is made mean 0 and standard deviation 1 (eps {eps:g}), undone at the end"
            )
        case ConstantNorm():
            lines.append("x is scaled to norm sqrt(d_in), undone at the end")
        case None:
            pass
        case scale:
            lines.append(f"x is multiplied by {scale.factor:g}, undone at the end")
    taken = "(x - b_dec)" if cfg.subtract_b_dec else "(x - b_in)" if cfg.input_bias else "x"
    bias = "" if cfg.architecture == "gated" else " + b_enc"
    lines.append(f"a = {taken} W_enc{bias}")
    lines.append(_choice(cfg))
    lines += {
        "rank": ["the choice is by a · ‖d‖, d being the feature's decoder row"],
        "scale": ["f is multiplied by ‖d‖, d being the feature's decoder row"],
        "none": [],
    }[cfg.decoder_norm]
    skip = " + x W_skip" if cfg.skip else ""
    lines.append(f"gives f W_dec + b_dec{skip}, {cfg.d_out or cfg.d_in} wide")
    return lines


def _choice(cfg: SAEConfig) -> str:
    text = CHOICES[cfg.architecture].format(k=cfg.k)
    if cfg.architecture == "jumprelu":
        return text if cfg.relu_after else "f = a where a is above the feature's threshold, else 0"
    if cfg.signed:
        return text.replace("largest of a", "of a largest in magnitude") + ", with their signs"
    if cfg.architecture in ("topk", "groupmax"):
        return f"{text}; ReLU on what is kept" if cfg.relu_after else f"{text}; no ReLU follows"
    return text


def _centred(cfg: SAEConfig) -> str:
    centred = cfg.site is not None and cfg.site.centred
    return ", the writing weights being centred: subtract the per-token mean" if centred else ""


def token_rule(rule: TokenRule | None) -> list[str]:
    """On which tokens it was trained, and so on which its numbers hold."""
    if rule is None:
        return ["not stated"]
    lines = [f"contexts of {rule.context} tokens"] if rule.context else []
    if rule.prepend_bos is not None:
        lines.append("a BOS token first" if rule.prepend_bos else "no BOS token put first")
    return [*lines, f"left out: {left_out(rule)}"]


def left_out(rule: TokenRule) -> str:
    """What the token rule leaves out, in words."""
    first = rule.skip_first or 0
    parts = [f"the first {first} positions" if first > 1 else "position 0"] if first else []
    parts += ["special tokens"] if rule.skip_special else []
    if rule.max_norm is not None:
        parts.append(
            f"tokens whose norm is above {rule.max_norm_factor:g} times the median norm of "
            f"{rule.median_norm:.1f}"
        )
    return ", ".join(parts) or "nothing"


def training(cfg: SAEConfig) -> list[str]:
    """What is known of the run: data, recipe, tokens, settings."""
    facts, notes = cfg.metrics or {}, cfg.notes or {}
    origin = cfg.origin
    lines = []
    if data := notes.get("provenance") or notes.get("dataset"):
        lines.append(f"data: {data}")
    if (way := notes.get("trained_as")) and way != cfg.architecture:
        lines.append(f"trained as {way}")
    tokens = facts.get("training_tokens_seen", facts.get("training_tokens"))
    if tokens:
        lines.append(f"{tokens:,} activations seen in training, repeats counted")
    if recipe := notes.get("recipe"):
        lines.append(f"recipe: `{recipe}`, by saezoo's trainer")
    if origin and origin.source:
        lines.append(
            f"made from {origin.source}" + f" at {origin.revision}" * bool(origin.revision)
        )
    if origin and origin.paper:
        lines.append(f"paper: <{origin.paper}>")
    return lines


def settings(cfg: SAEConfig) -> dict[str, Any]:
    """The settings of the run, where the trainer noted them."""
    try:
        found = json.loads((cfg.notes or {}).get("settings", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def measured_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of every number that is there."""
    return [
        (what.format_map(facts), f"{facts[key]:{form}}")
        for what, key, form in MEASURED
        if isinstance(facts.get(key), int | float) and (key != "pca_fvu" or "pca_k" in facts)
    ]
