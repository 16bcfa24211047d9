"""From a spec and tensors to a module: which module, by the kind of spec, in one table."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from saezoo.clt import CLTLayer, CrossLayerTranscoder, build_clt, check_clt_tensors, check_shapes
from saezoo.config import SAEConfig
from saezoo.config_multi import AnyConfig, CLTConfig, CrosscoderConfig
from saezoo.crosscoder import Crosscoder, build_crosscoder
from saezoo.errors import UnknownSAE
from saezoo.sae import SAE, build_sae, check_tensors

Model = SAE | CrossLayerTranscoder | CLTLayer | Crosscoder
"""What `load_sae` returns."""

BUILDERS: dict[type, Callable[..., Any]] = {
    SAEConfig: build_sae,
    CLTConfig: build_clt,
    CrosscoderConfig: build_crosscoder,
}


def build(
    cfg: AnyConfig,
    tensors: Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    where: str = "these tensors",
) -> Model:
    """The module over these tensors, frozen and in eval mode. Raises FormatError when they are not
    those that the spec requires.
    """
    return BUILDERS[type(cfg)](cfg, tensors, device=device, dtype=dtype, where=where)


def check_weights(cfg: AnyConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise FormatError unless the tensors are those that the spec requires."""
    if isinstance(cfg, SAEConfig):
        check_tensors(cfg, tensors, where)
    elif isinstance(cfg, CLTConfig):
        check_clt_tensors(cfg, tensors, where)
    else:
        check_shapes(cfg.tensor_shapes(), tensors, f"{where}: {cfg.title}")


def need_sae(model: Model, where: str, what: str) -> SAE:
    """`model` where it is an SAE. Raises UnknownSAE, in words, where it spans layers or models.

    what: who wants one, such as "saezoo demo".
    """
    if isinstance(model, SAE):
        return model
    raise UnknownSAE(
        f"{where} is {model.cfg.title}, which spans several layers or models; {what} takes an SAE "
        "or transcoder of one layer"
    )
