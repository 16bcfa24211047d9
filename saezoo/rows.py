"""What modules of several layers or models share: encoders computed some features at a time, and
decoders of which only the rows in use are ever read.

Shapes: N tokens, n features, T targets of a feature (layers or models), d_out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saezoo.errors import FormatError, InputError
from saezoo.sparse import SparseFeatures

CHUNK = 2**25
"""Numbers that are worked on at a time: 128 MB of float32."""


def step_for(width: int) -> int:
    """How many rows of `width` numbers are worked on at a time: at least one."""
    return max(1, CHUNK // width)


@dataclass(frozen=True)
class Active:
    """Which feature is on for which token: three flat tensors."""

    tokens: Tensor
    features: Tensor
    values: Tensor


class Decoder:
    """Decoder rows (n, T, d_out) that stay where they are, such as in a mapped file; those of the
    features in use are read, and no others.

    parts: one tensor (n, T, d_out), or T tensors (n, d_out).
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        first = self.parts[0]
        self.whole = first.dim() == 3
        targets = first.shape[1] if self.whole else len(self.parts)
        self.shape = (first.shape[0], targets, first.shape[-1])
        self.dtype = first.dtype

    def take(self, features: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows (len(features), T, d_out) of these features, in `dtype` on `device`."""
        where = features.to(self.parts[0].device)
        if self.whole:
            return self.parts[0][where].to(device=device, dtype=dtype)
        return torch.stack([part[where].to(device=device, dtype=dtype) for part in self.parts], 1)

    def of_target(self, place: int) -> "Decoder":
        """The rows of one target only, (n, 1, d_out)."""
        if self.whole:
            return Decoder([self.parts[0][:, place : place + 1]])
        return Decoder([self.parts[place]])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first feature, rows (…, T, d_out)) of all features, CHUNK numbers at a time."""
        n, targets, d_out = self.shape
        step = step_for(targets * d_out)
        for start in range(0, n, step):
            parts = [part[start : start + step] for part in self.parts]
            yield start, parts[0] if self.whole else torch.stack(parts, 1)

    def norms(self, dtype: torch.dtype) -> Tensor:
        """The norm of each feature's decoder to each target, (n, T). Reads everything once."""
        found = [rows.to(dtype).norm(dim=-1) for _, rows in self.blocks()]
        return torch.cat(found)


class RowModule(nn.Module):
    """A frozen module with encoder matrices among its parameters and a Decoder beside them.

    `dtype` is what the products are computed in. Encoders on a CPU keep the dtype of their file and
    are cast some rows at a time; biases and thresholds never go below float32. Decoders are no
    parameters: they stay in their file whatever `.to(…)` does, and rows are sent when used.
    """

    matrices: tuple[str, ...] = ("W_enc_rows",)
    """Names of the parameters that may have 16 bits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    @property
    def small_dtype(self) -> torch.dtype:
        """Of biases, thresholds and sums: at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def keep(self, **tensors: Tensor) -> None:
        """Register tensors as frozen parameters."""
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowModule":
        """`.to`, `.bfloat16` …: encoders follow, what is small never goes below float32."""
        own = dict(self.named_parameters(recurse=False))
        before = {name: value.data for name, value in own.items()}
        super()._apply(fn, recurse)
        for name, value in own.items():
            if name in self.matrices and value.dtype != before[name].dtype:
                self.dtype = value.dtype
            elif name not in self.matrices and value.dtype.itemsize < 4:
                value.data = before[name].to(device=value.device)
        return self


def compute_dtype(
    stored: torch.dtype, device: torch.device, wanted: torch.dtype | None
) -> torch.dtype:
    """The dtype of the products: what is wanted, else the stored one, but float32 for 16-bit
    weights on a CPU, whose 16-bit products are slow.
    """
    short = device.type == "cpu" and stored.itemsize < 4
    return wanted or (torch.float32 if short else stored)


def check_activations(x: object, tail: tuple[int, ...], words: str, device: torch.device) -> None:
    """Raise InputError unless x is a float tensor (…, *tail) on `device`. words: what that is."""
    shown = f"(…, {', '.join(map(str, tail))})"
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor {shown}: {words}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise InputError(f"expected a float dtype {shown}: {words}, got {x.dtype}")
    if x.shape[-len(tail) :] != tail:
        raise InputError(f"expected {shown}: {words}, got {tuple(x.shape)}")
    if x.device != device:
        raise InputError(f"the weights are on {device}, this is on {x.device}: use .to(…)")


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raise FormatError unless the tensors have these names and shapes, and a float dtype."""
    if missing := [name for name in shapes if name not in tensors]:
        raise FormatError(f"{where} needs {_some(missing)}, which the files do not have")
    if unknown := [name for name in tensors if name not in shapes]:
        raise FormatError(f"{where} has no {_some(unknown)}, which the files have")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise FormatError(f"{where}: {name} is {tuple(tensors[name].shape)}, expected {shape}")
        if not tensors[name].is_floating_point():
            raise FormatError(f"{where}: {name} is {tensors[name].dtype}, expected a float dtype")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def active_of(features: Tensor | SparseFeatures) -> Active:
    """What is on in features (…, n), dense or sparse, the tokens numbered in order."""
    if isinstance(features, SparseFeatures):
        # not -1: a size of 0 leaves it open
        flat = features.values.shape[:-1].numel(), features.values.shape[-1]
        values, indices = features.values.reshape(flat), features.indices.reshape(flat)
        tokens, slots = values.nonzero(as_tuple=True)
        return Active(tokens, indices[tokens, slots], values[tokens, slots])
    dense = features.reshape(-1, features.shape[-1])
    tokens, columns = dense.nonzero(as_tuple=True)
    return Active(tokens, columns, dense[tokens, columns])


def active_in_pieces(
    x: Tensor, width: int, features: Callable[[Tensor], Tensor], each: int = 1
) -> Active:
    """What is on in features(x), some tokens of x at a time, so that no more than CHUNK dense
    features are in memory. width: features of a token; each: rows of features of a token.
    """
    step = step_for(width)
    found = [active_of(features(part)) for part in x.split(step)]
    return join_active(
        [
            Active(here.tokens + place * step * each, here.features, here.values)
            for place, here in enumerate(found)
        ]
    )


def join_active(parts: Sequence[Active]) -> Active:
    """Several as one, in order."""
    return Active(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.features for part in parts]),
        torch.cat([part.values for part in parts]),
    )


def pack(active: Active, lead: torch.Size, d_sae: int) -> SparseFeatures:
    """SparseFeatures (…, k_max) of what is on, strongest first, none left out; lead: the … ."""
    count = lead.numel()
    order = active.values.abs().argsort(descending=True, stable=True)
    order = order[active.tokens[order].argsort(stable=True)]
    tokens, columns, values = active.tokens[order], active.features[order], active.values[order]
    counts = torch.bincount(tokens, minlength=count)
    k_max = int(counts.max()) if count else 0
    slots = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[tokens]
    made = values.new_zeros(count, k_max).index_put((tokens, slots), values)
    where = columns.new_zeros(count, k_max).index_put((tokens, slots), columns)
    return SparseFeatures(
        made.reshape(*lead, k_max), where.reshape(*lead, k_max), counts.reshape(lead), d_sae
    )


def sum_rows(
    active: Active, count: int, decoder: Decoder, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What active features add to each of `count` tokens, (count, T, d_out): values times decoder
    rows, summed in at least float32.

    Each row in use is read once, and CHUNK numbers of them are in memory at a time.
    """
    _, targets, d_out = decoder.shape
    wide = torch.promote_types(dtype, torch.float32)
    order = active.tokens.argsort(stable=True)
    tokens, values = active.tokens[order], active.values[order].to(wide)
    used, place = active.features[order].unique(return_inverse=True)
    out = torch.zeros(count, targets * d_out, dtype=wide, device=device)
    step = step_for(targets * d_out)
    for start in range(0, len(used), step):
        rows = decoder.take(used[start : start + step], dtype, device).to(wide).flatten(1)
        inside = (place >= start) & (place < start + step)
        counts = torch.bincount(tokens[inside], minlength=count)
        out = out + F.embedding_bag(
            place[inside] - start,
            rows,
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=values[inside],
        )
    return out.unflatten(1, (targets, d_out))
