"""Goodfire's tied BatchTopK SAEs: of Evo 2 (`sae-layer26-mixed-expansion_8-k_64.pt`), DeepSeek-R1.

Arithmetic, from BatchTopKTiedSAE in Evo 2's notebook sparse_autoencoder.ipynb and in Goodfire's
r1-interpretability (sae.py):
    p = ReLU(x W + b_enc), and b_dec is not subtracted from x
    f = the k * tokens largest of all of p, whatever token they are of; else 0
    y = f W^T + b_dec
So what is on for a token depends on those that are encoded with it: architecture tensor_topk. Their
option to break ties by feature number is off unless asked for. k is not in the file: it is that of
a file name as above, or the registry's; where both say it they must agree. W is stored once, and
here too it is one parameter. The `_orig_mod.` of torch.compile is taken off the names. Of
DeepSeek-R1 this is the `math` SAE (k 128); the `general` one wants activations times 13.08 besides,
which is in their code alone.
"""

import re
from pathlib import Path
from typing import Any

from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError
from saezoo.formats import Weights
from saezoo.formats._tensors import expect_facts, plain_name, read_state_dict, refuse_rest, take

NAME = re.compile(r"sae-layer\d+-\w+-expansion_\d+-k_(?P<k>\d{1,6})\.pth?")


def read(path: Path, entry: Entry | None) -> Weights:
    """Read one file. Raises FormatError where nothing says k, for missing, unknown and misshapen
    tensors, and where the registry states other sizes.
    """
    raw = {plain_name(str(name)): value for name, value in read_state_dict(path).items()}
    return tied(raw, path, entry)


def tied(raw: dict[str, Any], path: Path, entry: Entry | None) -> Weights:
    """The SAE of W (d_in, d_sae), b_enc and b_dec."""
    rows = take(raw, "W", path, dims=2).T
    tensors = {
        "W_enc_rows": rows,
        "b_enc": take(raw, "b_enc", path, dims=1),
        "W_dec": rows,
        "b_dec": take(raw, "b_dec", path, dims=1),
    }
    refuse_rest(raw, path, "Goodfire's tied SAE")
    d_sae, d_in = rows.shape
    found: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "k": _k(path, entry)}
    expect_facts(entry, found, path)
    spec = {"architecture": "tensor_topk", **found}
    return Weights(SAEConfig.from_json(spec, where=str(path)), tensors)


def _k(path: Path, entry: Entry | None) -> int:
    named = NAME.fullmatch(path.name)
    if named is not None:
        return int(named["k"])
    if entry is None or entry.k is None:
        raise FormatError(
            f"{path}: k is not in the file, nor in its name: load it by its name in the registry"
        )
    return entry.k
