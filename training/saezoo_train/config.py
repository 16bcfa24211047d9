"""A recipe: everything a training run needs to know, as frozen values. Every field has a default
that works.
"""

import math
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from saezoo.config import Origin, Site, Spec, TokenRule, one_line
from saezoo.host import SMOLLM2
from saezoo_train.own import find_architecture

DEFAULT_SITE = Site(
    model=SMOLLM2,
    layer=15,
    point="resid_post",
    module="model.layers.15",
    hook_name="blocks.15.hook_resid_post",
)
DEFAULT_TOKENS = TokenRule(
    prepend_bos=False, context=256, skip_first=1, skip_special=True, max_norm_factor=3.0
)
STDLIB = "stdlib"
STDLIB_TOKENS = 400_000
"""About what the texts of Python's standard library give."""


class Data(Spec):
    """Where the activations come from."""

    dataset: str = STDLIB
    """A file or folder of text (.jsonl, .txt, .md, .parquet), a dataset of the HuggingFace Hub
    (streamed), a folder of token shards or of activation shards, or `stdlib`: the documentation in
    Python's own standard library, some 400,000 tokens that are on every machine.
    """
    column: str = "text"
    """The key of the text in JSON lines, parquet and datasets."""
    split: str = "train"
    """Of a Hub dataset."""
    subset: str | None = None
    """Of a Hub dataset."""
    provenance: str | None = None
    """What a published result was really trained on, where that is something else."""
    held_out_one_in: PositiveInt = Field(default=20, ge=2)
    """One document in this many, chosen by its content, is kept for measuring."""
    held_out_documents: PositiveInt = 200
    """How many of them are measured on at the end, one context each."""
    measure_on: str | None = None
    """Text to measure on, all of it held out: for activation shards, which carry no text."""
    tokens: PositiveInt | None = None
    """Activations of one pass. A longer run goes through them again, in another order. None: all
    that the data gives.
    """
    store: bool | None = None
    """Whether a pass is kept on disk, so that the language model reads each text once. None: where
    the run is longer than `tokens`.
    """
    batch_contexts: PositiveInt = 8
    """Contexts that go through the language model together."""


