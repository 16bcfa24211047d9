"""Qwen-Scope: one `layer{n}.sae.pt` a layer, and in newer repos a `config.json` beside.

Arithmetic, from the code in the model cards:
    p = x W_enc^T + b_enc, and b_dec is not subtracted from x
    f = the k largest p, without ReLU: negative ones stay
    y = f W_dec^T + b_dec
x is what layer n gives. k is in config.json, in the repo's name (…-L0_100) and in the registry;
those that are there must agree. The licence restricts use: see the registry's use_restriction.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saezoo.config import SAEConfig, Site
from saezoo.entry import Entry
from saezoo.errors import FormatError
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
    whole_number,
)
from saezoo.formats.gemma_scope import names_of, prefer

FILE = re.compile(r"layer(\d{1,6})\.sae\.pt")
KNOWN = ("k", "d_model", "d_sae")
REPO = re.compile(r"SAE-Res-(?P<model>Qwen[\w.-]+)-W\d+K-L0_(?P<k>\d{1,6})\b")


def read(path: Path, entry: Entry | None) -> Weights:
    """Read one layer's file. Raises FormatError where nothing says k, and where file, config, repo
    and registry contradict.
    """
    config = path.with_name("config.json")
    data = read_json(config) if config.is_file() else {}
    tell_unknown(data, KNOWN, config)
    raw = read_state_dict(path)
    tensors: dict[str, Tensor] = {
        "W_enc_rows": take(raw, "W_enc", path, dims=2),
        "b_enc": take(raw, "b_enc", path, dims=1),
        "W_dec": take(raw, "W_dec", path, dims=2).T,
        "b_dec": take(raw, "b_dec", path, dims=1),
    }
    refuse_rest(raw, path, "Qwen-Scope")
    d_sae, d_in = tensors["W_enc_rows"].shape
    repo = next(filter(None, (REPO.search(name) for name in names_of(path, entry))), None)
    found: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    expect_sizes(data, {"d_model": d_in, "d_sae": d_sae}, config)
    found["k"] = _k(data, repo, entry, config)
    expect_facts(entry, found, path)
    spec = {"architecture": "topk", **found, "relu_after": False, "site": _site(path, repo, entry)}
    return Weights(SAEConfig.from_json(spec, where=str(path)), tensors)


def _k(data: dict[str, Any], repo: re.Match[str] | None, entry: Entry | None, config: Path) -> int:
    named = int(repo["k"]) if repo else None
    if "k" in data:
        k = whole_number(data, "k", config)
        if named not in (None, k):
            raise FormatError(f"{config}: k is {k}, but the repo's name says {named}")
        return k
    stated = named or (entry.k if entry is not None else None)
    if not stated:
        raise FormatError(
            f"{config.parent}: nothing says k: it is in the repo's config.json or name "
            "(…-L0_100); put that config.json beside, or load it by its name in the registry"
        )
    return stated


def _site(path: Path, repo: re.Match[str] | None, entry: Entry | None) -> Site | None:
    """What layer n gives, n from the file's name; the host from the repo's."""
    stated = entry.site if entry is not None else None
    model = stated.model if stated else f"Qwen/{repo['model']}" if repo else None
    named = FILE.fullmatch(path.name)
    site = site_of_hook(f"blocks.{named[1]}.hook_resid_post", model) if named else None
    return prefer(stated, site)
