"""npz archives from strangers: arrays of floats as numpy reads them, no code run, no memory spent
on lies, each refusal in one line.
"""

import io
import os
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saezoo.errors import FormatError, MissingFile, SaezooError, UnsafeFile
from saezoo.formats._npz import read_npz
from tests.origins.gemma_scope import save_aligned

WEIGHTS = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)


def npy(value, **changes):
    """The bytes of an .npy file; `changes` replace what its header says."""
    out = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(value) | changes
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + value.tobytes()


def packed(path, members, method=zipfile.ZIP_STORED):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of names that are there twice
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in members:
                archive.writestr(name, content)
    return path


def refused(path, error, said, **options):
    with pytest.raises(error) as caught:
        read_npz(path, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, save_aligned])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (1,), (9,), (0, 3), (4, 6), (2, 3, 5)], ids=str)
def test_arrays_are_those_that_numpy_reads(save, order, dtype, shape, tmp_path):
    value = np.array(np.random.default_rng(1).standard_normal(shape), dtype=dtype, order=order)
    save(tmp_path / "a.npz", first=value, second=value + 1)
    got = read_npz(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as expected:
        assert list(got) == expected.files
        for name, tensor in got.items():
            assert torch.equal(tensor, torch.from_numpy(expected[name]))
            assert tensor.data_ptr() % tensor.element_size() == 0
            if tensor.numel() > 1:
                assert tensor.numpy().strides == expected[name].strides


class Bomb:
    """Unpickled by the trusting, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_python_objects_are_refused_and_run_no_code(save, tmp_path):
    save(tmp_path / "a.npz", W_enc=WEIGHTS, W_dec=np.array([Bomb(tmp_path / "run")], dtype=object))
    refused(tmp_path / "a.npz", UnsafeFile, "Python objects")
    assert not (tmp_path / "run").exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as trusting:
        trusting["W_dec"]
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').mkdir('{run}'),)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (35,)}",
        "{'descr': '<f4', 'shape': (35,)}",
        "(" * 4000,
        "",
        "\xff\xfe",
    ],
)
def test_a_header_that_numpy_does_not_write_is_refused(header, tmp_path):
    text = header.replace("{run}", str(tmp_path / "run")).encode("latin-1")
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + WEIGHTS.tobytes()
    refused(packed(tmp_path / "a.npz", [("a.npy", content)]), FormatError, "'a.npy'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (npy(WEIGHTS, shape=(5, 8)), UnsafeFile, "claims 40 numbers"),
        (npy(WEIGHTS, shape=(5, 6)), UnsafeFile, "claims 30 numbers"),
        (npy(WEIGHTS, shape=(10**9, 10**9)), UnsafeFile, "claims"),
        (npy(WEIGHTS, shape=(0, 10**17)), UnsafeFile, "claims 0 numbers"),
        (npy(WEIGHTS, descr="<f8"), UnsafeFile, "of 8 bytes"),
        (npy(WEIGHTS, descr=">f4"), FormatError, ">f4"),
        (npy(WEIGHTS, descr="|V2"), FormatError, "|V2"),
        (npy(WEIGHTS.astype(np.int32)), FormatError, "<i4"),
        (npy(WEIGHTS > 0), FormatError, "|b1"),
        (npy(WEIGHTS.astype(np.complex64)), FormatError, "<c8"),
        (npy(np.array(["word"])), FormatError, "<U4"),
        (npy(np.zeros(3, [("a", "<f4")])), FormatError, "[('a', '<f4')]"),
        (b"", FormatError, "ends within"),
        (b"\x93NUMPY\x01\x00", FormatError, "ends within"),
        (b"\x93NUMPY\x01\x00\x40\x00{'desc", FormatError, "ends within"),
        (b"\x93NUMPY\x09\x00" + bytes(200), FormatError, "formats 1 to 3"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(200), UnsafeFile, "header of 2,147"),
        (b"PK\x03\x04" + bytes(200), FormatError, "formats 1 to 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_lies_or_is_of_no_float_is_refused(method, content, error, said, tmp_path):
    refused(packed(tmp_path / "a.npz", [("a.npy", content)], method), error, said)


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        (["../a.npy"], UnsafeFile, "points out"),
        (["b/../../a.npy"], UnsafeFile, "points out"),
        (["..\\a.npy"], UnsafeFile, "points out"),
        (["/etc/a.npy"], UnsafeFile, "points out"),
        (["a.pkl"], FormatError, "not the name"),
        (["a\nb.npy"], FormatError, "not the name"),
        (["a.npy", "a.npy"], FormatError, "twice"),
        ([], FormatError, "npz"),
        ([f"a{number}.npy" for number in range(300)], FormatError, "300"),
    ],
    ids=str,
)
def test_names_that_no_array_has_are_refused(names, error, said, tmp_path):
    refused(packed(tmp_path / "a.npz", [(name, npy(WEIGHTS)) for name in names]), error, said)


@pytest.mark.parametrize("pieces", [1, 80])
def test_a_deflate_bomb_is_refused_unread(pieces, tmp_path):
    content = npy(np.zeros(80 * 2**18 // pieces, np.float32))
    members = [(f"a{number}.npy", content) for number in range(pieces)]
    path = packed(tmp_path / "a.npz", members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    refused(path, UnsafeFile, "deflates")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("field", [20, 24])  # the size in the archive, and that of the array
@pytest.mark.parametrize("claimed", [0xFFFFFFF0, 10**6, 7])
def test_a_member_that_claims_another_size_than_it_has_is_refused(claimed, field, method, tmp_path):
    path = packed(tmp_path / "a.npz", [("a.npy", npy(WEIGHTS))], method)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"PK\x01\x02") + field
    raw[place : place + 4] = struct.pack("<I", claimed)
    path.write_bytes(bytes(raw))
    refused(path, FormatError, "a.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(method, tmp_path):
    refused(packed(tmp_path / "a.npz", [("a.npy", npy(WEIGHTS))], method), FormatError, "deflated")


def test_what_is_no_zip_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", WEIGHTS)
    refused(tmp_path / "a.npy", FormatError, "not an npz archive")
    np.savez(tmp_path / "a.npz", W_enc=WEIGHTS)
    (tmp_path / "b.npz").write_bytes(b"#!/bin/sh\n" + (tmp_path / "a.npz").read_bytes())
    refused(tmp_path / "b.npz", FormatError, "not an npz archive")
    refused(tmp_path / "a.npz", UnsafeFile, "more than the 100 expected", limit=100)
    refused(tmp_path / "none.npz", MissingFile, "no such file")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.97])
def test_a_file_cut_short_is_not_taken_for_whole(save, keep, tmp_path):
    save(tmp_path / "a.npz", W_enc=WEIGHTS, W_dec=WEIGHTS.T)
    raw = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(raw[: int(len(raw) * keep)])
    refused(tmp_path / "a.npz", FormatError, "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_changed_numbers_that_are_read_are_noticed(save, tmp_path):
    save(tmp_path / "a.npz", W_enc=WEIGHTS)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(bytes(raw))
    refused(tmp_path / "a.npz", FormatError, "a.npz")


def measured(path):
    """What a reader returns, and the most memory that it held in arrays and bytes."""
    tracemalloc.start()
    try:
        return read_npz(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_stored_array_that_lies_aligned_is_mapped_and_never_written_to(tmp_path):
    value = np.random.default_rng(0).standard_normal((1024, 2048), dtype=np.float32)
    save_aligned(tmp_path / "a.npz", W_enc=value)
    before = (tmp_path / "a.npz").read_bytes()
    got, peak = measured(tmp_path / "a.npz")
    assert peak < value.nbytes / 20
    assert torch.equal(got["W_enc"], torch.from_numpy(value))
    got["W_enc"].zero_()
    assert (tmp_path / "a.npz").read_bytes() == before


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_other_array_is_read_straight_into_its_place(save, tmp_path):
    value = np.random.default_rng(0).standard_normal((1024, 4096), dtype=np.float32)
    save(tmp_path / "a.npz", W_enc=value)
    got, peak = measured(tmp_path / "a.npz")
    assert value.nbytes <= peak < value.nbytes * 1.3
    assert torch.equal(got["W_enc"], torch.from_numpy(value))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, save_aligned])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_a_saezoo_error_or_in_tensors(save, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "a.npz"
    save(path, W_enc=WEIGHTS, b_enc=WEIGHTS[0])
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(1, 20))] = data.draw(st.binary(max_size=20))
        if not raw:
            break
    path.write_bytes(bytes(raw))
    said = ""
    try:
        got = read_npz(path)
    except SaezooError as error:
        said = str(error)
    else:
        assert all(value.is_floating_point() for value in got.values())
    assert "\n" not in said
