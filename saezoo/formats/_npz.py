"""Open a numpy archive (.npz) that a stranger wrote: float arrays only, and never a pickle.

An .npz is a zip of .npy files, each a magic number, a short text header (dtype, order, shape) and
the numbers; see numpy.lib.format. What the zip's central directory and the headers claim is checked
before memory is spent on it.
"""

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from saezoo.errors import FormatError, SaezooError, UnsafeFile
from saezoo.formats._tensors import (
    BIG_ARRAY,
    MAX_BYTES,
    MAX_DEFLATION,
    check_archive,
    first_line,
    is_zip,
    need_file,
)

MAX_MEMBERS = 256
"""Arrays in one archive; an SAE has five."""

MAX_HEADER = 4096
"""Bytes of an array's text header; numpy writes 118."""

CHUNK = 2**18
"""Bytes that are inflated at a time; they stay in the cache of a core."""

HEADER = re.compile(
    r"\{'descr': (?P<descr>.+?), 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,18}, ?){0,8}(?:\d{1,18})?)\),? ?\} *\n?"
)
"""As numpy writes it. Stricter than numpy's own reader, which evaluates the text as Python."""

ALIGN, PADDING = 64, 0xCAFE
"""Where written numbers start, and the tag of the zip field that fills the gap (Java's, which says
nothing).
"""

FLOATS = {"'<f2'": "<f2", "'<f4'": "<f4", "'<f8'": "<f8"}


