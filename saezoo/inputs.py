"""What an SAE can be given: activations and features of the right width, dtype and device."""

import torch
from torch import Tensor

from saezoo.errors import InputError
from saezoo.sparse import SparseFeatures


def check_input(x: Tensor, d_in: int, device: torch.device) -> None:
    """Raise InputError unless x is activations (…, d_in) on the SAE's device."""
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor (…, {d_in}), got {type(x).__name__}")
    if not x.is_floating_point():
        raise InputError(f"expected activations of a float dtype (…, {d_in}), got {x.dtype}")
    if x.shape[-1:] != (d_in,):
        heads = x.dim() > 1 and x.shape[-1] * x.shape[-2] == d_in
        hint = "; these look like (…, heads, d_head): use x.flatten(-2)" if heads else ""
        raise InputError(f"expected activations (…, {d_in}), got {tuple(x.shape)}{hint}")
    if x.device != device:
        raise InputError(f"the SAE is on {device}, the activations are on {x.device}: use .to(…)")


def check_features(features: Tensor | SparseFeatures, d_sae: int, device: torch.device) -> None:
    """Raise InputError unless features are (…, d_sae), dense or sparse, on the SAE's device."""
    if isinstance(features, SparseFeatures):
        values, width = features.values, features.d_sae
    elif isinstance(features, Tensor):
        values, width = features, features.shape[-1] if features.dim() else 0
    else:
        raise InputError(
            f"expected features as a tensor or SparseFeatures, got {type(features).__name__}"
        )
    if width != d_sae:
        raise InputError(f"expected features (…, {d_sae}), got {width} of them")
    if not values.is_floating_point():
        raise InputError(f"expected features of a float dtype (…, {d_sae}), got {values.dtype}")
    if values.device != device:
        raise InputError(f"the SAE is on {device}, the features are on {values.device}: use .to(…)")
