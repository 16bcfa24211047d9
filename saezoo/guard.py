"""Is this the model that the SAE was trained on? What can be seen of a host, against what the SAE's
spec says.

Each difference is of one of two kinds:
wrong    the numbers cannot be right: another model or commit, weights centred for an SAE of
         uncentred ones, a tokeniser without the BOS that the SAE wants, or of another vocabulary
doubt    they may be off, or cannot be told: a model that does not say which it is, quantisation,
         where BOS goes, folded biases

guard="error" raises for what is wrong and logs the doubts as warnings; "warn" logs both; "off"
looks at nothing. Facts that the SAE does not state are not compared.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from saezoo.config import Point, SAEConfig, Site
from saezoo.errors import CaptureError, InputError
from saezoo.sites import is_lens

logger = logging.getLogger(__name__)

Guard = Literal["error", "warn", "off"]
CENTRED: tuple[Point, ...] = (
    "embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
)
"""Points whose tensors change when writing weights are centred."""
COMMIT = re.compile(r"[0-9a-f]{40}")


class Difference(NamedTuple):
    """One thing in which host and spec differ, or may differ."""

    wrong: bool
    what: str


class HostFacts(NamedTuple):
    """What a model says of itself; None for what it does not."""

    model: str | None
    revision: str | None
    quantisation: str | None
    centred: bool | None


def check_host(
    model: nn.Module,
    cfg: SAEConfig,
    *,
    guard: Guard = "error",
    site: Site | None = None,
    tokenizer: Any = None,
) -> list[Difference]:
    """Compare a host with an SAE's spec; raise or log as `guard` says, and return what differs.

    site: instead of the spec's own. tokenizer: a TransformerLens model's own unless given; without
    one nothing is said of tokens. Raises CaptureError.
    """
    if guard not in ("error", "warn", "off"):
        raise InputError(f"guard {guard!r}: there are 'error', 'warn' and 'off'")
    if guard == "off":
        return []
    found = compare_host(model, cfg, site=site, tokenizer=tokenizer)
    wrong = [item.what for item in found if item.wrong]
    if wrong and guard == "error":
        raise CaptureError(f"not the SAE's host: {'; '.join(wrong)} (guard='warn' goes on anyway)")
    for item in found:
        logger.warning("the SAE's host: %s", item.what)
    return found


def compare_host(
    model: nn.Module, cfg: SAEConfig, *, site: Site | None = None, tokenizer: Any = None
) -> list[Difference]:
    """Everything in which a host differs from what the SAE's spec says, or may."""
    site = site or cfg.site or Site()
    host = host_facts(model)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    found = [*_identity(host, site), *_weights(model, host, site)]
    if tokenizer is not None:
        found += _tokens(model, cfg, site, tokenizer)
    return found


def host_facts(model: nn.Module) -> HostFacts:
    """What a HuggingFace or TransformerLens model says of itself."""
    cfg = getattr(model, "cfg", None)
    config = getattr(model, "config", None) or getattr(
        getattr(model, "original_model", None), "config", None
    )
    name = getattr(config, "_name_or_path", None) or getattr(cfg, "model_name", None)
    path = PurePath(name) if isinstance(name, str) else PurePath()
    # a folder of the Hub's cache says which repo and commit it is
    for part in path.parts:
        if part.startswith("models--"):
            name = part.removeprefix("models--").replace("--", "/")
    commit = getattr(config, "_commit_hash", None)
    if commit is None and COMMIT.fullmatch(path.name):
        commit = path.name
    return HostFacts(
        model=name if name and name != "custom" else None,
        revision=commit,
        quantisation=_quantisation(config),
        centred=_is_centred(model) if is_lens(model) else False,
    )


def _quantisation(config: Any) -> str | None:
    """How the weights are quantised, as far as config says."""
    told = getattr(config, "saezoo_quantisation", None)
    if isinstance(told, str):
        return told
    method = getattr(config, "quantization_config", None)
    if method is None:
        return None
    facts = method if isinstance(method, dict) else getattr(method, "__dict__", {})
    name = facts.get("quant_method", type(method).__name__)
    return str(getattr(name, "value", name))


