"""to_saelens as far as it goes without SAELens; with it: tests_peers/test_interop.py."""

import sys
import types

import pytest
import torch

from saezoo.config import SAEConfig
from saezoo.errors import CannotConvert, MissingExtra
from saezoo.formats.saelens import express
from saezoo.interop import to_saelens
from saezoo.sae import build_sae
from tests.test_saelens import CAN, CANNOT, tiny


@pytest.fixture
def no_saelens(monkeypatch):
    """As where SAELens is not installed."""
    monkeypatch.setitem(sys.modules, "sae_lens", None)


@pytest.mark.parametrize("spec", CANNOT.values(), ids=CANNOT)
@pytest.mark.usefixtures("no_saelens")
def test_what_saelens_cannot_express_is_refused_before_it_is_imported(spec):
    with pytest.raises(CannotConvert, match="SAELens cannot express"):
        to_saelens(tiny(**spec))


@pytest.mark.parametrize("spec", CAN.values(), ids=CAN)
@pytest.mark.usefixtures("no_saelens")
def test_without_saelens_it_says_what_to_install(spec):
    with pytest.raises(MissingExtra, match="pip install sae-lens") as caught:
        to_saelens(tiny(**spec))
    assert "\n" not in str(caught.value)


def test_a_saelens_older_than_6_is_told_apart(monkeypatch):
    old = types.ModuleType("sae_lens")
    old.SAE = type("SAE", (), {})
    monkeypatch.setitem(sys.modules, "sae_lens", old)
    with pytest.raises(MissingExtra, match="older than 6"):
        to_saelens(tiny(architecture="relu"))


def test_a_broken_saelens_says_what_it_lacks_itself(tmp_path, monkeypatch):
    (tmp_path / "sae_lens.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        to_saelens(tiny(architecture="relu"))


def test_an_architecture_that_this_saelens_does_not_have_yet_is_refused(monkeypatch):
    class Older:
        @classmethod
        def get_sae_config_class_for_architecture(cls, name):
            raise KeyError(name)

        get_sae_class_for_architecture = get_sae_config_class_for_architecture

    module = types.ModuleType("sae_lens")
    module.SAE = Older
    monkeypatch.setitem(sys.modules, "sae_lens", module)
    with pytest.raises(CannotConvert, match="no architecture 'abstopk'"):
        to_saelens(tiny(**CAN["signed"]))


@pytest.mark.parametrize("spec", CAN.values(), ids=CAN)
def test_the_tensors_that_are_handed_over_share_the_saes_memory(spec):
    sae = tiny(**spec)
    facts, tensors = express(sae.cfg, {key: value.data for key, value in sae.named_parameters()})
    own = {value.data_ptr() for value in sae.parameters()}
    assert {value.data_ptr() for value in tensors.values()} == own
    assert tensors["W_enc"].shape == (facts["d_in"], facts["d_sae"])
    assert facts["dtype"] == "float32"


def test_a_scale_is_folded_into_copies():
    cfg = SAEConfig.from_json(
        {
            "architecture": "relu",
            "d_in": 2,
            "d_sae": 3,
            "input_norm": {"kind": "scale", "factor": 4},
        }
    )
    ones = {key: torch.ones(shape) for key, shape in cfg.tensor_shapes().items()}
    sae = build_sae(cfg, ones)
    _, tensors = express(sae.cfg, {key: value.data for key, value in sae.named_parameters()})
    assert float(tensors["W_enc"][0, 0]) == 4
    assert float(sae.W_enc[0, 0]) == 1
