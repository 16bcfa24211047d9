"""Gemma Scope 2's cross-layer transcoders and crosscoders:
`clt/width_262k_l0_medium_affine/params_layer_{0..25}.safetensors` and
`crosscoder/layer_7_13_17_22_width_262k_l0_medium/params_layer_{0..3}.safetensors`, mostly with
`config.json` beside them.

Both are one class of the authors' tutorial (JumpReLUMultiLayerSAE), with a file for each layer l,
in which w_enc (d, n), w_dec (n, layers, d), b_enc and threshold (n,), b_dec (d,), and
affine_skip_connection (d, d) where there is one:
    p_l = x_l w_enc[l] + b_enc[l]
    f_l = ReLU(p_l) where p_l > threshold[l], else 0
    y_m = sum over all l of f_l w_dec[l][:, m] + b_dec[m], and + x_m skip[m] (no transpose)
So a crosscoder of theirs has features of each of its layers too, and is the same module. Features
write to every layer that w_dec has: whatever is causal here is so in the weights. (circuit-tracer
leaves out w_dec[l][:, m] for m < l, and the last layer where its list does not name it twice.)
`width` in names and configs counts the features of all layers together, and not exactly: the
tensors decide. A layer by name has the number of its file, which in a crosscoder is a place in its
list of layers.
"""

import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saezoo.config import Site
from saezoo.config_multi import CLTConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights, split_layer
from saezoo.formats._layers import (
    chosen,
    expect_layers,
    layers_there,
    sites_for,
    stated_site,
)
from saezoo.formats._tensors import (
    expect_facts,
    join_rows,
    read_json,
    read_safetensors,
    refuse_rest,
    take,
    yes_or_no,
)
from saezoo.formats.gemma_scope import names_of
from saezoo.formats.gemma_scope_2 import (
    CONFIG,
    CROSS_LAYER,
    HOOKS,
    KNOWN,
    SKIP,
    model_of,
    site_of_point,
)

logger = logging.getLogger(__name__)

KEY, FILE = "gemma_scope_2_multi", "params_layer_{layer}.safetensors"
CROSSCODER = re.compile(r"layer_(?P<layers>\d{1,3}(?:_\d{1,3})+)_width_")
PLACE = re.compile(r"\{([^{}]*)\}")
"""What stands for the number of the layer in a hook point of all layers."""


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a folder, or one layer of it (`FOLDER/layer_3`). Everything stays mapped.

    Raises MissingFile for a layer that is not there, FormatError for unknown values of what decides
    arithmetic, and where files, config and registry contradict each other.
    """
    folder, layer = split_layer(path)
    config = folder / CONFIG
    data = read_json(config) if config.is_file() else {}
    kind = _kind(data, folder, entry)
    there = layers_there(folder, KEY, FILE) if layer is None else [layer]
    tensors: dict[str, Tensor] = {}
    count, biases = 0, []
    for at in there:
        file = folder / FILE.replace("{layer}", str(at))
        own, bias = _layer_tensors(read_safetensors(file), file)
        count = _expect_same(count, own["W_dec"].shape[1], file)
        biases.append(bias)
        tensors |= {f"layers.{at}.{name}": value for name, value in own.items()}
    skip = any(name.endswith("W_skip") for name in tensors)
    if "affine_connection" in data and yes_or_no(data, "affine_connection", config) != skip:
        raise FormatError(f"{config}: affine_connection is {not skip}, the tensors say {skip}")
    if layer is None:
        expect_layers(there, count, folder)
        tensors["b_dec"] = join_rows(biases, folder, "b_dec")
    else:
        tensors.pop(f"layers.{layer}.W_skip", None)
    d_sae, d_in = own["W_enc_rows"].shape
    expect_facts(entry, {"d_in": d_in, "d_sae": d_sae}, folder)
    sites, out_sites = _sites(kind, data, folder, entry, count)
    spec = {
        "architecture": "jumprelu",
        "layers": count,
        "d_in": d_in,
        "d_sae": d_sae,
        "d_out": own["W_dec"].shape[2] if own["W_dec"].shape[2] != d_in else None,
        "causal": False,
        "skip": skip,
        "sites": sites,
        "out_sites": out_sites,
    }
    where = str(folder)
    return Weights(chosen(CLTConfig.from_json(spec, where), layer, where), tensors)


def _layer_tensors(raw: dict[str, Tensor], file: Path) -> tuple[dict[str, Tensor], Tensor]:
    """One layer's tensors under their canonical names, and the bias of what it receives."""
    own = {
        "W_enc_rows": take(raw, "w_enc", file, dims=2).T,
        "b_enc": take(raw, "b_enc", file, dims=1),
        "W_dec": take(raw, "w_dec", file, dims=3),
        "threshold": take(raw, "threshold", file, dims=1),
    }
    bias = take(raw, "b_dec", file, dims=1)
    if SKIP in raw:
        own["W_skip"] = take(raw, SKIP, file, dims=2)
    refuse_rest(raw, file, "a layer of Gemma Scope 2")
    return own, bias


