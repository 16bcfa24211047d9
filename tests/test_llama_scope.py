"""OpenMOSS' three formats: what their configs may say and what is refused, where an SAE belongs,
and that nothing is copied which need not be.
"""

import json
import math

import pytest
import torch

from saezoo.errors import FormatError, SaezooError
from saezoo.formats import detect, llama_scope_r1, llamascopium
from saezoo.formats import llama_scope as reader
from saezoo.load import load_sae
from tests.origins import llama_scope as scope
from tests.origins import llama_scope_r1 as r1
from tests.origins import llamascopium as scopium
from tests.origins._origin import N

OTHER = {"hook_point_out": "blocks.15.hook_mlp_out"}
NORM = "dataset_average_activation_norm"

WRONG = [
    # writer, what the config says, what is said of it
    (scope, {"act_fn": "gelu"}, "act_fn 'gelu' is not known"),
    (scope, {"act_fn": 3}, "act_fn 3 is not known"),
    (scope, {"norm_activation": "batch-wise"}, "'batch-wise' depends on the batch"),
    (scope, {"norm_activation": "layer"}, "'layer' is not known"),
    (scope, {"norm_activation": "token-wise"} | OTHER, "the norm of its output is not known"),
    (scope, {NORM: None}, f"needs {NORM}, not None"),
    (scope, {NORM: {"in": 3.0}}, f"{NORM}.out is None"),
    (scope, {NORM: {"in": 0, "out": 1}}, f"{NORM}.in is 0, expected a positive number"),
    (scope, {NORM: {"in": math.inf, "out": 1}}, "expected a positive number"),
    (scope, {NORM: {"in": True, "out": 1}}, "expected a positive number"),
    (scope, {NORM: {"in": 10**400, "out": 1}}, "expected a positive number"),
    (scope, {NORM: {"in": 5e-324, "out": 1}}, "inf, expected a positive number"),
    (scope, {"jump_relu_threshold": -(10**400)}, "expected a number"),
    (scope, {"use_glu_encoder": True}, "(GLU), which has no exact form here"),
    (scope, {"use_decoder_bias": "yes"}, "use_decoder_bias is 'yes'"),
    (scope, {"use_decoder_bias": False}, "decoder.bias"),
    (scope, {"sparsity_include_decoder_norm": 1}, "sparsity_include_decoder_norm is 1"),
    (scope, {"d_model": 7}, "d_model is 7, but the tensors have 6"),
    (scope, {"d_sae": 25}, "d_sae is 25, but the tensors have 24"),
    (scope, {"jump_relu_threshold": "high"}, "jump_relu_threshold is 'high'"),
    (scope, {"jump_relu_threshold": math.nan}, "jump_relu_threshold is nan"),
    (scope, {"act_fn": "topk", "jump_relu_threshold": 0, "top_k": 0}, "top_k is 0"),
    (scope, {"hook_point_in": 3}, "hook_point_in and hook_point_out are 3"),
    (scopium, {"act_fn": "batchlayertopk"}, "act_fn 'batchlayertopk' cannot be read here"),
    (scopium, {"act_fn": "layertopk"}, "act_fn 'layertopk' cannot be read here"),
    (scopium, {"sae_type": "clt"}, "hook_points_in"),
    (scopium, {"sae_type": "crosscoder"}, "hook_points"),
    (scopium, {"sae_type": "lorsa"}, "sparse attention reads a whole context"),
    (scopium, {"sae_type": "molt"}, "linear maps of low rank"),
    (scopium, {"sae_type": 7}, "sae_type 7 cannot be read here: there are sae, crosscoder"),
    (scopium, {"use_glu_encoder": True}, "GLU"),
    (scopium, {"norm_activation": "batch-wise"}, "'batch-wise' depends on the batch"),
    (scopium, {"norm_activation": 3}, "norm_activation 3 is not known"),
    (
        scopium,
        {"norm_activation": "token-wise", "hook_point_in": scopium.INTO},
        "the norm of its output is not known",
    ),
    (scopium, {"expansion_factor": 3}, "expansion_factor is 3.0, but the tensors have 24"),
    (scopium, {"expansion_factor": 1e308}, "expansion_factor is 1e+308"),
    (scopium, {"expansion_factor": 10**400}, "expected a positive number"),
    (scopium, {"expansion_factor": None}, "expansion_factor is None"),
    (scopium, {"d_model": 7}, "d_model is 7"),
    (scopium, {"use_decoder_bias": False}, "b_D"),
    (scopium, {"sparsity_include_decoder_norm": "no"}, "sparsity_include_decoder_norm is 'no'"),
    (scopium, {"hook_point_in": None}, "hook_point_in and hook_point_out are None"),
    (scopium, {"hook_point_in": "blocks.1.other"}, f"{NORM}.blocks.1.other is None"),
    (r1, {"act_fn": "topk"}, "act_fn 'topk' cannot be read here; there are jumprelu, relu"),
    (r1, {"act_fn": "batchtopk"}, "there are jumprelu, relu"),
    (r1, {"sae_type": "mixcoder"}, "sae_type 'mixcoder'"),
    (r1, {"apply_decoder_bias_to_pre_encoder": "yes"}, "apply_decoder_bias_to_pre_encoder"),
]


