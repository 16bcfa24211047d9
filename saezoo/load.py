"""From a name to a module: the pipeline, written once, top to bottom."""

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from saezoo.build import build, need_sae
from saezoo.config import SAEConfig
from saezoo.config_multi import AnyConfig
from saezoo.custom import build_custom
from saezoo.entry import Entry
from saezoo.errors import AmbiguousName, InputError, UnknownSAE
from saezoo.fetched import Fetched
from saezoo.find import find_sae
from saezoo.formats import Weights, format_module
from saezoo.formats._tensors import refuse_not_finite
from saezoo.hub import fetch
from saezoo.index import Row
from saezoo.kept import read_kept
from saezoo.placing import DTypes
from saezoo.sae import SAE, check_tensors
from saezoo.search import find_all, what_narrows


def load_sae(
    name: str | os.PathLike[str],
    id: str | None = None,  # noqa: A002 the name that SAELens' users know
    *,
    format: str | None = None,  # noqa: A002
    device: str | torch.device = "cpu",
    dtype: DTypes = None,
    features: Iterable[int] | Tensor | None = None,
    encoder_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    verify: bool = False,
    custom: type[Any] | None = None,
) -> SAE:
    """Load a published SAE by name, frozen and in eval mode, with the numbers of its authors' own
    code. Names of what spans several layers or models give a CrossLayerTranscoder, a CLTLayer
    (`NAME/layer_3`) or a Crosscoder instead.

    name: `release/id` (or release and id apart), `hf://org/repo[@rev]/path`, `https://…`, or a
    local folder or file. format: a key of `saezoo.formats.FORMATS`, where files and registry do not
    say it. verify: read every weight and refuse NaN and infinity (NotFinite); otherwise only
    headers and shapes are read.

    dtype: of the weights and of the products; None keeps the stored one, but makes 16-bit weights
    float32 on a CPU unless they would take more than 4 GiB. By name, such as
    {"W_dec": torch.bfloat16}: how each matrix is kept; products are then float32 on a CPU, and the
    widest of them elsewhere, a part being converted at a time.
    features: the numbers of those to load, in that order: their rows alone are read.
    `sae.feature_ids` says which they are, `sae.d_sae` how many. Where other features decide which
    are on (topk, groupmax), encode is refused and `pre_activations` is not; forward is refused
    always, since it would lack the rest.
    encoder_only: no decoder in memory; decode and forward are refused.
    custom: the class of an SAE whose architecture is `custom`; what its `from_native(cfg, tensors)`
    makes is returned. Nothing in a file ever names an import.

    Raises a SaezooError: BadName, UnknownSAE, FetchError, FormatError, ConfigError, InputError or
    one of their children.
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
    if isinstance(weights.cfg, SAEConfig) and (custom is not None or weights.cfg.custom):
        check_tensors(weights.cfg, weights.tensors, entry.name)
        _refuse_parts(entry.name, features, encoder_only, dtype)
        assert not isinstance(dtype, Mapping)
        made = build_custom(weights.cfg, weights.tensors, custom, device, dtype, entry.name)
        return cast(SAE, made)
    model = build(
        weights.cfg,
        weights.tensors,
        device=device,
        dtype=dtype,
        where=entry.name,
        features=features,
        encoder_only=encoder_only,
        consume=True,
    )
    if isinstance(model, SAE):
        model.folder = fetched.path.parent if fetched.path.is_file() else fetched.path
    # a type checker is told of the common case; names of the others are told apart by people
    return cast(SAE, model)


def _refuse_parts(where: str, features: object, encoder_only: bool, dtype: DTypes) -> None:
    """An architecture of one's own is loaded whole: what its tensors mean only its class knows."""
    if features is not None or encoder_only or isinstance(dtype, Mapping):
        raise InputError(
            f"{where} is of an architecture of its own: features=, encoder_only= and a dtype for "
            "each matrix are for those that saezoo computes itself"
        )


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
    dtype: DTypes = None,
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
        layer: need_sae(
            load_sae(
                found[layer][0]["name"],
                device=device,
                dtype=dtype,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                verify=verify,
            ),
            found[layer][0]["name"],
            "load_saes",
        )
        for layer in sorted(found)
    }


def read_weights(fetched: Fetched, entry: Entry | None, *, keep: bool = True) -> Weights:
    """The canonical form of fetched files, completed by what the registry knows. What had to be
    unpacked is kept for the next time; keep=False reads the published files themselves.
    """
    entry = fetched.entry or entry
    read = format_module(fetched.format).read
    weights = read_kept(fetched, entry, read) if keep else read(fetched.path, entry)
    return Weights(_with_registry_facts(weights.cfg, entry), weights.tensors)


def _with_registry_facts(cfg: AnyConfig, entry: Entry | None) -> AnyConfig:
    """Fill in what the files do not say; what they do say stays. Specs with many sites are
    completed by their readers.
    """
    if entry is None or not isinstance(cfg, SAEConfig):
        return cfg
    facts: dict[str, object] = {}
    for key in ("site", "out_site"):
        if getattr(cfg, key) is None and getattr(entry, key) is not None:
            facts[key] = getattr(entry, key)
    return cfg.model_copy(update=facts) if facts else cfg
