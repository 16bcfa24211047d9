"""Formats that are one file a layer, or a small folder: what their configs may say, where k comes
from, what the notes say, and where an SAE belongs.
"""

import json

import pytest
import torch

from saezoo.entry import Entry
from saezoo.errors import ConfigError, FormatError, SaezooError
from saezoo.formats import detect, esmc, goodfire, kissane_attn, qwen_scope
from saezoo.load import load_sae
from tests.origins import esmc as cambrian
from tests.origins import goodfire as good
from tests.origins import interplm, mlsae
from tests.origins import kissane_attn as kissane
from tests.origins import qwen_scope as qwen
from tests.origins._origin import D, K, N


def write(origin, folder):
    return origin.write(folder, origin.tensors(torch.Generator().manual_seed(0)))


def tensors(origin):
    return origin.tensors(torch.Generator().manual_seed(0))


def reconfigure(path, name, change):
    config = path.with_name(name) if path.is_file() else path / name
    data = json.loads(config.read_text()) | change
    config.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


WRONG = [
    (mlsae.ORIGINS[0], "config.json", {"k": 0}, "k is 0"),
    (mlsae.ORIGINS[0], "config.json", {"k": ...}, "k is None"),
    (mlsae.ORIGINS[0], "config.json", {"k": N + 1}, "more than d_sae"),
    (mlsae.ORIGINS[0], "config.json", {"standardize": "yes"}, "standardize is 'yes'"),
    (mlsae.ORIGINS[0], "config.json", {"n_inputs": 7}, "n_inputs is 7, but the tensors have 6"),
    (mlsae.ORIGINS[0], "config.json", {"n_latents": "many"}, "n_latents is 'many'"),
    (qwen.ORIGINS[0], "config.json", {"k": -1}, "k is -1"),
    (qwen.ORIGINS[0], "config.json", {"k": ...}, "nothing says k"),
    (qwen.ORIGINS[2], "config.json", {"k": 4}, "k is 4, but the repo's name says 3"),
    (qwen.ORIGINS[0], "config.json", {"d_model": 7}, "d_model is 7, but the tensors have 6"),
    (qwen.ORIGINS[0], "config.json", {"d_sae": 7}, "d_sae is 7, but the tensors have 24"),
    (cambrian.ORIGINS[0], "config.json", {"k": True}, "k is True"),
    (cambrian.ORIGINS[0], "config.json", {"k": ...}, "nothing says k"),
    (cambrian.ORIGINS[0], "config.json", {"d_model": 7}, "d_model is 7"),
    (cambrian.ORIGINS[0], "config.json", {"codebook_dim": 7}, "codebook_dim is 7"),
    (cambrian.ORIGINS[0], "config.json", {esmc.UPDATE: "yes"}, "is 'yes', expected true or false"),
    (kissane.ORIGINS[0], f"{kissane.NAME}_cfg.json", {"act_size": 7}, "act_size is 7"),
    (kissane.ORIGINS[0], f"{kissane.NAME}_cfg.json", {"dict_size": 0}, "dict_size is 0"),
]


@pytest.mark.parametrize(
    ("origin", "config", "change", "said"), WRONG, ids=lambda value: str(value)[:40]
)
def test_values_that_decide_arithmetic_must_be_known(origin, config, change, said, tmp_path):
    path = write(origin, tmp_path)
    reconfigure(path, config, change)
    with pytest.raises(SaezooError) as caught:
        load_sae(path)
    assert isinstance(caught.value, FormatError | ConfigError)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_k_of_qwen_scope_is_the_registrys_where_nothing_else_says_it(tmp_path):
    path = qwen.writer(repo="copied", cfg=None)(tmp_path, tensors(qwen.ORIGINS[0]))
    assert qwen_scope.read(path, Entry(source="hf://me/copied", k=5)).cfg.k == 5
    with pytest.raises(FormatError, match=r"config.json or name \(…-L0_100\)"):
        qwen_scope.read(path, None)


def test_the_site_of_qwen_scope_is_of_its_own_names_and_none_where_they_are_changed(tmp_path):
    path = write(qwen.ORIGINS[1], tmp_path)
    site = load_sae(path).cfg.site
    assert (site.model, site.layer, site.module, site.point) == (
        "Qwen/Qwen3-1.7B-Base",
        7,
        "model.layers.7",
        "resid_post",
    )
    moved = path.rename(path.with_name("seven.sae.pt"))
    assert load_sae(moved).cfg.site is None


