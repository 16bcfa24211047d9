"""A recipe: everything a training run needs to know, as one YAML file of frozen values."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from saezoo.config import Origin, Site, Spec, TokenRule, one_line
from saezoo.errors import ConfigError


class Data(Spec):
    """The text that activations come from."""

    dataset: str
    """A public dataset on the HuggingFace Hub: what anyone can train on."""
    provenance: str | None = None
    """What this recipe's published result was really trained on, where that is something else."""
    held_out_one_in: PositiveInt = 20
    """One document in this many, chosen by its content, is kept for measuring."""
    tokens: PositiveInt = 2_000_000
    """Activations to harvest before training."""


class Optimiser(Spec):
    """Adam, with a linear warm-up and a linear decay to zero."""

    lr: PositiveFloat = 1e-3
    warmup_steps: int = Field(default=200, ge=0)
    decay_share: float = Field(default=0.5, ge=0, le=1)
    """The share of all steps, at the end, over which the rate falls to zero."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8


class TopK(Spec):
    """A TopK SAE with unit-norm decoder rows and AuxK (Gao et al. 2024, arXiv 2406.04093)."""

    d_sae: PositiveInt = 5120
    k: PositiveInt = 32
    k_start: PositiveInt | None = None
    """Features on per token at the start; falls linearly to k. None: k throughout."""
    k_steps: int = Field(default=0, ge=0)
    auxk: PositiveInt = 256
    """How many dead features try to explain what is left (section 2.3 of the paper: about d_in /
    2).
    """
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    dead_after_tokens: PositiveInt = 200_000
    """A feature that has not fired in this many tokens is dead."""

    @model_validator(mode="after")
    def _consistent(self) -> "TopK":
        if self.k > self.d_sae or (self.k_start or 0) > self.d_sae:
            raise ValueError(f"k={max(self.k, self.k_start or 0)} is more than d_sae={self.d_sae}")
        return self


class Recipe(Spec):
    """One training run."""

    name: str
    site: Site
    tokens: TokenRule = TokenRule(
        prepend_bos=False, context=256, skip_first=1, skip_special=True, max_norm_factor=3.0
    )
    data: Data
    sae: TopK = TopK()
    optimiser: Optimiser = Optimiser()
    batch: PositiveInt = 1024
    train_tokens: PositiveInt = 10_000_000
    """Activations seen in training, counting repeats."""
    seed: int = 0
    origin: Origin | None = None


def read_recipe(path: Path, changes: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe; `changes` maps dotted keys to new values. Raises ConfigError naming file and
    key.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    for key, value in (changes or {}).items():
        place, *rest = reversed(key.split("."))
        target = data
        for part in reversed(rest):
            target = target.setdefault(part, {})
        target[place] = value
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from None
