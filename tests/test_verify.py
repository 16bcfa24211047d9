"""Verifying the registry: nothing is fetched, what is not as stated is said, and what is filled in
leaves every other byte of the YAML as it was.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from saezoo.cli import main
from saezoo.errors import Offline, RegistryError, UnknownSAE
from saezoo.fill import add_facts
from saezoo.find import find_sae
from saezoo.hub import fetch
from saezoo.registry import expand, read_release
from saezoo.verify import verify_releases
from tests.fakes.web import FakeWeb

REPO = "org/saes"
WEIGHTS = bytes(range(256)) * 4
CFG = b'{"d_in": 6, "k": 3}'
SIZE = len(WEIGHTS) + len(CFG)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {
    f"layers.{layer}/{name}": body
    for layer in (0, 1)
    for name, body in [("cfg.json", CFG), ("sae.safetensors", WEIGHTS), ("log.pt", b"unneeded")]
}
YAML = """\
# a comment at the top
release: mine
about: Two SAEs — of a test.   # and one behind
shared:
  format: sparsify
  source: hf://org/saes   # where they are
  site: {model: m}

families:
- id: 'layers.{layer}'
  each: {layer: 0..1}
  facts: {path: "layers.{layer}", site: {layer: "{layer}"}}
# a comment at the end
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
def mine(folder):
    """registry/mine.yaml, as YAML says; with further text to write another."""
    path = folder / "mine.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture
def commit(hub):
    return hub.commit(REPO, FILES)


@pytest.fixture
def web():
    host = FakeWeb()
    host.files = {"/a/0.pt": WEIGHTS, "/a/1.pt": WEIGHTS[::-1]}
    yield host
    host.close()


def of_web(web, count=2, more=""):
    return (
        "release: web\nabout: x\n"
        f"shared: {{format: openai, source: '{web.url}/a'{more}}}\n"
        f"families: [{{id: 'a{{n}}', each: {{n: 0..{count - 1}}}, facts: {{path: '{{n}}.pt'}}}}]\n"
    )


def statuses(*names, **how):
    return {
        finding.entry.name: finding.status
        for verdict in verify_releases(names, **how)
        for finding in verdict.findings
    }


def findings(*names):
    return [row for verdict in verify_releases(names) for row in verdict.findings]


@pytest.fixture
def run(capsys):
    """(exit code, stdout, stderr) of `saezoo registry verify …`."""

    def call(*words):
        with pytest.raises(SystemExit) as caught:
            main(["registry", "verify", *words])
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return call


def test_a_repo_costs_one_request_and_no_body(mine, hub, commit):
    (mine.parent / "twin.yaml").write_text(YAML.replace("release: mine", "release: twin"))
    assert set(statuses().values()) == {"ok"}
    assert dict(hub.asked()) == {f"GET /api/models/{REPO}": 1}
    assert {(row.seen.commit, row.size) for row in findings("mine")} == {(commit, SIZE)}
    assert [row.sha256 for row in findings("mine")] == [{"sae.safetensors": SHA256}] * 2


def test_the_fake_tells_sizes_and_hashes_only_to_who_asks_for_them(commit):
    from huggingface_hub import HfApi

    plain = HfApi().model_info(REPO, revision=commit).siblings
    assert {(item.size, item.lfs) for item in plain} == {(None, None)}
    full = {
        item.rfilename: item
        for item in HfApi().model_info(REPO, revision=commit, files_metadata=True).siblings
    }
    assert full["layers.0/sae.safetensors"].lfs.sha256 == SHA256
    assert full["layers.0/cfg.json"].lfs is None
    assert full["layers.0/cfg.json"].size == len(CFG)


@pytest.mark.parametrize(
    ("lost", "said"),
    [("layers.1/sae.safetensors", "sae.safetensors"), ("layers.1/", "layers.1")],
)
def test_what_is_not_in_the_listing_is_dead(mine, hub, lost, said):
    assert mine.exists()
    hub.commit(REPO, {name: body for name, body in FILES.items() if not name.startswith(lost)})
    ok, dead = findings("mine")
    assert (ok.status, dead.status) == ("ok", "dead")
    assert said in dead.detail


