"""Native folders that are fit to be published, of SAEs of a few hundred weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saezoo.check import write_golden
from saezoo.config import SAEConfig
from saezoo.formats import native
from saezoo.sae import build_sae

D, N, K = 6, 24, 4
METRICS = {
    "fvu": 0.25,
    "explained_variance": 0.75,
    "l0": 4.0,
    "cosine": 0.875,
    "dead_fraction": 0.125,
    "dense_fraction": 0.0,
    "loss_recovered": 0.9375,
    "kl": 0.125,
    "tokens": 4096,
    "version": 2,
    "training_tokens": 100000,
    "held_out_documents": 20,
}
SPEC: dict[str, Any] = {
    "architecture": "topk",
    "d_in": D,
    "d_sae": N,
    "k": K,
    "subtract_b_dec": True,
    "site": {
        "model": "my-org/tiny-llama",
        "layer": 3,
        "point": "resid_post",
        "module": "model.layers.3",
        "hook_name": "blocks.3.hook_resid_post",
    },
    "tokens": {
        "prepend_bos": False,
        "context": 32,
        "skip_first": 1,
        "skip_special": True,
        "median_norm": 10.0,
        "max_norm_factor": 3.0,
    },
    "origin": {"licence": "MIT", "author": "my-org"},
    "metrics": METRICS,
    "notes": {"dataset": "my-org/texts", "recipe": "tiny", "trained_as": "topk"},
}


def spec(**changes: Any) -> dict[str, Any]:
    """SPEC with changes: a dict is laid over what stands there, None takes a key away."""
    made = json.loads(json.dumps(SPEC))
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            made[key] |= value
            made[key] = {name: item for name, item in made[key].items() if item is not None}
        elif value is None:
            del made[key]
        else:
            made[key] = value
    return made


def at_layer(layer: int) -> dict[str, Any]:
    """The change that puts an SAE on another layer."""
    return {
        "layer": layer,
        "module": f"model.layers.{layer}",
        "hook_name": f"blocks.{layer}.hook_resid_post",
    }


def write_native(
    folder: Path, *, seed: int = 0, golden: bool = True, stats: bool = True, **changes: Any
) -> Path:
    """A native folder with golden outputs and stats."""
    cfg = SAEConfig.from_json(spec(**changes))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).abs()
        if name == "threshold"
        else torch.randn(shape, generator=generator)
        for name, shape in cfg.tensor_shapes().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    native.write(cfg, tensors, folder)
    if golden and cfg.custom is None:
        x = torch.randn(8, cfg.d_in, generator=generator)
        write_golden(build_sae(cfg, tensors), x, folder)
    if stats:
        density = torch.rand(cfg.d_sae, generator=generator) * 0.2
        save_file(
            {"density": density, "max_activation": density * 10}, folder / "stats.safetensors"
        )
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json, as a person would: nothing is checked."""
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        laid = isinstance(value, dict) and isinstance(data.get(key), dict)
        data[key] = data[key] | value if laid else value
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
