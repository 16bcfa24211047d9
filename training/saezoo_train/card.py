"""The README of a trained folder: what it is, how to load it, what was measured and what not."""

from collections.abc import Mapping
from typing import Any

from saezoo.config import SAEConfig, TokenRule
from saezoo.metrics import VERSION

MEASURED = (
    ("FVU", "fvu", ".4f"),
    ("FVU of PCA with {pca_k} directions, fitted to these same tokens", "pca_fvu", ".4f"),
    ("L0", "l0", ".2f"),
    ("features that fired on none of these tokens", "dead_fraction", ".2%"),
    ("next-token loss of the model, nats", "loss_clean", ".4f"),
    ("… with the reconstruction in place of the site", "loss_spliced", ".4f"),
    ("… with zeros in place of the site", "loss_zero", ".4f"),
    ("loss recovered", "loss_recovered", ".4f"),
    ("tokens counted", "tokens", ",d"),
    ("held-out documents, one context each", "held_out_documents", ",d"),
    ("share of tokens left out as norm outliers", "outlier_share", ".3%"),
)

TEXT = """# {name}

A {architecture} sparse autoencoder with {d_sae:,} features, {sparsity}, on the {side} of
`{module}`{hook} of {model} ({weights}).{trained_as}

```python
from saezoo import load_sae

{use}
```

## What it was trained on
{provenance}

Contexts of {context} tokens.
Left out: {left_out}.

## Measured on held-out documents
The definitions are those of `saezoo.metrics`, version {version}. FVU, L0 and PCA leave out the
tokens that training left out; the losses are over every position.

| | |
| --- | --- |
{rows}

## Limits
What was left out it has never seen: there its reconstruction means nothing. {files}

Licence: {licence}.
"""


USE = """sae = load_sae("{load}")
features = sae.encode_sparse(x)  # x: (…, {d_in}) activations at the site"""
FILES = """`stats.safetensors` has
`density` and `max_activation` of each feature over {stats_tokens} training tokens;
`golden.safetensors` has inputs and what the SAE makes of them."""

CUSTOM_USE = """from {module_of_class} import {name_of_class}  # its author's own code

sae = load_sae("{load}", custom={name_of_class})"""
CUSTOM_FILES = "Its architecture\nis its author's own, and so is the code that was measured."


def describe(cfg: SAEConfig) -> str:
    """Fill in the text above from a spec that has site, token rule, origin and metrics."""
    assert cfg.site is not None
    assert cfg.tokens is not None
    assert cfg.origin is not None
    facts, notes = cfg.metrics or {}, cfg.notes or {}
    name = notes.get("recipe", "my-sae")
    way = notes.get("trained_as", cfg.architecture)
    values: dict[str, Any] = {
        "name": name,
        "load": name if "/" in name else f"./{name}",
        "architecture": cfg.architecture,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "sparsity": _sparsity(cfg, facts),
        "side": cfg.site.side,
        "module": cfg.site.module,
        "hook": f" (`{cfg.site.hook_name}`)" if cfg.site.hook_name else "",
        "model": cfg.site.model,
        "weights": cfg.site.quantisation or "as published",
        "trained_as": f" It was trained as {way}." if way != cfg.architecture else "",
        "provenance": notes.get("provenance") or notes.get("dataset"),
        "context": cfg.tokens.context,
        "left_out": _left_out(cfg.tokens),
        "stats_tokens": f"{facts['stats_tokens']:,}" if "stats_tokens" in facts else "some",
        "version": facts.get("version", VERSION),
        "rows": "\n".join(
            f"| {what.format_map(facts)} | {facts[key]:{form}} |"
            for what, key, form in MEASURED
            if key in facts
        ),
        "licence": cfg.origin.licence or "not stated",
    }
    use, files = (CUSTOM_USE, CUSTOM_FILES) if cfg.custom else (USE, FILES)
    if cfg.custom:
        values["module_of_class"], _, values["name_of_class"] = cfg.custom.name.partition(":")
    values |= {"use": use.format_map(values), "files": files.format_map(values)}
    return TEXT.format_map(values)


def _sparsity(cfg: SAEConfig, facts: Mapping[str, Any]) -> str:
    if cfg.k:
        return f"{cfg.k} on per token"
    return f"{facts['l0']:.1f} on per token" if "l0" in facts else "sparse"


def _left_out(rule: TokenRule) -> str:
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
