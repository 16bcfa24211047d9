"""Converting writes a folder that computes the same, or nothing; checking finds what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from saezoo.check import check_sae, write_golden
from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.errors import CannotConvert, NotFinite, SaezooError
from saezoo.load import load_sae
from saezoo.numerics import TOLERANCE, close
from saezoo.sae import build_sae
from saezoo.save import save_sae


def tiny(seed=0, **spec):
    cfg = SAEConfig.from_json({"d_in": 6, "d_sae": 24} | spec)
    generator = torch.Generator().manual_seed(seed)
    shapes = cfg.tensor_shapes().items()
    return build_sae(cfg, {name: torch.randn(shape, generator=generator) for name, shape in shapes})


CAN = {
    "topk": {"architecture": "topk", "k": 3, "subtract_b_dec": True},
    "groupmax": {"architecture": "groupmax", "k": 3, "subtract_b_dec": True},
    "signed": {
        "architecture": "topk",
        "k": 3,
        "subtract_b_dec": True,
        "relu_after": False,
        "signed": True,
    },
    "transcoder": {"architecture": "topk", "k": 3, "out_site": {"module": "h.1.mlp"}},
    "skip transcoder": {
        "architecture": "topk",
        "k": 3,
        "skip": True,
        "out_site": {"module": "h.1.mlp"},
    },
}
CANNOT = {
    "relu": {"architecture": "relu", "subtract_b_dec": True},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu", "subtract_b_dec": True},
    "layer norm": {
        "architecture": "topk",
        "k": 3,
        "subtract_b_dec": True,
        "input_norm": {"kind": "layer_norm"},
    },
    "no relu": {"architecture": "topk", "k": 3, "subtract_b_dec": True, "relu_after": False},
    "other width out": {"architecture": "topk", "k": 3, "d_out": 9},
    "ranked by decoder norm": {
        "architecture": "topk",
        "k": 3,
        "subtract_b_dec": True,
        "decoder_norm": "rank",
    },
    "input bias": {"architecture": "topk", "k": 3, "input_bias": True},
}


@pytest.mark.parametrize("spec", CAN.values(), ids=CAN)
def test_native_to_sparsify_and_back_keeps_every_bit_and_every_output(spec, tmp_path):
    sae = tiny(**spec)
    save_sae(sae, tmp_path / "a")
    proof = convert_sae(tmp_path / "a", tmp_path / "b", to="sparsify")
    convert_sae(tmp_path / "b", tmp_path / "c")
    assert proof.difference <= proof.tolerance == TOLERANCE[torch.float32]
    assert "own formula" in proof.through
    again = load_sae(tmp_path / "c")
    assert all(torch.equal(value, getattr(again, name)) for name, value in sae.named_parameters())
    x = torch.randn(9, 6)
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize("spec", CANNOT.values(), ids=CANNOT)
def test_what_the_target_cannot_express_is_refused_with_the_reason_and_nothing_is_written(
    spec, tmp_path
):
    save_sae(tiny(**spec), tmp_path / "a")
    with pytest.raises(CannotConvert) as caught:
        convert_sae(tmp_path / "a", tmp_path / "b", to="sparsify")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_format_that_cannot_be_written_is_refused_with_those_that_can(tmp_path):
    save_sae(tiny(**CAN["topk"]), tmp_path / "a")
    for to in ("openai", "nonsense"):
        with pytest.raises(CannotConvert, match="native, sparsify"):
            convert_sae(tmp_path / "a", tmp_path / "b", to=to)


def test_weights_that_are_not_finite_are_not_converted(tmp_path):
    sae = tiny(**CAN["topk"])
    sae.b_enc[3] = float("nan")
    save_sae(sae, tmp_path / "a")
    with pytest.raises(NotFinite, match="b_enc"):
        convert_sae(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_writer_that_loses_something_is_caught_by_the_proof(tmp_path, monkeypatch):
    from saezoo.formats import sparsify

    honest = sparsify.write

    def forgetful(cfg, tensors, folder):
        honest(cfg, tensors | {"b_dec": torch.zeros_like(tensors["b_dec"])}, folder)

    monkeypatch.setattr(sparsify, "write", forgetful)
    save_sae(tiny(**CAN["topk"]), tmp_path / "a")
    with pytest.raises(CannotConvert, match="differs"):
        convert_sae(tmp_path / "a", tmp_path / "b", to="sparsify")
    assert not (tmp_path / "b").exists()


@pytest.fixture
def golden(tmp_path):
    sae = tiny(**CAN["topk"])
    folder = save_sae(sae, tmp_path / "sae")
    write_golden(sae, torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), folder)
    return folder


def verdicts(folder):
    return {finding.what: finding.ok for finding in check_sae(folder)}


def test_a_whole_folder_passes_every_check(golden):
    assert verdicts(golden) == {
        "files": True,
        "hash": None,
        "shapes": True,
        "finite": True,
        "golden": True,
    }


def test_a_weight_changed_by_a_thousandth_fails_the_golden_check_only(golden):
    path = golden / "sae.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors["b_dec"] *= 1.001
    save_file(tensors, path)
    assert verdicts(golden) == {
        "files": True,
        "hash": None,
        "shapes": True,
        "finite": True,
        "golden": False,
    }


def test_nan_weights_fail_and_wrong_shapes_end_the_check(golden):
    path = golden / "sae.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors["W_dec"][0, 0] = float("nan")
    save_file(tensors, path)
    assert verdicts(golden)["finite"] is False
    save_file(tensors | {"b_dec": torch.zeros(7)}, path)
    assert verdicts(golden) == {"files": True, "hash": None, "shapes": False}


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(8, 7)},
        {"indices": torch.full((8, 3), 24)},
        {"indices": torch.full((8, 3), -1)},
        {"values": torch.zeros(2, 3)},
        {"out": None},
    ],
    ids=["width", "index too large", "index negative", "lengths", "missing"],
)
def test_a_golden_file_of_the_wrong_shape_is_a_finding_not_a_crash(golden, change):
    tensors = load_file(golden / "golden.safetensors") | change
    save_file(
        {key: value for key, value in tensors.items() if value is not None},
        golden / "golden.safetensors",
    )
    assert verdicts(golden)["golden"] is False


def test_checking_names_what_cannot_be_read(golden):
    data = json.loads((golden / "config.json").read_text()) | {"architecture": "swiglu"}
    (golden / "config.json").write_text(json.dumps(data))
    last = check_sae(golden)[-1]
    assert last.ok is False
    assert "swiglu" in last.detail


def test_the_bundled_sae_loads_with_no_network_and_passes_every_check():
    name = "smollm2-135m-instruct/layer_15_resid_post"
    sae = load_sae(name, local_files_only=True, verify=True)
    assert (sae.cfg.architecture, sae.d_in, sae.cfg.k) == ("topk", 576, 32)
    assert sae.d_sae >= 4096
    found = {finding.what: finding.ok for finding in check_sae(name)}
    assert found == {"files": True, "hash": True, "shapes": True, "finite": True, "golden": True}
    assert close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), torch.float16)


def test_an_unknown_name_is_an_error_of_its_own():
    with pytest.raises(SaezooError):
        convert_sae("no-such-release/x", "dest")
