"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and of those before, read and
written.

Arithmetic, from saes/sae.py (process_sae_in, decode, _setup_activation_normalization) and the
module of each architecture; z is x after normalize_activations:
    pre = (z - b_dec if apply_b_dec_to_input else z) W_enc + b_enc
    standard    f = ReLU(pre)
    jumprelu    f = ReLU(pre) [pre > threshold]; a BatchTopK SAE is saved as this
    gated       f = [pi + b_gate > 0] ReLU(pi exp(r_mag) + b_mag), pi = pre without b_enc
    topk        f = ReLU of the k largest pre
    abstopk     f = the k of largest |pre|, with their signs
    y = f W_dec + b_dec, and the normalisation undone
    rescale_acts_by_decoder_norm (topk, abstopk): pre times |W_dec rows| before choosing, and f
                over |W_dec rows| before W_dec, so that f is in units of the output
    transcoders (transcoder.py): b_dec (d_out) is never subtracted from x; skip: y + x W_skip^T
normalize_activations: layer_norm and constant_norm_rescale are per token; expected_average_only_in
is one factor s that the files do not hold, folded as W_enc s, W_dec / s and b_dec / s.
Before version 6 (handle_pre_6_0_config): other names of keys, the metadata beside them, and
activation_fn_str `topk` makes a topk of a standard architecture, with ReLU after.
`scaling_factor` (versions before 6, finetuned SAEs): y = (f scaling_factor) W_dec + b_dec.
"""

import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saezoo.config import ConstantNorm, LayerNorm, SAEConfig, Scale
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._fold import fold, fold_scale, norm_reasons, refuse
from saezoo.formats._saelens_metadata import context_of, metadata_of
from saezoo.formats._tensors import (
    expect_facts,
    read_json,
    read_safetensors,
    refuse_rest,
    take,
    whole_number,
    yes_or_no,
)

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "relu"},
    "gated": {"architecture": "gated"},
    "topk": {"architecture": "topk"},
    "abstopk": {"architecture": "topk", "signed": True, "relu_after": False},
    "jumprelu": {"architecture": "jumprelu"},
    "transcoder": {"architecture": "relu"},
    "skip_transcoder": {"architecture": "relu", "skip": True},
    "jumprelu_transcoder": {"architecture": "jumprelu"},
    "jumprelu_skip_transcoder": {"architecture": "jumprelu", "skip": True},
}
WHY_NOT = {
    "batchtopk": ": a training checkpoint, which SAELens' save_inference_model makes a jumprelu of",
    "matryoshka_batchtopk": ": a training checkpoint, which save_inference_model makes a jumprelu",
    "matching_pursuit": ": it encodes step by step, not in one product",
    "temporal": ": it reads a whole context, not one token",
    "tanh-relu": ": tanh(ReLU(x)) has no form here",
    "covariance_whitening": ": a training checkpoint whose whitening is not in the file",
}
NORMS: dict[str, LayerNorm | ConstantNorm | None] = {
    "none": None,
    "layer_norm": LayerNorm(eps=1e-5, ddof=1),
    "constant_norm_rescale": ConstantNorm(),
    "expected_average_only_in": None,
}
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}
KNOWN = set(
    re.findall(
        r"\w+",
        "architecture d_in d_sae d_out k dtype device apply_b_dec_to_input "
        "normalize_activations reshape_activations rescale_acts_by_decoder_norm metadata "
        "activation_fn activation_fn_kwargs finetuning_scaling_factor model_name hook_name "
        "hook_layer hook_head_index hook_name_out hook_head_index_out hf_hook_name "
        "hf_hook_name_out prepend_bos context_size seqpos_slice exclude_special_tokens "
        "model_from_pretrained_kwargs neuronpedia_id dataset_path sae_lens_version "
        "sae_lens_training_version model_class_name",
    )
)


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a SAELens folder. The inputs of a hook_z SAE are flat: (…, heads * d_head).

    Raises FormatError for unknown values of what decides arithmetic, and for
    expected_average_only_in without the registry's norm_scaling_factor.
    """
    where = path / CONFIG
    facts, meta, old = _as_of_six(read_json(where), where)
    if unknown := sorted(facts.keys() - KNOWN):
        logger.info("%s: keys that SAELens' arithmetic does not have: %s", where, unknown)
    name = _architecture(facts, old, where)
    transcoder = name.endswith("transcoder")
    spec: dict[str, Any] = ARCHITECTURES[name] | {
        "d_in": whole_number(facts, "d_in", where),
        "d_sae": whole_number(facts, "d_sae", where),
        # SAELens' default, for a key that early versions did not write
        "subtract_b_dec": yes_or_no(
            {"apply_b_dec_to_input": True} | facts, "apply_b_dec_to_input", where
        ),
    }
    if transcoder:
        spec["d_out"] = whole_number(facts, "d_out", where)
        if spec["subtract_b_dec"]:
            raise FormatError(f"{where}: apply_b_dec_to_input must be false for a {name}")
    if spec["architecture"] == "topk":
        spec["k"] = whole_number(facts, "k", where)
        if yes_or_no(facts, "rescale_acts_by_decoder_norm", where):
            spec["decoder_norm"] = "scale"
    expect_facts(entry, {key: spec.get(key) for key in ("d_in", "d_sae", "k")}, where)
    norm, factor = _input_norm(facts, entry, transcoder=transcoder, where=where)
    spec |= {"input_norm": norm.to_json() if norm else None}
    _check_reshape(facts, meta, where)
    spec |= context_of(meta, entry, old=old, transcoder=transcoder)
    cfg = SAEConfig.from_json(spec, where=str(where))
    tensors = _tensors(path / WEIGHTS, cfg, facts)
    return Weights(cfg, tensors if factor is None else tensors | fold_scale(tensors, factor))


