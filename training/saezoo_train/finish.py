"""From a trained module to the folder that `load_sae` opens: fold, round, measure, write golden and
stats.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saezoo.capture import capture_pieces, contexts
from saezoo.check import write_golden
from saezoo.config import Origin, SAEConfig, TokenRule
from saezoo.evaluation import evaluate_pieces
from saezoo.formats import native
from saezoo.metrics import Metrics, ReconstructionSums
from saezoo.sae import SAE, build_sae
from saezoo.save import new_folder
from saezoo_train.architectures import TopKTrainer
from saezoo_train.card import describe
from saezoo_train.config import Recipe
from saezoo_train.trainer import Moments, batches, shard_paths

GOLDEN_TOKENS = 32


def fold(
    recipe: Recipe, model: TopKTrainer, moments: Moments, dtype: torch.dtype
) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Spec and tensors for raw activations, matrices rounded to `dtype`, biases float32."""
    rule = recipe.tokens.model_copy(update={"median_norm": moments.median_norm})
    facts: dict[str, Any] = {
        "site": recipe.site,
        "tokens": rule,
        "origin": recipe.origin or Origin(),
    }
    notes = {"dataset": recipe.data.dataset, "recipe": recipe.name}
    if recipe.data.provenance:
        notes["provenance"] = recipe.data.provenance
    cfg, tensors = model.to_native(facts | {"notes": notes})
    return cfg, {
        name: value.to(dtype) if value.dim() == 2 else value for name, value in tensors.items()
    }


def held_out_pieces(
    tokenizer: Any, texts: list[str], rule: TokenRule, seed: int = 0
) -> list[list[int]]:
    """One context of each document, chosen by the seed."""
    by_document: dict[int, list[list[int]]] = {}
    for number, piece in contexts(tokenizer, texts, rule.context or 256, smallest=16):
        by_document.setdefault(number, []).append(piece)
    generator = torch.Generator().manual_seed(seed)
    return [
        pieces[int(torch.randint(len(pieces), (1,), generator=generator))]
        for pieces in by_document.values()
    ]


def measure(
    sae: SAE,
    model: nn.Module,
    tokenizer: Any,
    pieces: list[list[int]],
    progress: Callable[[int], None],
) -> Metrics:
    """The metrics of `saezoo.metrics` on held-out contexts."""
    measured = evaluate_pieces(
        model,
        {"": sae},
        pieces,
        special_ids=tokenizer.all_special_ids,
        pca=True,
        progress=lambda done, total: progress(len(pieces) * done // total),
    )
    return measured[""].metrics


def feature_stats(
    sae: SAE, shards: Path, max_norm: float, tokens: int, seed: int
) -> dict[str, Tensor]:
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
    """Write the native folder `out` with golden outputs, stats and the metrics of the rounded
    weights.
    """
    cfg, tensors = fold(recipe, trained, moments, dtype)
    sae, rule = build_sae(cfg, tensors), cfg.tokens or TokenRule()
    pieces = held_out_pieces(tokenizer, held_out_texts, rule)
    metrics = measure(sae, model, tokenizer, pieces, progress)
    known = metrics.to_json() | {
        "training_tokens": moments.tokens,
        "training_tokens_seen": recipe.train_tokens,
        "held_out_documents": len(pieces),
    }
    cfg = cfg.model_copy(update={"metrics": known})
    batch = next(capture_pieces(model, tokenizer, enumerate(pieces[:8]), recipe.site, rule))
    with new_folder(out, "native") as work:
        native.write(cfg, tensors, work)
        write_golden(sae, decided_tokens(sae, batch.x.float())[:GOLDEN_TOKENS], work)
        max_norm = rule.max_norm or float("inf")
        stats = feature_stats(sae, shards, max_norm, stats_tokens, recipe.seed)
        save_file(stats, work / "stats.safetensors")
        (work / "README.md").write_text(describe(cfg), encoding="utf-8")
    return metrics


def decided_tokens(sae: SAE, x: Tensor, margin: float = 1e-3) -> Tensor:
    """The rows of x (tokens, d_in) whose k-th feature beats the next by a clear margin: on another
    machine's arithmetic a near-tie may fall the other way, and that would be no fault of the file.
    """
    assert sae.cfg.k is not None
    wider = sae.cfg.model_copy(update={"k": sae.cfg.k + 1})
    values = build_sae(wider, dict(sae.named_parameters())).encode_sparse(x).values
    return x[values[:, -2] - values[:, -1] > margin * values[:, 0]]
