"""The tree that is published: which files, where, made of what; nothing else is touched."""

import pytest
import torch
from safetensors.torch import load_file

from saezoo.check import GOLDEN_TOKENS, check_sae
from saezoo.config_multi import CLTConfig
from saezoo.errors import BadName, CannotConvert, NotPublishable, PublishError
from saezoo.formats import native
from saezoo.load import load_sae
from saezoo.numerics import close
from saezoo.publishing.pipeline import publish_sae
from saezoo.publishing.sources import find_sources
from saezoo.publishing.targets import FolderTarget, HubTarget, find_target
from saezoo.publishing.tree import Place, stage
from saezoo.registry import expand, parse_release
from tests.tiny_folders import METRICS, at_layer, spec, write_native

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

OWN = ["config.json", "density.png", "golden.safetensors", "sae.safetensors", "stats.safetensors"]
PNG = b"\x89PNG\r\n\x1a\n"


def staged(folder, work, path=None, exports=(), licence=None, place=None):
    sources = find_sources(folder, path, licence)
    return stage(sources, place or Place("my-saes", "my-org/my-saes"), exports, work)


def test_one_sae_goes_to_the_root_or_where_it_is_told(tmp_path):
    folder = write_native(tmp_path / "sae")
    tree = staged(folder, tmp_path)
    assert sorted(tree.staged.files) == OWN
    assert sorted(tree.staged.name_files) == ["README.md", "saezoo.yaml"]
    assert tree.names == ["hf://my-org/my-saes"]
    assert tree.rows[0]["id"] == "layer_3_resid_post"
    tree = staged(folder, tmp_path, path="a/b")
    assert sorted(tree.staged.files) == [f"a/b/{name}" for name in OWN]
    assert tree.names == ["hf://my-org/my-saes/a/b"]
    assert (tree.rows[0]["id"], tree.rows[0]["path"]) == ("a/b", "a/b")


def test_files_are_the_folders_own_and_the_plot_is_drawn(tmp_path):
    folder = write_native(tmp_path / "sae")
    files = staged(folder, tmp_path / "work").staged.files
    for name in set(OWN) - {"density.png"}:
        assert files[name] == folder / name
    first = files["density.png"].read_bytes()
    assert first.startswith(PNG)
    assert staged(folder, tmp_path / "again").staged.files["density.png"].read_bytes() == first


def test_a_row_says_what_the_registry_wants_to_know(tmp_path):
    tree = staged(write_native(tmp_path / "sae"), tmp_path, path="layer_3")
    release = parse_release(tree.staged.name_files["saezoo.yaml"].decode(), "saezoo.yaml")
    home = release.model_copy(update={"shared": {"source": "x"} | release.shared})
    entry = expand(home)["layer_3"]
    folder = tmp_path / "sae"
    size = sum((folder / name).stat().st_size for name in ("config.json", "sae.safetensors"))
    assert (entry.format, entry.licence, entry.author) == ("native", "MIT", "my-org")
    assert (entry.d_in, entry.d_sae, entry.k, entry.l0) == (6, 24, 4, 4.0)
    assert (entry.variance_explained, entry.size) == (0.75, size)
    assert (entry.site.layer, entry.site.module) == (3, "model.layers.3")
    assert "source" not in release.shared


def test_many_are_one_collection_in_the_order_of_their_numbers(tmp_path):
    for layer in (10, 9):
        write_native(tmp_path / "saes" / f"layer_{layer}", site=at_layer(layer), seed=layer)
    tree = staged(tmp_path / "saes", tmp_path, path="resid")
    assert [row["id"] for row in tree.rows] == ["resid/layer_9", "resid/layer_10"]
    assert sorted(tree.staged.files) == sorted(
        f"resid/layer_{layer}/{name}" for layer in (9, 10) for name in OWN
    )
    assert tree.staged.name_files["README.md"].decode().count("| `resid/layer_") == 2 + 2


