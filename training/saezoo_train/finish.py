"""From a trained module to the folder that `load_sae` opens: fold, round, measure, write golden and stats."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saezoo.capture import activations, contexts
from saezoo.check import write_golden
from saezoo.config import Origin, SAEConfig, TokenRule
from saezoo.formats import native
from saezoo.metrics import Metrics, ReconstructionSums, evaluate
from saezoo.sae import SAE, build_sae
from saezoo.save import new_folder
from saezoo_train.architectures import TopKTrainer
from saezoo_train.config import Recipe
from saezoo_train.trainer import Moments, batches, shard_paths

GOLDEN_TOKENS = 32


def fold(
    recipe: Recipe, model: TopKTrainer, moments: Moments, dtype: torch.dtype
) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Spec and tensors for raw activations, matrices rounded to `dtype`, biases float32."""
    rule = recipe.tokens.model_copy(update={"median_norm": moments.median_norm})
    facts: dict[str, Any] = {"site": recipe.site, "tokens": rule, "origin": recipe.origin or Origin()}
    notes = {"dataset": recipe.data.dataset, "recipe": recipe.name}
    if recipe.data.provenance:
        notes["provenance"] = recipe.data.provenance
    cfg, tensors = model.to_native(facts | {"notes": notes})
    return cfg, {name: value.to(dtype) if value.dim() == 2 else value for name, value in tensors.items()}


def held_out_pieces(tokenizer: Callable, texts: list[str], rule: TokenRule, seed: int = 0) -> list[list[int]]:
    """One context of each document, chosen by the seed."""
    by_document: dict[int, list[list[int]]] = {}
    for number, piece in contexts(tokenizer, texts, rule.context or 256, smallest=16):
        by_document.setdefault(number, []).append(piece)
    generator = torch.Generator().manual_seed(seed)
    return [
        pieces[int(torch.randint(len(pieces), (1,), generator=generator))] for pieces in by_document.values()
    ]


def measure(
    sae: SAE, model: nn.Module, tokenizer: Any, pieces: list[list[int]], progress: Callable[[int], None]
) -> Metrics:
    """The metrics of `saezoo.metrics` on held-out contexts."""
    return evaluate(
        model,
        sae,
        pieces,
        special_ids=tokenizer.all_special_ids,
        pad_id=tokenizer.pad_token_id or 0,
        progress=progress,
    )


def feature_stats(sae: SAE, shards: Path, max_norm: float, tokens: int, seed: int) -> dict[str, Tensor]:
    """density and max_activation, both (d_sae,) float32, over training tokens."""
    sums = ReconstructionSums(sae.d_in, sae.d_sae)
    for x in batches(shard_paths(shards), 4096, max_norm, seed):
        sums.add(sae, x)
        if sums.tokens >= tokens:
            break
    return {"density": sums.density, "max_activation": sums.strongest}


def write_result(
    recipe: Recipe,
    trained: TopKTrainer,
    moments: Moments,
    shards: Path,
    model: nn.Module,
    tokenizer: Any,
    held_out_texts: list[str],
    out: Path,
    *,
    dtype: torch.dtype = torch.float16,
    stats_tokens: int = 1_000_000,
    progress: Callable[[int], None] = lambda _contexts: None,
) -> Metrics:
    """Write the native folder `out` with golden outputs, stats and the metrics of the rounded weights."""
    cfg, tensors = fold(recipe, trained, moments, dtype)
    sae = build_sae(cfg, tensors)
    assert cfg.tokens is not None
    pieces = held_out_pieces(tokenizer, held_out_texts, cfg.tokens)
    metrics = measure(sae, model, tokenizer, pieces, progress)
    known = asdict(metrics) | {"training_tokens": moments.tokens, "training_tokens_seen": recipe.train_tokens}
    known |= {"held_out_documents": len(pieces)}
    cfg = cfg.model_copy(update={"metrics": known})
    special = [(number, piece) for number, piece in enumerate(pieces[:8])]
    assert cfg.site is not None
    batch = next(activations(model, tokenizer, special, cfg.site, cfg.tokens))
    choice = torch.randperm(len(batch.x), generator=torch.Generator().manual_seed(recipe.seed))[:GOLDEN_TOKENS]
    with new_folder(out, "native") as work:
        native.write(cfg, tensors, work)
        write_golden(sae, batch.x[choice].float(), work)
        stats = feature_stats(sae, shards, cfg.tokens.max_norm or float("inf"), stats_tokens, recipe.seed)
        save_file(stats, work / "stats.safetensors")
        (work / "README.md").write_text(describe(cfg), encoding="utf-8")
    return metrics


def describe(cfg: SAEConfig) -> str:
    """The README of a trained folder: what it is, how to load it, what was measured and what not."""
    site, tokens, origin, facts = cfg.site, cfg.tokens, cfg.origin, cfg.metrics or {}
    assert site is not None and tokens is not None and origin is not None
    name = (cfg.notes or {}).get("recipe", "this folder")
    rows = "\n".join(
        f"| {label} | {facts[key]:{form}} |"
        for label, key, form in (
            ("FVU", "fvu", ".4f"),
            (f"FVU of PCA with {facts.get('pca_k')} directions, fitted to these same tokens", "pca_fvu", ".4f"),
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
        if key in facts
    )
    return f"""# {name}

A {cfg.architecture} sparse autoencoder with {cfg.d_sae:,} features, {cfg.k} on per token, on the output of
`{site.module}` (`{site.hook_name}`) of {site.model} ({site.quantisation or "as published"}).

```python
from saezoo import load_sae
sae = load_sae("{name}")
features = sae.encode_sparse(x)  # x: (…, {cfg.d_in}) activations at the site
```

## What it was trained on
{(cfg.notes or {}).get("provenance") or (cfg.notes or {}).get("dataset")}. Contexts of {tokens.context} tokens; left out: position 0,
special tokens, and tokens whose norm is above {tokens.max_norm_factor} times the median norm {tokens.median_norm:.1f}.

## Measured on held-out documents
The definitions are those of `saezoo.metrics`, version {facts.get("version")}. FVU and L0 leave out what training left out.

| | |
| --- | --- |
{rows}

## Limits
On position 0 and on the tokens above the norm limit its reconstruction means nothing: it has never seen such activations.
`stats.safetensors` has `density` and `max_activation` of each feature over training tokens; `golden.safetensors` has seeded
inputs and what the SAE makes of them. Licence: {origin.licence}.
"""
