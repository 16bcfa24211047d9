"""Encode and decode some features at a time, so that what is in memory at once is a part of the
weights and a tile of tokens, never (tokens, d_sae).

The functions here are given, for some features, the function that computes them from inputs
(tokens, d_in): weights that are kept in another dtype are then converted once a part, not once a
tile. Results are those of one product over all features; only the last bits of a sum may differ, as
they do between any two shapes of a product. Among equal numbers the lower index wins, however the
features are parted.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saezoo.sparse import GROUP, SparseFeatures, decode_dense, pack_places, top_k

NUMBERS = 2**25
"""Weights of a part: 128 MB of float32. A tile of pre-activations is a quarter of that at most,
since deciding which are on takes a few of its size.
"""

ACCELERATED = 8
"""How many times as much is taken at once where memory is an accelerator's, whose products want it.
"""

Features = Callable[[slice], Callable[[Tensor], Tensor]]
"""Some features -> what makes (tokens, n) of inputs (tokens, d_in)."""

Scores = Callable[[slice], Callable[[Tensor], tuple[Tensor, Tensor]]]
"""Some features -> what makes (tokens, n) to choose by, and (tokens, n) to give, of inputs."""


class Parts(NamedTuple):
    """How a call is cut: each part of the features with each tile of the tokens."""

    features: list[slice]
    tokens: list[slice]

    @property
    def one(self) -> bool:
        """Whether nothing is cut."""
        return len(self.features) == len(self.tokens) == 1


def whole(tokens: int, d_sae: int) -> Parts:
    """Everything at once: gradients go through it."""
    return Parts([slice(0, d_sae)], [slice(0, tokens)])


def cut(tokens: int, d_sae: int, width: int, group: int = 1, times: int = 1) -> Parts:
    """Parts of at most `times` NUMBERS weights, `width` a feature; with groups of features, of
    whole ones, or each within one.
    """
    numbers = NUMBERS * times
    most = max(1, numbers // width)
    span = group if group > most else d_sae
    unit = group if 1 < group <= most else GROUP
    size = min(span, max(most // unit * unit, min(unit, most)))
    features = [
        slice(at, min(at + size, start + span))
        for start in range(0, d_sae, span)
        for at in range(start, start + span, size)
    ]
    tile = max(1, numbers // 4 // size)
    return Parts(features, [slice(at, at + tile) for at in range(0, max(tokens, 1), tile)])


def choose_top_k(scores: Scores, z: Tensor, parts: Parts, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices (tokens, k) of the k features with the largest keys, largest key first."""
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in parts.features:
        score = scores(part)
        for number, rows in enumerate(parts.tokens):
            keys, values = score(z[rows])
            index = top_k(keys.detach(), min(k, keys.shape[-1]))
            found = (keys.detach().gather(-1, index), values.gather(-1, index), index + part.start)
            if number == len(held):
                held.append(found)
            else:
                held[number] = _best(held[number], found, k)
            del keys, values
    _, values, indices = (torch.cat(column) for column in zip(*held, strict=True))
    return values, indices


