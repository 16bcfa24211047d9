"""`saezoo registry add`: published SAEs into the registry of a checkout, validated, in their place,
nothing twice, every other line as it was.
"""

import json

import pytest
import yaml

from saezoo.cli import main
from saezoo.errors import BadName, MissingFile, RegistryError
from saezoo.publishing.registering import add_to_registry
from saezoo.registry import expand, read_release
from tests.tiny_folders import write_native

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STANZA = f"""release: my-saes
about: Some SAEs.
shared:
  format: native
  source: hf://my-org/my-saes
  revision: {COMMIT}
  licence: MIT
  site: {{model: my-org/tiny-llama}}
saes:
- id: layer_10
  path: layer_10
  d_in: 6
  d_sae: 24
  site: {{layer: 10}}
- id: layer_2
  path: layer_2
  d_in: 6
  d_sae: 24
  site: {{layer: 2}}
"""


@pytest.fixture
def folder(tmp_path, registry_at, monkeypatch):
    """An empty registry of its own."""
    folder = tmp_path / "registry"
    folder.mkdir()
    registry_at(folder)
    monkeypatch.setattr("saezoo.verify.registry_folder", lambda: folder)
    return folder


@pytest.fixture
def stanza(tmp_path):
    """Writes a stanza, with changes, and returns its path."""

    def write(*changes, text=STANZA):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "stanza.yaml"
        path.write_text(text)
        return path

    return write


def test_a_new_release_gets_a_file_with_its_rows_sorted(folder, stanza):
    added = add_to_registry(stanza())
    assert (added.path, added.release, added.new_release) == (
        folder / "my-saes.yaml",
        "my-saes",
        True,
    )
    entries = expand(read_release("my-saes"))
    assert list(entries) == ["layer_2", "layer_10"]
    assert entries["layer_2"].revision == COMMIT
    assert entries["layer_2"].layer == 2
    assert (folder / "my-saes.yaml").read_text().count(COMMIT) == 1


def test_a_release_that_is_there_gets_rows_in_their_places(folder, stanza):
    text = STANZA.replace("- id: layer_2\n", "# a comment\n- id: layer_20\n").replace(
        "path: layer_2\n", "path: layer_20\n"
    )
    (folder / "my-saes.yaml").write_text(text)
    new = stanza(("layer_2\n", "layer_3\n"), ("layer_10\n", "layer_30\n"), (COMMIT, COMMIT[::-1]))
    added = add_to_registry(new)
    assert not added.new_release
    made = (folder / "my-saes.yaml").read_text()
    entries = expand(read_release("my-saes"))
    assert list(entries) == ["layer_3", "layer_10", "layer_20", "layer_30"]
    assert (entries["layer_3"].revision, entries["layer_10"].revision) == (COMMIT[::-1], COMMIT)
    for line in text.splitlines():
        assert line in made.splitlines()


def test_nothing_is_registered_twice(folder, stanza):
    add_to_registry(stanza())
    before = (folder / "my-saes.yaml").read_bytes()
    with pytest.raises(RegistryError, match="my-saes/layer_2 is registered already"):
        add_to_registry(stanza())
    with pytest.raises(RegistryError, match="is registered already, as my-saes/layer_10"):
        add_to_registry(stanza(("my-saes\nabout", "other\nabout")))
    assert (folder / "my-saes.yaml").read_bytes() == before
    assert [path.name for path in folder.glob("*.yaml")] == ["my-saes.yaml"]