def test_the_site_of_kissanes_saes_is_the_configs_and_heads_are_flat(tmp_path):
    site = load_sae(write(kissane.ORIGINS[0], tmp_path)).cfg.site
    assert (site.model, site.layer, site.point, site.side) == (
        "openai-community/gpt2",
        5,
        "attn_z",
        "input",
    )
    assert (site.module, site.hook_name) == ("transformer.h.5.attn.c_proj", "blocks.5.attn.hook_z")


def test_without_its_config_a_file_is_only_kissanes_where_it_is_said_to_be(tmp_path):
    path = write(kissane.ORIGINS[0], tmp_path)
    expected = load_sae(path)
    path.with_name(f"{kissane.NAME}_cfg.json").unlink()
    assert detect(path) != "kissane_attn"
    with pytest.raises(FormatError, match="pre_bias"):
        load_sae(path)
    told = load_sae(path, format="kissane_attn")
    x = torch.randn(5, D)
    assert torch.equal(told(x), expected(x))
    assert told.cfg.site is None
    assert kissane_attn.read(path, Entry(source="hf://a/b", d_in=D, d_sae=N)).cfg.d_sae == N


@pytest.mark.parametrize("name", ["goodfire", "deepseek_r1"])
def test_the_file_decides_between_both_namings_whichever_format_is_named(name, tmp_path):
    for number, origin in enumerate((good.ORIGINS[0], good.ORIGINS[3])):
        path = write(origin, tmp_path / str(number))
        x = torch.randn(5, D)
        assert torch.equal(load_sae(path, format=name)(x), load_sae(path)(x))
    assert goodfire.read(path, None).cfg.site is None


def test_a_factor_that_is_in_the_file_and_not_applied_is_told_in_the_notes(tmp_path):
    assert load_sae(write(interplm.ORIGINS[0], tmp_path / "a")).cfg.notes is None
    notes = load_sae(write(interplm.ORIGINS[2], tmp_path / "b")).cfg.notes
    assert "not applied" in notes["activation_rescale_factor"]
    notes = load_sae(write(cambrian.ORIGINS[0], tmp_path / "c")).cfg.notes
    assert "not applied" in notes["normalize_sae"]
    assert load_sae(write(cambrian.ORIGINS[1], tmp_path / "d")).cfg.notes is None


def test_an_sae_of_what_a_block_adds_says_so(tmp_path):
    write_it = cambrian.writer(cambrian.CONFIG | {esmc.UPDATE: True})
    path = write_it(tmp_path, tensors(cambrian.ORIGINS[0]))
    assert "minus the state before" in load_sae(path).cfg.notes["input"]


def test_k_of_esm_c_is_the_configs_else_the_registrys(tmp_path):
    path = write(cambrian.ORIGINS[0], tmp_path)
    path.with_name("config.json").unlink()
    assert esmc.read(path, Entry(source="hf://a/b", k=5)).cfg.k == 5
    with pytest.raises(FormatError, match="nothing says k"):
        load_sae(path)


def test_a_folder_of_both_files_of_interplm_wants_one_named(tmp_path):
    path = write(interplm.ORIGINS[0], tmp_path)
    with pytest.raises(FormatError, match="name it"):
        load_sae(path.parent, format="interplm")
    with pytest.raises(FormatError, match="It holds ae_normalized.pt: name a file, not the folder"):
        load_sae(path.parent)


def test_features_that_never_fired_have_no_direction_and_harm_nobody(tmp_path):
    sae = load_sae(write(interplm.ORIGINS[0], tmp_path), verify=True)
    assert not sae.W_dec[3].any()
    assert torch.isfinite(sae(torch.randn(5, D))).all()


@pytest.mark.parametrize("k", [K, N])
def test_relu_of_the_k_largest_changes_nothing_above_zero(k, tmp_path):
    path = write(mlsae.ORIGINS[0], tmp_path)
    reconfigure(path, "config.json", {"k": k})
    features = load_sae(path).encode(torch.randn(50, D))
    assert (features >= 0).all()
    assert int((features > 0).sum(-1).max()) <= k
