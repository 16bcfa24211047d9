"""What must hold before hours are spent: the site, the device, the shards, room on the disk."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from saezoo.capture import find_module
from saezoo.config import Site
from saezoo.errors import CaptureError, ConfigError, DataError, TrainingError
from saezoo.shards import ShardIndex
from saezoo_train.config import DEFAULT_SITE, DEFAULT_TOKENS, Recipe


def find_site(model: nn.Module, site: Site) -> Site:
    """The site with its module: as it is given, or that of its layer in this model.

    Raises CaptureError, naming the nearest modules or the layers that there are.
    """
    if site.module is not None:
        find_module(model, site.module)
        return site
    path, blocks = _blocks(model)
    layer = len(blocks) // 2 if site.layer is None else site.layer
    if layer >= len(blocks):
        raise CaptureError(
            f"{site.model}: has no layer {layer}; its layers are 0 to {len(blocks) - 1}"
        )
    point = site.point or "resid_post"
    sides = {"resid_post": "output", "resid_pre": "input"}
    if point not in sides:
        raise CaptureError(
            f"{site.model}: which module is {point} of layer {layer}? "
            f"give site.module, such as {path}.{layer}.mlp, and site.side"
        )
    found = {
        "layer": layer,
        "point": point,
        "module": f"{path}.{layer}",
        "side": sides[point],
        "hook_name": site.hook_name or f"blocks.{layer}.hook_{point}",
    }
    return site.model_copy(update=found)


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules in a language model: its layers."""
    lists = [
        (name, item) for name, item in model.named_modules() if isinstance(item, nn.ModuleList)
    ]
    if not lists:
        raise CaptureError(f"{type(model).__name__} has no list of layers: give site.module")
    return max(lists, key=lambda item: len(item[1]))


def device_of(recipe: Recipe) -> torch.device:
    """Where to train. Raises ConfigError for a device that this machine does not have."""
    name = recipe.run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"run.device={name}: this machine has no such device ({first})") from None
    return device


def of_shards(recipe: Recipe, index: ShardIndex) -> Recipe:
    """The recipe with the site and token rule of its activation shards, where it names none.

    Raises DataError when it names others.
    """
    site, tokens = recipe.site, recipe.tokens
    if site != DEFAULT_SITE:
        for key in ("model", "layer", "point", "module", "side"):
            ours, theirs = getattr(site, key), getattr(index.site, key)
            if ours is not None and theirs is not None and ours != theirs:
                raise DataError(
                    f"{recipe.data.dataset}: holds activations of {key} {theirs}, "
                    f"but the recipe says site.{key}={ours}"
                )
    for key, theirs in index.rule:
        ours = getattr(tokens, key)
        if tokens != DEFAULT_TOKENS and None not in (ours, theirs) and ours != theirs:
            raise DataError(
                f"{recipe.data.dataset}: was made with {key} {theirs}, "
                f"but the recipe says tokens.{key}={ours}"
            )
    rule = index.rule
    if rule.max_norm_factor is None:
        rule = rule.model_copy(update={"max_norm_factor": tokens.max_norm_factor})
    return recipe.model_copy(update={"site": index.site, "tokens": rule})


@dataclass(frozen=True)
class Needs:
    """What a run takes, estimated, in bytes."""

    parameters: int
    """Of the SAE, about."""
    memory: int
    """The SAE with gradients and Adam, two blocks of the buffer, the language model."""
    disk: int
    """Two checkpoints while one replaces the other, the stored pass, the result."""

    @classmethod
    def of(cls, recipe: Recipe, d_in: int, host: int) -> "Needs":
        """host: parameters of the language model, float32, 0 where none is needed."""
        parameters = (recipe.d_sae or 0) * (2 * d_in + 1) + d_in
        size = torch.empty(0, dtype=getattr(torch, recipe.buffer.dtype)).element_size()
        block = min(recipe.buffer.tokens, recipe.train_tokens) * d_in * size
        step = 4 * (recipe.batch * d_in * 8 + min(recipe.batch, 256) * (recipe.d_sae or 0))
        stored = (recipe.data.tokens or 0) * (d_in * size + 12) if recipe.data.store else 0
        return cls(
            parameters=parameters,
            memory=parameters * 16 + 2 * block + step + host * 4,
            disk=2 * parameters * 12 + stored + parameters * 4,
        )


def refuse_no_room(needs: Needs, folder: Path, device: torch.device) -> int:
    """Bytes that are free where `folder` will be. Raises TrainingError for a run that does not fit
    there, or not in the memory of a CPU.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cpu" and needs.memory > memory:
        raise TrainingError(
            f"the run takes about {needs.memory / 1e9:.1f} GB of memory, and this machine has "
            f"{memory / 1e9:.1f} GB: choose a smaller sae.d_sae or buffer.tokens"
        )
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needs.disk:
        raise TrainingError(
            f"{place}: {free / 1e9:.1f} GB are free; checkpoints, stored activations and result "
            f"take {needs.disk / 1e9:.1f} GB: make room, choose another --out, or a smaller "
            "data.tokens or sae.d_sae"
        )
    return free