@pytest.mark.parametrize(("module", "change", "said"), WRONG, ids=lambda value: str(value)[-60:])
def test_values_that_decide_arithmetic_must_be_known(module, change, said, tmp_path):
    origin = module.ORIGINS[0]
    path = module.writer(**change)(tmp_path, origin.tensors(torch.Generator().manual_seed(0)))
    with pytest.raises(FormatError) as caught:
        load_sae(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def write(origin, folder):
    return origin.write(folder, origin.tensors(torch.Generator().manual_seed(0)))


def named(module, name):
    return next(origin for origin in module.ORIGINS if origin.name == name)


def test_two_names_of_the_same_files_are_told_apart_by_the_tensors(tmp_path):
    new, old = write(scopium.ORIGINS[0], tmp_path / "a"), write(r1.ORIGINS[0], tmp_path / "b")
    names = [sorted(item.name for item in folder.iterdir()) for folder in (new, old)]
    assert names[0] == names[1]
    assert (detect(new), detect(old)) == ("llamascopium", "llama_scope_r1")


SITES = [
    # origin, input: layer, point, module and hook; output: point and module
    (
        scope.ORIGINS[0],
        (15, "resid_post", "model.layers.15", "blocks.15.hook_resid_post"),
        None,
    ),
    (
        named(scope, "transcoder"),
        (15, "resid_mid", "model.layers.15.post_attention_layernorm", "blocks.15.hook_resid_mid"),
        ("mlp_out", "model.layers.15.mlp"),
    ),
    (scopium.ORIGINS[0], (9, "mlp_out", None, "blocks.9.hook_mlp_out"), None),
    (
        named(scopium, "transcoder"),
        (9, "mlp_in", None, "blocks.9.ln2.hook_normalized"),
        ("mlp_out", None),
    ),
    (r1.ORIGINS[0], (15, "resid_post", None, "blocks.15.hook_resid_post"), None),
]


@pytest.mark.parametrize(("origin", "site", "out_site"), SITES, ids=str)
def test_the_hook_points_of_the_config_are_the_sites(origin, site, out_site, tmp_path):
    path = write(origin, tmp_path)
    if origin.format == "llama_scope":
        (path / "lm_config.json").write_text(json.dumps({"model_name": "meta-llama/Llama-3.1-8B"}))
    cfg = load_sae(path).cfg
    found = cfg.site
    assert (found.layer, found.point, found.module, found.hook_name) == site
    assert found.model == ("meta-llama/Llama-3.1-8B" if origin.format == "llama_scope" else None)
    assert cfg.is_transcoder == (out_site is not None)
    if out_site is not None:
        assert (cfg.out_site.point, cfg.out_site.module) == out_site


@pytest.mark.parametrize(
    ("read", "origin"),
    [
        (reader.read, named(scope, "bfloat16 file")),
        (llamascopium.read, named(scopium, "bfloat16 file")),
        (llama_scope_r1.read, named(r1, "bfloat16 file")),
    ],
    ids=["llama_scope", "llamascopium", "llama_scope_r1"],
)
def test_scales_and_norms_are_in_the_spec_so_that_no_matrix_is_copied(read, origin, tmp_path):
    tensors = read(write(origin, tmp_path), None).tensors
    assert {tensors[name].dtype for name in ("W_enc_rows", "W_dec")} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
@pytest.mark.parametrize("k", [0, 1.5, None, N + 1])
def test_k_must_be_a_number_of_features(name, k, tmp_path):
    path = write(named(scopium, name), tmp_path)
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(data | {"top_k": k}))
    with pytest.raises(SaezooError, match="top_k is|more than d_sae"):
        load_sae(path)


def test_features_of_llama_scope_are_in_units_of_unit_decoder_columns(tmp_path):
    sae = load_sae(write(scope.ORIGINS[0], tmp_path), dtype=torch.float64)
    features = torch.eye(N, dtype=torch.float64)
    directions = sae.decode(features) - sae.b_dec
    assert torch.allclose(directions.norm(dim=1), torch.ones(N, dtype=torch.float64))