def read_npz(path: Path, *, limit: int = MAX_BYTES) -> dict[str, Tensor]:
    """All arrays of an .npz file, by their names without `.npy`, as float16, 32 or 64 tensors.

    A stored array that lies aligned in the file is mapped in place, and so not read before it is
    used. Any other (deflated, or not aligned: zip aligns nothing, and torch may crash on such
    addresses, pytorch#191238) is read straight into its array: peak memory is that array.
    Arrays in Fortran order are views of their transpose.

    Raises UnsafeFile for Python objects, '..' in names, claims of more bytes than are there or than
    `limit`, and extreme deflation; FormatError for all else that is not a whole archive of floats.
    """
    need_file(path)
    try:
        if not is_zip(path):
            raise FormatError(f"{path}: not an npz archive; download it again")
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive.infolist())
            check_archive(path, limit)
            return {
                member.filename.removesuffix(".npy"): _read_member(path, archive, member)
                for member in archive.infolist()
            }
    except SaezooError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
        OverflowError,
        LookupError,
    ) as error:
        raise FormatError(
            f"{path}: not a whole npz archive ({first_line(error)}); download it again"
        ) from None


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float tensors as an .npz that numpy reads and `read_npz` maps: stored, and each array's
    numbers at a multiple of ALIGN. 16-bit tensors become float32; numpy has no bfloat16.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, value in tensors.items():
            wide = value.detach().cpu().to(torch.promote_types(value.dtype, torch.float32))
            member = zipfile.ZipInfo(f"{name}.npy")
            assert archive.fp is not None
            # the local header is 30 bytes, the name, 20 more for a large array, and a field of
            # extra bytes that nobody reads; numpy pads its own header, which follows, to 64
            large = wide.numel() * wide.element_size() > 2**30
            start = archive.fp.tell() + 30 + len(member.filename) + 20 * large + 4
            padding = -start % ALIGN
            member.extra = struct.pack("<HH", PADDING, padding) + bytes(padding)
            with archive.open(member, "w", force_zip64=large) as file:
                np.lib.format.write_array(file, wide.contiguous().numpy(), allow_pickle=False)


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuse, by the central directory alone, what no archive of arrays looks like."""
    if not 0 < len(members) <= MAX_MEMBERS:
        raise FormatError(f"{path}: has {len(members):,} arrays, expected 1 to {MAX_MEMBERS}")
    seen = set()
    for member in members:
        where = f"{path}: {member.filename!r}"
        if ".." in re.split(r"[/\\]", member.filename) or member.filename.startswith(("/", "\\")):
            raise UnsafeFile(f"{where} points out of the archive")
        if not re.fullmatch(r"[\w./-]+\.npy", member.filename):
            raise FormatError(f"{where} is not the name of an array")
        if member.filename in seen:
            raise FormatError(f"{where} is there twice")
        seen.add(member.filename)
        if member.flag_bits & 1 or member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise FormatError(f"{where} is encrypted, or neither stored nor deflated")
        if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
            raise UnsafeFile(
                f"{where} claims {member.file_size:,} bytes, but holds {member.compress_size:,}"
            )
    held = path.stat().st_size
    claimed = sum(member.compress_size for member in members)
    if claimed > held:
        raise UnsafeFile(f"{path}: its arrays claim {claimed:,} bytes of a file of {held:,}")
    total = sum(member.file_size for member in members)
    # many small bombs are one large one
    if total > BIG_ARRAY and total > MAX_DEFLATION * held:
        raise UnsafeFile(f"{path}: deflates more than {MAX_DEFLATION} times, to {total:,} bytes")


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    where = f"{path}: {member.filename!r}"
    with archive.open(member) as stream:
        dtype, fortran, shape, start = read_header(stream, where)
        count = math.prod(shape)
        if start + count * dtype.itemsize != member.file_size:
            raise UnsafeFile(
                f"{where} claims {count:,} numbers of {dtype.itemsize} bytes, but holds "
                f"{member.file_size - start:,} bytes"
            )
        offset = find_data(path, member) + start
        stored = member.compress_type == zipfile.ZIP_STORED
        if stored and count and offset % dtype.itemsize == 0:
            # copy on write: as a tensor it may be written to, the file never is
            flat: np.ndarray = np.memmap(path, dtype, "c", offset, (count,))
        else:
            flat = _fill(stream, np.empty(count, dtype), where)
    tensor = torch.from_numpy(flat)
    if not fortran:
        return tensor.view(shape)
    return tensor.view(shape[::-1]).permute(*reversed(range(len(shape))))


def read_header(
    stream: IO[bytes], where: str
) -> tuple["np.dtype[np.floating]", bool, tuple[int, ...], int]:
    """dtype, whether in Fortran order, shape, and where the numbers start."""
    magic = _take(stream, 8, where)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise FormatError(f"{where} is not an array of numpy's formats 1 to 3")
    form = "<H" if magic[6] == 1 else "<I"
    (length,) = struct.unpack(form, _take(stream, struct.calcsize(form), where))
    if length > MAX_HEADER:
        raise UnsafeFile(f"{where} has a header of {length:,} bytes, more than {MAX_HEADER:,}")
    text = _take(stream, length, where).decode("latin-1")
    found = HEADER.fullmatch(text)
    if found is None:
        raise FormatError(f"{where} has a header that numpy does not write: {text[:80]!r}")
    descr = found["descr"]
    if "O" in descr:
        raise UnsafeFile(f"{where} holds Python objects, whose pickle could run code: not read")
    if descr not in FLOATS:
        raise FormatError(
            f"{where} has dtype {descr[:80]}, expected a little-endian float of 2, 4 or 8 bytes"
        )
    shape = tuple(int(size) for size in re.findall(r"\d+", found["shape"]))
    start = 8 + struct.calcsize(form) + length
    return np.dtype(FLOATS[descr]), found["fortran"] == "True", shape, start


def find_data(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes start in the file, past its local header, whose length only it knows.

    The local header itself was checked when the member was opened.
    """
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(30)
        end = file.seek(0, 2)
    name, extra = struct.unpack("<HH", local[26:30])
    start = member.header_offset + 30 + name + extra
    if start + member.compress_size > end:
        raise FormatError(f"{path}: {member.filename!r} ends after the file; download it again")
    return start


def _fill(stream: IO[bytes], flat: np.ndarray, where: str) -> np.ndarray:
    """Read the rest of a member into its array, a chunk at a time; zipfile checks the CRC."""
    room, filled = flat.view(np.uint8), 0
    while chunk := stream.read(min(CHUNK, room.size - filled)):
        room[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    if filled != room.size:
        raise FormatError(f"{where} holds {filled:,} bytes, expected {room.size:,}")
    return flat


def _take(stream: IO[bytes], count: int, where: str) -> bytes:
    value = stream.read(count)
    if len(value) != count:
        raise FormatError(f"{where} ends within its header")
    return value
