"""Goodfire's and qresearch's SAEs: one `.pt` or `.pth`, no config file.

Arithmetic, from the code in the model cards, for both namings:
    f = ReLU(x W^T + b_enc), y = f D^T + b_dec, and b_dec is not subtracted from x
Goodfire calls them encoder_linear.* and decoder_linear.*, qresearch encoder.* and decoder.*: the
file decides. A file with one tied matrix W is one of Goodfire's BatchTopK SAEs (DeepSeek-R1), which
evo2.py reads. Sizes are the tensors'; where in a model it belongs is only in the registry.
"""

from pathlib import Path

from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.formats import Weights, evo2
from saezoo.formats._tensors import expect_facts, plain_name, read_state_dict, refuse_rest, take

NAMINGS = {
    "Goodfire's format": ("encoder_linear", "decoder_linear"),
    "qresearch's format": ("encoder", "decoder"),
}


def read(path: Path, entry: Entry | None) -> Weights:
    """Read one file. Raises FormatError for missing, unknown and misshapen tensors, and where the
    registry states other sizes.
    """
    raw = {plain_name(str(name)): value for name, value in read_state_dict(path).items()}
    if "W" in raw:
        return evo2.tied(raw, path, entry)
    fitting = [title for title, (encoder, _) in NAMINGS.items() if f"{encoder}.weight" in raw]
    title = fitting[0] if fitting else next(iter(NAMINGS))
    encoder, decoder = NAMINGS[title]
    tensors = {
        "W_enc_rows": take(raw, f"{encoder}.weight", path, dims=2),
        "b_enc": take(raw, f"{encoder}.bias", path, dims=1),
        "W_dec": take(raw, f"{decoder}.weight", path, dims=2).T,
        "b_dec": take(raw, f"{decoder}.bias", path, dims=1),
    }
    refuse_rest(raw, path, title)
    d_sae, d_in = tensors["W_enc_rows"].shape
    found = {"d_in": d_in, "d_sae": d_sae}
    expect_facts(entry, found, path)
    return Weights(SAEConfig.from_json({"architecture": "relu", **found}, str(path)), tensors)
