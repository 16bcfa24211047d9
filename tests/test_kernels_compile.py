"""Every kernel compiles for the oldest and the newest GPU that it is for, as it is launched there,
and none spills registers or wants more shared memory than there is. No GPU is needed.

Spills are what `ptxas -v` says: without a driver Triton itself does not know them.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton
from saezoo_train.kernels import (
    LONGEST,
    WIDEST,
    adam,
    auxk,
    batch_top_k,
    centre,
    csc,
    decode,
    select,
    sums,
    update,
)
from saezoo_train.kernels import encode as encoder
from saezoo_train.kernels._launch import OPTIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saezoo import sparse_gpu

PTXAS = next(Path(triton.__file__).parent.rglob("ptxas-blackwell"))
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program can have."""

TYPES = {
    "bf16": "x w pre W_dec W copy rows",
    "fp32": "bias offset bound values dvalues loss m v weights partial pull norms rates p g",
    "i32": "groups idx counts least tau ties keys order before next_keys next_order starts state "
    "bins slots seed",
    "i16": "maxima flat pre_bits",
}
"""Of pointers, by the argument's name, where a row below does not say another."""
POINTERS = {name: f"*{kind}" for kind, names in TYPES.items() for name in names.split()}
LONG_ROWS = {"BITS": 16, "ROWS": 1}


def encode(tile, **others):
    sizes = {"BB": tile.tokens, "BM": tile.latents, "BD": tile.inner, "ALONG": tile.along}
    constants = sizes | {"UPCAST": False, "GROUP": 32} | others
    return constants, {"num_warps": tile.warps, "num_stages": tile.stages}


def described(tile):
    """Arguments that are tensor descriptors."""
    return {
        "x": f"tensordesc<bf16[{tile.tokens}, {tile.inner}]>",
        "w": f"tensordesc<bf16[{tile.latents}, {tile.inner}]>",
        "pre": f"tensordesc<bf16[{tile.tokens}, {tile.latents // 2}]>",
        "maxima": "*bf16",
    }


def pick(name, kernel, constants, warps=4, types=None, arches=(80, 90), **options):
    """A row: what is compiled, with which constants, warps and types of arguments."""
    types = types or {}
    options = {"num_warps": warps} | options
    return pytest.param(kernel, constants, options, types, arches, id=name)


def encodes():
    """The encoder as each GPU launches it."""
    for has_offset in (False, True):
        tail = ", offset" if has_offset else ""
        offset = {"HAS_OFFSET": has_offset}
        for tile, arches in ((encoder.AMPERE, (80,)), (encoder.HOPPER, (90,))):
            constants, options = encode(tile, EVEN=True, **offset)
            maxima = {"maxima": "*fp32" if has_offset else "*bf16"}
            yield pick(f"encode{tail}", encoder._encode, constants, options["num_warps"], maxima,
                       arches, num_stages=options["num_stages"])  # fmt: skip
        constants, options = encode(encoder.HOPPER, **offset)
        types = described(encoder.HOPPER) | maxima
        name, warps = f"encode by descriptors{tail}", options["num_warps"]
        yield pick(name, encoder._encode_tma, constants, warps, types, (90,),
                   num_stages=options["num_stages"])  # fmt: skip
    constants, options = encode(encoder.FLOAT32, EVEN=False, HAS_OFFSET=False)
    types = dict.fromkeys(("x", "w", "pre", "maxima"), "*fp32")
    yield pick("encode float32", encoder._encode, constants, options["num_warps"], types,
               num_stages=options["num_stages"])  # fmt: skip
    constants, options = encode(encoder.AMPERE, EVEN=False, HAS_OFFSET=False)
    yield pick("encode, odd d", encoder._encode, constants, options["num_warps"],
               {"maxima": "*bf16"}, (80,), num_stages=options["num_stages"])  # fmt: skip


