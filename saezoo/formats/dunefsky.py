"""Jacob Dunefsky's transcoders: one `.pt` with a pickled config object and a state dict.

Arithmetic, from transcoder_circuits' sae_training/sparse_autoencoder.py:
    f = ReLU((x - b_dec) W_enc + b_enc)
    y = f W_dec + b_dec_out      transcoders: b_dec is of the input, b_dec_out of the output
    y = f W_dec + b_dec          SAEs
x is what config.hook_point gives, y goes where config.out_hook_point is. The released set reads
ln2.hook_normalized, which has not the norm's gain and which no HuggingFace module outputs.
The config is an object of the authors' own class; it is read as a bag of fields (see _pickled.py).
`.pkl` and `.pkl.gz`, which their code also writes, are bare pickles and are not read.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from saezoo.config import SAEConfig, Site
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._hooks import site_of_hook
from saezoo.formats._pickled import read_config, read_pickled, read_state
from saezoo.formats._tensors import expect_facts, expect_sizes, refuse_rest, take, yes_or_no
from saezoo.formats.gemma_scope import prefer

NOT_OURS = ("normalize_activations", "activation_fn_str")
"""Fields that change the arithmetic, of configs by others with the same tensors."""


def read(path: Path, entry: Entry | None) -> Weights:
    """Read one file. W_enc (d_in, d_sae) becomes a view by rows; the rest is as stored.

    Raises UnsafeFile for a pickle that names more than a config class, FormatError where config,
    tensors and registry contradict.
    """
    saved = read_pickled(path)
    raw = read_state(saved, path)
    data = read_config(saved["cfg"], "cfg", path)
    if others := [key for key in NOT_OURS if key in data]:
        raise FormatError(
            f"{path}: its config has {', '.join(others)}, which Dunefsky's code has not; if it is "
            "one of Prisma's, give format='prisma' (--from)"
        )
    tensors = {
        "W_enc_rows": take(raw, "W_enc", path, dims=2).T,
        "b_enc": take(raw, "b_enc", path, dims=1),
        "W_dec": take(raw, "W_dec", path, dims=2),
    }
    d_sae, d_in = tensors["W_enc_rows"].shape
    spec: dict[str, Any] = {"architecture": "relu", "d_in": d_in, "d_sae": d_sae}
    spec |= take_biases(raw, tensors, path)
    refuse_rest(raw, path, "Dunefsky's format")
    transcoder = spec["input_bias"]
    if "is_transcoder" in data and yes_or_no(data, "is_transcoder", path) != transcoder:
        raise FormatError(
            f"{path}: is_transcoder is {not transcoder}, but there is "
            f"{'a' if transcoder else 'no'} b_dec_out"
        )
    expect_sizes(data, {"d_in": d_in, "d_sae": d_sae}, path)
    if transcoder:
        expect_sizes(data, {"d_out": len(tensors["b_dec"])}, path)
    expect_facts(entry, {"d_in": d_in, "d_sae": d_sae}, path)
    spec["site"], spec["out_site"] = _sites(data, entry, transcoder=transcoder)
    return Weights(SAEConfig.from_json(spec, where=str(path)), tensors)


def take_biases(raw: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Move b_dec, and b_dec_out where there is one, to where they are used; returns that part of
    the spec. W_dec is in `tensors`.
    """
    b_dec = take(raw, "b_dec", path, dims=1)
    if "b_dec_out" not in raw:
        tensors["b_dec"] = b_dec
        return {"subtract_b_dec": True, "input_bias": False}
    tensors |= {"b_in": b_dec, "b_dec": take(raw, "b_dec_out", path, dims=1)}
    d_in, d_out = tensors["W_enc_rows"].shape[1], tensors["W_dec"].shape[1]
    return {"input_bias": True, "d_out": d_out if d_out != d_in else None}


def _sites(
    data: dict[str, Any], entry: Entry | None, *, transcoder: bool
) -> tuple[Site | None, Site | None]:
    stated = entry.site if entry is not None else None
    model = data.get("model_name")
    model = stated.model if stated and stated.model else model if isinstance(model, str) else None
    hooks = data.get("hook_point"), data.get("out_hook_point") if transcoder else None
    found = [site_of_hook(hook, model) if isinstance(hook, str) else None for hook in hooks]
    return prefer(stated, found[0]), prefer(entry.out_site if entry else None, found[1])
