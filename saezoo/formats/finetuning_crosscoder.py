"""science-of-finetuning's crosscoders between a model and its chat version: `config.json` and
`model.safetensors`, as huggingface_hub's PyTorchModelHubMixin writes them.

encoder.weight (sources, d, n), encoder.bias (n,), decoder.weight (sources, n, d), decoder.bias
(sources, d). Arithmetic (dictionary.py of their dictionary_learning: NormalizableMixin, CrossCoder,
BatchTopKCrossCoder):
    z_s = (x_s - activation_mean[s]) * activation_global_scale[s]; z = x where those are NaN
    f = ReLU(sum_s z_s encoder[s] + bias)
    BatchTopK only: f where f * c > threshold, else 0
    y_s = f decoder[s] + bias[s], and / (activation_global_scale[s] + 1e-8) + activation_mean[s]
c is the code normalisation, by code_normalization_id (files without it are CROSSCODER): CROSSCODER
sum_s |d_s|, SAE the norm of all together, MIXED a weighted sum of both, NONE 1, and DECOUPLED |d_s|
for each source, whose BatchTopK has features for each. A plain CrossCoder's forward has no c.
Source 0 is the base model, source 1 the chat model.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from saezoo.config import Site
from saezoo.config_multi import CrosscoderConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._tensors import (
    expect_facts,
    read_json,
    read_safetensors,
    refuse_rest,
    take,
    whole_number,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"

CODES = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
"""code_normalization_id: the values of their Enum, which counts from 1."""

CODE_NORMS = {
    "CROSSCODER": "sum",
    "SAE": "joint",
    "MIXED": "mixed",
    "NONE": "none",
    "DECOUPLED": "each",
}


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a folder; the matrices are views of the mapped file.

    Raises FormatError where config, tensors and registry contradict each other, and for what has no
    exact form here.
    """
    config, file = path / CONFIG, path / WEIGHTS
    data = read_json(config)
    raw = {name.replace("_orig_mod.", ""): value for name, value in read_safetensors(file).items()}
    tensors = {
        "W_enc_rows": take(raw, "encoder.weight", file, dims=3).mT,
        "b_enc": take(raw, "encoder.bias", file, dims=1),
        "W_dec": take(raw, "decoder.weight", file, dims=3).transpose(0, 1),
        "b_dec": take(raw, "decoder.bias", file, dims=2),
    }
    reads, d_sae, d_in = tensors["W_enc_rows"].shape
    sources = tensors["W_dec"].shape[1]
    for key, found in (("activation_dim", d_in), ("dict_size", d_sae)):
        if whole_number(data, key, config) != found:
            raise FormatError(f"{config}: {key} is {data[key]}, but the tensors have {found}")
    if data.get("latent_processor") is not None:
        raise FormatError(
            f"{config}: latent_processor is {data['latent_processor']!r}: what it does to features "
            "is not in the files"
        )
    code = _code(raw, data, file)
    spec: dict[str, Any] = {
        "architecture": "relu",
        "sources": sources,
        "d_in": d_in,
        "d_sae": d_sae,
        "reads": _reads(data, config, reads, sources),
        "notes": {"code_normalization": code},
    }
    norm = _normaliser(raw, file, sources, d_in)
    if "threshold" in raw:
        spec |= _batch_top_k(raw, data, file, code, norm is not None)
        threshold = take(raw, "threshold", file).float()
        tensors["threshold"] = _wide(threshold, code, sources, d_sae, file)
    if norm is not None:
        spec["input_norm"] = {"kind": "standardise", "eps": 1e-8}
        tensors |= norm
    refuse_rest(raw, file, "this format")
    expect_facts(entry, {"d_in": d_in, "d_sae": d_sae, "k": None}, file)
    if entry is not None and entry.site is not None:
        spec["sites"] = [entry.site, *[Site()] * (sources - 1)]
    return Weights(CrosscoderConfig.from_json(spec, str(file)), tensors)


def _code(raw: dict[str, Tensor], data: dict[str, Any], file: Path) -> str:
    """The code normalisation's name, by the tensor; a config that says otherwise is refused."""
    number = whole_number({"code_normalization_id": 1} | raw, "code_normalization_id", file)
    raw.pop("code_normalization_id", None)
    code = CODES.get(number)
    if code is None:
        raise FormatError(f"{file}: code_normalization_id is {number}, expected 1 to 5")
    stated = data.get("code_normalization")
    if stated is not None and (not isinstance(stated, str) or stated.upper() != code):
        raise FormatError(f"{file}: its code normalisation is {code}, the config says {stated!r}")
    return code


def _reads(data: dict[str, Any], config: Path, reads: int, sources: int) -> list[int] | None:
    """The sources that are encoded, where the config lists them."""
    listed = data.get("encoder_layers")
    if listed is None:
        if reads != sources:
            raise FormatError(
                f"{config}: {reads} encoders and {sources} decoders, no encoder_layers"
            )
        return None
    whole = isinstance(listed, list) and all(type(item) is int for item in listed)
    if not whole or len(listed) != reads:
        raise FormatError(f"{config}: encoder_layers is {listed!r}, the encoders are {reads}")
    return listed


def _normaliser(
    raw: dict[str, Tensor], file: Path, sources: int, d_in: int
) -> dict[str, Tensor] | None:
    """Statistics of the activations; None where they are NaN or not there, which both mean none."""
    mean, std = raw.pop("activation_mean", None), raw.pop("activation_std", None)
    scale = raw.pop("activation_global_scale", None)
    raw.pop("target_rms", None)  # is in the scale
    if mean is None or std is None or scale is None:
        return None
    shapes = tuple(mean.shape), tuple(std.shape), tuple(scale.shape)
    if shapes != ((sources, d_in), (sources, d_in), (sources,)):
        raise FormatError(f"{file}: activation_mean, _std and _global_scale are {shapes}")
    if bool(mean.isnan().any()) or bool(std.isnan().any()):
        return None
    return {"in_mean": mean, "in_scale": scale}


def _batch_top_k(
    raw: dict[str, Tensor], data: dict[str, Any], file: Path, code: str, normalised: bool
) -> dict[str, Any]:
    """What the threshold of a BatchTopKCrossCoder adds to the spec."""
    notes = {"code_normalization": code, "k in training": str(whole_number(raw, "k", file))}
    raw.pop("k")
    if bool((raw["threshold"] < 0).any()):
        notes["threshold"] = "unset (below 0): every feature above 0 is on"
    if code == "DECOUPLED" and normalised:
        raise FormatError(
            f"{file}: its authors' code normalises the inputs of a decoupled BatchTopK twice, "
            "which has no form here"
        )
    spec = {"architecture": "jumprelu", "code_norm": CODE_NORMS[code], "notes": notes}
    if code == "MIXED":
        spec["mixed"] = [
            data.get("code_normalization_alpha_sae", 1.0),
            data.get("code_normalization_alpha_cc", 0.1),
        ]
    return spec


def _wide(threshold: Tensor, code: str, sources: int, d_sae: int, file: Path) -> Tensor:
    """The one threshold (or each source's) as one for each feature."""
    shape = (sources,) if code == "DECOUPLED" else ()
    if threshold.numel() != (sources if shape else 1) or threshold.dim() > 1:
        raise FormatError(f"{file}: threshold is {tuple(threshold.shape)}, expected {shape}")
    wide = threshold.reshape(*shape, 1).expand(*shape, d_sae)
    return wide.contiguous()
