"""What had to be unpacked is unpacked once: the next load maps it, and never gives old numbers."""

import ast
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saezoo import kept
from saezoo.entry import Entry
from saezoo.errors import ConfigError
from saezoo.formats import _stream, gemma_scope, openai
from saezoo.https import cache_place
from saezoo.hub import fetch
from saezoo.load import load_sae, read_weights
from saezoo.save import save_sae
from saezoo.transfer import write_marker
from tests.origins.gemma_scope import save_aligned

D, N = 64, 4096
"""1 MB a matrix: as little as is worth keeping."""

URL = "https://example.org/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz"
LEGACY = "https://example.org/gpt2/8.pt"


def arrays(seed=0):
    """A Gemma Scope SAE that deflates well."""
    draw = np.random.default_rng(seed)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": N, "b_dec": D, "threshold": N}
    return {key: draw.integers(-9, 9, shape).astype("f4") / 8 for key, shape in shapes.items()}


def pickled(path, seed=0, **options):
    """An OpenAI SAE, whose decoder is stored the other way round."""
    a = {key: torch.from_numpy(value) for key, value in arrays(seed).items()}
    state = {"pre_bias": a["b_dec"], "latent_bias": a["b_enc"], "activation": "ReLU"}
    state |= {"encoder.weight": a["W_dec"], "decoder.weight": a["W_enc"]}
    torch.save(state, path, **options)


def small(path):
    a = arrays()
    a = {"W_enc": a["W_enc"][:, :8], "W_dec": a["W_dec"][:8], "b_dec": a["b_dec"]} | {
        key: a[key][:8] for key in ("b_enc", "threshold")
    }
    np.savez_compressed(path, **a)