class Buffer(Spec):
    """Activations that are shuffled together. Two of these are in memory: one is used while the
    next is filled.
    """

    tokens: PositiveInt = 131_072
    """Activations in each; rounded up to whole batches."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """How they are kept."""


class Optimiser(Spec):
    """Adam, with a linear warm-up and a linear decay to zero."""

    lr: PositiveFloat | None = None
    """None: 1e-3 * sqrt(5120 / d_sae). The law 1 / sqrt(d_sae) is that of Gao et al. 2024 (arXiv
    2406.04093, section 2.2 and appendix A); the constant is that of the bundled SAE's run.
    """
    warmup_steps: NonNegativeInt = 200
    """Steps over which the rate rises."""
    decay_share: float = Field(default=0.5, ge=0, le=1)
    """The share of all steps, at the end, over which the rate falls to zero. Conerly et al. 2024
    ("Circuits Updates April"): 0.2.
    """
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """None: 0.9, and 0 for gated, as in its paper (Rajamanoharan et al. 2024, arXiv 2404.16014).
    That of JumpReLU (2407.14435) has 0 too: after 200 steps on SmolLM2 it gave an FVU of 0.247 with
    12 % of the latents silent, 0.9 gave 0.238 with 6 %.
    """
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """None: 0.999, as in all of them."""
    eps: PositiveFloat = 1e-8
    """Gao et al. 2024 use 6.25e-10, for a loss that is a mean over d_in; ours is a sum."""
    clip_norm: PositiveFloat | None = None
    """Gradients are scaled down to this norm where theirs is larger (Conerly et al. 2024: 1)."""


class Run(Spec):
    """How a run is kept and watched. Nothing here changes what is trained, so all of it may differ
    when a run goes on.
    """

    checkpoint_minutes: PositiveFloat = 10
    """Minutes between checkpoints."""
    log_every: PositiveInt = 50
    """Steps from one row of metrics to the next; a row is a mean over them."""
    logger: Literal["wandb"] | None = None
    """Also send the rows there."""
    device: str | None = None
    """Such as `cpu` or `cuda`. None: cuda where there is one."""
    triton: bool | None = None
    """Whether updates are made by the Triton kernels. None: where device and recipe allow it."""


class Recipe(Spec):
    """One training run."""

    name: str = "my-sae"
    architecture: str = "topk"
    """One of those that saezoo_train.architectures lists, or `module:Class`: a class in a file
    beside the recipe.
    """
    sae: SerializeAsAny[Spec]
    """The architecture's own options."""
    site: Site = DEFAULT_SITE
    """Where in which language model. With `layer` alone, the output of that layer."""
    tokens: TokenRule = DEFAULT_TOKENS
    """Which tokens count."""
    data: Data = Data()
    buffer: Buffer = Buffer()
    optimiser: Optimiser = Optimiser()
    batch: PositiveInt = 1024
    """Activations a step."""
    train_tokens: PositiveInt = 4_000_000
    """Activations seen in training, counting repeats."""
    seed: int = 0
    save_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the matrices in the folder that is written; biases stay float32."""
    run: Run = Run()
    origin: Origin | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any, info: ValidationInfo) -> Any:
        """Read `sae` as the options of the architecture, and put partial sites and token rules
        over the defaults. The context's `near` is the recipe's folder.
        """
        if not isinstance(data, dict):
            return data
        data = dict(data)
        near = (info.context or {}).get("near")
        options = find_architecture(str(data.get("architecture", "topk")), near).Options
        given = data.get("sae")
        if not isinstance(given, options):
            try:
                data["sae"] = options.model_validate(given or {})
            except ValidationError as error:
                raise ValueError(f"sae.{one_line(error)}") from None
        data["site"] = _filled_site(data.get("site"))
        if isinstance(data.get("tokens"), dict):
            data["tokens"] = DEFAULT_TOKENS.model_dump() | data["tokens"]
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.train_tokens < self.batch:
            raise ValueError(f"train_tokens={self.train_tokens} is less than batch={self.batch}")
        if (self.tokens.context or 256) <= (self.tokens.skip_first or 0):
            raise ValueError("tokens.skip_first leaves nothing of a context")
        return self

    @property
    def steps(self) -> int:
        """Updates in the whole run."""
        return self.train_tokens // self.batch

    @property
    def d_sae(self) -> int | None:
        """Latents, where the architecture's options say how many."""
        return getattr(self.sae, "d_sae", None)


def _filled_site(site: Any) -> Any:
    """A site without a model is in the default one; without place and model it is the default
    place.
    """
    if site is None:
        return DEFAULT_SITE
    if not isinstance(site, dict):
        return site
    if not site.keys() & {"model", "layer", "point", "module", "hook_name"}:
        return DEFAULT_SITE.model_dump() | site
    return {"model": SMOLLM2} | {key: value for key, value in site.items() if value is not None}


BETA1 = {"gated": 0.0}
"""Of Adam, where it is not 0.9."""


def resolve(recipe: Recipe) -> Recipe:
    """The same recipe with what is derived written out: learning rate, betas, tokens of a pass,
    whether they are stored.
    """
    optimiser = recipe.optimiser
    lr = optimiser.lr or 1e-3 * math.sqrt(5120 / (recipe.d_sae or 5120))
    beta1 = BETA1.get(recipe.architecture, 0.9) if optimiser.beta1 is None else optimiser.beta1
    beta2 = 0.999 if optimiser.beta2 is None else optimiser.beta2
    rates = {"lr": float(f"{lr:.4g}"), "beta1": beta1, "beta2": beta2}
    data = recipe.data
    tokens = data.tokens or (STDLIB_TOKENS if data.dataset == STDLIB else None)
    store = data.store
    if store is None:
        store = tokens is not None and recipe.train_tokens > tokens
    return recipe.model_copy(
        update={
            "optimiser": optimiser.model_copy(update=rates),
            "data": data.model_copy(update={"tokens": tokens, "store": store}),
        }
    )
