"""The seven classes of dictionary_learning, as its own trainers save them."""

import json
from functools import partial

import pytest
import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.errors import FormatError
from saezoo.load import load_sae
from saezoo.numerics import TOLERANCE, close, largest_difference
from saezoo.sae import build_sae
from saezoo.save import save_sae
from tests.origins.dictionary_learning import ORIGINS
from tests_peers._compare import DTYPES, D, K, N, check_loaded, inputs, randomise

COMMON = {
    "steps": 10,
    "activation_dim": D,
    "dict_size": N,
    "layer": 3,
    "lm_name": "EleutherAI/pythia-70m-deduped",
    "submodule_name": "resid_post_layer_3",
    "device": "cpu",
}
SPARSE = {"k": K, "warmup_steps": 1, "threshold_start_step": 1}
WARM = {"warmup_steps": 1, "sparsity_warmup_steps": 2}
ANNEAL = WARM | {"anneal_start": 3, "n_sparsity_updates": 2}
GROUPS = {"group_fractions": [0.25, 0.25, 0.5]}

TRAINERS = {
    "AutoEncoder": (StandardTrainer, WARM),
    "AutoEncoder, April update": (StandardTrainerAprilUpdate, WARM),
    "AutoEncoder, p-annealed": (PAnnealTrainer, ANNEAL),
    "AutoEncoderNew": (StandardTrainerAprilUpdate, WARM | {"dict_class": AutoEncoderNew}),
    "GatedAutoEncoder": (GatedSAETrainer, WARM),
    "JumpReluAutoEncoder": (JumpReluTrainer, WARM),
    "AutoEncoderTopK": (TopKTrainer, SPARSE),
    "BatchTopKSAE": (BatchTopKTrainer, SPARSE),
    "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKTrainer, SPARSE | GROUPS),
}
each = pytest.mark.parametrize("name", TRAINERS)


def saved(name, folder, *, scale=None, threshold=0.8):
    """A trainer's dictionary with random weights, and the folder as trainSAE of training.py leaves
    it.
    """
    trainer_class, options = TRAINERS[name]
    trainer = trainer_class(**COMMON | options)
    ae = randomise(trainer.ae)
    if "threshold" in dict(ae.named_buffers()):
        ae.threshold.fill_(threshold)
    if scale is not None:
        ae.scale_biases(scale)
    config = {"trainer": trainer.config, "buffer": {"io": "out", "d_submodule": D}}
    if name == "AutoEncoderNew":
        # no trainer of 0.1.0 makes this class and says so; earlier ones wrote the class' name
        config["trainer"] |= {"dict_class": "AutoEncoderNew"}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    final = {key: value.cpu() for key, value in ae.state_dict().items()}
    torch.save(final, folder / "ae.pt")
    return ae.eval()


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads(name, dtype, tmp_path, same):
    ae = saved(name, tmp_path).to(dtype)
    check_loaded(tmp_path, ae.encode, ae, same, dtype)
    assert load_sae(tmp_path).cfg.hook_name == "blocks.3.hook_resid_post"


@each
def test_reads_what_scale_biases_left(name, tmp_path, same):
    """As trainSAE does at the end when activations were normalised in training."""
    if name == "AutoEncoderNew":  # the one class that has no scale_biases
        assert not hasattr(AutoEncoderNew(D, N), "scale_biases")
        return
    ae = saved(name, tmp_path, scale=1.75)
    check_loaded(tmp_path, ae.encode, ae, same, torch.float32)


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_reads_an_unset_threshold(name, tmp_path, same):
    ae = saved(name, tmp_path, threshold=-1.0)
    check_loaded(tmp_path, ae.encode, ae, same, torch.float32)


def test_reads_a_matryoshka_in_pieces_of_a_context(tmp_path, same):
    ae = saved("MatryoshkaBatchTopKSAE", tmp_path)
    x = inputs(torch.float32)
    same(load_sae(tmp_path)(x.view(4, 16, D)), ae(x).view(4, 16, D))


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_without_a_config_the_two_that_store_the_same_are_refused(name, tmp_path):
    saved(name, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FormatError, match="AutoEncoderTopK or BatchTopKSAE"):
        load_sae(tmp_path)


