"""The README of a trained folder: what it is, how to load it, what was measured and what not."""

from typing import Any

from saezoo.config import SAEConfig

MEASURED = (
    ("FVU", "fvu", ".4f"),
    ("FVU of PCA fitted to these same tokens, with as many directions as L0", "pca_fvu", ".4f"),
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

A {architecture} sparse autoencoder with {d_sae:,} features, {k} on per token, on the output of
`{module}` (`{hook_name}`) of {model} ({weights}).

```python
from saezoo import load_sae

sae = load_sae("{name}")
features = sae.encode_sparse(x)  # x: (…, {d_in}) activations at the site
```

## What it was trained on
{provenance}

Contexts of {context} tokens. Left out: position 0, special tokens, and tokens whose norm is above
{factor} times the median norm of {median:.1f}.

## Measured on held-out documents
The definitions are those of `saezoo.metrics`, version {version}. FVU, L0 and PCA leave out the
tokens that training left out; the losses are over every position.

| | |
| --- | --- |
{rows}

## Limits
On position 0 and on tokens above the norm limit its reconstruction means nothing: it has never
seen such activations. `stats.safetensors` has `density` and `max_activation` of each feature over
training tokens; `golden.safetensors` has inputs and what the SAE makes of them.

Licence: {licence}.
"""


def describe(cfg: SAEConfig) -> str:
    """Fill in the text above from a spec that has site, token rule, origin and metrics."""
    assert cfg.site is not None
    assert cfg.tokens is not None
    assert cfg.origin is not None
    facts, notes = cfg.metrics or {}, cfg.notes or {}
    values: dict[str, Any] = {
        "name": notes.get("recipe"),
        "architecture": cfg.architecture,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "k": cfg.k,
        "module": cfg.site.module,
        "hook_name": cfg.site.hook_name,
        "model": cfg.site.model,
        "weights": cfg.site.quantisation or "as published",
        "provenance": notes.get("provenance") or notes.get("dataset"),
        "context": cfg.tokens.context,
        "factor": cfg.tokens.max_norm_factor,
        "median": cfg.tokens.median_norm,
        "version": facts.get("version"),
        "rows": "\n".join(
            f"| {what} | {facts[key]:{form}} |" for what, key, form in MEASURED if key in facts
        ),
        "licence": cfg.origin.licence,
    }
    return TEXT.format_map(values)
