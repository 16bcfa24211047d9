"""The native folder: bitwise round trips, and every way in which it can be broken."""

import contextlib
import json
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saezoo.config import SAEConfig
from saezoo.errors import ConfigError, FormatError, MissingFile, NotFinite, SaezooError, UnsafeFile
from saezoo.files import write_file, write_folder
from saezoo.load import load_sae
from saezoo.sae import build_sae
from saezoo.save import save_sae

SPECS = {
    "relu": {"architecture": "relu"},
    "topk": {"architecture": "topk", "k": 3, "subtract_b_dec": True},
    "signed": {"architecture": "topk", "k": 3, "relu_after": False, "signed": True},
    "jumprelu": {"architecture": "jumprelu", "input_norm": {"kind": "layer_norm", "eps": 1e-5}},
    "gated": {"architecture": "gated"},
    "groupmax": {"architecture": "groupmax", "k": 4, "metrics": {"fvu": 0.25}},
    "transcoder": {
        "architecture": "relu",
        "d_out": 9,
        "skip": True,
        "site": {"model": "m", "layer": 3, "point": "mlp_in", "module": "h.3.mlp", "side": "input"},
        "out_site": {"model": "m", "layer": 3, "point": "mlp_out", "module": "h.3.mlp"},
        "tokens": {"skip_first": 1, "median_norm": 5.5, "max_norm_factor": 3},
        "origin": {"licence": "MIT"},
    },
}


def tiny(dtype=torch.float32, seed=0, **spec):
    cfg = SAEConfig.from_json({"d_in": 6, "d_sae": 24} | spec)
    generator = torch.Generator().manual_seed(seed)
    shapes = cfg.tensor_shapes().items()
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes}
    return build_sae(cfg, tensors, dtype=dtype)


@pytest.fixture
def folder(tmp_path):
    return save_sae(tiny(**SPECS["topk"]), tmp_path / "sae")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_what_is_saved_is_loaded_bit_for_bit(spec, dtype, tmp_path):
    sae = tiny(dtype, **spec)
    again = load_sae(save_sae(sae, tmp_path / "sae"), dtype=dtype)
    assert again.cfg == sae.cfg
    for (name, a), (other, b) in zip(sae.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    x = torch.randn(5, 6)
    assert torch.equal(sae(x), again(x))


def test_saving_over_a_native_folder_replaces_it_and_over_anything_else_is_refused(
    folder, tmp_path
):
    other = tiny(seed=1, **SPECS["gated"])
    save_sae(other, folder)
    assert load_sae(folder).cfg.architecture == "gated"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match="not a native folder alone"):
        save_sae(other, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="is a file"):
        save_sae(other, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sae"]


def config(folder, **changes):
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def weights(folder, **changes):
    path = folder / "sae.safetensors"
    data = {name: value.clone() for name, value in load_file(path).items()} | changes
    save_file({name: value for name, value in data.items() if value is not None}, path)


def cut(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), FormatError, "no known format"),
    "no weights": (lambda f: (f / "sae.safetensors").unlink(), FormatError, "sae.safetensors"),
    "half of the weights": (lambda f: cut(f, "sae.safetensors", 0.5), FormatError, "whole"),
    "two bytes of weights": (
        lambda f: (f / "sae.safetensors").write_bytes(b"ab"),
        FormatError,
        "whole",
    ),
    "empty weights": (lambda f: (f / "sae.safetensors").write_bytes(b""), FormatError, "whole"),
    "header of nonsense": (
        lambda f: (f / "sae.safetensors").write_bytes(b"\x10" + bytes(7) + b"{not json at all"),
        FormatError,
        "whole",
    ),
    "header of terabytes": (
        lambda f: (f / "sae.safetensors").write_bytes(b"\xff" * 6 + b"\0\0" + b"{}"),
        FormatError,
        "whole",
    ),
    "half of the config": (lambda f: cut(f, "config.json", 0.5), FormatError, "not JSON"),
    "config of a list": (
        lambda f: (f / "config.json").write_text("[1]"),
        FormatError,
        "no known format",
    ),
    "deeply nested config": (
        lambda f: (f / "config.json").write_text('{"saezoo_format":' + "[" * 100_000),
        FormatError,
        "not JSON",
    ),
    "huge config": (
        lambda f: (f / "config.json").write_bytes(b" " * 5_000_000),
        UnsafeFile,
        "too much",
    ),
    "newer format": (lambda f: config(f, saezoo_format=2), FormatError, "upgrade saezoo"),
    "format of words": (lambda f: config(f, saezoo_format="one"), FormatError, "saezoo_format"),
    "unknown key": (lambda f: config(f, colour="red"), ConfigError, "colour"),
    "unknown architecture": (
        lambda f: config(f, architecture="swiglu"),
        ConfigError,
        "architecture",
    ),
    "no k": (lambda f: config(f, k=...), ConfigError, "needs k"),
    "d_sae of words": (lambda f: config(f, d_sae="many"), ConfigError, "d_sae"),
    "d_sae too large": (lambda f: config(f, d_sae=48), FormatError, "expected (48, 6)"),
    "d_sae too small": (lambda f: config(f, d_sae=12), FormatError, "expected (12, 6)"),
    "missing tensor": (lambda f: weights(f, b_enc=None), FormatError, "b_enc"),
    "unknown tensor": (lambda f: weights(f, W_extra=torch.zeros(2)), FormatError, "W_extra"),
    "wrong shape": (
        lambda f: weights(f, W_dec=torch.zeros(6, 24)),
        FormatError,
        "W_dec is (6, 24)",
    ),
    "integers": (
        lambda f: weights(f, b_enc=torch.zeros(24, dtype=torch.int32)),
        FormatError,
        "int32",
    ),
    "far larger than the config allows": (
        lambda f: weights(f, W_dec=torch.zeros(300_000, 6)),
        UnsafeFile,
        "more than",
    ),
}


