"""Connor Kissane's crosscoder between two models: `cfg.json` and `cc_weights.pt`.

W_enc (models, d, n), W_dec (n, models, d), b_enc (n,), b_dec (models, d). Arithmetic (crosscoder.py
of ckkissane/crosscoder-model-diff-replication):
    f = ReLU(sum_m x_m W_enc[m] + b_enc),   y_m = f W_dec[:, m] + b_dec[m]
A public converter permutes W_enc as if it were (d, models, n): the shapes decide here, and where d
is the number of models, the order of the authors' code holds.
The crosscoder was trained on activations scaled to a mean norm of sqrt(d), one factor a model,
which the files do not hold: its authors' notebook folds them in first. Where the registry states
them (source_scales), activations as the models give them go in and come out; else the note `input`
says that they must be scaled.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from saezoo.config import Site
from saezoo.config_multi import CrosscoderConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._hooks import canonical_model, site_of_hook
from saezoo.formats._tensors import (
    expect_facts,
    read_json,
    read_pickle,
    refuse_rest,
    take,
    whole_number,
)
from saezoo.formats.gemma_scope import prefer

CONFIG, WEIGHTS = "cfg.json", "cc_weights.pt"


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a folder. Raises FormatError where config, tensors and registry contradict."""
    config, file = path / CONFIG, path / WEIGHTS
    data = read_json(config)
    raw = read_pickle(file)
    if not isinstance(raw, dict):
        raise FormatError(f"{file}: expected a dictionary of tensors, got {type(raw).__name__}")
    tensors = {
        "W_enc_rows": take(raw, "W_enc", file, dims=3),
        "b_enc": take(raw, "b_enc", file, dims=1),
        "W_dec": take(raw, "W_dec", file, dims=3),
        "b_dec": take(raw, "b_dec", file, dims=2),
    }
    refuse_rest(raw, file, "this format")
    d_sae, sources, d_in = tensors["W_dec"].shape
    tensors["W_enc_rows"] = _rows(tensors["W_enc_rows"], sources, d_in, d_sae, file)
    for key, found in (("d_in", d_in), ("dict_size", d_sae)):
        if whole_number(data, key, config) != found:
            raise FormatError(f"{config}: {key} is {data[key]}, but the tensors have {found}")
    if "n_models" in data and whole_number(data, "n_models", config) != sources:
        raise FormatError(f"{config}: n_models is {data['n_models']}, the tensors have {sources}")
    expect_facts(entry, {"d_in": d_in, "d_sae": d_sae}, file)
    spec: dict[str, Any] = {
        "architecture": "relu",
        "sources": sources,
        "d_in": d_in,
        "d_sae": d_sae,
        "sites": _sites(data, entry, sources),
    }
    if entry is not None and entry.source_scales is not None:
        spec["input_norm"] = {"kind": "scale", "factors": entry.source_scales}
    else:
        spec["notes"] = {
            "input": "scale each model's activations to a mean norm of sqrt(d_in) first, as in "
            "training; the files do not hold the factors"
        }
    return Weights(CrosscoderConfig.from_json(spec, str(file)), tensors)


def _rows(W_enc: Tensor, sources: int, d_in: int, d_sae: int, file: Path) -> Tensor:
    """(models, n, d), a view."""
    shape = tuple(W_enc.shape)
    if shape == (sources, d_in, d_sae):
        return W_enc.mT
    if shape == (d_in, sources, d_sae):
        return W_enc.permute(1, 2, 0)
    raise FormatError(f"{file}: W_enc is {shape}, expected {(sources, d_in, d_sae)}")


def _sites(data: dict[str, Any], entry: Entry | None, sources: int) -> list[Site] | None:
    """The hook of the config in each model, the first of which is the one that the registry and the
    config name.
    """
    hook, named = data.get("hook_point"), data.get("model_name")
    if not isinstance(hook, str):
        sites = [Site()] * sources
        return [entry.site, *sites[1:]] if entry and entry.site else None
    model = canonical_model(named) if isinstance(named, str) else None
    sites = [site_of_hook(hook, model), *[site_of_hook(hook)] * (sources - 1)]
    return [prefer(entry.site if entry else None, sites[0]) or sites[0], *sites[1:]]