def _as_of_six(data: dict[str, Any], where: Path) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The keys as version 6 calls them, the metadata, and whether the file is older."""
    meta = data.get("metadata") or {}
    if not isinstance(meta, dict):
        raise FormatError(f"{where}: metadata is {type(meta).__name__}, expected an object")
    version = str(data.get("sae_lens_version") or meta.get("sae_lens_version") or "0")
    found = re.match(r"(\d{1,6})(\.|$)", version)
    if found is None:
        raise FormatError(f"{where}: sae_lens_version {version!r} is not a version")
    if int(found[1]) >= 6:
        return data, meta, False
    facts = {"architecture": "standard"} | {RENAMED.get(key, key): data[key] for key in data}
    if isinstance(facts.get("normalize_activations"), bool):
        on = facts["normalize_activations"]
        facts["normalize_activations"] = "expected_average_only_in" if on else "none"
    return facts, meta | facts, True


def _architecture(facts: dict[str, Any], old: bool, where: Path) -> str:
    """SAELens' name of the architecture; that of an old topk, and its k, from activation_fn."""
    name, activation = facts.get("architecture"), facts.get("activation_fn")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        why = WHY_NOT.get(str(name), f"; there are {', '.join(ARCHITECTURES)}")
        raise FormatError(f"{where}: architecture {name!r} cannot be read{why}")
    if activation not in (None, "relu", "topk"):
        why = WHY_NOT.get(str(activation), "; there are relu and topk")
        raise FormatError(f"{where}: activation_fn {activation!r} cannot be read{why}")
    if activation == "topk" and name == "standard" and old:
        name = "topk"
    if activation is not None and (activation == "topk") != (name == "topk"):
        raise FormatError(f"{where}: activation_fn {activation!r} contradicts architecture {name}")
    if old and name == "topk":
        options = facts.get("activation_fn_kwargs") or {}
        if not isinstance(options, dict) or options.keys() - {"k"}:
            raise FormatError(f"{where}: activation_fn_kwargs {options!r}: only k is known")
        if facts.setdefault("k", options.get("k")) != options.get("k", facts["k"]):
            raise FormatError(f"{where}: k is {facts['k']!r}, but activation_fn_kwargs {options}")
    return name