def test_a_repo_or_a_pinned_commit_that_is_gone_makes_all_its_saes_dead(mine, hub):
    assert set(statuses().values()) == {"dead"}
    hub.commit(REPO, FILES)
    mine.write_text(YAML.replace("  site:", f"  revision: {'f' * 40}\n  site:"))
    assert set(statuses().values()) == {"dead"}


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        (f"size: {SIZE}", "ok"),
        (f"size: {SIZE - 1}", "changed"),
        (f"sha256: {{sae.safetensors: {SHA256.upper()}}}", "ok"),
        (f"sha256: {SHA256}", "ok"),
        (f"sha256: '{'0' * 64}'", "changed"),
        (f"sha256: {{sae.safetensors: '{'0' * 64}'}}", "changed"),
        (f"sha256: {{old.safetensors: {SHA256}}}", "changed"),
    ],
)
@pytest.mark.parametrize("place", ["shared", "files"])
def test_a_stated_fact_is_compared_wherever_it_stands(mine, commit, facts, status, place):
    assert commit
    if place == "shared":
        mine.write_text(YAML.replace("  site:", f"  {facts}\n  site:", 1))
    else:
        mine.write_text(f"{YAML}files: {{layers.0: {{{facts}}}, layers.1: {{{facts}}}}}\n")
    assert set(statuses().values()) == {status}


def test_a_file_of_an_https_host_is_asked_for_by_head_alone(folder, web):
    digest = hashlib.md5(WEIGHTS, usedforsecurity=False)
    web.headers["/a/0.pt"] = {"Content-MD5": base64.b64encode(digest.digest()).decode()}
    (folder / "web.yaml").write_text(of_web(web, 3))
    rows = [row.to_json() for row in findings("web")]
    assert [row["status"] for row in rows] == ["ok", "ok", "dead"]
    assert rows[0]["size"] == len(WEIGHTS)
    assert rows[0]["md5"] == {"0.pt": digest.hexdigest()}
    assert "md5" not in rows[1]
    assert {method for method, _, _ in web.requests} == {"HEAD"}
    (folder / "web.yaml").write_text(of_web(web, 2, ", size: 7"))
    assert set(statuses().values()) == {"changed"}


@pytest.mark.parametrize(("answer", "status"), [(403, "unknown"), (500, "unknown"), (410, "dead")])
def test_only_what_a_host_says_is_gone_is_dead(folder, web, answer, status):
    (folder / "web.yaml").write_text(of_web(web))
    web.fail("0.pt", "status", status=answer, method="HEAD", times=9, headers={"Retry-After": "0"})
    assert statuses() == {"web/a0": status, "web/a1": "ok"}


def test_a_host_that_is_down_is_said_once_and_others_are_asked(folder, mine, commit, run):
    assert commit
    assert mine.exists()
    gone = FakeWeb()
    (folder / "web.yaml").write_text(of_web(gone, 30))
    gone.close()
    code, out, _ = run()
    assert code == 0
    assert out.count("cannot be reached") == 1
    assert f"{gone.url.partition('//')[2]} cannot be reached: 30 SAEs" in out
    assert re.search(r"mine +2 +\n", out), "another host is asked all the same"


def test_a_host_that_cannot_be_reached_twice_is_not_asked_again(folder, web, monkeypatch):
    asked = []

    def fail(_: object, url: str) -> None:
        asked.append(url)
        raise Offline(url)

    (folder / "web.yaml").write_text(of_web(web, 9))
    monkeypatch.setattr("saezoo.metadata._ask_head", fail)
    assert set(statuses().values()) == {"unknown"}
    assert len(asked) == 2


def test_no_network_wanted_is_one_line_before_any_request(mine, hub, monkeypatch):
    assert mine.exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Offline, match="HF_HUB_OFFLINE"):
        statuses()
    assert not hub.requests


def test_the_folder_of_a_format_that_nothing_reads_is_only_looked_for(mine, hub, commit):
    assert commit
    mine.write_text(YAML.replace("format: sparsify", "format: mlsae_of_tomorrow"))
    (row, _) = findings("mine")
    assert row.status == "ok"
    assert "mlsae_of_tomorrow" in row.detail
    assert (row.size, row.sha256) == (None, {})
    hub.commit(REPO, {"elsewhere/x": b""})
    assert set(statuses().values()) == {"dead"}


def test_fill_adds_lines_and_changes_no_other_byte(mine, commit):
    assert [verdict.filled for verdict in verify_releases(fill=True)] == [True]
    was, now = YAML.splitlines(), mine.read_text().splitlines()
    added = [line for line in now if line not in was]
    assert [line for line in now if line in was] == was
    facts = f"{{size: {SIZE}, sha256: {{sae.safetensors: {SHA256}}}}}"
    assert added == [
        f"  revision: {commit}",
        "files:  # by id; written by `saezoo registry verify --fill`",
        f"  layers.0: {facts}",
        f"  layers.1: {facts}",
    ]
    assert now[6] == f"  revision: {commit}"


def test_what_was_filled_is_what_a_fetch_is_held_to(mine, hub, commit):
    list(verify_releases(fill=True))
    assert mine.exists()
    hub.commit(REPO, {})
    entry = find_sae("mine/layers.1")
    assert (entry.revision, entry.size) == (commit, SIZE)
    assert entry.sha256 == {"sae.safetensors": SHA256}
    assert expand(read_release("mine"))["layers.1"] == entry
    assert fetch(entry).commit == commit