def test_a_licence_that_is_given_stands_in_the_spec_that_is_published(tmp_path):
    folder = write_native(tmp_path / "sae")
    before = (folder / "config.json").read_bytes()
    files = staged(folder, tmp_path / "work", licence="CC-BY-4.0").staged.files
    assert native.read_config(files["config.json"].parent).origin.licence == "CC-BY-4.0"
    assert (folder / "config.json").read_bytes() == before
    assert (
        staged(folder, tmp_path / "w", licence="MIT").staged.files["config.json"].parent == folder
    )


@pytest.mark.parametrize("name", ["topk", "relu", "jumprelu", "gated"])
def test_golden_outputs_are_made_where_there_are_none(tmp_path, name):
    spec = {"architecture": name} | ({} if name == "topk" else {"k": None})
    folder = write_native(tmp_path / "sae", golden=False, **spec)
    files = staged(folder, tmp_path / "work").staged.files
    golden = load_file(files["golden.safetensors"])
    assert 8 <= len(golden["x"]) <= GOLDEN_TOKENS
    sae = load_sae(folder)
    assert close(sae(golden["x"]), golden["out"])
    # inputs of several sizes, on which it does something
    assert golden["x"].norm(dim=-1).max() > 5 * golden["x"].norm(dim=-1).min()
    assert golden["values"].count_nonzero() > 0
    again = staged(folder, tmp_path / "again").staged.files["golden.safetensors"]
    assert again.read_bytes() == files["golden.safetensors"].read_bytes()


def test_without_stats_there_is_no_plot_and_the_card_shows_none(tmp_path):
    tree = staged(write_native(tmp_path / "sae", stats=False), tmp_path)
    assert sorted(tree.staged.files) == ["config.json", "golden.safetensors", "sae.safetensors"]
    card = tree.staged.name_files["README.md"].decode()
    assert "density" not in card
    assert "stats.safetensors" not in card


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning"])
def test_exports_compute_what_the_sae_does(tmp_path, name):
    folder = write_native(tmp_path / "sae")
    done = publish_sae(folder, tmp_path / "zoo", exports=[name])
    assert any(file.path.startswith(f"{name}/") for file in done.files)
    x = torch.randn(20, 6)
    assert close(load_sae(tmp_path / "zoo" / name)(x), load_sae(folder)(x))


def test_an_export_that_cannot_express_it_is_refused_before_anything_is_written(tmp_path):
    folder = write_native(tmp_path / "sae", architecture="jumprelu", k=None)
    with pytest.raises(CannotConvert, match="sae: sparsify cannot express .*nothing was published"):
        publish_sae(folder, tmp_path / "zoo", exports=["saelens", "sparsify"])
    assert not (tmp_path / "zoo").exists()
    for name in ("openai", "native", "nonsense", "clt"):
        with pytest.raises(CannotConvert, match=f"cannot export to '{name}'; there are sparsify"):
            publish_sae(folder, tmp_path / "zoo", exports=[name])


def test_an_architecture_of_ones_own_has_no_golden_outputs_and_is_checked_all_the_same(tmp_path):
    own = {"name": "my_sae:SquaredSAE", "tensors": {"W_dec": [24, 6]}}
    folder = write_native(tmp_path / "sae", architecture="custom", k=None, custom=own)
    done = publish_sae(folder, tmp_path / "zoo")
    assert "golden.safetensors" not in {file.path for file in done.files}
    assert {row.what: row.ok for row in check_sae(tmp_path / "zoo")} == {
        "files": True,
        "hash": None,
        "shapes": True,
        "finite": True,
        "golden": None,
    }