def _input_norm(
    facts: dict[str, Any], entry: Entry | None, *, transcoder: bool, where: Path
) -> tuple[LayerNorm | ConstantNorm | None, float | None]:
    """The normalisation of each token, or the factor that is to be folded."""
    # SAELens' own registry overrides the file's word for some
    stated = entry.normalize_activations if entry is not None else None
    name = stated or facts.get("normalize_activations")
    name = "none" if name is None else name
    if not isinstance(name, str) or name not in NORMS:
        why = WHY_NOT.get(str(name), f"; there are {', '.join(NORMS)}")
        raise FormatError(f"{where}: normalize_activations {name!r} cannot be read{why}")
    if transcoder and name != "none":
        # SAELens normalises what goes in and does not undo it on what comes out
        raise FormatError(f"{where}: normalize_activations {name!r} of a transcoder has no meaning")
    factor = entry.norm_scaling_factor if entry is not None else None
    if name != "expected_average_only_in":
        if factor is not None:
            logger.info("%s: normalize_activations is %s, so no factor is folded", where, name)
        return NORMS[name], None
    if factor is None or factor <= 0:
        raise FormatError(
            f"{where}: normalize_activations {name!r} needs the registry's norm_scaling_factor, "
            f"which is {factor}: it is not in the file"
        )
    return None, factor


def _check_reshape(facts: dict[str, Any], meta: dict[str, Any], where: Path) -> None:
    """hook_z only flattens the heads of the input: refuse any other reshaping."""
    reshape, hook = facts.get("reshape_activations") or "none", meta.get("hook_name")
    if reshape not in ("none", "hook_z"):
        raise FormatError(
            f"{where}: reshape_activations {reshape!r} cannot be read; there are none and hook_z"
        )
    if reshape == "hook_z" and hook is not None and not str(hook).endswith("_z"):
        raise FormatError(f"{where}: reshape_activations 'hook_z' contradicts hook_name {hook!r}")


def _tensors(where: Path, cfg: SAEConfig, facts: dict[str, Any]) -> dict[str, Tensor]:
    """Canonical tensors; both matrices stay views of the file unless finetuning scaled one."""
    raw = read_safetensors(where)
    for name, value in raw.items():
        # before anything is multiplied with them and hides it
        if not value.is_floating_point():
            raise FormatError(f"{where}: {name} is {value.dtype}, expected a float dtype")
    if cfg.architecture == "jumprelu" and "threshold" not in raw and "log_threshold" in raw:
        # older training checkpoints: process_state_dict_for_loading of saes/jumprelu_sae.py
        raw["threshold"] = take(raw, "log_threshold", where).float().exp()
    tensors = {"W_enc_rows": take(raw, "W_enc", where, dims=2).T}
    tensors["W_dec"] = take(raw, "W_dec", where, dims=2)
    if cfg.skip:
        tensors["W_skip"] = take(raw, "W_skip", where, dims=2).T
    for name in sorted(cfg.tensor_shapes().keys() - tensors.keys()):
        tensors[name] = take(raw, name, where, dims=1)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name not in raw:
            continue
        factor = take(raw, name, where, dims=1)
        if torch.allclose(factor, torch.ones_like(factor)):
            continue
        if facts.get("finetuning_scaling_factor") is not True or cfg.decoder_norm != "none":
            raise FormatError(
                f"{where}: {name} is not all ones, which needs finetuning_scaling_factor true in "
                f"{CONFIG}, and no rescale_acts_by_decoder_norm"
            )
        if factor.shape != (cfg.d_sae,):
            raise FormatError(f"{where}: {name} is {tuple(factor.shape)}, expected {(cfg.d_sae,)}")
        tensors["W_dec"] = tensors["W_dec"] * factor.unsqueeze(1)
    refuse_rest(raw, where, "SAELens")
    return tensors


