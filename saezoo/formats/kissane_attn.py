"""Connor Kissane's and Rob Krzyzanowski's attention SAEs: `NAME.pt`, and `NAME_cfg.json` beside.

Arithmetic, from the AutoEncoder of their notebooks:
    f = ReLU((x - b_dec) W_enc + b_enc), y = f W_dec + b_dec
x is hook_z with the heads flattened: (…, heads * d_head). Of the config, act_size and dict_size are
the tensors' sizes, act_name is the hook and model_name the host; the rest concerns training.
"""

from pathlib import Path
from typing import Any

from saezoo.config import SAEConfig, Site
from saezoo.entry import Entry
from saezoo.formats import Weights
from saezoo.formats._hooks import site_of_hook
from saezoo.formats._tensors import (
    expect_facts,
    expect_sizes,
    read_json,
    read_state_dict,
    refuse_rest,
    take,
    tell_unknown,
)
from saezoo.formats.gemma_scope import prefer

KNOWN = ("act_size", "dict_size", "act_name", "model_name")


def read(path: Path, entry: Entry | None) -> Weights:
    """Read one file, and its config where it is there. Raises FormatError where file, config and
    registry contradict.
    """
    config = path.with_name(f"{path.stem}_cfg.json")
    data = read_json(config) if config.is_file() else {}
    tell_unknown(data, KNOWN, config)
    raw = read_state_dict(path)
    tensors = {
        "W_enc_rows": take(raw, "W_enc", path, dims=2).T,
        "b_enc": take(raw, "b_enc", path, dims=1),
        "W_dec": take(raw, "W_dec", path, dims=2),
        "b_dec": take(raw, "b_dec", path, dims=1),
    }
    refuse_rest(raw, path, "Kissane's format")
    d_sae, d_in = tensors["W_enc_rows"].shape
    found: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    expect_sizes(data, {"act_size": d_in, "dict_size": d_sae}, config)
    expect_facts(entry, found, path)
    spec = {"architecture": "relu", **found, "subtract_b_dec": True, "site": _site(data, entry)}
    return Weights(SAEConfig.from_json(spec, where=str(path)), tensors)


def _site(data: dict[str, Any], entry: Entry | None) -> Site | None:
    stated = entry.site if entry is not None else None
    hook, model = data.get("act_name"), data.get("model_name")
    if not isinstance(hook, str):
        return stated
    model = stated.model if stated and stated.model else model if isinstance(model, str) else None
    return prefer(stated, site_of_hook(hook, model))