def selections():
    """For 32,768 latents, k 32; for 131,072, k 64; for the longest lists."""
    for groups, k in ((1024, 32), (4096, 64), (WIDEST // 32, LONGEST)):
        wide, some = LONG_ROWS | {"WIDTH": groups}, LONG_ROWS | {"WIDTH": k, "GROUP": 32}
        warps, fewer = select.warps(groups), select.warps(k * 32)
        yield pick(f"best groups {groups}", select._best_groups, wide, warps)
        yield pick(f"thresholds {k}", select._thresholds, some, fewer)
        listed = wide | {"SLOTS": k}
        yield pick(f"groups from {groups}", select._groups_from, listed, warps)
        chunk = min(k * 32, select.CHUNK)
        for by_bound in (False, True):
            emitted = some | {"WIDTH": chunk, "SLOTS": k, "BY_BOUND": by_bound, "EACH": True}
            emitted |= {"POSITIVE": False, "RELU": not by_bound}
            yield pick(f"emit {k} {by_bound}", select._emit, emitted, select.warps(2 * chunk))
        yield pick(
            f"count candidates {k}", batch_top_k._count_candidates, some, batch_top_k.warps(k)
        )
        yield pick(f"count equal {k}", batch_top_k._count_equal, some, batch_top_k.warps(k))
    yield pick("count bins", batch_top_k._count_bins, {"BITS": 16, "BLOCK": 4096}, 8)
    yield pick("pick", batch_top_k._pick, {})


def lists():
    """The sort, and centring."""
    block = {"BLOCK": 256, "DIGITS": 64}
    yield pick("csc count", csc._count, block)
    yield pick("csc scatter", csc._scatter, block | {"FIRST": False})
    yield pick("csc starts", csc._find_starts, {"WIDE": 256})
    yield pick("centre", centre._centre, {"SHIFT": True, "ROWS": 4, "WIDTH": 1024},
               types={"x": "*fp32", "b": "*fp32", "out": "*bf16"})  # fmt: skip


def decodes():
    """32 and 64 slots in registers; more in pieces."""
    types = {"grad": "*bf16", "out": "*bf16"}
    plain = {"KB": 32, "BD": 128, "BIAS": False}
    yield pick("decode", sparse_gpu.decode_kernel, plain, types=types)
    for k, wide in ((32, 128), (64, 64)):
        fused = {"KB": k, "BD": wide, "BIAS": False, "RELU": True}
        yield pick(f"decode loss {k}", decode.decode_loss_kernel, fused, types=types)
    yield pick("decode error", decode.decode_error_kernel, plain, types=types)
    products = {"KB": 32, "BD": 128, "RELU": True}
    yield pick("pair products", decode.pair_products_kernel, products, types={"out": "*fp32"})


def updates():
    """Both matrices of each width; with AuxK; bfloat16 moments."""
    narrow = {"W": "*fp32", "extra": "*bf16"}
    fixed = {"R": 1, "SPLIT": 128, "BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "PULL": False}
    fixed |= {"NORMS": False}
    rows = [
        (576, True, False, False), (768, True, False, False), (768, False, False, False),
        (768, True, True, False), (768, True, False, True), (4096, True, False, False),
        (4096, False, False, False), (12_288, True, False, False),
    ]  # fmt: skip
    for d, unit, extra, chance in rows:
        one, two = update.pieces(d)
        constants = fixed | {"D1": one, "D2": two, "UNROLL": sums.unroll(one), "UNIT": unit}
        constants |= {"EXTRA": extra, "CHANCE": chance}
        types = narrow | ({"m": "*bf16", "v": "*bf16"} if chance else {})
        name = f"update {d}{' unit' * unit}{' extra' * extra}{' bf16 moments' * chance}"
        yield pick(name, update.update_kernel, constants, update.warps(d, chance), types)


def others():
    """Sums over lists, Adam on vectors, AuxK's selection."""
    blocks = {"SPLIT": 128, "E": 16, "BD": 128}
    yield pick("block sums", sums.block_sums_kernel, blocks)
    yield pick("block numbers", sums.block_numbers_kernel, {"SPLIT": 128}, 1, {"out": "*fp32"})
    latent = {"R": 8, "E": 16, "SPLIT": 128}
    yield pick("latent sums", sums.latent_sums_kernel, latent, types={"out": "*fp32"})
    gradient = {"R": 1, "BD": 1024, "SPLIT": 128, "UNROLL": 4}
    yield pick("gradient", sums.gradient_kernel, gradient, types={"out": "*fp32"})
    rows = {"E": 16, "BD": 128}
    yield pick("weighted rows", sums.weighted_rows_kernel, rows, types={"out": "*fp32"})
    vector = {"BLOCK": 1024, "BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "LEAST": False}
    yield pick("update vector", adam.update_vector_kernel, vector, types={"least": "fp32"})
    for width in (512, auxk.WIDEST):
        largest = {"R": 1, "WIDTH": width, "LOWEST": 16}
        types, warps = {"out": "*bf16"}, auxk.warps(width)
        yield pick(f"keep largest {width}", auxk.keep_largest_kernel, largest, warps, types)


KERNELS = [*encodes(), *selections(), *lists(), *decodes(), *updates(), *others()]


def compiled(kernel, constants, options, types, arch):
    """Triton's result for a GPU of this compute capability."""
    known = POINTERS | {"scale": "fp32", "least": "*i32"} | types
    names = kernel.arg_names
    kinds = {name: known.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
    missing = set(constants) - set(names)
    assert not missing, f"{kernel.__name__} has no argument {missing}"
    # tensors of torch begin at such addresses, and so do the sizes in question
    whole = [["tt.divisibility", 16]]
    sized = ("D", "M", "K", "G")
    attributes = {
        (place,): whole
        for place, name in enumerate(names)
        if kinds[name].startswith("*") or (name in sized and kinds[name] == "i32")
    }
    source = ASTSource(
        kernel,
        {name: kinds[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | OPTIONS)


def ptxas(ptx, folder):
    """What the assembler says of registers and spills."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    target = re.search(r"\.target (\w+)", ptx)[1]
    command = [PTXAS, "-v", f"--gpu-name={target}", path, "-o", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr


def spilled(said):
    """Bytes."""
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert found, said
    return sum(map(int, found))


@pytest.mark.parametrize(("kernel", "constants", "options", "types", "arches"), KERNELS)
def test_it_compiles_and_does_not_spill(kernel, constants, options, types, arches, tmp_path):
    for arch in arches:
        got = compiled(kernel, constants, options, types, arch)
        said = ptxas(got.asm["ptx"], tmp_path)
        assert not spilled(said), f"sm_{arch}: {said}"
        assert got.metadata.shared <= SHARED[arch], f"sm_{arch}: {got.metadata.shared} bytes"
        assert not re.search(r"\b(atom|red)\.\S*f(16|32|64)", got.asm["ptx"]), "a float atomic"


def test_a_spill_would_be_seen(tmp_path):
    """More of a row than one warp's registers hold."""
    constants = LONG_ROWS | {"WIDTH": 2048, "SLOTS": 64, "GROUP": 32, "BY_BOUND": False}
    constants |= {"EACH": True, "POSITIVE": False, "RELU": True}
    got = compiled(select._emit, constants, {"num_warps": 1}, {}, 90)
    assert spilled(ptxas(got.asm["ptx"], tmp_path)) > 0


def test_every_kernel_is_in_the_table():
    listed = {row.values[0].__name__ for row in KERNELS}
    modules = (
        adam,
        auxk,
        batch_top_k,
        centre,
        csc,
        decode,
        encoder,
        select,
        sparse_gpu,
        sums,
        update,
    )
    kernels = {
        item.__name__
        for module in modules
        for item in vars(module).values()
        if isinstance(item, triton.JITFunction) and item.__module__ == module.__name__
        and not any(kind in item.arg_names for kind in ("key_RC", "inside_R"))
    }  # fmt: skip
    inner = {
        name
        for module in modules
        for name in re.findall(r"(\w+)\(", Path(module.__file__).read_text(encoding="utf-8"))
    }
    # what other kernels call is compiled with them
    assert {name for name in kernels if name not in inner} <= listed
