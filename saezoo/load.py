"""From a name to a module: the pipeline, written once, top to bottom."""

import os
from collections.abc import Collection
from typing import Any

import torch

from saezoo.config import SAEConfig
from saezoo.custom import build_custom
from saezoo.entry import Entry
from saezoo.errors import AmbiguousName, UnknownSAE
from saezoo.find import find_sae
from saezoo.formats import Weights, format_module
from saezoo.formats._tensors import refuse_not_finite
from saezoo.hub import Fetched, fetch
from saezoo.index import Row
from saezoo.kept import read_kept
from saezoo.sae import SAE, build_sae, check_tensors
from saezoo.search import find_all, what_narrows


def load_sae(
    name: str | os.PathLike[str],
    id: str | None = None,  # noqa: A002 the name that SAELens' users know
    *,
    format: str | None = None,  # noqa: A002
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    verify: bool = False,
    custom: type[Any] | None = None,
) -> SAE:
    """Load a published SAE by name, frozen and in eval mode, with the numbers of its authors' own
    code.

    name: `release/id` (or release and id apart), `hf://org/repo[@rev]/path`, `https://…`, or a
    local folder or file. format: a key of `saezoo.formats.FORMATS`, where files and registry do not
    say it. dtype: of the weights; None keeps the stored one, but makes 16-bit weights float32 on a
    CPU. verify: read every weight and refuse NaN and infinity (NotFinite); otherwise only headers
    and shapes are read.

    custom: the class of an SAE whose architecture is `custom`; what its `from_native(cfg, tensors)`
    makes is returned. Nothing in a file ever names an import.

    Raises a SaezooError: BadName, UnknownSAE, FetchError, FormatError, ConfigError or one of their
    children.
    """
    entry = find_sae(
        name,
        id,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    fetched = fetch(
        entry, format=format, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    weights = read_weights(fetched, entry)
    if verify:
        refuse_not_finite(weights.tensors, entry.name)
    if custom is not None or weights.cfg.custom is not None:
        check_tensors(weights.cfg, weights.tensors, entry.name)
        return build_custom(weights.cfg, weights.tensors, custom, device, dtype, entry.name)
    sae = build_sae(weights.cfg, weights.tensors, device=device, dtype=dtype, where=entry.name)
    sae.folder = fetched.path if fetched.path.is_dir() else fetched.path.parent
    return sae


def load_saes(
    model: str,
    layers: Collection[int] | None = None,
    site: str | None = None,
    *,
    width: int | str | None = None,
    l0: str | float | tuple[float, float] | None = None,
    search: str | None = None,
    release: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    verify: bool = False,
) -> dict[int, SAE]:
    """One SAE of each layer of a model, by layer: the registered ones that fit every filter (those
    of `list_saes`).

    Nothing is fetched unless each layer has exactly one. Raises UnknownSAE where a layer has none,
    AmbiguousName where one has several (saying in what they differ), and what `load_sae` raises.
    """
    found: dict[int, list[Row]] = {}
    for row in find_all(model, layers, site, width, l0, search, release).rows:
        layer = (row.get("site") or {}).get("layer")
        if layer is not None:
            found.setdefault(layer, []).append(row)
    if lacking := sorted(set(layers or found) - found.keys()):
        raise UnknownSAE(f"{model}: no SAE fits on layer {', '.join(map(str, lacking))}")
    if not found:
        raise UnknownSAE(f"no registered SAE of {model!r} fits; `saezoo list` shows the releases")
    if several := [layer for layer, rows in sorted(found.items()) if len(rows) > 1]:
        rows = found[several[0]]
        raise AmbiguousName(
            f"{model}: layer {several[0]} has {len(rows)} SAEs that fit, such as "
            f"{rows[0]['name']}. They differ in {what_narrows(rows)}"
        )
    return {
        layer: load_sae(
            found[layer][0]["name"],
            device=device,
            dtype=dtype,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            verify=verify,
        )
        for layer in sorted(found)
    }


def read_weights(fetched: Fetched, entry: Entry | None, *, keep: bool = True) -> Weights:
    """The canonical form of fetched files, completed by what the registry knows. What had to be
    unpacked is kept for the next time; keep=False reads the published files themselves.
    """
    read = format_module(fetched.format).read
    weights = read_kept(fetched, entry, read) if keep else read(fetched.path, entry)
    return Weights(_with_registry_facts(weights.cfg, entry), weights.tensors)


def _with_registry_facts(cfg: SAEConfig, entry: Entry | None) -> SAEConfig:
    """Fill in what the files do not say; what they do say stays."""
    if entry is None:
        return cfg
    facts: dict[str, object] = {}
    for key in ("site", "out_site"):
        if getattr(cfg, key) is None and getattr(entry, key) is not None:
            facts[key] = getattr(entry, key)
    return cfg.model_copy(update=facts) if facts else cfg