@pytest.mark.parametrize(("breaking", "error", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused_in_one_line_that_says_what_is_wrong(
    breaking, error, said, folder
):
    breaking(folder)
    with pytest.raises(error) as caught:
        load_sae(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["W_enc_rows", "b_dec"])
def test_a_plain_load_reads_no_weights_but_verify_refuses_what_is_not_finite(bad, name, folder):
    value = load_file(folder / "sae.safetensors")[name].clone()
    value.view(-1)[-1] = bad
    weights(folder, **{name: value})
    load_sae(folder)
    with pytest.raises(NotFinite, match=name):
        load_sae(folder, verify=True)


def test_large_finite_weights_whose_sum_overflows_are_not_taken_for_infinite(folder):
    weights(folder, b_enc=torch.full((24,), 3e38))
    load_sae(folder, verify=True)


def test_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(MissingFile, match="nowhere"):
        load_sae(tmp_path / "nowhere")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_to_the_bytes_is_a_saezoo_error_or_a_module_of_the_right_shapes(
    data, tmp_path_factory
):
    folder = save_sae(tiny(**SPECS["topk"]), tmp_path_factory.mktemp("fuzz") / "sae")
    path = folder / data.draw(st.sampled_from(["config.json", "sae.safetensors"]))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                raw[place] ^= data.draw(st.integers(1, 255))
            case "cut":
                del raw[place : place + data.draw(st.integers(1, 40))]
            case "insert":
                raw[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        if not raw:
            break
    path.write_bytes(bytes(raw))
    try:
        sae = load_sae(folder)
    except SaezooError as error:
        said = str(error)
    else:
        said = ""
        assert sae.W_enc.shape == (sae.d_in, sae.d_sae)
    assert "\n" not in said


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    with write_folder(tmp_path / "kept") as work:
        (work / "a").write_text("old")

    def fail_in_folder():
        with write_folder(tmp_path / "kept") as work:
            (work / "a").write_text("new")
            raise RuntimeError

    def fail_in_file():
        with write_file(tmp_path / "file") as work:
            work.write_text("half")
            raise RuntimeError

    for fail in (fail_in_folder, fail_in_file):
        with pytest.raises(RuntimeError):
            fail()
    assert (tmp_path / "kept" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_reader_never_sees_half_a_folder_while_it_is_replaced(tmp_path):
    folder = tmp_path / "sae"
    saes = [tiny(seed=seed, **SPECS["topk"]) for seed in range(2)]
    save_sae(saes[0], folder)
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            # between two renames the name may be free for an instant; it is never half there
            with contextlib.suppress(MissingFile):
                seen.append(load_sae(folder).b_enc.clone())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(20):
        save_sae(saes[turn % 2], folder)
    stop.set()
    reader.join()
    assert seen
    assert all(any(torch.equal(value, sae.b_enc) for sae in saes) for value in seen)


def test_weights_are_mapped_not_read(tmp_path):
    cfg = SAEConfig(architecture="relu", d_in=512, d_sae=8192)
    big = build_sae(cfg, {name: torch.zeros(shape) for name, shape in cfg.tensor_shapes().items()})
    folder = save_sae(big, tmp_path / "big")
    del big

    def resident():
        with open(f"/proc/{os.getpid()}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident()
    sae = load_sae(folder)
    assert resident() - before < 4e6 < (folder / "sae.safetensors").stat().st_size
    assert sae.W_enc.shape == (512, 8192)
