"""What is known of each feature over many tokens: `stats.safetensors` beside an SAE's weights."""

from pathlib import Path

from torch import Tensor

from saezoo.errors import DataError, MissingFile
from saezoo.formats._tensors import read_safetensors
from saezoo.sae import SAE

STATS = "stats.safetensors"


def feature_stats(sae: SAE) -> dict[str, Tensor]:
    """`density` (share of tokens on which a feature is on) and `max_activation` (raw units of the
    features), both (d_sae,) float32, as far as the file has them.

    Raises MissingFile where there is no such file, saying how to come by one, and DataError for one
    that is not of this SAE.
    """
    if sae.folder is None:
        raise MissingFile(
            f"this SAE was made in memory, so there is no {STATS} of it: load it by name or folder"
        )
    path = Path(sae.folder) / STATS
    if not path.is_file():
        raise MissingFile(
            f"{sae.folder}: no {STATS}; `saezoo download NAME` fetches the one that its publisher "
            "has, and SAEs that saezoo trained have one"
        )
    return stats_of(path, sae.d_sae)


def stats_of(path: Path, d_sae: int) -> dict[str, Tensor]:
    """What a file of stats holds, each (d_sae,). Raises DataError for one of another SAE."""
    # two columns of float64 at most, and the header
    stats = read_safetensors(path, limit=64 * d_sae + 2**16)
    for name, value in stats.items():
        if tuple(value.shape) != (d_sae,):
            raise DataError(f"{path}: {name} is {tuple(value.shape)}, expected ({d_sae},)")
    return stats
