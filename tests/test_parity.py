"""Every foreign format and variant computes what its authors' own formula computes."""

import pytest
import torch

from saezoo.errors import FormatError
from saezoo.formats import detect
from saezoo.load import load_sae
from saezoo.numerics import TOLERANCE, close, largest_difference
from tests.origins import ALL, dictionary_learning, sparsify
from tests.origins._origin import D, N

each_origin = pytest.mark.parametrize("origin", ALL, ids=str)


def load(origin, folder, seed, dtype=torch.float64):
    """The SAE in float64, in which no near-tie is decided by rounding, and the checkpoint's
    tensors.
    """
    tensors = origin.tensors(torch.Generator().manual_seed(seed))
    sae = load_sae(origin.write(folder, tensors), dtype=dtype)
    return sae, {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in tensors.items()
    }


@each_origin
@pytest.mark.parametrize("seed", range(4))
def test_a_loaded_sae_computes_what_its_origin_computes(origin, seed, tmp_path):
    sae, tensors = load(origin, tmp_path, seed)
    x = (
        torch.randn(64, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 50))
        * 2
        + 1
    )
    features, out = origin.encode(tensors, x), origin.forward(tensors, x)
    assert (features != 0).any(0).sum() > 3
    assert close(sae.encode(x), features)
    assert close(sae.encode_sparse(x).to_dense(), features)
    assert close(sae(x), out)
    assert close(sae.decode(sae.encode(x), x), out)
    assert close(sae(x.view(4, 4, 4, D)).view_as(out), out)
    assert torch.equal(sae.encode_sparse(x).counts, (features != 0).sum(-1))


@each_origin
def test_in_float32_it_is_as_near_as_float32_allows(origin, tmp_path):
    sae, tensors = load(origin, tmp_path, 0, torch.float32)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(9))
    assert close(sae.encode(x), origin.encode(tensors, x))
    assert close(sae(x), origin.forward(tensors, x))


@each_origin
def test_a_known_mistake_would_be_seen(origin, tmp_path):
    sae, tensors = load(origin, tmp_path, 0)
    x = torch.randn(64, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 2 + 1
    seen = [largest_difference(mistake(tensors, x), sae(x)) for mistake in origin.mistakes]
    assert all(difference > 100 * TOLERANCE[torch.float32] for difference in seen)


@each_origin
def test_the_files_say_which_format_they_are(origin, tmp_path):
    path = origin.write(tmp_path, origin.tensors(torch.Generator().manual_seed(0)))
    assert detect(path) == origin.format
    sae = load_sae(path)
    assert (sae.d_in, sae.d_sae) == (D, N)


@each_origin
def test_foreign_matrices_are_views_of_the_file_until_something_needs_another_layout(
    origin, tmp_path
):
    sae, _ = load(origin, tmp_path, 0, None)
    flat = [value for value in (sae.W_enc_rows, sae.W_dec) if not value.is_contiguous()]
    assert all(value.T.is_contiguous() for value in flat)


SITES = [
    ("layers.10", "layers.10", 10, "resid_post", "output", "blocks.10.hook_resid_post"),
    ("layers.3.mlp", "layers.3.mlp", 3, "mlp_out", "output", "blocks.3.hook_mlp_out"),
    ("h.4.attn", "h.4.attn", 4, "attn_out", "output", "blocks.4.hook_attn_out"),
    (
        "gpt_neox.layers.2.attention",
        "gpt_neox.layers.2.attention",
        2,
        "attn_out",
        "output",
        "blocks.2.hook_attn_out",
    ),
    ("embed_tokens", "embed_tokens", None, "embed", "output", "hook_embed"),
]


@pytest.mark.parametrize(("folder", "module", "layer", "point", "side", "hook"), SITES)
def test_the_hookpoint_of_a_sparsify_folder_is_its_site(
    folder, module, layer, point, side, hook, tmp_path
):
    origin = sparsify.ORIGINS[0]
    path = origin.write(tmp_path, origin.tensors(torch.Generator().manual_seed(0)))
    site = load_sae(path.rename(tmp_path / folder)).cfg.site
    assert (site.module, site.layer, site.point, site.side, site.hook_name) == (
        module,
        layer,
        point,
        side,
        hook,
    )


def test_a_transcoder_reads_its_modules_input_and_writes_its_output(tmp_path):
    origin = next(origin for origin in sparsify.ORIGINS if origin.name == "transcoder")
    cfg = load_sae(origin.write(tmp_path, origin.tensors(torch.Generator().manual_seed(0)))).cfg
    assert (cfg.site.module, cfg.site.side, cfg.site.point) == ("layers.3.mlp", "input", "mlp_in")
    assert (cfg.out_site.module, cfg.out_site.side, cfg.out_site.point) == (
        "layers.3.mlp",
        "output",
        "mlp_out",
    )


DL_SITES = [
    (
        {},
        {"io": "out"},
        ("gpt_neox.layers.3", 3, "resid_post", "output", "blocks.3.hook_resid_post"),
    ),
    (
        {"lm_name": "google/gemma-2-2b"},
        {},
        ("model.layers.3", 3, "resid_post", "output", "blocks.3.hook_resid_post"),
    ),
    (
        {"submodule_name": "mlp_layer_3"},
        {},
        ("gpt_neox.layers.3.mlp", 3, "mlp_out", "output", "blocks.3.hook_mlp_out"),
    ),
    ({}, {"io": "in"}, ("gpt_neox.layers.3", 3, None, "input", None)),
    (
        {"submodule_name": "model.layers.7.mlp", "layer": 7},
        {},
        ("model.layers.7.mlp", 7, None, "output", None),
    ),
    ({"submodule_name": None}, {}, (None, 3, None, "output", None)),
]


@pytest.mark.parametrize(("trainer", "buffer", "expected"), DL_SITES, ids=str)
def test_the_site_of_a_dictionary_is_what_its_config_says_and_no_guess(
    trainer, buffer, expected, tmp_path
):
    import json

    origin = dictionary_learning.ORIGINS[0]
    path = origin.write(tmp_path, origin.tensors(torch.Generator().manual_seed(0)))
    data = json.loads((path / "config.json").read_text())
    data = {"trainer": data["trainer"] | trainer, "buffer": buffer}
    (path / "config.json").write_text(json.dumps(data))
    site = load_sae(path).cfg.site
    assert (site.module, site.layer, site.point, site.side, site.hook_name) == expected


def test_a_bare_topk_file_is_refused_because_two_classes_store_the_same_tensors(tmp_path):
    origin = next(origin for origin in dictionary_learning.ORIGINS if origin.name == "BatchTopKSAE")
    path = origin.write(tmp_path, origin.tensors(torch.Generator().manual_seed(0)))
    (path / "config.json").unlink()
    with pytest.raises(FormatError, match="AutoEncoderTopK or BatchTopKSAE"):
        load_sae(path)


def test_an_unset_threshold_is_told_in_the_notes(tmp_path):
    origin = next(o for o in dictionary_learning.ORIGINS if "unset" in o.name)
    sae, _ = load(origin, tmp_path, 0)
    assert "unset" in sae.cfg.notes["threshold"]
