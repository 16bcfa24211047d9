"""OpenMOSS Llama Scope R1 Distill: `config.json` and `sae_weights.safetensors`.

The arithmetic is that of llamascopium.py, by the code of early 2025 (Language-Model-SAEs, February
to April 2025, src/lm_saes/sae.py): tensors encoder.* and decoder.*, log_jumprelu_threshold, and
b_dec may be subtracted after the scaling (apply_decoder_bias_to_pre_encoder, false unless said):
    z = s x, or s x - b_dec
    p = z W^T + b_enc, f = p where p |D| > exp(log_jumprelu_threshold), y = (f D^T + b_dec) / s
dataset_average_activation_norm.<hook> is in some files; the registry has s as norm_scaling_factor,
and where both are there they must agree. SAELens leaves |D| out of the comparison, which is right
only for decoders of unit norm. topk and batchtopk of that code kept negative pre-activations of
tokens with too few positive ones: they are refused.
"""

from pathlib import Path

from saezoo.entry import Entry
from saezoo.formats import Weights
from saezoo.formats.llamascopium import ACTIVATIONS, read_named

NAMES = {
    "encoder.weight": "W_enc_rows",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec.T",
    "decoder.bias": "b_dec",
}


def read(path: Path, entry: Entry | None) -> Weights:
    """Read a folder of Llama Scope R1 Distill. Raises FormatError as llamascopium's `read` does."""
    activations = {name: ACTIVATIONS[name] for name in ("jumprelu", "relu")}
    return read_named(path, entry, NAMES, activations)