def put(cache, write, url=URL):
    """A file in the cache as a fetch from `url` would leave it."""
    path, marker = cache_place(url, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    write_marker(marker, path, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def deflated(seed=0):
    return lambda path: np.savez_compressed(path, **arrays(seed))


def folders(cache):
    root = cache / "kept"
    return sorted(root.iterdir()) if root.is_dir() else []


def load(url=URL):
    return load_sae(url, local_files_only=True)


def same(sae, seed=0):
    """Whether an SAE has exactly the numbers of the arrays."""
    return all(
        np.array_equal(getattr(sae, key).numpy(), value) for key, value in arrays(seed).items()
    )


@pytest.fixture
def reads(monkeypatch):
    """The files that were really unpacked."""
    seen = []
    for module, name in ((gemma_scope, "read_npz"), (openai, "read_pickle")):
        real = getattr(module, name)

        def spy(path, *words, real=real, **options):
            seen.append(path)
            return real(path, *words, **options)

        monkeypatch.setattr(module, name, spy)
    return seen


def test_the_second_load_unpacks_nothing_and_has_the_same_numbers_bit_for_bit(
    cache, reads, monkeypatch
):
    file = put(cache, deflated())
    first, second = load(), load()
    assert reads == [file]
    monkeypatch.setenv("SAEZOO_KEPT_GB", "0")
    without = load()
    assert reads == [file, file]
    for sae in (first, second, without):
        assert same(sae)
        assert sae.cfg == without.cfg
    assert without.cfg.site.layer == 20
    # both of the mapped ones lie in rows, so that even the order of sums is the same
    x = torch.randn(7, D)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first.encode(x), second.encode(x))


@pytest.mark.parametrize(
    ("write", "url"),
    [
        (deflated(), URL),
        (lambda path: np.savez(path, **arrays()), URL),
        (lambda path: pickled(path, _use_new_zipfile_serialization=False), LEGACY),
    ],
    ids=["deflated npz", "stored npz, not aligned", "pickle of before torch 1.6"],
)
def test_what_cannot_be_mapped_is_kept_in_rows(write, url, cache, reads):
    put(cache, write, url)
    first, second = load(url), load(url)
    assert len(reads) == 1
    assert len(folders(cache)) == 1
    for name, value in first.named_parameters():
        assert torch.equal(value, second.get_parameter(name))
        assert value.is_contiguous()


@pytest.mark.parametrize(
    ("write", "url"),
    [
        (lambda path: save_aligned(path, **arrays()), URL),
        (pickled, LEGACY),
        (small, URL),
    ],
    ids=["stored npz, aligned", "pickle of today", "a few kB"],
)
def test_what_is_mapped_or_small_is_not_kept(write, url, cache, reads):
    put(cache, write, url)
    load(url)
    load(url)
    assert len(reads) == 2
    assert folders(cache) == []


def test_a_local_file_is_not_kept(cache, tmp_path, reads):
    np.savez_compressed(tmp_path / "params.npz", **arrays())
    for _ in range(2):
        assert same(load_sae(tmp_path / "params.npz"))
    assert len(reads) == 2
    assert folders(cache) == []


def test_a_file_that_nobody_has_checked_is_not_kept(cache, reads):
    file = put(cache, deflated())
    fetched = fetch(Entry(source=URL), local_files_only=True)
    shutil.rmtree(cache / "checked")
    read_weights(fetched, None)
    assert reads == [file]
    assert folders(cache) == []


def test_a_file_with_other_contents_is_never_served_from_what_was_kept(cache):
    file = put(cache, deflated(0))
    assert same(load(), 0)
    # of the same size and time, at the same place: only its hash tells
    was = file.stat()
    put(cache, lambda path: path.write_bytes(tampered(path)))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    write_marker(cache_place(URL, cache)[1], file, hashlib.sha256(file.read_bytes()).hexdigest())
    assert file.stat().st_size == was.st_size
    assert same(load(), 1)


def tampered(path):
    """The other SAE, padded to the length of the first."""
    size, other = path.stat().st_size, path.with_name("other.npz")
    np.savez_compressed(other, **arrays(1))
    data = other.read_bytes()
    other.unlink()
    assert abs(size - len(data)) < 2**15
    # a zip ends with a comment of any length, stated in its last two bytes
    if len(data) > size:
        pytest.skip("deflated the other way")
    return data[:-2] + (size - len(data)).to_bytes(2, "little") + bytes(size - len(data))


def test_a_file_that_is_changed_in_its_place_is_not_served_from_what_was_kept(cache, reads):
    put(cache, deflated(0))
    fetched = fetch(Entry(source=URL), local_files_only=True)
    read_weights(fetched, None)
    np.savez_compressed(fetched.path, **arrays(1))
    weights = read_weights(fetched, None)
    assert np.array_equal(weights.tensors["W_dec"].numpy(), arrays(1)["W_dec"])
    assert len(reads) == 2


def test_an_entry_whose_site_was_corrected_gives_the_corrected_one(cache, reads):
    put(cache, deflated())
    site = {"layer": 3, "point": "mlp_out", "module": "model.layers.3.mlp"}
    entry = Entry(source=URL, site=site)
    fetched = fetch(entry, local_files_only=True)
    assert read_weights(fetched, entry).cfg.site.module == "model.layers.3.mlp"
    corrected = Entry(source=URL, site=site | {"module": "model.layers.3.norm"})
    for _ in range(2):
        assert read_weights(fetched, corrected).cfg.site.module == "model.layers.3.norm"
    assert len(reads) == 2


OTHER = {
    "release": "r",
    "id": "i",
    "format": "gemma_scope",
    "source": "https://example.org/embedding",
    "path": "embedding/width_4k/average_l0_6",
    "revision": "v2",
    "sha256": "0" * 64,
    "size": 1,
    "site": {"layer": 1},
    "out_site": {"layer": 1},
    "d_in": D,
    "d_sae": N,
    "k": 3,
    "l0": 3.0,
    "variance_explained": 0.5,
    "norm_scaling_factor": 2.0,
    "source_scales": (0.5, 2.0),
    "normalize_activations": "none",
    "neuronpedia": "n",
    "licence": "MIT",
    "paper": "p",
    "author": "a",
    "notes": {"n": "n"},
}


@pytest.mark.parametrize("fact", Entry.model_fields)
def test_every_fact_that_a_reader_may_use_makes_another_key(fact, cache):
    put(cache, deflated())
    fetched = fetch(Entry(source=URL), local_files_only=True)
    flag = "bool" in str(Entry.model_fields[fact].annotation)
    one, other = (
        kept._place(fetched, Entry(**({"source": URL} | facts)))
        for facts in ({}, {fact: OTHER.get(fact, flag or "another")})
    )
    assert (one.key == other.key) == (fact in kept.NOT_READ)


def test_no_reader_looks_at_a_fact_that_makes_no_other_key():
    for path in sorted(Path(gemma_scope.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "entry":
                looked_at = node.attr
                assert looked_at not in kept.NOT_READ | {"name", "to_json", "model_dump"}, (
                    f"{path}:{node.lineno}: take {looked_at} out of saezoo.kept.NOT_READ"
                )


def test_a_changed_reader_reads_again(cache, reads, monkeypatch):
    put(cache, deflated())
    load()
    monkeypatch.setattr(kept, "_readers", lambda: "another")
    load()
    assert len(reads) == 2


def damage(how):
    def wrap(do):
        do.how = how
        return do

    return wrap


@damage("cut")
def cut(folder):
    weights = folder / "sae.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)


@damage("a changed byte")
def flip(folder):
    with (folder / "sae.safetensors").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"\xff")


@damage("a changed config")
def config(folder):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"relu_after": False}))