def _expect_same(known: int, found: int, file: Path) -> int:
    if known not in (0, found):
        raise FormatError(
            f"{file}: its decoder is of {found} layers, that of the layers before is of {known}"
        )
    return found


def _kind(data: dict[str, Any], folder: Path, entry: Entry | None) -> str:
    """clt or crosscoder, by the config, else by the folders' names. Both compute the same; only
    their sites differ.
    """
    if data and data.get("architecture") != "jump_relu":
        raise FormatError(
            f"{folder / CONFIG}: architecture {data.get('architecture')!r} is not known for Gemma "
            "Scope 2"
        )
    if more := sorted(data.keys() - KNOWN):
        logger.info("%s: keys that are not used: %s", folder / CONFIG, ", ".join(more))
    kind = data.get("type")
    if kind is None:
        named = any(CROSSCODER.search(f"{name}/") for name in names_of(folder, entry))
        return "crosscoder" if named else "clt"
    if not isinstance(kind, str) or kind not in CROSS_LAYER:
        raise FormatError(
            f"{folder / CONFIG}: type is {kind!r}, but a file a layer is of clt or crosscoder"
        )
    return kind


def _sites(
    kind: str, data: dict[str, Any], folder: Path, entry: Entry | None, count: int
) -> tuple[tuple[Site, ...] | None, tuple[Site, ...] | None]:
    """The sites read and written: the config's hook points, else those of the kind."""
    model = model_of(data, folder, entry)
    into, out = data.get("hf_hook_point_in"), data.get("hf_hook_point_out")
    if into is None:
        ends = HOOKS["transcoder"] if kind == "clt" else (HOOKS["resid_post"][0],) * 2
        into, out = (f"model.layers.{{all}}.{end}" for end in ends)
    numbers = _numbers(kind, into, folder, entry, count)

    def made(hook: object) -> list[Site | None]:
        if numbers is None or not isinstance(hook, str):
            return []
        return [site_of_point(PLACE.sub(str(at), hook, count=1), model) for at in numbers]

    return (
        sites_for(stated_site(entry, "site"), made(into)),
        sites_for(stated_site(entry, "out_site"), made(out)),
    )


def _numbers(
    kind: str, hook: object, folder: Path, entry: Entry | None, count: int
) -> list[int] | None:
    """Which layers of the model these are; None where nothing says so."""
    listed = PLACE.search(hook) if isinstance(hook, str) else None
    words = re.findall(r"\d{1,3}", listed[1]) if listed else []
    if not words and kind == "crosscoder":
        named = next(filter(None, map(CROSSCODER.search, names_of(folder, entry))), None)
        if named is None:
            return None
        words = named["layers"].split("_")
    if not words:
        return list(range(count))
    if len(words) != count:
        raise FormatError(
            f"{folder}: {len(words)} layers are named ({', '.join(words)}), but the decoders are "
            f"of {count}"
        )
    return [int(word) for word in words]