REFUSED = {
    "a branch": ((COMMIT, "main"), "no commit: its revision is 'main'"),
    "no commit": ((f"  revision: {COMMIT}\n", ""), "no commit: its revision is None"),
    "no licence": (("  licence: MIT\n", ""), "does not say licence"),
    "no model": (("  site: {model: my-org/tiny-llama}\n", ""), "does not say site.model"),
    "no width": (("  d_sae: 24\n", ""), "does not say d_sae"),
    "a folder": (("hf://my-org/my-saes", "./folder"), "others cannot reach './folder'"),
    "https without a hash": (("hf://my-org/my-saes", "https://host.org/x"), "needs a sha256"),
    "a format of nobody's": (("format: native", "format: mine"), "there is no format 'mine'"),
    "an unknown key": (("  d_in: 6\n", "  d_inn: 6\n"), "d_inn"),
    "an id twice": (("id: layer_10", "id: layer_2"), "appears twice"),
    "a name that leaves": (("release: my-saes", "release: ../my-saes"), "no name of a release"),
    "a hidden name": (("release: my-saes", "release: .my-saes"), "no name of a release"),
    "no YAML": (("about: ", "about: ["), "not YAML"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_what_lacks_something_is_refused_in_one_line(folder, stanza, change, said):
    with pytest.raises(RegistryError) as caught:
        add_to_registry(stanza(change))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())


def test_an_alias_of_another_release_is_no_name_for_it(folder, stanza):
    (folder / "old.yaml").write_text(
        STANZA.replace("release: my-saes", "release: old").replace(
            "about", "aliases: [my-saes]\nabout", 1
        )
    )
    changes = [("hf://my-org/my-saes", "hf://my-org/others")]
    with pytest.raises(RegistryError, match="another name of the release old"):
        add_to_registry(stanza(*changes))


@pytest.mark.usefixtures("folder")
def test_rows_of_another_repo_do_not_go_into_somebodys_release(stanza):
    add_to_registry(stanza())
    other = stanza(
        ("hf://my-org/my-saes", "hf://thief/saes"), ("layer_2\n", "layer_3\n"), ("layer_10", "x")
    )
    with pytest.raises(RegistryError, match="needs a release of another name"):
        add_to_registry(other)


def test_open_and_empty_releases_are_for_writing_by_hand(folder, stanza):
    for text, said in (
        ("release: r\nabout: x\nopen: [{id: 'l.{layer}'}]\n", "not enumerated"),
        ("release: r\nabout: x\n", "there is no SAE in it"),
    ):
        with pytest.raises(RegistryError, match=said):
            add_to_registry(stanza(text=text))
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("folder")
def test_a_repos_manifest_is_pinned_at_its_commit(hub, tmp_path):
    native = write_native(tmp_path / "sae")
    files = {f"layer_3/{item.name}": item.read_bytes() for item in native.iterdir()}
    manifest = (
        "release: my-saes\nabout: a <b>b</b>\n"
        "shared: {format: native, licence: MIT, site: {model: my-org/tiny-llama}}\n"
        "saes:\n- {id: layer_3, path: layer_3, d_in: 6, d_sae: 24}\n"
    )
    commit = hub.commit("my-org/my-saes", files | {"saezoo.yaml": manifest.encode()})
    add_to_registry("hf://my-org/my-saes")
    entry = expand(read_release("my-saes"))["layer_3"]
    assert (entry.source, entry.revision) == ("hf://my-org/my-saes", commit)
    # a stranger's prose loses its markup
    assert read_release("my-saes").about == "a b"
    with pytest.raises(MissingFile):
        add_to_registry("hf://my-org/nothing")


@pytest.mark.usefixtures("folder")
def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(RegistryError, match="no such file; give hf://org/repo"):
        add_to_registry(tmp_path / "nowhere.yaml")
    with pytest.raises(BadName, match="give hf://org/repo, or a YAML file"):
        add_to_registry("https://host.org/x.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RegistryError, match="at most"):
        add_to_registry(tmp_path / "big.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"release: \xff\n")
    with pytest.raises(RegistryError, match="not UTF-8"):
        add_to_registry(tmp_path / "latin.yaml")


@pytest.mark.usefixtures("folder")
def test_an_installed_registry_is_not_written(stanza, tmp_path, monkeypatch):
    monkeypatch.setattr("saezoo.verify.registry_folder", lambda: tmp_path / "_registry")
    with pytest.raises(RegistryError, match="in a checkout"):
        add_to_registry(stanza())


@pytest.mark.usefixtures("folder")
def test_the_command_says_what_comes_next(stanza, capsys):
    for words in (["registry", "add"], ["registry", "add", "--json"]):
        text = STANZA if len(words) == 2 else STANZA.replace("my-saes", "others")
        with pytest.raises(SystemExit) as caught:
            main([*words, str(stanza(text=text))])
        assert not caught.value.code
        out = capsys.readouterr().out
        if "--json" in words:
            assert json.loads(out)["ids"] == ["layer_10", "layer_2"]
        else:
            assert "wrote registry/my-saes.yaml: 2 SAEs" in out
            assert "make docs" in out
    with pytest.raises(SystemExit) as caught:
        main(["registry", "add", str(stanza())])
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("saezoo: my-saes/layer_10 is registered already")
    assert err.count("\n") == 1


def test_what_is_written_reads_as_it_was_meant(folder, stanza):
    add_to_registry(stanza())
    made = yaml.safe_load((folder / "my-saes.yaml").read_text())
    before = yaml.safe_load(STANZA)
    assert made["shared"] == before["shared"]
    assert sorted(made["saes"], key=str) == sorted(before["saes"], key=str)