@damage("no marker")
def marker(folder):
    (folder / "kept.json").unlink()


@damage("a broken marker")
def broken(folder):
    (folder / "kept.json").write_text("{")


@damage("no weights")
def weights(folder):
    (folder / "sae.safetensors").unlink()


@damage("empty")
def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@damage("zeros, as after a power cut, and a marker that fits them")
def zeros(folder):
    path = folder / "sae.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    (folder / "kept.json").write_text(json.dumps({"stamp": kept._stamp(folder)}))


@pytest.mark.parametrize(
    "do", [cut, flip, config, marker, broken, weights, empty, zeros], ids=lambda do: do.how
)
def test_a_torn_or_altered_folder_is_made_anew(do, cache, reads):
    put(cache, deflated())
    cfg = load().cfg
    (folder,) = folders(cache)
    do(folder)
    again = load()
    assert len(reads) == 2
    assert same(again)
    assert again.cfg == cfg
    assert same(load())
    assert len(reads) == 2
    assert folders(cache) == [folder]


def test_processes_that_load_at_once_all_get_the_numbers_and_leave_one_folder(cache):
    put(cache, deflated())
    code = (
        "import hashlib, saezoo\n"
        f"sae = saezoo.load_sae({URL!r}, local_files_only=True)\n"
        "print(hashlib.sha256(sae.W_enc_rows.numpy().tobytes()).hexdigest())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {process.communicate()[0].strip() for process in running}
    rows = np.ascontiguousarray(arrays()["W_enc"].T)
    assert said == {hashlib.sha256(rows.tobytes()).hexdigest()}
    assert len(folders(cache)) == 1


@pytest.mark.parametrize("wins", ["the slower", "the faster"])
def test_a_process_that_finds_the_folder_made_meanwhile_uses_one_of_both(
    wins, cache, reads, monkeypatch
):
    put(cache, deflated())
    real = kept.stream_safetensors

    def overtaken(tensors, path):
        monkeypatch.setattr(kept, "stream_safetensors", real)
        assert same(load())
        if wins == "the faster":
            # what renaming onto a folder that is not empty says
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        return real(tensors, path)

    monkeypatch.setattr(kept, "stream_safetensors", overtaken)
    assert same(load())
    assert len(reads) == 2
    assert same(load())
    assert len(reads) == 2
    assert len(folders(cache)) == 1


def url_of(number):
    return URL.replace("layer_20", f"layer_{number}")


def test_the_least_recently_used_goes_first_and_the_bound_holds(cache, reads, monkeypatch):
    monkeypatch.setenv("SAEZOO_KEPT_GB", "0.0045")  # room for two of 2.1 MB
    for number in range(3):
        put(cache, deflated(number), url_of(number))
    for age, number in ((200, 0), (100, 1)):
        before = set(folders(cache))
        load(url_of(number))
        (new,) = set(folders(cache)) - before
        os.utime(new / "kept.json", (time.time() - age,) * 2)
    load(url_of(0))
    load(url_of(2))
    assert len(reads) == 3
    held = sum(size for _, size, _ in kept.kept_folders(cache / "kept"))
    assert held < 4.5e6
    assert same(load(url_of(0)), 0)
    assert same(load(url_of(2)), 2)
    assert len(reads) == 3
    assert same(load(url_of(1)), 1)
    assert len(reads) == 4


def test_what_is_larger_than_the_bound_is_not_kept_and_displaces_nothing(cache, monkeypatch):
    put(cache, deflated(0), url_of(0))
    load(url_of(0))
    before = folders(cache)
    monkeypatch.setenv("SAEZOO_KEPT_GB", "0.001")
    put(cache, deflated(1), url_of(1))
    assert same(load(url_of(1)), 1)
    assert folders(cache) == before


def test_nothing_is_kept_nor_looked_at_when_it_is_turned_off(cache, reads, monkeypatch):
    monkeypatch.setenv("SAEZOO_KEPT_GB", "0")
    put(cache, deflated())
    load()
    assert folders(cache) == []
    monkeypatch.delenv("SAEZOO_KEPT_GB")
    load()
    monkeypatch.setenv("SAEZOO_KEPT_GB", "0")
    load()
    assert len(reads) == 3


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_bound_that_is_no_number_is_refused_in_one_line(text, cache, monkeypatch):
    monkeypatch.setenv("SAEZOO_KEPT_GB", text)
    put(cache, deflated())
    with pytest.raises(ConfigError, match=f"SAEZOO_KEPT_GB is '{text}'"):
        load()


def fails(number):
    def call(*_words, **_options):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("saezoo.files.tempfile.mkdtemp", fails(errno.EROFS)),
        ("saezoo.kept.write_json", fails(errno.EACCES)),
        ("saezoo.kept.os.replace", fails(errno.EACCES)),
        ("saezoo.formats._stream.os.fsync", fails(errno.ENOSPC)),
        ("saezoo.kept.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0)),
    ],
    ids=["read-only", "no marker", "no rename", "full", "nearly full"],
)
def test_a_cache_that_cannot_be_written_keeps_nothing_and_loads_all_the_same(
    place, value, cache, monkeypatch
):
    put(cache, deflated())
    monkeypatch.setattr(place, value)
    assert same(load())
    assert folders(cache) == []


