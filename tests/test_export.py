"""What is written in another format computes the same through that format's own formula, and what a
format cannot say is refused by name.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from saezoo.cli import cli
from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.errors import CannotConvert
from saezoo.formats import FORMATS, detect, format_module, writable_formats
from saezoo.load import load_sae
from saezoo.numerics import TOLERANCE, close
from saezoo.sae import build_sae
from saezoo.save import save_sae
from tests.origins import ALL
from tests.origins._origin import D

FOREIGN = [name for name in writable_formats() if name != "native"]
WORDS = {"dictionary_learning": "dictionary_learning", "gemma_scope": "Gemma Scope"}
WORDS |= {"sparsify": "sparsify", "saelens": "SAELens"}


def tiny(seed=0, *, positive=False, **spec):
    cfg = SAEConfig.from_json({"d_in": 6, "d_sae": 24} | spec)
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(shape, generator=generator) for name, shape in cfg.tensor_shapes().items()
    }
    if positive:
        made["threshold"] = made["threshold"].abs()
    return build_sae(cfg, made)


def refusal(source, dest, to):
    """What is said where a conversion is refused; empty where it is not."""
    try:
        convert_sae(source, dest, to)
    except CannotConvert as error:
        return str(error)
    return ""


def inputs():
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(5)) * 2 + 1


@pytest.mark.parametrize("origin", ALL, ids=str)
def test_whatever_is_read_is_written_so_that_its_authors_outputs_come_back_or_refused(
    origin, tmp_path
):
    tensors = origin.tensors(torch.Generator().manual_seed(0))
    path = origin.write(tmp_path / "source", dict(tensors))
    wide = {
        key: value.double() if value.is_floating_point() else value
        for key, value in tensors.items()
    }
    x, written = inputs().double(), 0
    for to in writable_formats():
        if said := refusal(path, tmp_path / to, to):
            assert "cannot" in said
            assert "\n" not in said
            assert not (tmp_path / to).exists()
            continue
        written += 1
        assert detect(tmp_path / to) == to
        sae = load_sae(tmp_path / to, dtype=torch.float64)
        assert close(sae.encode(x), origin.encode(wide, x), torch.float32)
        assert close(sae(x), origin.forward(wide, x), torch.float32)
    assert written, "at least saezoo's own format holds everything that is read"


RELU = {"architecture": "relu", "subtract_b_dec": True}
PLAIN = {"architecture": "relu"}
GATED = {"architecture": "gated", "subtract_b_dec": True}
TOPK = {"architecture": "topk", "k": 3, "subtract_b_dec": True}
JUMP = {"architecture": "jumprelu"}

BITWISE = [
    ("sparsify", TOPK),
    ("saelens", RELU),
    ("saelens", JUMP),
    ("dictionary_learning", RELU),
    ("dictionary_learning", PLAIN),
    ("dictionary_learning", GATED),
    ("dictionary_learning", JUMP),
    ("dictionary_learning", TOPK),
    ("gemma_scope", JUMP),
    ("gemma_scope", PLAIN),
    ("circuit_tracer", PLAIN),
    ("circuit_tracer", JUMP | {"relu_after": False}),
    ("circuit_tracer", TOPK | {"subtract_b_dec": False, "relu_after": False}),
]


@pytest.mark.parametrize(("to", "spec"), BITWISE, ids=str)
def test_a_round_trip_keeps_every_bit_and_every_output(to, spec, tmp_path):
    sae = tiny(**spec)
    save_sae(sae, tmp_path / "a")
    proof = convert_sae(tmp_path / "a", tmp_path / "b", to)
    assert proof.difference <= proof.tolerance == TOLERANCE[torch.float32]
    assert f"{to}'s own formula" in proof.through
    convert_sae(tmp_path / "b", tmp_path / "c")
    again = load_sae(tmp_path / "c")
    assert all(torch.equal(value, getattr(again, name)) for name, value in sae.named_parameters())
    assert torch.equal(again.encode(inputs()), sae.encode(inputs()))
    assert torch.equal(again(inputs()), sae(inputs()))


PAIRS = [
    (first, second, spec)
    for spec in (RELU, PLAIN, GATED, TOPK, JUMP)
    for first in FOREIGN
    for second in FOREIGN
    if first != second
]


@pytest.mark.parametrize(("first", "second", "spec"), PAIRS, ids=str)
def test_there_and_there_and_back_keeps_every_bit_where_both_can(first, second, spec, tmp_path):
    sae = tiny(**spec)
    save_sae(sae, tmp_path / "a")
    steps = [("a", "b", first), ("b", "c", second), ("c", "d", first)]
    if any(refusal(tmp_path / source, tmp_path / dest, to) for source, dest, to in steps):
        return  # which those are is a table of its own, in docs/formats.md
    again = load_sae(tmp_path / "d")
    for name, value in sae.named_parameters():
        # with a ReLU a threshold below 0 is as 0, which circuit_tracer writes: it has no ReLU
        floor = 0.0 if name == "threshold" else -torch.inf
        assert torch.equal(value.clamp(min=floor), getattr(again, name).clamp(min=floor))
    assert torch.equal(again.encode(inputs()), sae.encode(inputs()))


def test_pairs_of_formats_are_not_all_refused(tmp_path):
    save_sae(tiny(**JUMP), tmp_path / "0")
    for step, to in enumerate(["dictionary_learning", "gemma_scope", "saelens"]):
        convert_sae(tmp_path / str(step), tmp_path / str(step + 1), to)
    assert torch.equal(load_sae(tmp_path / "3").threshold, load_sae(tmp_path / "0").threshold)


FOLDED = [
    ("sparsify", TOPK | {"input_norm": {"kind": "scale", "factor": 3.0}}),
    ("sparsify", TOPK | {"decoder_norm": "scale"}),
    ("saelens", TOPK | {"decoder_norm": "scale", "input_norm": {"kind": "scale", "factor": 0.3}}),
    ("saelens", RELU | {"decoder_norm": "scale"}),
    ("saelens", JUMP | {"decoder_norm": "rank"}),
    ("dictionary_learning", RELU | {"input_norm": {"kind": "scale", "factor": 3.0}}),
    ("dictionary_learning", RELU | {"decoder_norm": "rank"}),
    ("dictionary_learning", JUMP | {"decoder_norm": "scale"}),
    ("gemma_scope", JUMP | {"decoder_norm": "rank", "input_norm": {"kind": "scale", "factor": 5}}),
    ("gemma_scope", PLAIN | {"decoder_norm": "scale"}),
    ("circuit_tracer", JUMP | {"decoder_norm": "rank", "relu_after": False}),
    (
        "circuit_tracer",
        PLAIN | {"decoder_norm": "scale", "input_norm": {"kind": "scale", "factor": 3}},
    ),
]


@pytest.mark.parametrize(("to", "spec"), FOLDED, ids=str)
def test_a_scale_and_the_norms_of_the_decoder_are_folded_into_the_weights(to, spec, tmp_path):
    sae = tiny(**spec)
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to)
    again = load_sae(tmp_path / "b")
    assert again.cfg.input_norm is None
    assert again.cfg.decoder_norm == "none"
    assert close(again.encode(inputs()), sae.encode(inputs()))
    assert close(again(inputs()), sae(inputs()))


REFUSED = [
    # target, spec, what is said
    ("sparsify", RELU, "the architecture relu"),
    ("sparsify", TOPK | {"decoder_norm": "rank"}, "decoder_norm rank"),
    ("sparsify", TOPK | {"relu_after": False}, "topk without ReLU"),
    ("sparsify", TOPK | {"input_norm": {"kind": "layer_norm"}}, "layer_norm"),
    ("sparsify", {"architecture": "topk", "k": 3, "input_bias": True}, "an input bias"),
    ("sparsify", {"architecture": "topk", "k": 3, "d_out": 9}, "d_out 9"),
    ("saelens", TOPK | {"decoder_norm": "rank"}, "decoder_norm rank"),
    ("saelens", JUMP | {"relu_after": False}, "thresholds are negative"),
    ("saelens", {"architecture": "groupmax", "k": 3}, "the architecture groupmax"),
    ("dictionary_learning", JUMP | {"subtract_b_dec": True}, "a threshold for each feature"),
    ("dictionary_learning", {"architecture": "gated"}, "gated without b_dec subtracted"),
    ("dictionary_learning", {"architecture": "topk", "k": 3}, "topk without b_dec subtracted"),
    (
        "dictionary_learning",
        TOPK | {"signed": True, "relu_after": False},
        "a choice by magnitude",
    ),
    ("dictionary_learning", JUMP | {"relu_after": False}, "thresholds are negative"),
    ("dictionary_learning", PLAIN | {"skip": True}, "a skip connection"),
    ("dictionary_learning", PLAIN | {"out_site": {"layer": 3}}, "a transcoder"),
    ("dictionary_learning", RELU | {"input_norm": {"kind": "constant_norm"}}, "constant_norm"),
    ("gemma_scope", JUMP | {"subtract_b_dec": True}, "b_dec subtracted from the input"),
    ("gemma_scope", RELU, "b_dec subtracted from the input"),
    ("gemma_scope", JUMP | {"skip": True}, "a skip connection"),
    ("gemma_scope", JUMP | {"d_out": 9}, "d_out 9"),
    ("gemma_scope", {"architecture": "gated"}, "the architecture gated"),
    ("gemma_scope", JUMP | {"relu_after": False}, "thresholds are negative"),
]


@pytest.mark.parametrize(("to", "spec", "said"), REFUSED, ids=str)
def test_what_a_format_cannot_say_is_refused_by_name_and_nothing_is_written(
    to, spec, said, tmp_path
):
    save_sae(tiny(**spec), tmp_path / "a")
    with pytest.raises(CannotConvert) as caught:
        convert_sae(tmp_path / "a", tmp_path / "b", to)
    assert str(caught.value).startswith(f"{WORDS[to]} cannot express ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("to", ["saelens", "gemma_scope", "dictionary_learning"])
def test_without_relu_is_with_it_where_no_threshold_is_negative(to, tmp_path):
    sae = tiny(positive=True, **JUMP, relu_after=False)
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to)
    assert torch.equal(load_sae(tmp_path / "b").encode(inputs()), sae.encode(inputs()))


def test_a_decoder_row_of_zeros_is_nothing_to_divide_by(tmp_path):
    sae = tiny(**RELU, decoder_norm="scale")
    sae.W_dec[7] = 0
    save_sae(sae, tmp_path / "a")
    with pytest.raises(CannotConvert, match="decoder row 7 is zero"):
        convert_sae(tmp_path / "a", tmp_path / "b", "saelens")


CLASSES = [
    (RELU, "AutoEncoder"),
    (PLAIN, "AutoEncoderNew"),
    (GATED, "GatedAutoEncoder"),
    (JUMP, "JumpReluAutoEncoder"),
    (TOPK, "AutoEncoderTopK"),
]


@pytest.mark.parametrize(("spec", "name"), CLASSES, ids=str)
def test_the_class_of_dictionary_learning_is_the_one_that_computes_the_same(spec, name, tmp_path):
    site = {"model": "google/gemma-2-2b", "layer": 3, "point": "mlp_out"}
    site |= {"module": "model.layers.3.mlp", "hook_name": "blocks.3.hook_mlp_out"}
    save_sae(tiny(**spec, site=site), tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", "dictionary_learning")
    trainer = json.loads((tmp_path / "b" / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == name
    assert trainer["submodule_name"] == "mlp_out_layer_3"
    again = load_sae(tmp_path / "b").cfg.site
    assert (again.model, again.layer, again.module) == (site["model"], 3, site["module"])


@pytest.mark.parametrize(("notes", "k"), [({"k": "5"}, 5), ({}, 24), (None, 24)], ids=str)
def test_one_threshold_with_b_dec_subtracted_is_a_batch_topk(notes, k, tmp_path):
    sae = tiny(**JUMP, subtract_b_dec=True, notes=notes)
    sae.threshold[:] = 0.4
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", "dictionary_learning")
    data = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (data["trainer"]["dict_class"], data["trainer"]["k"]) == ("BatchTopKSAE", k)
    again = load_sae(tmp_path / "b")
    assert again.cfg.notes["k"] == str(k)
    assert torch.equal(again.encode(inputs()), sae.encode(inputs()))


def test_written_arrays_are_what_numpy_reads_and_lie_so_that_they_are_mapped(tmp_path):
    save_sae(tiny(**JUMP), tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", "gemma_scope")
    sae = load_sae(tmp_path / "a")
    with np.load(tmp_path / "b" / "params.npz") as arrays:
        assert sorted(arrays) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
        assert np.array_equal(arrays["W_enc"], sae.W_enc.numpy())
        assert {value.dtype.str for value in arrays.values()} == {"<f4"}
    module = format_module("gemma_scope")
    tensors = module.read(tmp_path / "b", None).tensors
    assert all(value.data_ptr() % 64 == 0 for value in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", ["gemma_scope", "dictionary_learning", "saelens"])
def test_16_bit_weights_lose_nothing(to, dtype, tmp_path):
    sae = tiny(**JUMP)
    cfg, tensors = sae.cfg, {name: value.to(dtype) for name, value in sae.named_parameters()}
    (tmp_path / "a").mkdir()
    format_module("native").write(cfg, tensors, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to)
    again = load_sae(tmp_path / "b")
    assert all(torch.equal(value.float(), getattr(again, name)) for name, value in tensors.items())


def test_the_proof_sees_what_only_large_activations_turn_on(tmp_path, monkeypatch):
    sae = tiny(**JUMP)
    sae.threshold[:] = 60
    save_sae(sae, tmp_path / "a")
    module = format_module("gemma_scope")
    honest = module.write

    def forgetful(cfg, tensors, folder):
        honest(cfg, tensors | {"W_dec": tensors["W_dec"] * 1.01}, folder)

    monkeypatch.setattr(module, "write", forgetful)
    with pytest.raises(CannotConvert, match="differs"):
        convert_sae(tmp_path / "a", tmp_path / "b", "gemma_scope")


def test_the_proof_sees_features_in_another_unit(tmp_path, monkeypatch):
    save_sae(tiny(**RELU), tmp_path / "a")
    module = format_module("saelens")
    honest = module.write

    def rescaled(cfg, tensors, folder):
        doubled = {name: tensors[name] * 2 for name in ("W_enc_rows", "b_enc")}
        honest(cfg, tensors | doubled | {"W_dec": tensors["W_dec"] / 2}, folder)

    monkeypatch.setattr(module, "write", rescaled)
    with pytest.raises(CannotConvert, match="differs"):
        convert_sae(tmp_path / "a", tmp_path / "b", "saelens")


def test_the_help_of_convert_lists_what_the_table_says_can_be_written():
    shown = " ".join(CliRunner().invoke(cli, ["convert", "--help"]).output.split())
    assert ", ".join(writable_formats()) in shown
    assert set(FOREIGN) >= {"saelens", "sparsify", "dictionary_learning", "gemma_scope"}
    for name in writable_formats():
        module = format_module(name)
        assert callable(module.write)
        assert name == "native" or callable(module.origin_output)
    for name in FORMATS.keys() - set(writable_formats()):
        assert not hasattr(format_module(name), "write")


def test_the_command_prints_the_proof_and_one_line_where_it_cannot(tmp_path):
    save_sae(tiny(**RELU), tmp_path / "a")
    run = CliRunner().invoke
    done = run(cli, ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "saelens"])
    assert done.exit_code == 0
    assert "largest difference" in done.output
    assert "saelens's own formula" in done.output
    done = run(cli, ["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "gemma_scope"])
    assert done.exit_code == 1
    assert "b_dec subtracted from the input" in str(done.exception) + done.output


def test_origins_are_all_found():
    assert {origin.format for origin in ALL} >= {"openai", "sparsify", "gemma_scope", "saelens"}
    assert len({str(origin) for origin in ALL}) == len(ALL)
    assert all(origin.tensors(torch.Generator().manual_seed(0)) for origin in ALL)
    assert D == 6