def write(cfg: SAEConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write cfg.json, of version 6, and sae_weights.safetensors. Raises CannotConvert with what
    SAELens cannot express.
    """
    data, out = express(cfg, tensors)
    plain = {key: value.detach().cpu().contiguous() for key, value in out.items()}
    save_file(plain, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def express(cfg: SAEConfig, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An SAE in SAELens' terms: the keys of cfg.json, of version 6, and its tensors by its names
    and in its shapes (W_enc (d_in, d_sae), W_skip (d_out, d_in)), views where nothing is folded.

    Raises CannotConvert with what SAELens cannot express.
    """
    # SAELens' rescale_acts_by_decoder_norm is decoder_norm scale of a topk; the norms are those of
    # the W_dec that is written, so a scale folded into that too would change them
    own = cfg.architecture == "topk" and not isinstance(cfg.input_norm, Scale)
    cfg, tensors = fold(cfg, tensors, norms=not (own and cfg.decoder_norm == "scale"))
    name = _name_of(cfg)
    out = {key: value for key, value in tensors.items() if key != "W_enc_rows"}
    out["W_enc"] = tensors["W_enc_rows"].T
    if cfg.skip:
        out["W_skip"] = tensors["W_skip"].T
    # SAELens casts every tensor to the config's dtype: the widest, so that none loses digits
    wide = functools.reduce(torch.promote_types, (value.dtype for value in out.values()))
    meta = metadata_of(cfg)
    heads = meta.get("hook_name", "").endswith("hook_z") and "hook_head_index" not in meta
    kinds = [key for key, norm in NORMS.items() if norm is not None and norm == cfg.input_norm]
    data = {
        "architecture": name,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": str(wide).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": cfg.subtract_b_dec,
        "normalize_activations": kinds[0] if kinds else "none",
        "reshape_activations": "hook_z" if heads else "none",
        "metadata": meta,
    }
    if name.endswith("transcoder"):
        data["d_out"] = cfg.d_out or cfg.d_in
    if cfg.architecture == "topk":
        data |= {"k": cfg.k, "rescale_acts_by_decoder_norm": cfg.decoder_norm == "scale"}
    return data, out


def _name_of(cfg: SAEConfig) -> str:
    """SAELens' architecture for a spec. Raises CannotConvert where there is none."""
    wanted = {"architecture": cfg.architecture} | {
        key: True for key in ("skip", "signed") if getattr(cfg, key)
    }
    names = [
        name
        for name, spec in ARCHITECTURES.items()
        if {key: spec[key] for key in spec if key != "relu_after"} == wanted
        and name.endswith("transcoder") == cfg.is_transcoder
    ]
    norm, what = cfg.input_norm, "a transcoder" if cfg.is_transcoder else "an SAE"
    rescaled = cfg.decoder_norm == "scale" and cfg.architecture == "topk"
    refuse(
        "SAELens",
        [
            (not names, f"the architecture {cfg.architecture} of {what}"),
            *norm_reasons(cfg.model_copy(update={"decoder_norm": "none"}) if rescaled else cfg),
            (
                isinstance(norm, LayerNorm) and norm != NORMS["layer_norm"],
                "a layer_norm other than with eps 1e-5 and ddof 1",
            ),
            (cfg.is_transcoder and norm is not None, "a transcoder's normalisation"),
            (cfg.is_transcoder and cfg.subtract_b_dec, "a transcoder that subtracts b_dec"),
            (cfg.input_bias, "an input bias of its own"),
        ],
    )
    return names[0]


def origin_output(folder: Path, x: Tensor) -> Tensor:
    """What SAELens computes from the files in `folder` for x (…, d_in), by its dense formulas."""
    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    raw = {name: value.to(x.dtype) for name, value in read_safetensors(folder / WEIGHTS).items()}
    shift, scale = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
    divisor = scale
    if data["normalize_activations"] == "layer_norm":
        shift, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        divisor = scale + 1e-5
    elif data["normalize_activations"] == "constant_norm_rescale":
        scale = divisor = x.norm(dim=-1, keepdim=True) / data["d_in"] ** 0.5
    z = (x - shift) / divisor
    pre = (z - raw["b_dec"] if data["apply_b_dec_to_input"] else z) @ raw["W_enc"]
    pre = pre + raw["b_enc"] if "b_enc" in raw else pre
    norms = raw["W_dec"].norm(dim=-1) if data.get("rescale_acts_by_decoder_norm") else None
    pre = pre if norms is None else pre * norms
    match data["architecture"]:
        case "gated":
            acts = (pre * raw["r_mag"].exp() + raw["b_mag"]).relu() * (pre + raw["b_gate"] > 0)
        case "topk" | "abstopk" as name:
            index = (pre if name == "topk" else pre.abs()).topk(data["k"]).indices
            acts = torch.zeros_like(pre).scatter(-1, index, pre.gather(-1, index))
            acts = acts.relu() if name == "topk" else acts
        case _:
            acts = pre.relu() * (pre > raw["threshold"]) if "threshold" in raw else pre.relu()
    acts = acts if norms is None else acts / norms
    y = (acts @ raw["W_dec"] + raw["b_dec"]) * scale + shift
    return y + x @ raw["W_skip"].T if "W_skip" in raw else y
