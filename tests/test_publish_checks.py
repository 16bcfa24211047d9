"""What is refused before anything is published: each reason is a line, and says what to do."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from saezoo.errors import NotPublishable, SaezooError
from saezoo.publishing.checks import find_leaks, find_problems, leaks, left_out
from saezoo.publishing.pipeline import publish_sae
from saezoo.publishing.sources import find_sources
from saezoo.publishing.staged import Staged
from tests.tiny_folders import at_layer, change_config, write_native

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

TOKEN = "hf_" + "a1B2" * 8


def problems(folder, path=None, licence=None, **options):
    return find_problems(find_sources(folder, path, licence), **options)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"architecture": "relu", "k": None},
        {"architecture": "jumprelu", "k": None},
        {"architecture": "gated", "k": None},
    ],
    ids=lambda spec: spec.get("architecture", "topk"),
)
def test_a_folder_as_the_trainer_leaves_it_has_no_problem(tmp_path, spec):
    assert problems(write_native(tmp_path / "sae", **spec)) == []


LACKING = {
    "no licence": ({"origin": {"licence": None}}, "no licence: give --licence"),
    "no origin": ({"origin": None}, "no licence: give --licence"),
    "no site": ({"site": None}, "does not say site.model, site.module or site.hook_name"),
    "no model": ({"site": {"model": None}}, "does not say site.model"),
    "no place": ({"site": {"module": None, "hook_name": None}}, "site.module or site.hook_name"),
    "no token rule": ({"tokens": None}, "does not say tokens"),
    "half a token rule": (
        {"tokens": {"context": None, "prepend_bos": None}},
        "does not say tokens.prepend_bos, tokens.context",
    ),
    "no metrics": ({"metrics": None}, "no metrics fvu, l0, dead_fraction, tokens"),
    "metrics of nobody's": ({"metrics": {"version": None}}, "of version None of the definitions"),
    "metrics of the future": ({"metrics": {"version": 99}}, "of version 99 of the definitions"),
    "an L0 above all": ({"metrics": {"l0": 25.0}}, "its l0 is 25.0"),
    "an FVU below 0": ({"metrics": {"fvu": -0.5}}, "its fvu is -0.5"),
    "a dead share above 1": ({"metrics": {"dead_fraction": 1.5}}, "its dead_fraction is 1.5"),
    "a path of this machine": (
        {"notes": {"dataset": "/data/me/docs.jsonl"}},
        "notes.dataset is '/data/me/docs.jsonl', a path of this machine",
    ),
    "a model by its folder": ({"site": {"model": "~/models/x"}}, "site.model is '~/models/x'"),
    "a path in a sentence": (
        {"notes": {"provenance": "texts of /home/me/all.txt, twice"}},
        "notes.provenance is '/home/me/all.txt', a path",
    ),
    "a path of Windows": ({"notes": {"dataset": "C:\\Users\\me"}}, "notes.dataset is 'C:"),
    "a token": ({"notes": {"a": f"with {TOKEN}"}}, "notes.a: what looks like a HuggingFace token"),
    "an OAuth token": (
        {"notes": {"a": "hf_oauth_" + "x7" * 12}},
        "notes.a: what looks like a HuggingFace token",
    ),
    "a password by its key": ({"notes": {"password": "x7" * 12}}, "looks like a key or password"),
    "a password in a URL": (
        {"origin": {"source": "https://me:secret@host.org/x"}},
        "origin.source: what looks like a password in a URL",
    ),
}


@pytest.mark.parametrize(("change", "said"), LACKING.values(), ids=LACKING)
def test_what_a_spec_lacks_or_gives_away_is_one_line(tmp_path, change, said):
    (found,) = problems(write_native(tmp_path / "sae", **change))
    assert found.startswith("sae: ")
    assert said in found
    assert "\n" not in found
    assert TOKEN not in found
    assert "secret" not in found


def test_without_metrics_is_said_and_then_numbers_may_be_lacking(tmp_path):
    folder = write_native(tmp_path / "sae", stats=False, metrics=None)
    found = problems(folder)
    assert len(found) == 2
    assert all("--without-metrics" in line for line in found)
    assert problems(folder, without_metrics=True) == []


def test_a_licence_that_is_given_takes_the_place_of_one_that_lacks(tmp_path):
    folder = write_native(tmp_path / "sae", origin=None)
    assert problems(folder, licence="Apache-2.0") == []


DAMAGE = {
    "NaN": (lambda t: t | {"W_dec": t["W_dec"] * float("nan")}, "NaN"),
    "infinity": (lambda t: t | {"b_enc": t["b_enc"] / 0}, "infin"),
    "a shape": (lambda t: t | {"b_enc": t["b_enc"][:-1].clone()}, "b_enc"),
    "a tensor too many": (lambda t: t | {"optimizer": torch.zeros(3)}, "optimizer"),
    "a tensor too few": (lambda t: {k: v for k, v in t.items() if k != "b_dec"}, "b_dec"),
    "other weights": (lambda t: t | {"W_dec": t["W_dec"] * 1.01}, "golden.safetensors is not of"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_weights_that_are_not_whole_are_refused(tmp_path, damage, said):
    folder = write_native(tmp_path / "sae")
    save_file(damage(load_file(folder / "sae.safetensors")), folder / "sae.safetensors")
    (found,) = problems(folder)
    assert said in found


def test_a_cut_file_and_stats_of_another_sae_are_refused(tmp_path):
    folder = write_native(tmp_path / "cut")
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert len(problems(folder)) == 1
    folder = write_native(tmp_path / "stats")
    save_file({"density": torch.zeros(3)}, folder / "stats.safetensors")
    (found,) = problems(folder)
    assert "density is (3,), expected (24,)" in found


@pytest.mark.parametrize(
    "path", ["../x", "a/../b", "/a", "a b", ".hidden", "a/.git", "a|b", "a\nb", "a//b"]
)
def test_paths_that_no_repo_should_have_are_refused(tmp_path, path):
    found = problems(write_native(tmp_path / "sae"), path=path)
    if path in ("/a", "a//b"):
        # a slash too many is no other place
        assert len(found) == (path == "a//b")
    else:
        assert len(found) == 1
        assert "the path" in found[0]


def test_what_is_no_native_folder_is_refused_with_what_to_do(tmp_path):
    for folder, said in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "neither a native folder nor one of such"),
    ):
        with pytest.raises(NotPublishable, match=said):
            find_sources(folder, None, None)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"saezoo_format": 99}')
    with pytest.raises(NotPublishable, match="upgrade saezoo"):
        find_sources(tmp_path, None, None)


def test_all_reasons_of_all_folders_are_told_at_once(tmp_path):
    for layer in (1, 2):
        write_native(tmp_path / f"layer_{layer}", site=at_layer(layer), origin=None, tokens=None)
    with pytest.raises(NotPublishable) as caught:
        publish_sae(tmp_path, "my-org/my-saes")
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "layer_1",
        "layer_1",
        "layer_2",
        "layer_2",
    ]
    assert "\n" not in str(caught.value)


def test_runs_hidden_folders_and_links_are_not_taken_for_saes(tmp_path):
    real = write_native(tmp_path / "saes" / "layer_3")
    write_native(tmp_path / "saes" / "layer_3.run" / "best")
    write_native(tmp_path / "saes" / ".cache" / "x")
    other = write_native(tmp_path / "elsewhere")
    (tmp_path / "saes" / "link").symlink_to(other)
    assert [source.folder for source in find_sources(tmp_path / "saes", None, None)] == [real]


def test_what_is_not_needed_is_left_out_and_named(tmp_path):
    folder = write_native(tmp_path / "sae")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "wandb").mkdir()
    (folder / "README.md").write_text("mine")
    assert left_out(find_sources(folder, None, None), []) == ["sae/optimizer.pt", "sae/wandb"]


def test_secrets_are_looked_for_in_every_file_that_goes_out(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(2)}, weights, metadata={"made_in": "/home/me/run", "t": TOKEN})
    (tmp_path / "cfg.json").write_text(json.dumps({"path": ["/mnt/x"], "ok": "a/b"}))
    (tmp_path / "notes.md").write_text(f"fine\n{TOKEN}\n")
    staged = Staged(
        {name: tmp_path / name for name in ("w.safetensors", "cfg.json", "notes.md")},
        {"README.md": b"theirs: /home/you/x\nours: /home/me/y\n", "saezoo.yaml": b"about: x\n"},
    )
    found = find_leaks(staged, {"README.md": "theirs: /home/you/x\n"}, "own-token")
    places = [re.match(r"\S+ (line \d|[\w.]+)", line)[1] for line in found]
    assert sorted(places) == sorted(
        ["__metadata__.made_in", "__metadata__.t", "path.0", "line 2", "line 2"]
    )
    assert not any(TOKEN in line for line in found)
    staged = Staged({}, {"README.md": b"my own-token", "saezoo.yaml": b""})
    assert find_leaks(staged, {}, "own-token") == ["README.md: holds the token itself"]


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/my-org/tmp/usr",
        "see saezoo/home/x and a/b",
        "layers.3/mlp",
        "0123456789abcdef0123456789abcdef01234567",
        "the tokens: 1310720 of them",
        "hf://my-org/my-saes",
        "and/or, 1/2, </home>",
    ],
)
def test_what_only_looks_a_little_like_one_is_let_through(text):
    assert list(leaks({"notes.a": text}, "config.json")) == []


def test_a_spec_that_spans_layers_is_refused_in_one_line(tmp_path):
    folder = write_native(tmp_path / "sae")
    change_config(folder, kind="nonsense")
    with pytest.raises(SaezooError) as caught:
        find_sources(folder, None, None)
    assert "\n" not in str(caught.value)
