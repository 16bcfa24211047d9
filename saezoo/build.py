"""From a spec and tensors to a module: which module, by the kind of spec, in one table."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from saezoo.clt import CrossLayerTranscoder, build_clt, check_clt_tensors
from saezoo.clt_layer import CLTLayer
from saezoo.config import SAEConfig
from saezoo.config_multi import AnyConfig, CLTConfig, CrosscoderConfig
from saezoo.crosscoder import Crosscoder, build_crosscoder
from saezoo.errors import InputError, UnknownSAE
from saezoo.placing import DTypes
from saezoo.rows import check_shapes
from saezoo.sae import SAE, build_sae, check_tensors

Model = SAE | CrossLayerTranscoder | CLTLayer | Crosscoder
"""What `load_sae` returns."""

BUILDERS: dict[type, Callable[..., Any]] = {
    CLTConfig: build_clt,
    CrosscoderConfig: build_crosscoder,
}


def build(
    cfg: AnyConfig,
    tensors: MutableMapping[str, Tensor] | Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: DTypes = None,
    where: str = "these tensors",
    features: Iterable[int] | Tensor | None = None,
    encoder_only: bool = False,
    consume: bool = False,
) -> Model:
    """The module over these tensors, frozen and in eval mode; the rest as `build_sae` has it.

    Raises FormatError when the tensors are not those that the spec requires, and InputError for
    parts and dtypes of what spans several layers or models, which has none to choose.
    """
    if isinstance(cfg, SAEConfig):
        return build_sae(
            cfg,
            tensors,
            device=device,
            dtype=dtype,
            where=where,
            features=features,
            encoder_only=encoder_only,
            consume=consume,
        )
    if features is not None or encoder_only:
        asked = "encoder_only" if features is None else "features"
        raise InputError(
            f"{where}: {asked}= is for SAEs of one layer. This is {cfg.title}: it is loaded whole, "
            "its weights stay in their files until they are used"
        )
    if isinstance(dtype, Mapping):
        raise InputError(f"{where}: {cfg.title} takes one dtype, not one for each matrix")
    return BUILDERS[type(cfg)](cfg, tensors, device=device, dtype=dtype, where=where)


def check_weights(cfg: AnyConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise FormatError unless the tensors are those that the spec requires."""
    if isinstance(cfg, SAEConfig):
        check_tensors(cfg, tensors, where)
    elif isinstance(cfg, CLTConfig):
        check_clt_tensors(cfg, tensors, where)
    else:
        check_shapes(cfg.tensor_shapes(), tensors, f"{where}: {cfg.title}")


def spec_of(model: Model) -> AnyConfig:
    """The spec to save a module by. Raises ConfigError for a layer that cannot encode alone."""
    return model.cfg.alone(model.layer) if isinstance(model, CLTLayer) else model.cfg


def tensors_of(model: Model) -> dict[str, Tensor]:
    """The tensors of a module under their canonical names, decoders as they lie in their files."""
    if isinstance(model, SAE):
        return {name: value.data for name, value in model.named_parameters()}
    if isinstance(model, Crosscoder):
        own = {name: value.data for name, value in model.named_parameters()}
        return own | {"W_dec": model.decoder.parts[0]}
    if isinstance(model, CLTLayer):
        return _layer_tensors(model)
    found = {"b_dec": model.b_dec.data}
    for at in range(model.cfg.layers):
        found |= _layer_tensors(model.layer(at))
        if model.cfg.skip:
            found[f"layers.{at}.W_skip"] = model.W_skip[at].data
    return found


def _layer_tensors(layer: CLTLayer) -> dict[str, Tensor]:
    start = f"layers.{layer.layer}."
    found = {start + name: value.data for name, value in layer.named_parameters()}
    decoder = layer.decoder
    if decoder.whole:
        return found | {f"{start}W_dec": decoder.parts[0]}
    parts = zip(layer.targets, decoder.parts, strict=True)
    return found | {f"{start}W_dec.{target}": part for target, part in parts}


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