def _is_centred(model: Any) -> bool | None:
    """Whether each row of TransformerLens' W_out has mean zero, as center_writing_weights does."""
    try:
        weight = model.blocks[0].mlp.W_out
    except AttributeError:
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    with torch.no_grad():
        mean, size = weight.float().mean(-1).abs().max(), weight.float().abs().max()
    return bool(mean < 1e-3 * size)


def short_name(model: str) -> str:
    """A model's name without organisation and spelling: mirrors and renamed repos are the same."""
    return PurePath(model).name.lower().removeprefix("meta-")


def _identity(host: HostFacts, site: Site) -> Iterator[Difference]:
    if site.model is not None:
        if host.model is None:
            yield Difference(False, f"expected {site.model}; this model does not say which it is")
        elif short_name(host.model) != short_name(site.model):
            # a folder may be called anything
            local = host.model.startswith(("/", ".", "~")) or host.model.count("/") > 1
            can_tell = "cannot be told" if local else f"is {host.model}"
            yield Difference(
                not local, f"expected {site.model}, this {can_tell}{_from(host, local)}"
            )
    if site.revision is not None and host.revision != site.revision:
        both = host.revision is not None and COMMIT.fullmatch(site.revision) is not None
        yield Difference(
            both, f"expected revision {site.revision}, this is {host.revision or 'not known'}"
        )


def _from(host: HostFacts, local: bool) -> str:
    return f" from its folder {host.model}" if local else ""


def _weights(model: nn.Module, host: HostFacts, site: Site) -> Iterator[Difference]:
    if (host.quantisation or "").lower() != (site.quantisation or "").lower():
        yield Difference(
            False,
            f"expected quantisation {site.quantisation or 'none'}, this is "
            f"{host.quantisation or 'not quantised, as far as it says'}",
        )
    if host.centred and not site.centred and site.point in (None, *CENTRED):
        unsaid = "does not say so" if site.centred is None else "was trained on uncentred ones"
        yield Difference(
            site.centred is False,
            f"its writing weights were centred (center_writing_weights), the SAE {unsaid}",
        )
    if site.point == "attn_z" and _values_folded(model):
        yield Difference(
            False,
            "its value biases were folded (fold_value_biases), which changes hook_z; whether the "
            "SAE's were is not known",
        )


def _values_folded(model: Any) -> bool:
    """Whether a TransformerLens model has biases of keys but none of values."""
    if not is_lens(model):
        return False
    attention = getattr(model.blocks[0], "attn", None)
    keys, values = (getattr(attention, name, None) for name in ("b_K", "b_V"))
    both = isinstance(keys, Tensor) and isinstance(values, Tensor)
    return both and bool(keys.any()) and not bool(values.any())  # type: ignore[union-attr]


def _tokens(model: nn.Module, cfg: SAEConfig, site: Site, tokenizer: Any) -> Iterator[Difference]:
    rule = cfg.tokens
    rows = _vocabulary(model)
    try:
        size = len(tokenizer)
    except TypeError:
        size = None
    if rows is not None and size is not None and size > rows:
        yield Difference(True, f"the tokeniser has {size} tokens, the model embeds {rows}")
    name = getattr(tokenizer, "name_or_path", "")
    told = site.model is not None and "/" in name and not name.startswith(("/", ".", "~"))
    if told and short_name(name) != short_name(site.model or ""):
        yield Difference(False, f"expected the tokeniser of {site.model}, this is {name}'s")
    if rule is None or rule.prepend_bos is None:
        return
    if rule.prepend_bos and getattr(tokenizer, "bos_token_id", None) is None:
        yield Difference(True, "the SAE wants BOS in front, and this tokeniser has none")
        return
    adds = getattr(getattr(model, "cfg", None), "default_prepend_bos", None)
    if not isinstance(adds, bool):
        adds = getattr(tokenizer, "add_bos_token", None)
    if isinstance(adds, bool) and adds != rule.prepend_bos:
        yield Difference(
            False,
            f"the SAE was trained {'with' if rule.prepend_bos else 'without'} BOS in front, this "
            f"tokeniser puts {'one' if adds else 'none'}",
        )


def _vocabulary(model: nn.Module) -> int | None:
    """Rows of the embedding."""
    get = getattr(model, "get_input_embeddings", None)
    weight = getattr(get() if callable(get) else getattr(model, "embed", None), "weight", None)
    if weight is None:
        weight = getattr(model, "W_E", None)
    return len(weight) if isinstance(weight, Tensor) else None
