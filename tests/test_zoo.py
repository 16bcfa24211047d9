"""Live zoos: a stranger's manifest is data, pinned by name; a hostile one harms nothing."""

import json
import re

import pytest
import torch

from saezoo import SAE, SAEConfig, find_sae, save_sae
from saezoo.cli import main
from saezoo.errors import BadName, Offline, RegistryError, SaezooError, UnknownSAE
from saezoo.hub import Fetched
from saezoo.load import load_sae
from saezoo.manifest import MAX_BYTES, read_manifest
from saezoo.registry import LIMIT, expand, match_open, release_names
from saezoo.search import find_all
from saezoo.zoo import Terms, add_zoo, list_zoos, remove_zoo, update_zoos

HOME = "hf://org/zoo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA256 = "ab" * 32
WHERE = "hf://org/zoo/saezoo.yaml"

MANIFEST = """release: mine
about: My SAEs.
shared:
  format: native
  licence: MIT
  site: {model: openai-community/gpt2}
saes:
- id: layer_3
  path: saes/layer_3
  site: {layer: 3, point: resid_post}
"""


def native_files(tmp_path, seed=0):
    """config.json and sae.safetensors of a tiny SAE, and the SAE."""
    sae = SAE(SAEConfig(architecture="relu", d_in=4, d_sae=8))
    generator = torch.Generator().manual_seed(seed)
    for value in sae.parameters():
        value.copy_(torch.randn(value.shape, generator=generator))
    folder = save_sae(sae, tmp_path / f"native-{seed}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}, sae


@pytest.fixture
def zoo(hub, cache, tmp_path):  # noqa: ARG001 a fresh cache
    """A repo with a manifest and one SAE; returns (hub, the SAE, its files)."""
    files, sae = native_files(tmp_path)
    repo = {f"saes/layer_3/{name}": data for name, data in files.items()}
    hub.commit("org/zoo", repo | {"saezoo.yaml": MANIFEST.encode()})
    return hub, sae, repo


def test_an_id_of_a_repos_manifest_loads_by_one_name(zoo):
    _, sae, _ = zoo
    x = torch.randn(5, 4)
    assert torch.equal(load_sae("hf://org/zoo#layer_3")(x), sae(x))
    entry = find_sae("hf://org/zoo#layer_3")
    assert (entry.source, entry.path, entry.licence) == (HOME, "saes/layer_3", "MIT")
    assert re.fullmatch(r"[0-9a-f]{40}", entry.revision)
    assert entry.layer == 3


def test_a_pinned_zoo_is_found_by_name_and_stays_at_its_commit(zoo, tmp_path):
    hub, sae, repo = zoo
    pin = add_zoo(HOME)
    other, _ = native_files(tmp_path, seed=1)
    hub.commit(
        "org/zoo",
        {f"saes/layer_3/{name}": data for name, data in other.items()}
        | {"saezoo.yaml": MANIFEST.encode()},
    )
    x = torch.randn(5, 4)
    assert torch.equal(load_sae("zoo/mine/layer_3")(x), sae(x))
    assert find_sae("zoo/mine/layer_3").name == "zoo/mine/layer_3"
    assert find_sae("zoo/mine/layer_3").revision == pin.commit
    (change,) = update_zoos([])
    assert change.error is None
    assert find_sae("zoo/mine/layer_3").revision != pin.commit
    assert not torch.equal(load_sae("zoo/mine/layer_3")(x), sae(x))


def test_once_pinned_and_fetched_no_request_is_made(zoo):
    hub, _, _ = zoo
    add_zoo(HOME)
    load_sae("zoo/mine/layer_3")
    hub.requests.clear()
    load_sae("zoo/mine/layer_3")
    load_sae("zoo/mine/layer_3", local_files_only=True)
    assert not hub.requests


def test_updates_say_what_is_new_and_what_is_gone_and_broken_ones_keep_the_old_pin(zoo):
    hub, _, repo = zoo
    add_zoo(HOME)
    hub.commit("org/zoo", repo | {"saezoo.yaml": MANIFEST.replace("layer_3", "layer_4").encode()})
    (change,) = update_zoos(["mine"])
    assert (change.added, change.removed) == (["layer_4"], ["layer_3"])
    before = list_zoos()
    for broken in (b"release: mine\nabout: [\n", b"release: other\nabout: x\n", b"\xff"):
        hub.commit("org/zoo", repo | {"saezoo.yaml": broken})
        (change,) = update_zoos(["mine"])
        assert change.error
        assert list_zoos() == before
    assert find_sae("zoo/mine/layer_4")


@pytest.mark.usefixtures("cache")
def test_a_zoo_in_a_folder_reads_the_folders_own_files(tmp_path):
    files, sae = native_files(tmp_path)
    folder = tmp_path / "zoo"
    (folder / "saes" / "layer_3").mkdir(parents=True)
    for name, data in files.items():
        (folder / "saes" / "layer_3" / name).write_bytes(data)
    (folder / "saezoo.yaml").write_text(MANIFEST)
    x = torch.randn(5, 4)
    assert torch.equal(load_sae(f"{folder}#layer_3")(x), sae(x))
    add_zoo(folder)
    assert torch.equal(load_sae("zoo/mine/layer_3")(x), sae(x))


@pytest.mark.usefixtures("zoo")
def test_two_zoos_of_one_name_are_told_apart_by_removing_the_first(tmp_path):
    add_zoo(HOME)
    (tmp_path / "saezoo.yaml").write_text(MANIFEST)
    with pytest.raises(BadName, match="zoo remove mine"):
        add_zoo(tmp_path)
    remove_zoo("mine")
    assert add_zoo(tmp_path).release == "mine"
    with pytest.raises(UnknownSAE, match="zoo add"):
        remove_zoo("another")


@pytest.mark.usefixtures("zoo")
def test_unknown_names_in_zoos_list_the_closest():
    add_zoo(HOME)
    with pytest.raises(UnknownSAE, match="layer_3"):
        find_sae("zoo/mine/layer_33")
    with pytest.raises(UnknownSAE, match="Closest: mine"):
        find_sae("zoo/mime/layer_3")
    with pytest.raises(UnknownSAE, match="zoo/mine/layer_3"):
        find_sae("zoo/mine")
    assert "zoo" not in release_names(), "names of pinned zoos start with it"


@pytest.mark.usefixtures("hub", "cache")
def test_without_a_network_a_manifest_that_is_not_cached_says_so():
    with pytest.raises(Offline):
        load_sae("hf://org/zoo#layer_3", local_files_only=True)


@pytest.mark.usefixtures("zoo")
def test_searches_find_pinned_zoos_and_a_broken_one_hides_nothing(cache):
    add_zoo(HOME)
    names = [entry.name for entry in find_all(model="gpt2", layer=3).entries]
    assert "zoo/mine/layer_3" in names
    pin = cache / "zoos" / "mine.json"
    facts = json.loads(pin.read_text())
    pin.write_text(json.dumps(facts | {"text": "release: [", "release": "mine"}))
    (cache / "zoos" / "torn.json").write_text('{"rel')
    found = find_all(model="gpt2", layer=3)
    assert "zoo/mine" in found.not_listed
    assert len(found.rows) == len(names) - 1
    assert find_sae("openai-gpt2-small/resid_post_mlp_v5_32k/8")


ROW = "saes: [{id: a, path: a%s}]\n"
HEAD = "release: r\nabout: x\nshared: {format: native}\n"
REFUSED = {
    "an anchor": ("release: &a r\nabout: *a\n", "line 1: anchors"),
    "an anchor bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "line 1: anchors"),
    "a tag": ("release: !!python/name:os.system r\n", "line 1: tags"),
    "a directive": ("%YAML 1.1\n---\nrelease: r\n", "directives"),
    "deep nesting": ("release: r\nabout: " + "[" * 5000, "line 2: nested"),
    "not YAML": (HEAD + "saes: [a: b: c\n", "line 4"),
    "an unknown key": (HEAD + "colour: red\n", "line 4: colour"),
    "an unknown key of a row": (
        HEAD + "saes:\n- {id: a}\n- {id: b, colour: red}\n",
        "line 6: b: colour",
    ),
    "an id twice": (HEAD + "saes:\n- {id: a}\n- {id: a}\n", "line 6: the id 'a' appears twice"),
    "a pattern of too many": (HEAD + "families: [{id: 'l{n}', each: {n: 0..30000}}]\n", "20,000"),
    "a range without end": (
        HEAD + "families: [{id: 'l{n}', each: {n: 0..99999999999}}]\n",
        "20,000",
    ),
    "a product of too many": (
        HEAD + "families: [{id: '{a}-{b}-{c}', each: {a: 0..999, b: 0..999, c: 0..999}}]\n",
        "20,000",
    ),
    "an escape code in an id": (HEAD + 'saes: [{id: "a\\e[31m"}]\n', "line 4: id 'a[31m'"),
    "an escape code in a path": (HEAD + 'saes: [{id: a, path: "b\\u202e"}]\n', "line 4: path"),
    "a path that leaves": (HEAD + ROW % "/../b", "line 4: a: the path"),
    "a file": (HEAD + ROW % ", source: 'file:///etc'", "not allowed"),
    "a folder of this machine": (HEAD + ROW % ", source: /etc", "not allowed"),
    "the package's own": (HEAD + ROW % ", source: 'bundled:x'", "not allowed"),
    "plain http": (HEAD + ROW % ", source: 'http://host.org/a'", "not allowed"),
    "https without a hash": (HEAD + ROW % ", source: 'https://host.org/a'", "sha256"),
    "https to this machine": (
        HEAD + ROW % f", source: 'https://127.0.0.1/a', sha256: {SHA256}",
        "no public host",
    ),
    "https to this network": (
        HEAD + ROW % f", source: 'https://192.168.0.1/a', sha256: {SHA256}",
        "no public host",
    ),
    "https by a number": (
        HEAD + ROW % f", source: 'https://2130706433/a', sha256: {SHA256}",
        "no public host",
    ),
    "https by a bare name": (
        HEAD + ROW % f", source: 'https://intranet/a', sha256: {SHA256}",
        "no public host",
    ),
    "another repo without a commit": (HEAD + ROW % ", source: 'hf://other/repo'", "needs a commit"),
    "another repo at a branch": (
        HEAD + ROW % ", source: 'hf://other/repo', revision: main",
        "needs a commit",
    ),
    "an open pattern elsewhere": (
        HEAD + "open: [{id: 'l{layer}', facts: {source: 'hf://other/repo'}}]\n",
        "needs a commit",
    ),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED)
def test_manifests_that_ask_for_too_much_are_refused_in_one_line_with_the_place(text, said):
    with pytest.raises(RegistryError) as caught:
        read_manifest(text.encode(), WHERE, HOME, COMMIT)
    message = str(caught.value)
    assert message.startswith(WHERE)
    assert said in message
    assert message.isprintable()


def test_a_million_rows_are_refused_by_size_alone():
    text = HEAD + "saes:\n" + "- {id: a}\n" * 1_000_000
    with pytest.raises(RegistryError, match="bytes"):
        read_manifest(text.encode(), WHERE, HOME)
    rows = "".join(f"- {{id: a{number}}}\n" for number in range(LIMIT + 1))
    assert len(rows) < MAX_BYTES
    with pytest.raises(RegistryError, match="20,000"):
        read_manifest((HEAD + "saes:\n" + rows).encode(), WHERE, HOME)


def test_prose_loses_markup_and_control_characters():
    text = 'release: r\nabout: "a <b onclick=x>bold</b> \\e[31mred [bold]x[/bold] [1, 2]\\u202e"\n'
    release = read_manifest(text.encode(), WHERE, HOME)
    assert release.about == "a bold [31mred x [1, 2]"


def test_no_part_of_a_manifest_moves_an_id_off_the_commit_that_it_is_pinned_at():
    for text in (
        HEAD + "saes: [{id: a, path: a}]\nfiles: {a: {revision: main, size: 7}}\n",
        HEAD + "saes: [{id: a, path: a, revision: main, size: 7}]\n",
        HEAD.replace("native}", "native, revision: main}") + "saes: [{id: a, path: a, size: 7}]\n",
    ):
        entry = expand(read_manifest(text.encode(), WHERE, HOME, COMMIT))["a"]
        assert (entry.source, entry.revision, entry.size) == (HOME, COMMIT, 7)
    text = (
        HEAD + "open: [{id: 'l{layer}', facts: {revision: main}}]\nfiles: {l3: {revision: main}}\n"
    )
    assert match_open(read_manifest(text.encode(), WHERE, HOME, COMMIT), "l3").revision == COMMIT


def test_lawful_sources_are_kept_and_pinned():
    text = HEAD + (
        "saes:\n- {id: own, path: a}\n"
        f"- {{id: named, source: '{HOME}', path: b}}\n"
        f"- {{id: other, source: 'hf://other/repo@{COMMIT[::-1]}', path: c}}\n"
        f"- {{id: web, source: 'https://host.org/d', sha256: {SHA256}}}\n"
    )
    entries = expand(read_manifest(text.encode(), WHERE, HOME, COMMIT))
    assert [entries[key].revision for key in entries] == [COMMIT, COMMIT, COMMIT[::-1], None]
    assert entries["other"].source == "hf://other/repo"


@pytest.mark.usefixtures("hub", "cache")
def test_a_name_that_resolves_to_this_machine_is_refused(monkeypatch, tmp_path):
    import saezoo.zoo

    found = [(0, 0, 0, "", ("10.0.0.7", 0))]
    monkeypatch.setattr(saezoo.zoo.socket, "getaddrinfo", lambda *_: found)
    (tmp_path / "saezoo.yaml").write_text(
        HEAD + f"saes: [{{id: a, source: 'https://host.org/a', sha256: {SHA256}}}]\n"
    )
    with pytest.raises(RegistryError, match=r"10\.0\.0\.7"):
        load_sae(f"{tmp_path}#a")
    with pytest.raises(RegistryError, match=r"10\.0\.0\.7"):
        add_zoo("https://host.org/zoo")


@pytest.mark.usefixtures("cache")
def test_a_manifest_too_large_is_not_read(hub):
    hub.commit("org/zoo", {"saezoo.yaml": b"#" * (MAX_BYTES + 1)})
    with pytest.raises(SaezooError, match="bytes"):
        add_zoo(HOME)


def test_no_token_goes_to_another_host(zoo):
    hub, _, _ = zoo
    hub.repos["org/zoo"].private_to = "secret"
    add_zoo(HOME, Terms(token="secret"))  # noqa: S106 a fake
    load_sae("zoo/mine/layer_3", token="secret")  # noqa: S106 the storage host asserts it sees none


@pytest.mark.parametrize("words", [["zoo", "list"], ["zoo", "list", "--json"]])
@pytest.mark.usefixtures("zoo")
def test_zoos_are_listed_for_people_and_scripts(capsys, words):
    add_zoo(HOME)
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "zoo/mine" in out
    assert "--json" not in words or json.loads(out)[0]["source"] == HOME


@pytest.mark.usefixtures("zoo")
def test_the_commands_add_update_and_remove(capsys):
    for words, said in (
        (["zoo", "add", HOME], "zoo/mine: 1 SAEs from hf://org/zoo at"),
        (["list", "zoo/mine"], "zoo/mine/layer_3"),
        (["info", "zoo/mine/layer_3"], "MIT"),
        (["zoo", "update"], "zoo/mine: 0 new, 0 gone"),
        (["zoo", "remove", "zoo/mine"], "forgotten"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        shown = capsys.readouterr()
        assert not caught.value.code, shown.err
        assert said in shown.out


@pytest.mark.usefixtures("cache")
def test_a_manifest_at_a_url_speaks_of_files_beside_it_each_with_its_hash(monkeypatch, tmp_path):
    import saezoo.zoo

    asked = []

    def fetch_file(entry, **_options):
        asked.append(entry.source)
        return Fetched(tmp_path / "saezoo.yaml", "", None, "https")

    public = [(0, 0, 0, "", ("93.184.216.34", 0))]
    monkeypatch.setattr(saezoo.zoo.socket, "getaddrinfo", lambda *_: public)
    monkeypatch.setattr(saezoo.zoo, "fetch_file", fetch_file)
    (tmp_path / "saezoo.yaml").write_text(
        HEAD + f"saes: [{{id: a, path: a.pt, sha256: {SHA256}}}]\n"
    )
    pin = add_zoo("https://host.org/zoo")
    assert asked == ["https://host.org/zoo/saezoo.yaml"]
    assert (pin.home, pin.commit) == ("https://host.org/zoo", None)
    entry = find_sae("zoo/r/a")
    assert (entry.source, entry.path, entry.sha256) == ("https://host.org/zoo", "a.pt", SHA256)
    assert find_sae("https://host.org/zoo/saezoo.yaml#a").path == "a.pt"
    (tmp_path / "saezoo.yaml").write_text(HEAD + "saes: [{id: a, path: a.pt}]\n")
    with pytest.raises(RegistryError, match="sha256"):
        find_sae("https://host.org/zoo#a")
