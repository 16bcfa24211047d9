"""Many SAEs at once: the bytes first, those that are cached not again, and failures said at the
end.
"""

import json

import pytest

from saezoo.cli import main
from saezoo.entry import Entry
from saezoo.errors import BadName, MissingFile
from saezoo.hub import Fetched, fetch
from saezoo.many import fetch_many, plan
from saezoo.search import parse_layers

CFG = b'{"d_in": 6, "k": 3}'
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def repo(hub, cache, tmp_path, registry_at):  # noqa: ARG001 a fresh cache
    """A Hub repo of three SAEs, and a registry of them and a fourth that is not there."""
    files = {}
    for layer in range(3):
        files[f"layers.{layer}/cfg.json"] = CFG
        files[f"layers.{layer}/sae.safetensors"] = WEIGHTS
    hub.commit("org/saes", files)
    folder = tmp_path / "registry"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        """release: mine
about: x
shared: {format: sparsify, source: "hf://org/saes", site: {model: org/m, point: resid_post}}
families:
- id: layers.{layer}
  each: {layer: 0..3}
  facts: {path: "layers.{layer}", site: {layer: "{layer}"}}
"""
    )
    registry_at(folder)
    return hub


def entry(layer):
    return Entry(source="hf://org/saes", path=f"layers.{layer}", format="sparsify")


@pytest.mark.usefixtures("repo")
def test_the_bytes_are_known_before_and_what_is_cached_counts_for_nothing():
    fetch(entry(1))
    wanted = plan([entry(layer) for layer in range(3)])
    assert [item.cached for item in wanted] == [False, True, False]
    assert [item.size for item in wanted] == [len(CFG + WEIGHTS), 0, len(CFG + WEIGHTS)]


def test_one_request_tells_the_sizes_of_a_whole_repo(repo):
    plan([entry(layer) for layer in range(3)])
    assert len(repo.requests) == 1
    repo.requests.clear()
    plan([entry(layer) for layer in range(3)], local_files_only=True)
    assert not repo.requests


@pytest.mark.usefixtures("repo")
def test_all_are_fetched_in_order_and_one_that_fails_stops_no_other():
    told = []
    results = fetch_many(
        [entry(layer) for layer in (2, 7, 0)], done=lambda item, _result: told.append(item.path)
    )
    assert isinstance(results[0], Fetched)
    assert isinstance(results[1], MissingFile)
    assert results[2].path.name == "layers.0"
    assert (results[2].path / "sae.safetensors").read_bytes() == WEIGHTS
    assert sorted(told) == ["layers.0", "layers.2", "layers.7"]


@pytest.mark.usefixtures("repo")
def test_the_command_shows_bytes_first_fetches_and_counts(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["download", "--model", "m", "--layers", "0..1"])
    assert not caught.value.code
    shown = capsys.readouterr()
    assert "2 SAEs, 0 of them cached; 21 kB to fetch" in shown.err
    assert "2 of 2 SAEs are in the cache" in shown.out
    with pytest.raises(SystemExit) as caught:
        main(["download", "--release", "mine", "--json"])
    assert caught.value.code == 1
    shown = capsys.readouterr()
    assert "4 SAEs, 2 of them cached; at least 10 kB to fetch" in shown.err
    rows = json.loads(shown.out)
    assert [("error" in row) for row in rows] == [False, False, False, True]
    assert "mine/layers.3" in shown.err


@pytest.mark.usefixtures("repo")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["download"], "give names"),
        (["download", "a/b", "--model", "m"], "give names"),
        (["download", "--model", "nobody"], "4 without model"),
        (["download", "--model", "m", "--layers", "x"], "5..12"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_chosen_is_said(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code
    assert said in capsys.readouterr().err


def test_layers_are_read_as_people_write_them():
    assert parse_layers("12") == [12]
    assert parse_layers("5,7..9") == [5, 7, 8, 9]
    with pytest.raises(BadName):
        parse_layers("5-7")
