"""Ways in which a checkpoint may be broken, and what a reader must then do. Each is a function of
what its authors would have written; the counts are those of tests/test_fuzz_formats.py.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from saezoo.formats import split_part

EXAMPLES = 200
"""Broken checkpoints of each format that are looked at in every run of the tests."""

EXAMPLES_OF_SEVERAL = 40
"""The same of each kind of what spans several layers or models (tests/test_multi_hostile.py)."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Broken:
    """A checkpoint on disk, and the tensors that the authors' formula is held to."""

    path: Path
    tensors: Tensors


def renamed(origin, folder, tensors, random):
    """a tensor has another name"""
    name = random.choice(sorted(tensors))
    others = {key: value for key, value in tensors.items() if key != name}
    return write(origin, folder, others | {random.choice([f"{name}s", "x"]): tensors[name]})


def left_out(origin, folder, tensors, random):
    """a tensor is not there"""
    name = random.choice(sorted(tensors))
    return write(origin, folder, {key: value for key, value in tensors.items() if key != name})


def added(origin, folder, tensors, random):
    """a tensor more than there should be"""
    shape = [random.randint(0, 24) for _ in range(random.randint(0, 3))]
    return write(origin, folder, tensors | {"one_more": torch.ones(shape)})


def retyped(origin, folder, tensors, random):
    """a tensor of another dtype"""
    name = random.choice(sorted(tensors))
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    return write(origin, folder, tensors | {name: tensors[name].to(random.choice(dtypes))})


def reshaped(origin, folder, tensors, random):
    """a tensor of another shape"""
    name = random.choice(sorted(tensors))
    value = tensors[name]
    shapes = [value.unsqueeze(0), value.reshape(-1), value.reshape(-1)[:1], value.reshape(-1)[:0]]
    if value.dim():
        shapes += [value[:-1], torch.cat([value, value[:1]]), value.unsqueeze(-1)]
    if value.dim() > 1:
        shapes += [value.mT.contiguous(), value[..., :-1].contiguous(), value[0]]
    return write(origin, folder, tensors | {name: random.choice(shapes).clone()})


def not_finite(origin, folder, tensors, random):
    """a tensor with NaN or infinity in it"""
    floats = sorted(key for key, value in tensors.items() if value.is_floating_point())
    name = random.choice(floats)
    value = tensors[name].clone()
    flat = value.reshape(-1)
    flat[random.randrange(len(flat))] = random.choice([math.nan, math.inf, -math.inf])
    return write(origin, folder, tensors | {name: flat.reshape(value.shape)})


def cut_short(origin, folder, tensors, random):
    """a file that ends too soon"""
    broken = write(origin, folder, tensors)
    file = random.choice(files(broken.path))
    raw = file.read_bytes()
    file.write_bytes(raw[: random.randrange(len(raw))])
    return broken


def scribbled(origin, folder, tensors, random):
    """a file with some bytes replaced in its first kilobyte, where its headers are"""
    broken = write(origin, folder, tensors)
    file = random.choice(files(broken.path))
    raw = bytearray(file.read_bytes())
    for _ in range(random.randint(1, 4)):
        raw[random.randrange(min(len(raw), 1024))] = random.randrange(256)
    file.write_bytes(bytes(raw))
    return broken


def misconfigured(origin, folder, tensors, random):
    """a config with a value that it cannot have"""
    broken = write(origin, folder, tensors)
    configs = [file for file in files(broken.path) if file.suffix in READ]
    if not configs:
        return cut_short(origin, folder / "again", tensors, random)
    file = random.choice(configs)
    load, dump = READ[file.suffix]
    data = load(file.read_text())
    at, key = random.choice(list(leaves(data)) or [({}, "")])
    junk = ["junk", [], ["junk"], {"junk": 1}, {}]
    if isinstance(at.get(key) if isinstance(at, dict) else at[key], int):
        junk = [*junk, -7, 1.5, 10**30] if not isinstance(at[key], bool) else [*junk, 3, -1.5]
    at[key] = random.choice(junk)
    file.write_text(dump(data))
    return broken


DAMAGES = (
    renamed,
    left_out,
    added,
    retyped,
    reshaped,
    not_finite,
    cut_short,
    scribbled,
    misconfigured,
)


def write(origin, folder: Path, tensors: Tensors) -> Broken:
    """As the authors would, had they had these tensors."""
    return Broken(origin.write(folder, dict(tensors)), tensors)


def files(path: Path) -> list[Path]:
    """What can be broken of a checkpoint: the file, or all of its folder."""
    path, _ = split_part(path)
    found = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    return [file for file in found if file.stat().st_size]


def leaves(data):
    """(container, key) of every value in nested JSON that is not a container with something in
    it.
    """
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from leaves(value)
        else:
            yield data, key


def _yaml():
    import yaml

    return (yaml.safe_load, yaml.safe_dump)


READ = {
    ".json": (json.loads, json.dumps),
    ".yaml": (lambda text: _yaml()[0](text), lambda data: _yaml()[1](data)),
    ".yml": (lambda text: _yaml()[0](text), lambda data: _yaml()[1](data)),
}


def random_of(seed: int) -> Random:
    """The choices of one example."""
    return Random(seed)
