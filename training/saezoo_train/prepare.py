"""What a run and a dry run have in common: the language model, the site, the data, all looked at
before anything is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.config import Site
from saezoo.errors import ConfigError, DataError, FetchError, NoAccess
from saezoo.host import Host, load_host
from saezoo.shards import read_index
from saezoo_train.activations import ModelSource, ShardSource, Source, vocabulary
from saezoo_train.config import Recipe
from saezoo_train.data import Words, held_out_documents, kind_of
from saezoo_train.finish import held_out_pieces
from saezoo_train.preflight import device_of, find_site, of_shards
from saezoo_train.watch import Watch


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs besides its own state."""

    recipe: Recipe
    """With the site and token rule of activation shards, where these decide."""
    site: Site
    device: torch.device
    model: nn.Module | None
    """None where activations come from shards and nothing is measured on text."""
    tokenizer: Any
    pieces: list[list[int]]
    """Held-out contexts."""
    folder: Path | None
    """Of activation shards, where these are the data."""

    def source(self) -> Source:
        """The stream of activations."""
        if self.folder is not None:
            return ShardSource(self.recipe, self.folder, hold_out=self.model is None)
        assert self.model is not None
        return ModelSource(self.recipe, self.site, self.model, self.tokenizer)

    @property
    def host_parameters(self) -> int:
        """Of the language model."""
        return sum(value.numel() for value in self.model.parameters()) if self.model else 0


def prepare(recipe: Recipe, watch: Watch) -> Prepared:
    """Load the language model and look at the data. recipe: resolved.

    Raises SaezooError for whatever would stop the run later: a model that cannot be had, a site
    that matches nothing, a device that is not there, data that is missing or has nothing held out.
    """
    device = device_of(recipe)
    folder = None
    if kind_of(recipe.data) == "activations":
        folder = Path(recipe.data.dataset)
        recipe = of_shards(recipe, read_index(folder))
        if recipe.data.measure_on is None:
            return Prepared(recipe, recipe.site, device, None, None, [], folder)
    if recipe.site.model is None:
        raise ConfigError("the recipe names no language model: give site.model")
    watch.phase("loading the language model", None)
    host = _load(recipe.site.model)
    watch.note(host.took)
    model = host.model.to(device)
    site = find_site(model, recipe.site)
    if site.quantisation is None and "Q4_1 GGUF" in host.took:
        site = site.model_copy(update={"quantisation": "Q4_1 GGUF, dequantised to float32"})
    refuse_long_contexts(recipe, model)
    watch.phase("reading the held-out documents", None)
    texts = held_out_documents(recipe.data)
    if not texts:
        raise DataError(
            f"{recipe.data.measure_on or recipe.data.dataset}: no document is held out (one in "
            f"{recipe.data.held_out_one_in} is): give more text, a smaller data.held_out_one_in, "
            "or data.measure_on"
        )
    words = Words(host.tokenizer, vocabulary(model))
    pieces = held_out_pieces(words, texts, recipe.tokens, recipe.seed)
    return Prepared(recipe, site, device, model, host.tokenizer, pieces, folder)


def _load(name: str) -> Host:
    """The language model. Raises NoAccess, saying what to do, for one whose licence must be
    accepted first.
    """
    try:
        return load_host(name)
    except FetchError as error:
        if "gated" not in str(error):
            raise
        raise NoAccess(
            f"the language model {name!r} is gated: accept its licence at "
            f"https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN"
        ) from None


def refuse_long_contexts(recipe: Recipe, model: nn.Module) -> None:
    """Raises ConfigError for contexts that the language model cannot read."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    context = recipe.tokens.context or 0
    if isinstance(longest, int) and context > longest:
        raise ConfigError(
            f"tokens.context={context}: {recipe.site.model} reads at most {longest} tokens"
        )


def rows_up_to(batches: Iterator[Tensor], tokens: int) -> Iterator[Tensor]:
    """Batches until there were this many rows."""
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch)
        if seen >= tokens:
            return
