"""Gemma Scope 1 and 2: what the names of repos and folders say, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saezoo.config import Site
from saezoo.entry import Entry
from saezoo.errors import FormatError, MissingFile, SaezooError, UnsafeFile
from saezoo.formats import gemma_scope, gemma_scope_2
from tests.origins import gemma_scope as first
from tests.origins import gemma_scope_2 as second
from tests.origins._origin import D, N


def made(origin):
    return origin.tensors(torch.Generator().manual_seed(0))


def said(site):
    return site and (site.model, site.module, site.layer, site.point, site.side, site.hook_name)


def refused(read, path, error, what, entry=None):
    with pytest.raises(error) as caught:
        read(path, entry)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


G2, G9 = "google/gemma-2-2b", "google/gemma-2-9b"
MLP = (G2, "model.layers.3.post_feedforward_layernorm", 3, "mlp_out", "output")
FIRST = [
    (
        "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
        (G2, "model.layers.20", 20, "resid_post", "output", "blocks.20.hook_resid_post"),
        None,
        71,
    ),
    (
        "gemma-scope-9b-it-res/layer_9/width_1m/average_l0_122",
        (f"{G9}-it", "model.layers.9", 9, "resid_post", "output", "blocks.9.hook_resid_post"),
        None,
        122,
    ),
    (
        "gemma-scope-9b-pt-att/layer_0/width_16k/average_l0_12",
        (G9, "model.layers.0.self_attn.o_proj", 0, "attn_z", "input", "blocks.0.attn.hook_z"),
        None,
        12,
    ),
    (
        "gemma-scope-2b-pt-mlp/layer_3/width_65k/average_l0_5",
        (*MLP, "blocks.3.hook_mlp_out"),
        None,
        5,
    ),
    (
        "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54",
        (G2, None, 3, "mlp_in", "output", "blocks.3.ln2.hook_normalized"),
        (*MLP, "blocks.3.hook_mlp_out"),
        54,
    ),
    (
        "gemma-scope-9b-pt-res/embedding/width_4k/average_l0_14",
        (G9, "model.layers.0", None, "embed", "input", "hook_embed"),
        None,
        14,
    ),
    ("mine/layer_7/width_16k/canonical", (None, None, 7, None, "output", None), None, None),
    ("mine", None, None, None),
]


@pytest.mark.parametrize("told", ["folders", "registry"])
@pytest.mark.parametrize(("name", "site", "out_site", "l0"), FIRST)
def test_names_say_site_and_l0_of_gemma_scope(name, site, out_site, l0, told, tmp_path):
    repo, _, folder = name.partition("/")
    entry = None
    if told == "registry":
        entry = Entry(source=f"hf://google/{repo}", path=folder)
        repo, folder = "somewhere", "else"
    cfg = gemma_scope.read(first.writer(repo, folder)(tmp_path, made(first.ORIGINS[0])), entry).cfg
    assert (said(cfg.site), said(cfg.out_site)) == (site, out_site)
    assert (cfg.metrics or {}).get("l0") == l0
    assert cfg.is_transcoder == (out_site is not None)
    assert (cfg.input_norm is not None) == (cfg.site is not None and cfg.site.point == "embed")


def test_a_gemma_scope_transcoder_reads_the_stream_without_the_norms_gain(tmp_path):
    path = first.writer(first.TRANSCODERS)(tmp_path, made(first.ORIGINS[0]))
    assert gemma_scope.read(path, None).cfg.site.rms_gain is False


def test_the_registry_wins_over_names(tmp_path):
    path = first.writer()(tmp_path, made(first.ORIGINS[0]))

    def read(**site):
        return gemma_scope.read(path, Entry(source=str(path), site=Site(**site))).cfg

    assert read(model="mine").site.model == "mine"
    assert read(model="mine").site.module == "model.layers.20"
    # another place: nothing of what the names say is about it
    assert read(layer=5) == read(layer=5).model_copy(update={"site": Site(layer=5)})
    assert read(point="embed").input_norm is not None


def changed(tensors, **changes):
    return {key: value for key, value in (tensors | changes).items() if value is not None}


FIRST_REFUSED = [
    ({"W_enc": None}, "'W_enc'"),
    ({"threshold": None}, "'threshold'"),
    ({"w_enc": torch.zeros(D, N)}, "w_enc"),
    ({"scaling_factor": torch.ones(N)}, "scaling_factor"),
    ({"W_enc": torch.zeros(D, N, 1)}, "2 dimensions"),
    ({"W_enc": torch.zeros(0, N)}, "d_in"),
    ({"threshold": torch.zeros(N, 1)}, "1 dimensions"),
    ({"b_dec": torch.zeros(D, dtype=torch.int64)}, "<i8"),
]


@pytest.mark.parametrize(("changes", "what"), FIRST_REFUSED, ids=str)
def test_missing_unknown_and_misshapen_arrays_are_named(changes, what, tmp_path):
    path = first.writer()(tmp_path, changed(made(first.ORIGINS[0]), **changes))
    refused(gemma_scope.read, path, SaezooError, what)


@pytest.mark.parametrize("fact", [{"d_in": 7}, {"d_sae": 25}], ids=str)
@pytest.mark.parametrize(
    ("origins", "form"), [(first, gemma_scope), (second, gemma_scope_2)], ids=["1", "2"]
)
def test_a_file_that_contradicts_the_registry_is_refused(origins, form, fact, tmp_path):
    path = origins.writer()(tmp_path, made(origins.ORIGINS[0]))
    refused(form.read, path, FormatError, "registry states", Entry(source=str(path), **fact))


def test_pickled_objects_in_an_archive_are_refused(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{}], dtype=object))
    refused(gemma_scope.read, tmp_path, UnsafeFile, "Python objects")
    refused(gemma_scope.read, tmp_path / "none", MissingFile, "params.npz")


B1 = "google/gemma-3-1b-pt"
OUT = (B1, "model.layers.12.post_feedforward_layernorm", 12, "mlp_out", "output")
SECOND = {
    "resid_post": (B1, "model.layers.12", 12, "resid_post", "output", "blocks.12.hook_resid_post"),
    "attn_out": (
        B1,
        "model.layers.12.self_attn.o_proj",
        12,
        "attn_z",
        "input",
        "blocks.12.attn.hook_z",
    ),
    "mlp_out": (*OUT, "blocks.12.hook_mlp_out"),
    "transcoder": (
        B1,
        "model.layers.12.pre_feedforward_layernorm",
        12,
        "mlp_in",
        "output",
        None,
    ),
}


@pytest.mark.parametrize("cfg", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize("every", [True, False], ids=["all", "some"])
@pytest.mark.parametrize("what", SECOND)
def test_config_or_names_say_the_site_of_gemma_scope_2(what, every, cfg, tmp_path):
    path = second.writer(what, every=every, cfg=cfg)(tmp_path, made(second.ORIGINS[0]))
    got = gemma_scope_2.read(path, None).cfg
    assert said(got.site) == SECOND[what]
    assert said(got.out_site) == (SECOND["mlp_out"] if what == "transcoder" else None)
    assert got.site.rms_gain is (True if what == "transcoder" else None)


@pytest.mark.parametrize(
    ("name", "repo", "model"),
    [
        ("google/gemma-3-4b-it", "", "google/gemma-3-4b-it"),
        ("gemma-v3-27b-it", "", "google/gemma-3-27b-it"),
        ("gemma-v3-270m-pt", "", "google/gemma-3-270m"),
        (None, "gemma-scope-2-270m-it", "google/gemma-3-270m-it"),
        (None, "gemma-scope-2-270m-pt", "google/gemma-3-270m"),
        (None, "gemma-scope-2-12b-pt", "google/gemma-3-12b-pt"),
    ],
)
def test_the_host_of_gemma_scope_2_has_the_name_that_it_has_on_the_hub(name, repo, model, tmp_path):
    path = second.writer(model_name=name)(tmp_path, made(second.ORIGINS[0]))
    entry = Entry(source=f"hf://google/{repo}") if repo else None
    assert gemma_scope_2.read(path, entry).cfg.site.model == model


def test_a_hook_point_that_nobody_knows_is_no_site_of_another_name(tmp_path):
    path = second.writer(hf_hook_point_in="model.layers.3.mlp.up_proj.output")(
        tmp_path, made(second.ORIGINS[0])
    )
    site = gemma_scope_2.read(path, None).cfg.site
    assert said(site) == (B1, "model.layers.3.mlp.up_proj", 3, None, "output", None)


def test_a_transcoder_may_write_another_width_than_it_reads(tmp_path):
    tensors = made(second.ORIGINS[0]) | {
        "w_dec": torch.ones(N, D + 2),
        "b_dec": torch.ones(D + 2),
        "affine_skip_connection": torch.ones(D, D + 2),
    }
    path = second.writer("transcoder", affine=True)(tmp_path, tensors)
    weights = gemma_scope_2.read(path, None)
    assert (weights.cfg.d_in, weights.cfg.d_out) == (D, D + 2)
    shapes = {name: tuple(value.shape) for name, value in weights.tensors.items()}
    assert shapes == weights.cfg.tensor_shapes()


SECOND_REFUSED = [
    ({"architecture": "topk"}, {}, "topk"),
    ({"architecture": None}, {}, "None"),
    ({"type": "clt"}, {}, "cross-layer"),
    ({"type": "crosscoder"}, {}, "cross-layer"),
    ({"type": "lorsa"}, {}, "lorsa"),
    ({"type": ["sae"]}, {}, "sae"),
    ({"width": N + 1}, {}, "width"),
    ({"width": "16k"}, {}, "width"),
    ({"affine_connection": True}, {}, "affine_skip_connection"),
    ({"affine_connection": "no"}, {}, "affine_connection"),
    ({}, {"affine_skip_connection": torch.zeros(D, D)}, "affine_connection"),
    ({}, {"w_enc": None}, "'w_enc'"),
    ({}, {"threshold": None}, "'threshold'"),
    ({}, {"w_gate": torch.zeros(D, N)}, "w_gate"),
    ({}, {"w_enc": torch.zeros(2, D, N)}, "cross-layer"),
    ({}, {"w_dec": torch.zeros(N, 2, D)}, "cross-layer"),
    ({}, {"b_enc": torch.zeros(1, N)}, "1 dimensions"),
]


@pytest.mark.parametrize(("config", "tensors", "what"), SECOND_REFUSED, ids=str)
def test_what_gemma_scope_2_does_not_have_is_refused(config, tensors, what, tmp_path):
    path = second.writer(**config)(tmp_path, changed(made(second.ORIGINS[0]), **tensors))
    refused(gemma_scope_2.read, path, FormatError, what)


def test_a_folder_called_affine_must_have_its_skip(tmp_path):
    path = second.writer("transcoder", affine=True, cfg=False)(tmp_path, made(second.ORIGINS[0]))
    refused(gemma_scope_2.read, path, FormatError, "called affine")


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_one_layers_file_of_a_cross_layer_set_is_not_taken_for_an_sae(kind, tmp_path):
    folder = tmp_path / kind / "layer_7_13_17_22_width_262k_l0_medium"
    folder.mkdir(parents=True)
    save_file(made(second.ORIGINS[0]), folder / "params_layer_0.safetensors")
    refused(gemma_scope_2.read, folder, FormatError, "cross-layer")
    refused(gemma_scope_2.read, folder / "params_layer_0.safetensors", FormatError, "cross-layer")
    (folder / "params_layer_0.safetensors").rename(folder / "params.safetensors")
    refused(gemma_scope_2.read, folder, FormatError, "folder says")


@pytest.mark.parametrize("content", ["[]", "{", "\xff"])
def test_a_broken_config_is_refused(content, tmp_path):
    path = second.writer()(tmp_path, made(second.ORIGINS[0]))
    (path / "config.json").write_bytes(content.encode("latin-1"))
    refused(gemma_scope_2.read, path, FormatError, "config.json")


def test_unknown_keys_are_logged(tmp_path, caplog):
    path = second.writer(colour="red")(tmp_path, made(second.ORIGINS[0]))
    with caplog.at_level("INFO", logger="saezoo"):
        gemma_scope_2.read(path, None)
    assert "does not have: ['colour']" in caplog.text
