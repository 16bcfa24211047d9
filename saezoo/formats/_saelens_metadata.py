"""What SAELens' metadata says of sites, tokens and provenance, read and written.

The keys: LLM_METADATA_KEYS of loading/pretrained_sae_loaders.py, and _set_sae_metadata of
llm_sae_training_runner.py. None of it decides arithmetic, so a malformed fact is no fact.
"""

from typing import Any

from saezoo.config import SAEConfig, Site
from saezoo.entry import Entry
from saezoo.formats._hooks import canonical_model, module_and_side, site_of_hook

VERSION = "6.0.0"
"""The version whose keys are written: SAELens reads a file without one as older than 6."""


def context_of(
    meta: dict[str, Any], entry: Entry | None, *, old: bool, transcoder: bool
) -> dict[str, Any]:
    """site, out_site, tokens and notes of a SAEConfig; what the registry states of a site wins."""
    site = _site(meta, "", entry.site if entry else None)
    found: dict[str, Any] = {"site": site, "tokens": _tokens(meta, old=old)}
    if transcoder:
        found["out_site"] = _site(meta, "_out", entry.out_site if entry else None) or {}
    told = {key: meta.get(key) for key in ("neuronpedia_id", "dataset_path", "hook_head_index")}
    skip = (found["tokens"] or {}).get("skip_first")
    if meta.get("seqpos_slice") not in ([None], [skip, None]):  # more than a TokenRule can say
        told["seqpos_slice"] = meta.get("seqpos_slice")
    if isinstance(meta.get("exclude_special_tokens"), list):
        told["exclude_special_tokens"] = meta["exclude_special_tokens"]
    notes = {key: str(value) for key, value in told.items() if value is not None}
    return found | {"notes": notes or None}


def metadata_of(cfg: SAEConfig) -> dict[str, Any]:
    """The other way round: SAELens' metadata, of version 6, without what is not known."""
    tokens, notes = cfg.tokens, cfg.notes or {}
    meta: dict[str, Any] = {}
    for suffix, site in (("_out", cfg.out_site), ("", cfg.site)):
        if site is not None:
            meta["model_name"] = site.model or meta.get("model_name")
            meta[f"hook_name{suffix}"] = site.hook_name
            meta[f"hf_hook_name{suffix}"] = f"{site.module}.{site.side}" if site.module else None
    if cfg.site is not None and cfg.site.centred is not None:
        meta["model_from_pretrained_kwargs"] = {"center_writing_weights": cfg.site.centred}
    if tokens is not None:
        meta["prepend_bos"], meta["context_size"] = tokens.prepend_bos, tokens.context
        meta["exclude_special_tokens"] = tokens.skip_special
        meta["seqpos_slice"] = [tokens.skip_first, None] if tokens.skip_first else None
    if notes.get("hook_head_index", "").isdecimal():
        meta["hook_head_index"] = int(notes["hook_head_index"])
    meta |= {key: notes.get(key) for key in ("neuronpedia_id", "dataset_path")}
    known = {key: value for key, value in meta.items() if value is not None}
    return known | {"sae_lens_version": VERSION, "saved_by": "saezoo"}


def _site(meta: dict[str, Any], suffix: str, stated: Site | None) -> dict[str, Any] | None:
    """The input site, or with suffix `_out` the output's; what the registry states wins."""
    own = stated.model_dump(exclude_unset=True, exclude_none=True) if stated else {}
    model = own.get("model") or _text(meta, "model_name")
    hook = own.get("hook_name") or _text(meta, f"hook_name{suffix}")
    site = site_of_hook(hook, model) if hook else Site(model=canonical_model(model))
    known = site.to_json()
    if module := _text(meta, f"hf_hook_name{suffix}"):
        known["module"], known["side"] = module_and_side(module)
    if meta.get(f"hook_head_index{suffix}") is not None:  # one head: no module gives it alone
        known = {key: known[key] for key in known if key not in ("module", "point")}
    layer = meta.get(f"hook_layer{suffix}")
    if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0:
        known.setdefault("layer", layer)
    options = meta.get("model_from_pretrained_kwargs")
    centred = options.get("center_writing_weights") if isinstance(options, dict) else None
    if isinstance(centred, bool):
        known["centred"] = centred
    if stated is not None and "module" in own:
        own["side"] = stated.side
    return known | own if known.keys() | own.keys() != {"side"} else None


def _tokens(meta: dict[str, Any], *, old: bool) -> dict[str, Any] | None:
    """prepend_bos, context_size, the start of seqpos_slice (slice(*it)) and special tokens."""
    rule: dict[str, Any] = {"prepend_bos": True} if old and meta.get("hook_name") else {}
    flags = (("prepend_bos", "prepend_bos"), ("exclude_special_tokens", "skip_special"))
    rule |= {ours: meta[key] for key, ours in flags if isinstance(meta.get(key), bool)}
    if type(meta.get("context_size")) is int and meta["context_size"] > 0:
        rule["context"] = meta["context_size"]
    part = meta.get("seqpos_slice")
    if isinstance(part, list) and len(part) > 1 and type(part[0]) is int and part[0] >= 0:
        rule["skip_first"] = part[0]
    return rule or None


def _text(meta: dict[str, Any], key: str) -> str | None:
    value = meta.get(key)
    return value if isinstance(value, str) and value else None