def test_a_second_fill_writes_nothing(mine, folder, web, commit):
    assert commit
    (folder / "web.yaml").write_text(of_web(web))
    assert [verdict.filled for verdict in verify_releases(fill=True)] == [True, True]
    was = {path: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}
    assert [verdict.filled for verdict in verify_releases(fill=True)] == [False, False]
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()} == was
    assert mine in was


def test_fill_pins_no_release_in_which_something_changed(mine, commit):
    assert commit
    text = YAML + f"files: {{layers.0: {{sha256: '{'0' * 64}'}}}}\n"
    mine.write_text(text)
    (verdict,) = verify_releases(fill=True)
    assert not verdict.filled
    assert "1 changed" in verdict.not_filled
    assert mine.read_text() == text


def test_a_release_that_cannot_be_edited_does_not_keep_others_from_being_filled(mine, commit):
    odd = YAML.replace("release: mine", "release: ahead") + "...\n"
    (mine.parent / "ahead.yaml").write_text(odd)
    first, second = verify_releases(fill=True)
    assert "by hand" in first.not_filled
    assert (mine.parent / "ahead.yaml").read_text() == odd
    assert second.filled
    assert commit in mine.read_text()


def test_where_the_rows_are_of_several_repos_each_id_has_its_own_commit(folder, hub):
    commits = [hub.commit(f"org/{name}", FILES) for name in "ab"]
    rows = "".join(
        f"- {{id: '{n}', source: hf://org/{name}, path: layers.0}}\n" for n, name in enumerate("ab")
    )
    path = folder / "both.yaml"
    path.write_text(f"release: both\nabout: x\nshared: {{format: sparsify}}\nsaes:\n{rows}")
    list(verify_releases(fill=True))
    assert [find_sae(f"both/{n}").revision for n in "01"] == commits
    assert "revision" not in yaml.safe_load(path.read_text())["shared"]


def test_fill_leaves_a_stated_branch_and_files_of_this_machine_alone(mine, folder, hub):
    hub.commit(REPO, FILES, branch="v1")
    mine.write_text(YAML.replace("  site:", "  revision: v1\n  site:", 1))
    assert statuses(fill=True) == {"mine/layers.0": "ok", "mine/layers.1": "ok"}
    assert find_sae("mine/layers.0").revision == "v1"
    assert find_sae("mine/layers.0").size == SIZE
    here = folder.parent / "here"
    here.mkdir()
    for name in ("cfg.json", "sae.safetensors"):
        (here / name).write_bytes(FILES[f"layers.0/{name}"])
    text = f"release: own\nabout: x\nsaes: [{{id: a, format: sparsify, source: '{here}'}}]\n"
    (folder / "own.yaml").write_text(text)
    assert statuses("own", fill=True) == {"own/a": "ok"}
    assert (folder / "own.yaml").read_text() == text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "text",
    [
        YAML,
        YAML.rstrip("\n"),
        "release: mine\nabout: é…\nshared: {source: hf://o/r, licence: MIT}  # x\n",
        "release: mine\nshared: {licence: MIT}\nfiles: {}\n",
        "release: mine\nshared:\n    licence: MIT\n",
        "release: mine\nshared: {source: hf://o/r}\nfiles:\n  a: {size: 1}  # mine\n# end\n",
        "release: mine\nshared: {source: hf://o/r}\nfiles:\n  a:\n    size: 1\n\n  c: {}\nx: 1\n",
        "release: mine\nshared: {source: hf://o/r}\nfiles:\n  c:\n    sha256:\n      x: y\n#end",
        "release: mine\nshared: {source: hf://o/r}\nfiles: {a: {size: 1}, c: {size: 2}}\n",
        '{"release": "mine", "shared": {"source": "hf://o/r"}, "files": {}}',
    ],
)
def test_facts_go_into_yaml_of_any_form_and_everything_else_stays(text, end):
    text = text.replace("\n", end)
    commit, odd = "0" * 40, "8"
    files = {
        "a": {"size": 3, "sha256": {"x, y.pt": "1" * 64}},
        odd: {"size": 4},
        "b: #": {"size": 5},
    }
    new = add_facts(text, commit, files, "here")
    was, now = yaml.safe_load(text), yaml.safe_load(new)
    assert now.pop("shared") == was.pop("shared") | {"revision": commit}
    had = was.pop("files", {})
    assert now.pop("files") == had | {k: v | had.get(k, {}) for k, v in files.items()}
    assert now == was
    assert add_facts(new, "f" * 40, files, "here") == new
    letters = iter(new)
    assert all(sign in letters for sign in text), "something was taken away"
    assert new.count("\r\n") == (new.count("\n") if end == "\r\n" and "\r\n" in text else 0)


