"""What all architectures here share: two matrices, their biases, how they begin, who is dead, and
how the input scale is folded away.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, PositiveInt
from torch import Tensor, nn

from saezoo.config import SAEConfig, Spec
from saezoo_train.architectures.base import Architecture, Setting, StepOutput
from saezoo_train.ops import normalise_rows, remove_parallel_gradient

# B batch, D d_in, M d_sae, S sample


class DictionaryOptions(Spec):
    """Options that every architecture here has."""

    # what is written under a field is its description
    model_config = ConfigDict(use_attribute_docstrings=True)

    d_sae: PositiveInt = 8192
    """Latents: the width of the dictionary."""
    decoder_init: Literal["random", "data"] = "random"
    """Directions of the decoder's rows: random (Gao et al. 2024, arXiv 2406.04093, appendix A.1),
    or those of activations of the sample about their mean (as Bricken et al. 2023, "Towards
    Monosemanticity", resample dead latents).
    """
    encoder_init: Literal["decoder", "matched"] = "decoder"
    """The encoder begins as a copy of the decoder's rows (Gao et al. 2024, appendix A.1), or as
    that copy times the one factor that gives reconstructions of the sample the mean norm of the
    activations about b_dec (same place; their `init_from_data_`).
    """
    b_dec_init: Literal["mean", "median", "zero"] = "mean"
    """b_dec begins as the mean of the activations (Bricken et al. 2023 subtract it), their
    geometric median (Gao et al. 2024), or zero (Conerly et al. 2024, "Circuits Updates April").
    """
    dead_after_tokens: PositiveInt = 200_000
    """A latent that has not fired in this many tokens is dead. Gao et al. 2024, appendix A.2: 10
    million, in runs of billions of tokens; a run here may be a few million long.
    """


class Dictionary(Architecture):
    """W_enc, W_dec and b_dec, in scaled units, and `silent`: tokens since each latent last fired.

    The subclass adds the biases and thresholds it needs, and says in `training_step` what is done.
    """

    Options: ClassVar[type[Spec]] = DictionaryOptions
    unit_rows: ClassVar[bool] = True
    """Whether the decoder's rows are kept at length 1 (Bricken et al. 2023): the gradient along
    them is removed before each update, and the length restored after it.
    """
    silent: Tensor

    def __init__(self, options: Any, setting: Setting) -> None:
        super().__init__(options, setting)
        generator = torch.Generator().manual_seed(setting.seed)
        rows_MD = initial_rows(options, setting, generator)
        self.W_dec = nn.Parameter(rows_MD)
        self.W_enc = nn.Parameter(rows_MD.clone())
        self.b_dec = nn.Parameter(initial_bias(options, setting))
        self.register_buffer("silent", torch.zeros(options.d_sae, dtype=torch.int64))

    def match_norm(self) -> None:
        """Where asked for, scale the encoder so that the sample's reconstructions are as long as
        the sample, both about b_dec: without biases and thresholds they are proportional to it.
        To be called at the end of __init__.
        """
        if self.options.encoder_init != "matched":
            return
        x_SD = self.setting.sample_SD[:4096]
        with torch.no_grad():
            ours = (self.reconstruct(x_SD) - self.b_dec).norm(dim=-1).mean()
            self.scale_encoder((x_SD - self.b_dec).norm(dim=-1).mean() / ours.clamp_min(1e-12))

    @torch.no_grad()
    def thresholds_for(self, l0: float) -> Tensor:
        """What each latent's W_enc (x - b_dec) is above for l0 / d_sae of the sample, and at least
        0: (M,). With these as thresholds l0 latents are on per token, each as often as another.
        """
        x_SD = self.setting.sample_SD - self.b_dec
        rank = min(max(1, round(l0 / len(self.W_enc) * len(x_SD))), len(x_SD))
        # some latents at a time: of all it would be gigabytes
        parts = [(x_SD @ rows.T).topk(rank, dim=0)[0][-1] for rows in self.W_enc.split(1024)]
        return torch.cat(parts).clamp_min(0)

    def scale_encoder(self, factor: Tensor) -> None:
        """Make pre-activations this many times as large, before the first step."""
        self.W_enc.mul_(factor)

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """The reconstruction (B, D) of scaled activations, as in training."""
        raise NotImplementedError

    def before_update(self) -> None:
        """Take the part along its rows out of the decoder's gradient."""
        if self.unit_rows and self.W_dec.grad is not None:
            remove_parallel_gradient(self.W_dec.data, self.W_dec.grad)

    def after_update(self) -> None:
        """Bring the decoder's rows back to length 1."""
        if self.unit_rows:
            normalise_rows(self.W_dec.data)

    @torch.no_grad()
    def count_silence(self, fired_N: Tensor, tokens: int) -> None:
        """Add a batch to `silent`; fired_N: latents that were on, in any order."""
        self.silent += tokens
        self.silent[fired_N] = 0

    @property
    def dead(self) -> Tensor:
        """Which latents count as dead, (M,) bool."""
        return self.silent > self.options.dead_after_tokens

    def fvu(self, x_BD: Tensor, out_BD: Tensor) -> Tensor:
        """Squared error over the variance of the data about its mean. Scalar."""
        return (out_BD - x_BD).pow(2).sum(-1).mean() / self.setting.variance

    def output(
        self,
        loss: Tensor,
        fvu: Tensor,
        fired_N: Tensor,
        x_BD: Tensor,
        logs: Mapping[str, Tensor],
    ) -> StepOutput:
        """What a step returns; fired_N: the latents that were on, one entry for each token and
        latent.
        """
        l0, dead = x_BD.new_tensor(len(fired_N) / len(x_BD)), self.dead.to(x_BD.dtype).mean()
        curves = {name: value.detach() for name, value in logs.items()}
        return StepOutput(loss, fvu.detach(), l0, dead, curves)

    def native(
        self, facts: dict[str, Any], architecture: str, added: Mapping[str, Tensor], **spec: Any
    ) -> tuple[SAEConfig, dict[str, Tensor]]:
        """Spec and tensors for raw activations x of an SAE that reads s x, s the scale.

        added: what is added to pre-activations or compared with them, by its native name. ReLU,
        top-k and thresholds commute with a positive factor, so only these change, and b_dec:
        W (s x - b) + c = s (W (x - b / s) + c / s). Features come out in raw units.
        """
        d_sae, d_in = self.W_enc.shape
        given: dict[str, Any] = (
            {"architecture": architecture, "d_in": d_in, "d_sae": d_sae} | spec | facts
        )
        tensors = {"W_enc_rows": self.W_enc.data, "W_dec": self.W_dec.data}
        tensors |= {
            name: value.detach() / self.setting.scale
            for name, value in {**added, "b_dec": self.b_dec}.items()
        }
        return SAEConfig(**given), tensors


def warm_up(step: int, steps: int, share: float) -> float:
    """How much of a sparsity penalty is in force at a step: from 0 linearly to 1 over this share of
    all steps.
    """
    return min(1.0, step / max(share * steps, 1))


def initial_rows(
    options: DictionaryOptions, setting: Setting, generator: torch.Generator
) -> Tensor:
    """Directions of length 1, (M, D)."""
    d_in = setting.mean_D.shape[0]
    rows_MD = torch.randn(options.d_sae, d_in, generator=generator)
    if options.decoder_init == "data":
        # more latents than activations: the rest stays random
        order = torch.randperm(len(setting.sample_SD), generator=generator)[: options.d_sae]
        rows_MD[: len(order)] = setting.sample_SD[order] - setting.mean_D
    normalise_rows(rows_MD)
    return rows_MD


def initial_bias(options: DictionaryOptions, setting: Setting) -> Tensor:
    """b_dec, (D,)."""
    match options.b_dec_init:
        case "mean":
            return setting.mean_D.clone()
        case "median":
            return geometric_median(setting.sample_SD)
        case _:
            return torch.zeros_like(setting.mean_D)


def geometric_median(x_SD: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to all, by Weiszfeld's iteration. (D,)"""
    guess_D = x_SD.mean(0)
    for _ in range(steps):
        weight_S = 1 / (x_SD - guess_D).norm(dim=-1).clamp_min(1e-12)
        before_D, guess_D = guess_D, weight_S @ x_SD / weight_S.sum()
        if (guess_D - before_D).norm() <= tolerance * guess_D.norm():
            break
    return guess_D
