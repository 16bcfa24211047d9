"""Hand an SAE to another package in memory: no file is written, no weight copied that need not be.

The other package is imported when it is asked for, never before.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saezoo.errors import CannotConvert, MissingExtra
from saezoo.formats.saelens import express
from saezoo.sae import SAE, check_whole

if TYPE_CHECKING:
    import sae_lens


def to_saelens(sae: SAE) -> "sae_lens.SAE[Any]":
    """The same SAE as a SAELens one, of version 6, with its config and metadata: for SAEBench,
    SAEDashboard and whatever else takes a `sae_lens.SAE`.

    It is frozen, in eval mode and on `sae`'s device. Its weights are `sae`'s own memory, W_enc
    (d_in, d_sae) and W_skip (d_out, d_in) as transposed views, so that changing them in place
    (`fold_W_dec_norm()`) changes both; give it `copy.deepcopy(sae)` where that matters. Copied
    are only tensors below the widest dtype, because SAELens computes in one, and the matrices of
    an SAE with a scale, which is folded. (A W_dec that its file keeps transposed is shared until
    `sae`'s first decode, for which `sae` lays out its own.)

    A hook_z SAE takes (…, heads, d_head) there, as SAELens wants it, and (…, d_in) here.

    Raises CannotConvert with what SAELens cannot express, before it is imported, and MissingExtra
    when it is not installed or older than 6; PartialSAE for an SAE that was loaded in part.
    """
    if not isinstance(sae, SAE):
        raise CannotConvert(f"SAELens holds SAEs of one layer, and this is a {type(sae).__name__}")
    check_whole(sae, "to_saelens")
    facts, tensors = express(sae.cfg, {key: value.data for key, value in sae.named_parameters()})
    base = _saelens()
    name, device = facts["architecture"], str(sae.device)
    try:
        made_of = base.get_sae_class_for_architecture(name)
    except KeyError:
        raise CannotConvert(
            f"the installed sae-lens has no architecture {name!r}: pip install -U sae-lens"
        ) from None
    config = base.get_sae_config_class_for_architecture(name).from_dict(facts | {"device": "meta"})
    made = made_of(config)
    dtype = getattr(torch, facts["dtype"])
    made.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, assign=True)
    made.register_state_dict_post_hook(_contiguous)
    # the module's own device and dtype follow with `to`, which leaves such tensors where they are
    return made.to(device=device, dtype=dtype).requires_grad_(False).eval()


def _contiguous(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """SAELens' save_model gives its state_dict to safetensors, which takes no transposed views."""
    for key, value in state.items():
        if key.startswith(prefix):
            state[key] = value.contiguous()


def _saelens() -> Any:
    """sae_lens.SAE of version 6. Raises MissingExtra."""
    try:
        from sae_lens import SAE as base
    except ImportError as error:
        if error.name != "sae_lens":
            raise  # installed, but broken: its own message says more
        raise MissingExtra("SAELens is not installed: pip install sae-lens") from None
    if not hasattr(base, "get_sae_config_class_for_architecture"):
        raise MissingExtra("the installed SAELens is older than 6: pip install -U sae-lens")
    return base
