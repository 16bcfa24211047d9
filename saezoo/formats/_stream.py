"""Write safetensors a few rows at a time, so that no second copy of a tensor is ever in memory.

safetensors' own save_file wants every tensor contiguous, and a transposed view would be copied
whole for that. The file: 8 bytes with the length of a JSON header, the header, the numbers; see
https://github.com/huggingface/safetensors#format.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What safetensors calls the dtypes that an SAE can have."""

BLOCK = 4 * 2**20
"""Bytes of a tensor that are made contiguous at a time."""

ALIGN = 64
"""The numbers start at a multiple of this: the width of a cache line."""


def stream_safetensors(tensors: Mapping[str, Tensor], path: Path) -> int:
    """Write float tensors to a new file, rows in order whatever their strides, and have the disk
    confirm it. Returns the file's size in bytes.

    Raises KeyError for a dtype that is not in NAMES, OSError where it cannot be written.
    """
    # the widest numbers first: so each tensor starts at a multiple of its own width
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    end = 0
    for name in order:
        value = tensors[name]
        start, end = end, end + byte_count(value)
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for block in _blocks(tensors[name].detach()):
                file.write(block.numpy().data)
        file.flush()
        # a rename may reach the disk before the numbers do: after a power cut a file of the right
        # size would hold zeros
        os.fsync(file.fileno())
        return file.tell()


def byte_count(value: Tensor) -> int:
    """Bytes of the numbers that a tensor shows."""
    return value.numel() * value.element_size()


def _blocks(value: Tensor) -> Iterator[Tensor]:
    """A tensor's bytes in row-major order, as flat uint8 tensors of about BLOCK bytes; each is good
    until the next.
    """
    if not value.numel():
        return
    if value.dim() > 1 and not value.is_contiguous() and byte_count(value[0]) > BLOCK:
        for part in value:
            yield from _blocks(part)
        return
    rows = max(1, BLOCK * len(value) // byte_count(value))
    # one for all blocks: memory that is freed and asked for again does not always go back between
    space = None if value.is_contiguous() else torch.empty(value[:rows].shape, dtype=value.dtype)
    for start in range(0, len(value), rows):
        block = value[start : start + rows]
        if space is not None:
            block = space[: len(block)].copy_(block)
        yield block.view(torch.uint8).view(-1)