@pytest.mark.parametrize(
    "text",
    ["release: mine\nshared: &x {a: b}\nmore: *x\n", "release: mine\nsaes: []\n...\n", "- a\n"],
)
def test_yaml_of_a_form_that_cannot_be_edited_is_refused(text):
    with pytest.raises(RegistryError, match="by hand"):
        add_facts(text, "0" * 40, {"a": {"size": 1}}, "registry/mine.yaml")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("files: {layers.7: {size: 1}}\n", "'layers.7', which is no id"),
        ("files: {layers.0: {d_in: 1}}\n", "files.layers.0.d_in"),
        ("files: {layers.0: {size: -1}}\n", "files.layers.0.size"),
    ],
)
def test_files_of_an_unknown_id_or_key_are_refused(mine, files, said):
    mine.write_text(YAML + files)
    with pytest.raises(RegistryError) as caught:
        expand(read_release("mine"))
    assert said in str(caught.value)
    assert "registry/mine.yaml" in str(caught.value)


def test_files_win_over_shared_and_a_row_over_them(folder):
    (folder / "mine.yaml").write_text(
        "release: mine\nabout: x\nshared: {source: hf://o/r, size: 1}\n"
        "saes: [{id: a}, {id: b, size: 3}, {id: c}]\n"
        "files: {a: {size: 2}, b: {size: 2}}\n"
        "open: [{id: 'layers.{layer}'}]\n"
    )
    assert [find_sae(f"mine/{id}").size for id in "abc"] == [2, 3, 1]
    (folder / "open.yaml").write_text(
        "release: open\nabout: x\nshared: {source: hf://o/r}\n"
        "open: [{id: 'layers.{layer}'}]\nfiles: {layers.3: {size: 5}}\n"
    )
    assert expand(read_release("open")) == {}
    assert [find_sae(f"open/layers.{n}").size for n in (3, 4)] == [5, None]


def test_an_installed_registry_is_not_written(mine, hub, tmp_path, monkeypatch):
    assert mine.exists()
    monkeypatch.setattr("saezoo.verify.registry_folder", lambda: tmp_path / "_registry")
    with pytest.raises(RegistryError, match="in a checkout"):
        statuses(fill=True)
    assert not hub.requests


def test_a_release_that_there_is_not_is_named_before_any_request(mine, hub):
    assert mine.exists()
    with pytest.raises(UnknownSAE, match="mime"):
        statuses("mine", "mime")
    assert not hub.requests


def test_the_command_prints_a_row_a_release_and_fails_only_for_dead_or_changed(mine, hub, run):
    hub.commit(REPO, FILES)
    code, out, err = run("mine", "--fill")
    assert code == 0
    assert not err, "no bar where stderr is no terminal"
    assert out.splitlines()[1].split() == ["mine", "2", "yes"]
    assert "make docs" in out
    rows = json.loads(run("--json")[1])
    assert [row["name"] for row in rows] == ["mine/layers.0", "mine/layers.1"]
    assert rows[0]["sha256"] == {"sae.safetensors": SHA256}
    text = mine.read_text().replace(f"size: {SIZE}", "size: 7", 1)
    mine.write_text(text)
    code, out, _ = run("mine", "--fill")
    assert code == 1
    assert "changed: mine/layers.0: " in out
    assert "settle those first" in out
    assert mine.read_text() == text


def test_a_bar_is_shown_on_a_terminal(mine, hub, commit, run, monkeypatch):
    assert mine.exists()
    assert commit
    assert hub.repos
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, out, err = run()
    assert "SAEs" in err
    assert "SAEs" not in out


def test_ctrl_c_says_what_was_seen_and_leaves_whole_files(mine, folder, web, hub, run, monkeypatch):
    hub.commit(REPO, FILES)
    (folder / "web.yaml").write_text(of_web(web))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saezoo.metadata._ask_head", interrupt)
    code, out, err = run("--fill")
    assert code == 130
    assert "interrupted" in err
    assert out.splitlines()[1].split() == ["mine", "2", "yes"]
    assert "files:" in mine.read_text()
    assert (folder / "web.yaml").read_text() == of_web(web)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.yaml", "web.yaml"]


def test_a_write_that_breaks_off_leaves_the_old_file(mine, commit, monkeypatch):
    assert commit

    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        list(verify_releases(fill=True))
    assert mine.read_text() == YAML
    assert [path.name for path in mine.parent.iterdir()] == ["mine.yaml"]


def test_a_dead_sae_makes_the_command_fail(mine, hub, run):
    assert mine.exists()
    hub.commit(REPO, {name: body for name, body in FILES.items() if "layers.1" not in name})
    code, out, _ = run()
    assert code == 1
    assert "dead: mine/layers.1: " in out