CLASSES = {
    "AutoEncoder": partial(AutoEncoder.from_pretrained, normalize_decoder=False),
    "AutoEncoderNew": AutoEncoderNew.from_pretrained,
    "GatedAutoEncoder": GatedAutoEncoder.from_pretrained,
    "JumpReluAutoEncoder": JumpReluAutoEncoder.from_pretrained,
    "AutoEncoderTopK": AutoEncoderTopK.from_pretrained,
    "BatchTopKSAE": BatchTopKSAE.from_pretrained,
    "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE.from_pretrained,
}


@each
def test_what_was_read_and_written_again_is_loaded_by_the_package(name, tmp_path, same):
    (tmp_path / "a").mkdir()
    ae = saved(name, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="dictionary_learning")
    again, x = loaded(tmp_path / "b"), inputs(torch.float32)
    # a Matryoshka is a BatchTopK once it is trained
    expected = type(ae) if name != "MatryoshkaBatchTopKSAE" else BatchTopKSAE
    assert type(again) is expected
    same(again.encode(x), ae.encode(x))
    same(again(x), ae(x))


SCALE = {"kind": "scale", "factor": 4.0}  # folded into float32 without rounding
WRITTEN = {
    "relu": {"architecture": "relu", "subtract_b_dec": True},
    "relu, b_dec not subtracted": {"architecture": "relu"},
    "relu, scaled": {"architecture": "relu", "subtract_b_dec": True, "input_norm": SCALE},
    "gated": {"architecture": "gated", "subtract_b_dec": True},
    "jumprelu": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk", "k": K, "subtract_b_dec": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WRITTEN)
def test_loads_what_saezoo_writes(name, dtype, tmp_path, same):
    cfg = SAEConfig.from_json({"d_in": D, "d_sae": N} | WRITTEN[name])
    generator = torch.Generator().manual_seed(0)
    shapes = cfg.tensor_shapes().items()
    sae = build_sae(cfg, {key: torch.randn(shape, generator=generator) for key, shape in shapes})
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="dictionary_learning")
    ae, sae, x = loaded(tmp_path / "b").to(dtype), sae.to(dtype), inputs(dtype)
    same(ae.encode(x), sae.encode(x))
    same(ae(x), sae(x))


def loaded(folder):
    """The package's dictionary of a folder, by the class that its config names."""
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    k = {"k": trainer["k"]} if "k" in trainer else {}
    return CLASSES[trainer["dict_class"]](folder / "ae.pt", **k)


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
def test_the_origin_in_our_tests_is_the_package(origin, tmp_path, same):
    tensors = origin.tensors(torch.Generator().manual_seed(0))
    path = origin.write(tmp_path, tensors)
    ae = CLASSES[origin.name.partition(",")[0]](path / "ae.pt" if path.is_dir() else path).double()
    tensors = {
        key: value.double() if value.is_floating_point() else value
        for key, value in tensors.items()
    }
    x = inputs(torch.float64)
    same(origin.encode(tensors, x), ae.encode(x))
    same(origin.forward(tensors, x), ae(x))


def test_from_pretrained_rescales_features_and_not_the_output(tmp_path):
    """A disagreement of the package with itself: AutoEncoder.from_pretrained makes decoder columns
    unit length by default, so its features are not those that were trained; saezoo keeps the
    file's, and the norms are the factor between the two.
    """
    ae = saved("AutoEncoder", tmp_path)
    rescaled, x = AutoEncoder.from_pretrained(tmp_path / "ae.pt"), inputs(torch.float32)
    sae = load_sae(tmp_path)
    assert close(sae(x), rescaled(x))
    assert close(sae.encode(x), ae.encode(x))
    assert close(sae.encode(x) * sae.W_dec.norm(dim=1), rescaled.encode(x))
    assert largest_difference(sae.encode(x), rescaled.encode(x)) > 100 * TOLERANCE[x.dtype]
    as_it_is = AutoEncoder.from_pretrained(tmp_path / "ae.pt", normalize_decoder=False)
    assert close(sae.encode(x), as_it_is.encode(x))


def test_autoencodernew_gives_other_features_beside_the_output_than_alone(tmp_path):
    """A disagreement of the package with itself: forward(output_features=True) returns features
    times the decoder norms, encode does not. saezoo's are encode's.
    """
    ae, x = saved("AutoEncoderNew", tmp_path), inputs(torch.float32)
    _, beside = ae(x, output_features=True)
    sae = load_sae(tmp_path)
    assert close(sae.encode(x), ae.encode(x))
    assert close(sae.encode(x) * sae.W_dec.norm(dim=1), beside)
    assert not close(beside, ae.encode(x))
