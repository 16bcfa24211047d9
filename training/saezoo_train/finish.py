"""From a trained architecture to the folder that `load_sae` opens: fold, round, measure, write
golden and stats.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saezoo.capture import contexts
from saezoo.check import GOLDEN_TOKENS, decided_tokens, write_golden
from saezoo.config import Origin, SAEConfig, Site, TokenRule
from saezoo.errors import DataError
from saezoo.evaluation import evaluate_pieces
from saezoo.formats import native
from saezoo.metrics import VERSION, Metrics, ReconstructionSums
from saezoo.publishing.card import Shown, write_card
from saezoo.sae import build_sae
from saezoo.save import new_folder
from saezoo_train.architectures import Architecture
from saezoo_train.config import Recipe
from saezoo_train.data import Document, Words

STATS_TOKENS = 250_000
"""Training activations that densities and largest activations are of, at most."""

Facts = dict[str, float | int | str]


def fold(
    recipe: Recipe,
    site: Site,
    model: Architecture,
    median_norm: float,
    steps_by: str | None = None,
) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Spec and tensors for raw activations on the CPU, matrices rounded to the recipe's
    `save_dtype`, the rest float32. Those of an architecture of one's own stay as they are.
    steps_by: what made the updates, where it was not torch ops.
    """
    rule = recipe.tokens.model_copy(update={"median_norm": median_norm})
    notes = {
        "dataset": _named(recipe.data.dataset),
        "recipe": recipe.name,
        "trained_as": recipe.architecture,
        "settings": json.dumps(_settings(recipe)),
    }
    if steps_by:
        notes["steps_by"] = steps_by
    if recipe.data.provenance:
        notes["provenance"] = recipe.data.provenance
    facts: dict[str, Any] = {
        "site": site,
        "tokens": rule,
        "origin": recipe.origin or Origin(),
        "notes": notes,
    }
    cfg, tensors = model.export(facts)
    if cfg.custom is not None:
        # what may be rounded only its author knows
        return cfg, {name: value.detach().cpu() for name, value in tensors.items()}
    dtype = getattr(torch, recipe.save_dtype)
    return cfg, {
        name: (value.to(dtype) if value.dim() == 2 else value).detach().cpu()
        for name, value in tensors.items()
    }


def _named(dataset: str) -> str:
    """A data set as others may know it: of a folder on this machine only its own name."""
    return Path(dataset).name if Path(dataset).expanduser().is_absolute() else dataset


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What decides how it was trained, for the card."""
    chosen = {"sae", "optimiser", "batch", "train_tokens", "seed"}
    return recipe.model_dump(mode="json", include=chosen, exclude_none=True)


def held_out_pieces(
    words: Words, texts: list[Document], rule: TokenRule, seed: int
) -> list[list[int]]:
    """One context of each document, chosen by the seed. Raises DataError when there is none."""
    by_document: dict[int, list[list[int]]] = {}
    documents: Any = texts  # `contexts` only hands them to the tokenizer
    bos = bool(rule.prepend_bos)
    found = contexts(words, documents, rule.context or 256, prepend_bos=bos, smallest=16)
    for number, piece in found:
        by_document.setdefault(number, []).append(piece)
    if not by_document:
        raise DataError(
            f"{len(texts)} held-out documents, and none has 16 tokens: nothing can be measured; "
            "give more text, or a smaller data.held_out_one_in"
        )
    generator = torch.Generator().manual_seed(seed)
    return [
        pieces[int(torch.randint(len(pieces), (1,), generator=generator))]
        for pieces in by_document.values()
    ]


def measure(
    sae: Any,
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


def pca_directions(sae: Any) -> int:
    """How many principal components to compare with: k, where there is one."""
    return min(sae.cfg.k or 32, sae.d_in - 1)


def measure_rows(sae: Any, rows: Iterator[Tensor], max_norm: float) -> Facts:
    """What can be measured on held-out activations without their text: FVU, L0, dead features and
    PCA.
    """
    sums = ReconstructionSums(sae.d_in, sae.d_sae, covariance=True)
    for x in rows:
        x = x.float()
        sums.add(sae, x[x.norm(dim=-1) <= max_norm])
    if not sums.tokens:
        return {}
    pca_k = pca_directions(sae)
    return {
        "fvu": sums.fvu,
        "l0": sums.l0,
        "dead_fraction": sums.dead_fraction,
        "pca_k": pca_k,
        "pca_fvu": sums.pca_fvu(pca_k),
        "tokens": sums.tokens,
        "version": VERSION,
    }


def feature_stats(
    sae: Any, batches: Iterable[Tensor], progress: Callable[[int], None] = lambda _tokens: None
) -> tuple[dict[str, Tensor], int]:
    """density and max_activation, both (d_sae,) float32, over training activations, and how many
    these were.
    """
    sums = ReconstructionSums(sae.d_in, sae.d_sae)
    for x in batches:
        sums.add(sae, x)
        progress(sums.tokens)
    return {"density": sums.density, "max_activation": sums.strongest}, sums.tokens


def write_result(
    cfg: SAEConfig, tensors: dict[str, Tensor], facts: Facts, x: Tensor, stats: dict, out: Path
) -> None:
    """Write the native folder `out`: the spec with its metrics, weights, golden outputs for some of
    the activations x (tokens, d_in), stats and README. An architecture of one's own has no golden
    outputs: saezoo alone cannot compute them.
    """
    cfg = cfg.model_copy(update={"metrics": facts})
    with new_folder(out, "native") as work:
        native.write(cfg, tensors, work)
        if cfg.custom is None:
            sae = build_sae(cfg, tensors)
            write_golden(sae, decided_tokens(sae, x.float())[:GOLDEN_TOKENS], work)
        if stats:
            save_file(stats, work / "stats.safetensors")
        (work / "README.md").write_text(_readme(cfg, bool(stats)), encoding="utf-8")


def _readme(cfg: SAEConfig, stats: bool) -> str:
    """The card that `saezoo publish` writes too, as long as the folder has no other name."""
    name = (cfg.notes or {}).get("recipe", "my-sae")
    shown = Shown(
        cfg,
        name if "/" in name else f"./{name}",
        golden=cfg.custom is None,
        stats=stats,
    )
    return write_card(name, [shown])
