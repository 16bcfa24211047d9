"""What can be moved into the weights, for targets that have no word for it.

Each fold leaves features and reconstruction as they are, up to the rounding of the numbers that
are multiplied. b_dec is never folded into b_enc: where one activation dwarfs the others that loses
digits, so a target that cannot subtract it cannot express the SAE.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from saezoo.config import SAEConfig, Scale
from saezoo.errors import CannotConvert


def fold(
    cfg: SAEConfig, tensors: dict[str, Tensor], *, norms: bool = True
) -> tuple[SAEConfig, dict[str, Tensor]]:
    """The same SAE without a scale of the input, without decoder_norm (unless norms=False) and
    without keeping negative features, where that can be had; the rest stays as it is, and so do
    tensors that nothing is folded into.

    scale of the input   W_enc s, W_dec / s, b_dec / s, b_in / s
    decoder_norm scale   W_enc |d|, b_enc |d|, W_dec / |d|
    decoder_norm rank    relu: nothing, since |d| decides nothing; jumprelu: threshold / |d|;
                         topk and groupmax choose by a |d| and return a, which no weights do
    jumprelu without ReLU is that with it where no threshold is negative

    Raises CannotConvert where a decoder row is zero, by whose norm one would have to divide.
    """
    changes: dict[str, object] = {}
    if norms and cfg.decoder_norm != "none" and not _decides(cfg):
        tensors = tensors | _fold_norms(cfg, tensors)
        changes["decoder_norm"] = "none"
    if isinstance(cfg.input_norm, Scale):
        tensors = tensors | fold_scale(tensors, cfg.input_norm.factor)
        changes["input_norm"] = None
    if cfg.architecture == "jumprelu" and bool((tensors["threshold"] >= 0).all()):
        changes["relu_after"] = True
    return cfg.model_copy(update=changes), tensors


def fold_scale(tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The tensors that differ in an SAE that takes raw x, of one that takes x * factor. Thresholds
    and the encoder's biases stay: pre-activations are the same.
    """
    folded = {"W_enc_rows": _wide(tensors["W_enc_rows"]).mul_(factor)}
    for name in ("W_dec", "b_dec", "b_in"):
        if name in tensors:
            folded[name] = _wide(tensors[name]).div_(factor)
    return folded


def refuse(target: str, reasons: Iterable[tuple[bool, str]]) -> None:
    """Raise CannotConvert in one line with every reason that holds."""
    if lacking := [what for holds, what in reasons if holds]:
        raise CannotConvert(f"{target} cannot express {' nor '.join(lacking)}")


def shared_reasons(cfg: SAEConfig) -> list[tuple[bool, str]]:
    """What no target but SAELens has a word for."""
    kind = cfg.input_norm.kind if cfg.input_norm is not None else ""
    d_out = cfg.d_out or cfg.d_in
    return [
        (bool(kind), f"a normalisation of each token ({kind})"),
        (cfg.input_bias, "an input bias of its own"),
        (d_out != cfg.d_in, f"d_out {d_out} other than d_in {cfg.d_in}"),
        *norm_reasons(cfg),
    ]


def norm_reasons(cfg: SAEConfig) -> list[tuple[bool, str]]:
    """Of an SAE that `fold` has been through: what could not be folded."""
    return [
        (
            cfg.decoder_norm != "none",
            f"a choice by decoder norm (decoder_norm {cfg.decoder_norm}) that leaves features as "
            "they are",
        ),
        (
            not cfg.relu_after and not cfg.signed,
            f"{cfg.architecture} without ReLU"
            + (", whose thresholds are negative" if cfg.architecture == "jumprelu" else ""),
        ),
    ]


def _decides(cfg: SAEConfig) -> bool:
    """Whether the norms choose among features, and so cannot be folded."""
    return cfg.decoder_norm == "rank" and cfg.architecture not in ("relu", "jumprelu")


def _fold_norms(cfg: SAEConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if cfg.decoder_norm == "rank" and cfg.architecture == "relu":
        return {}
    norms = tensors["W_dec"].to(torch.promote_types(tensors["W_dec"].dtype, torch.float32))
    norms = norms.norm(dim=1)
    if not bool((norms > 0).all()):
        zero = int((norms == 0).nonzero()[0])
        raise CannotConvert(
            f"decoder_norm {cfg.decoder_norm} cannot be folded: decoder row {zero} is zero"
        )
    if cfg.decoder_norm == "rank":
        return {"threshold": _wide(tensors["threshold"]).div_(norms)}
    rows = norms.unsqueeze(1)
    return {
        "W_enc_rows": _wide(tensors["W_enc_rows"]).mul_(rows),
        "b_enc": _wide(tensors["b_enc"]).mul_(norms),
        "W_dec": _wide(tensors["W_dec"]).div_(rows),
    }


def _wide(value: Tensor) -> Tensor:
    """A copy in float32 or wider, to be changed in place: a second would double the memory."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