def test_what_spans_several_layers_is_refused_in_one_line(tmp_path):
    cfg = CLTConfig(architecture="relu", d_in=4, d_sae=8, layers=2)
    tensors = {name: torch.zeros(shape) for name, shape in cfg.tensor_shapes().items()}
    (tmp_path / "clt").mkdir()
    native.write(cfg, tensors, tmp_path / "clt")
    with pytest.raises(NotPublishable, match="only SAEs of one layer can be published"):
        publish_sae(tmp_path / "clt", tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("org/repo", HubTarget),
        ("hf://org/repo", HubTarget),
        ("hf://org/repo/", HubTarget),
        ("./zoo", FolderTarget),
        ("../zoo", FolderTarget),
        ("/tmp/zoo", FolderTarget),
        ("~/zoo", FolderTarget),
    ],
)
def test_where_it_goes_is_read_off_the_target(target, kind):
    assert isinstance(find_target(target), kind)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("zoo", "./zoo for a folder"),
        ("org/repo/path", "--path say where"),
        ("hf://org/repo@main", "--branch"),
        ("https://host.org/x", "org/repo"),
        ("org/re po", "no name of a Hub repo"),
        ("org/--x", "no name of a Hub repo"),
        ("", "org/repo"),
    ],
)
def test_what_is_no_target_is_refused_with_both_spellings(target, said):
    with pytest.raises(BadName, match=said):
        find_target(target)


def test_what_is_the_hubs_is_refused_for_a_folder(tmp_path):
    for options in ({"pr": True}, {"private": True}, {"branch": "x"}):
        with pytest.raises(BadName, match="for the Hub"):
            find_target(tmp_path, **options)


def test_an_id_that_stands_at_a_place_stays(tmp_path):
    folder = write_native(tmp_path / "sae")
    manifest = staged(folder, tmp_path / "w").staged.name_files["saezoo.yaml"].decode()
    renamed = manifest.replace("id: layer_3_resid_post", "id: mine")
    place = Place("my-saes", "my-org/my-saes", manifest=renamed)
    tree = staged(folder, tmp_path / "again", place=place)
    assert [row["id"] for row in tree.rows] == ["mine"]
    assert tree.staged.name_files["saezoo.yaml"].decode() == renamed


def test_weights_that_the_registry_knows_are_called_by_that_name(tmp_path, registry_at):
    folder = write_native(tmp_path / "sae")
    place = Place("my-saes", "my-org/my-saes")
    tree = staged(folder, tmp_path / "w", path="layer_3", place=place)
    (tmp_path / "registry").mkdir()
    registry_at(tmp_path / "registry")
    text = tree.staged.name_files["saezoo.yaml"].decode()
    known = tmp_path / "registry" / "my-saes.yaml"
    known.write_text(text.replace("shared:\n", "shared:\n  source: hf://my-org/my-saes\n"))
    assert staged(folder, tmp_path / "x", path="layer_3").names == ["my-saes/layer_3"]
    other = write_native(tmp_path / "other", seed=1)
    assert staged(other, tmp_path / "y", path="layer_3").names == ["hf://my-org/my-saes/layer_3"]


HEAD = "release: r\nabout: x\nshared: {format: native}\nsaes:\n"


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- a",
        "\x00",
        "release: &a r\nabout: *a\n",
        HEAD + "- {id: a, source: 'file:///etc', path: x}\n",
        HEAD + "- {id: a, path: ../x}\n",
        "release: r\nabout: x\ncolour: red\n",
        "#" * 2**21,
    ],
    ids=["cut", "a list", "a NUL", "anchors", "a file", "a path that leaves", "a key", "size"],
)
def test_a_saezoo_yaml_that_nobody_could_read_is_told_in_one_line(tmp_path, text):
    folder = write_native(tmp_path / "sae")
    with pytest.raises(PublishError) as caught:
        staged(folder, tmp_path, place=Place("x", None, manifest=text))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("the saezoo.yaml that is there: ")


def test_a_collection_too_large_for_a_manifest_is_told_before_it_is_published(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("saezoo.registry.LIMIT", 2)
    rows = "- {id: a, path: a}\n- {id: b, path: b}\n"
    folder = write_native(tmp_path / "sae")
    with pytest.raises(PublishError, match="more than 2 ids"):
        staged(folder, tmp_path, path="one", place=Place("x", None, manifest=HEAD + rows))


def test_numbers_are_those_of_the_folder(tmp_path):
    tree = staged(write_native(tmp_path / "sae"), tmp_path)
    published = native.read_config(tree.staged.files["config.json"].parent)
    assert published.metrics == METRICS == spec()["metrics"]
