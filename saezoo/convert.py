"""Turn any SAE into a folder of another format, and prove that it computes the same."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saezoo.build import Model, build, check_weights
from saezoo.clt_layer import CLTLayer
from saezoo.config import SAEConfig
from saezoo.crosscoder import Crosscoder
from saezoo.errors import CannotConvert
from saezoo.find import find_sae
from saezoo.formats import (
    FAMILIES,
    Weights,
    detect,
    format_module,
    format_of,
    is_read,
    writable_formats,
)
from saezoo.formats._tensors import refuse_not_finite, same_tensors
from saezoo.hub import fetch
from saezoo.load import read_weights
from saezoo.numerics import TOLERANCE, largest_difference
from saezoo.sae import SAE, build_sae
from saezoo.save import new_folder

SEED, TOKENS = 20_240_606, 64
SIZES = (1.0, 10.0, 100.0)
"""Of the activations that a proof compares on, each number on its own scale."""


@dataclass(frozen=True)
class Proof:
    """What was compared after a conversion: features and reconstruction of the source with those
    of the target, on seeded inputs.
    """

    folder: Path
    format: str
    difference: float
    """Largest difference, as a share of the largest output."""
    tolerance: float
    through: str
    """Whose formula computed the target's output."""


def convert_sae(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    to: str = "native",
    *,
    format: str | None = None,  # noqa: A002
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Proof:
    """Read `src` (any name that `load_sae` takes) and write it to the folder `dest` in the format
    `to`.

    The folder appears only when the proof holds: it is reopened, and both compute the same on the
    same seeded inputs. Raises CannotConvert when the target cannot express this SAE, or the proof
    fails; NotFinite for NaN or infinity.
    """
    if to in FAMILIES or not is_read(to) or not format_of(to).writable:
        writable = ", ".join(writable_formats())
        raise CannotConvert(
            f"cannot write the format {to!r}. Formats that can be written: {writable}"
        )
    entry = find_sae(src, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    fetched = fetch(
        entry, format=format, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    weights = read_weights(fetched, entry, keep=False)
    return convert_weights(weights, dest, to, where=entry.name)


def convert_weights(
    weights: Weights, dest: str | os.PathLike[str], to: str, *, where: str = "these weights"
) -> Proof:
    """Write what a reader gave, in the format `to`, which can be written; see `convert_sae`."""
    if to != "native" and not isinstance(weights.cfg, SAEConfig):
        raise CannotConvert(
            f"{where} is {weights.cfg.title}, which the format {to} cannot express: it holds "
            "an SAE of one layer. Only the native format holds it"
        )
    refuse_not_finite(weights.tensors, where)
    check_weights(weights.cfg, weights.tensors, where)
    with new_folder(Path(dest), to) as work:
        format_module(to).write(weights.cfg, dict(weights.tensors), work)
        difference, through = _prove(weights, work, to)
    return Proof(Path(dest), to, difference, TOLERANCE[torch.float32], through)


def _prove(source: Weights, folder: Path, to: str) -> tuple[float, str]:
    """Reopen what was written and compare it with the source: (largest difference, through what).

    Compared are features and reconstruction of the reopened folder, and the reconstruction of the
    target's own formula. Raises CannotConvert above the tolerance. A float32 near-tie of two
    features may be decided otherwise by another memory layout; so a miss is looked at again in
    float64, where such ties are told apart, under the same tolerance.
    """
    if detect(folder) != to:
        raise CannotConvert(
            f"the written folder reads as {detect(folder)}, not {to}: nothing was written"
        )
    module = format_module(to)
    again = module.read(folder, None)
    if not isinstance(source.cfg, SAEConfig):
        return _prove_same(source, again), "the reopened folder"
    assert isinstance(again.cfg, SAEConfig)
    own = getattr(module, "origin_output", None)
    tolerance, difference = TOLERANCE[torch.float32], float("inf")
    for dtype in (torch.float32, torch.float64):
        expected = build_sae(source.cfg, source.tensors, dtype=dtype)
        got = build_sae(again.cfg, again.tensors, dtype=dtype, where=to)
        differences = [0.0]
        for x in proof_inputs(source.cfg.d_in, dtype):
            wanted = expected(x)
            differences += [
                largest_difference(got.encode(x), expected.encode(x)),
                largest_difference(got(x), wanted),
            ]
            if own is not None:
                differences.append(largest_difference(own(folder, x), wanted))
        difference = max(differences)
        if difference <= tolerance:
            break
    else:
        raise CannotConvert(
            f"what {to} computes differs by {difference:.2g}, more than {tolerance:.0g}: "
            "nothing was written"
        )
    return (
        difference,
        f"the reopened folder and {to}'s own formula" if own else "the reopened folder",
    )


def _prove_same(source: Weights, again: Weights) -> float:
    """What spans several layers is only ever rewritten: spec, tensors and outputs must be the same,
    bit for bit. Returns 0. Raises CannotConvert.
    """
    if again.cfg != source.cfg or again.tensors.keys() != source.tensors.keys():
        raise CannotConvert("the reopened folder has another spec or other tensors")
    outputs = [_output(build(weights.cfg, weights.tensors)) for weights in (source, again)]
    difference = largest_difference(outputs[1], outputs[0])
    same = all(same_tensors(source.tensors[name], again.tensors[name]) for name in source.tensors)
    if difference or not same:
        raise CannotConvert(f"the reopened folder differs (outputs by {difference:.2g})")
    return difference


def _output(model: Model) -> Tensor:
    """What a module makes of some seeded activations; of one layer, what it adds to its targets."""
    generator = torch.Generator().manual_seed(SEED)
    assert not isinstance(model, SAE)
    if isinstance(model, CLTLayer):
        return model.decode(model.encode_sparse(torch.randn(4, model.d_in, generator=generator)))
    inputs = model.sources if isinstance(model, Crosscoder) else model.cfg.layers
    return model(torch.randn(4, inputs, model.d_in, generator=generator))


def proof_inputs(d_in: int, dtype: torch.dtype) -> list[Tensor]:
    """Seeded activations (TOKENS, d_in) of several sizes: small ones may turn no feature of an SAE
    with high thresholds on, and large ones hide what biases do.
    """
    generator = torch.Generator().manual_seed(SEED)
    return [(torch.randn(TOKENS, d_in, generator=generator) * size).to(dtype) for size in SIZES]