def _best(
    first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of two lists of (keys, values, indices), the first of lower indices. Each has its
    equal keys by index, so a stable sort keeps them so.
    """
    keys, values, indices = (torch.cat(pair, -1) for pair in zip(first, second, strict=True))
    keys, order = keys.sort(dim=-1, descending=True, stable=True)
    order = order[..., :k]
    return keys[..., :k], values.gather(-1, order), indices.gather(-1, order)


def choose_group_max(
    scores: Scores, z: Tensor, parts: Parts, d_sae: int, k: int
) -> tuple[Tensor, Tensor]:
    """Values and indices (tokens, k) of the largest of each of k groups."""
    group = d_sae // k
    best: Tensor | None = None
    for part in parts.features:
        score = scores(part)
        groups = slice(part.start // group, (part.stop - 1) // group + 1)
        for rows in parts.tokens:
            _, values = score(z[rows])
            inside = min(group, values.shape[-1])
            values, index = values.unflatten(-1, (-1, inside)).max(-1)
            first = torch.arange(index.shape[-1], device=z.device) * inside + part.start
            index = index + first
            if best is None:
                best = values.new_full((len(z), k), -torch.inf)
                indices = index.new_zeros(len(z), k)
            larger = ~(values <= best[rows, groups])  # NaN too, as torch.max has it
            best[rows, groups] = torch.where(larger, values, best[rows, groups])
            indices[rows, groups] = torch.where(larger, index, indices[rows, groups])
    assert best is not None
    return best, indices


def choose_of_all(
    scores: Scores, z: Tensor, parts: Parts, d_sae: int, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` largest positive numbers of all of (tokens, d_sae) together. Returns (values,
    places), the places counted through the whole row by row, ascending.

    Among equal numbers the first places win. NaN counts as largest, as in torch.topk. Memory: a
    tile, and what is kept of all.
    """
    values, places = torch.empty(0), torch.empty(0, dtype=torch.int64)
    floor = 0.0
    for part in parts.features:
        score = scores(part)
        for rows in parts.tokens:
            _, tile = score(z[rows])
            row, column = _candidates(tile.detach(), floor, count)
            values = torch.cat([values.to(tile), tile[row, column]])
            found = (row + rows.start) * d_sae + column + part.start
            places = torch.cat([places.to(found), found])
            if len(values) >= count > 0:
                values, places = _largest(values, places, count)
                floor = float(values.detach().min())
            del tile
    places, order = places.sort()
    return values[order], places


def _candidates(keys: Tensor, floor: float, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the positive keys of a tile that may be among the `count` largest: none
    below the floor. Equal ones are all kept, since places decide between them.
    """
    above = ~((keys <= 0) | (keys < floor))
    if int(above.count_nonzero()) > count > 0:
        above &= ~(keys < keys.flatten().topk(count, sorted=False).values.min())
    row, column = above.nonzero(as_tuple=True)
    return row, column


def _largest(values: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values with their places, of equal ones the first places."""
    places, order = places.sort()
    values = values[order]
    best = values.detach().argsort(descending=True, stable=True)[:count]
    return values[best], places[best]


def pack_parts(features: Features, z: Tensor, parts: Parts, shape: torch.Size) -> SparseFeatures:
    """Every active feature, of (…, d_sae) that is never made."""
    found: list[tuple[Tensor, Tensor]] = []
    d_sae = shape[-1]
    for part, rows, dense in _tiles(features, z, parts):
        row, column = dense.nonzero(as_tuple=True)
        found.append((dense[row, column], (row + rows.start) * d_sae + column + part.start))
        del dense
    values, places = (torch.cat(column) for column in zip(*found, strict=True))
    if len(parts.features) > 1:
        places, order = places.sort()
        values = values[order]
    return pack_places(values, places, shape)


def fill_parts(features: Features, z: Tensor, parts: Parts, out: Tensor) -> Tensor:
    """Dense features, written into out (tokens, d_sae)."""
    for part, rows, dense in _tiles(features, z, parts):
        out[rows, part] = dense
    return out


def decode_parts(
    features: Features,
    decoder: Callable[[slice], Tensor],
    z: Tensor,
    parts: Parts,
    out: Tensor,
) -> Tensor:
    """Features times decoder rows, added to out (tokens, d_out)."""
    last, rows_of = None, None
    for part, rows, dense in _tiles(features, z, parts):
        if part is not last:
            rows_of = None  # freed before the next is made
            last, rows_of = part, decoder(part)
        assert rows_of is not None
        out[rows] += decode_dense(dense, rows_of)
    return out


def _tiles(features: Features, z: Tensor, parts: Parts) -> Iterator[tuple[slice, slice, Tensor]]:
    for part in parts.features:
        compute = features(part)
        for rows in parts.tokens:
            yield part, rows, compute(z[rows])


def decode_kept(features: Tensor | SparseFeatures, W_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """Features (…, d_sae) times a decoder that is kept in another dtype than `dtype`, of which some
    rows are converted at a time: of sparse features those in use.
    """
    d_sae, d_out = W_dec.shape
    if isinstance(features, SparseFeatures):
        return _decode_used(features, W_dec, dtype)
    flat = features.reshape(-1, d_sae)
    out = torch.zeros(len(flat), d_out, dtype=dtype, device=W_dec.device)
    for part in cut(1, d_sae, d_out).features:
        out = out + decode_dense(flat[:, part], W_dec[part].to(dtype))
    return out.reshape(*features.shape[:-1], d_out)


def _decode_used(features: SparseFeatures, W_dec: Tensor, dtype: torch.dtype) -> Tensor:
    k_max, d_out = features.values.shape[-1], W_dec.shape[1]
    values, indices = features.values.reshape(-1, k_max), features.indices.reshape(-1, k_max)
    lead = features.values.shape[:-1]
    if not k_max or not len(values):
        return values.new_zeros(*lead, d_out, dtype=dtype)
    tile = max(1, NUMBERS // (k_max * d_out))
    parts = []
    for some, index in zip(values.split(tile), indices.split(tile), strict=True):
        used, place = index.unique(return_inverse=True)
        rows = W_dec[used].to(dtype)
        weights = some.to(dtype)
        parts.append(F.embedding_bag(place, rows, mode="sum", per_sample_weights=weights))
    return torch.cat(parts).reshape(*lead, d_out)


def row_norms(rows: Tensor, dtype: torch.dtype, through: torch.dtype | None = None) -> Tensor:
    """Euclidean norm of each row, computed in `dtype`, some rows at a time where they are kept in
    another. through: a dtype that they are rounded to before.
    """
    through = through or rows.dtype
    if rows.dtype == dtype == through:
        return rows.norm(dim=1)
    parts = cut(1, *rows.shape).features
    return torch.cat([rows[part].to(through).to(dtype).norm(dim=1) for part in parts])