def test_a_cache_whose_kept_folder_cannot_be_made_loads_all_the_same(cache):
    put(cache, deflated())
    (cache / "kept").write_text("in the way")
    for _ in range(2):
        assert same(load())


def test_a_kept_folder_of_a_cache_that_became_read_only_is_used(cache, reads, monkeypatch):
    put(cache, deflated())
    load()
    monkeypatch.setattr("saezoo.kept.os.utime", fails(errno.EROFS))
    assert same(load())
    assert len(reads) == 1


def test_the_work_folder_of_a_process_that_died_is_cleared_away_after_a_day(cache):
    put(cache, deflated())
    for name, hours in ((".old", 25), (".young", 1)):
        (cache / "kept" / name).mkdir(parents=True)
        os.utime(cache / "kept" / name, (time.time() - hours * 3600,) * 2)
    load()
    names = [path.name for path in folders(cache)]
    assert ".old" not in names
    assert ".young" in names


def test_a_new_commit_with_the_same_file_is_served_from_what_was_kept(hub, cache, tmp_path, reads):
    deflated()(tmp_path / "params.npz")
    files = {"layer_20/width_16k/average_l0_71/params.npz": (tmp_path / "params.npz").read_bytes()}
    name = "hf://google/gemma-scope-2b-pt-res@{}/layer_20/width_16k/average_l0_71"
    commits = [
        hub.commit("google/gemma-scope-2b-pt-res", files | {"README.md": text})
        for text in (b"1", b"2")
    ]
    for commit in commits:
        assert same(load_sae(name.format(commit)))
    assert len(reads) == 1
    assert len(folders(cache)) == 1


def test_a_native_sae_is_never_looked_up(cache, tmp_path, monkeypatch):
    put(cache, deflated())
    save_sae(load(), tmp_path / "native")
    monkeypatch.setattr(kept, "_checked", None)
    assert same(load_sae(tmp_path / "native"))


@pytest.mark.parametrize("dtype", list(_stream.NAMES), ids=str)
@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_a_streamed_file_is_the_tensors_whatever_their_strides(dtype, block, tmp_path, monkeypatch):
    monkeypatch.setattr(_stream, "BLOCK", block)
    made = torch.randn(7, 41).to(dtype)
    tensors = {"rows": made, "view": made.T, "every other": made[:, ::2], "bias": made[0]}
    tensors |= {"none": made[:0], "wide": made.double()}
    size = _stream.stream_safetensors(tensors, tmp_path / "x.safetensors")
    assert size == (tmp_path / "x.safetensors").stat().st_size
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
