"""What lies in the cache is shown as it is, and only what was asked for is removed."""

import hashlib
import json
import os
import time

import pytest

from saezoo.cached import KINDS, list_cached, remove_cached, to_prune
from saezoo.cli import main
from saezoo.entry import Entry
from saezoo.errors import BadName, Offline
from saezoo.hub import fetch
from saezoo.load import load_sae
from saezoo.transfer import write_marker
from tests.test_kept import URL, deflated, put

FILES = {"a/cfg.json": b"{}", "a/sae.safetensors": b"w" * 1000}
DAY = 86_400


def age(path, days):
    """As if a file or folder was last used so long ago."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(file, (time.time() - days * DAY,) * 2)


@pytest.fixture
def full(hub, cache):
    """A cache with something of every kind; returns its folder."""
    first = hub.commit("org/saes", FILES)
    second = hub.commit("org/saes", FILES | {"a/cfg.json": b'{"d_in": 6}'})
    for commit in (first, second):
        fetch(Entry(source="hf://org/saes", path="a", revision=commit, format="sparsify"))
    put(cache, deflated())
    load_sae(URL, local_files_only=True)
    for name, text in {
        "hosts/model/config.json": "{}",
        "hosts/model/model.safetensors": "w" * 50,
        "zoos/mine.json": "{}",
        "index/1234.json.gz": "z",
    }.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(text)
    return cache


@pytest.fixture
def run(capsys):
    """(exit code, stdout, stderr) of `saezoo cache …`, in this process."""

    def call(*words):
        with pytest.raises(SystemExit) as caught:
            main(["cache", *words])
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return call


def kinds(items):
    return {item.kind for item in items}


def test_everything_is_listed_by_kind_with_what_it_takes(full):
    items = list_cached()
    assert kinds(items) == set(KINDS)
    found = {(item.kind, item.what): item.size for item in items}
    assert found[("hosts", "model")] == 52
    assert found[("zoos", "zoo/mine")] == 2
    assert found[("kept", URL)] == sum(
        path.stat().st_size for path in (full / "kept").rglob("*") if path.is_file()
    )
    (https,) = (item for item in items if item.kind == "https")
    assert https.path.stat().st_size == https.size
    assert https.what == URL.removeprefix("https://")
    assert {item.kind for item in list_cached(kinds=["hub", "zoos"])} == {"hub", "zoos"}
    with pytest.raises(BadName, match="no kind 'tarot'"):
        list_cached(kinds=["tarot"])


def test_a_blob_that_two_commits_have_counts_once(full):
    hub = list_cached(kinds=["hub"])
    assert len(hub) == 2
    blobs = (full / "hub").glob("*/blobs/*")
    assert sum(item.size for item in hub) == sum(path.stat().st_size for path in blobs)


def test_an_empty_cache_has_nothing(cache, run):
    assert list_cached() == []
    assert run("ls")[1] == f"0 B in {cache}\n"
    assert run("prune", "--yes")[:2] == (0, "nothing to remove\n")
    assert not cache.exists()


def test_what_was_used_within_the_days_stays(full):
    age(full / "hosts", 40)
    age(next((full / "kept").iterdir()) / "kept.json", 40)
    age(full / "zoos" / "mine.json", 400)
    chosen = to_prune(list_cached(), older_than=30)
    assert kinds(chosen) == {"hosts", "kept"}
    load_sae(URL, local_files_only=True)
    assert kinds(to_prune(list_cached(), older_than=30)) == {"hosts"}


@pytest.mark.usefixtures("full")
def test_a_file_that_is_served_from_what_was_kept_counts_as_used():
    (https,) = list_cached(kinds=["https"])
    age(https.path, 40)
    write_marker(https.marks[0], https.path, hashlib.sha256(https.path.read_bytes()).hexdigest())
    age(https.path, 40)
    load_sae(URL, local_files_only=True)
    if os.stat(https.path).st_atime == os.stat(https.path).st_mtime:
        pytest.skip("this disk does not note when a file is read")
    assert to_prune(list_cached(), older_than=30) == []


def test_pinned_zoos_go_only_when_asked_for_by_kind(full):
    items = list_cached()
    assert kinds(to_prune(items)) == set(KINDS) - {"zoos"}
    assert kinds(to_prune(items, kinds=["zoos"])) == {"zoos"}
    remove_cached(to_prune(items))
    assert kinds(list_cached()) == {"zoos"}
    assert (full / "zoos" / "mine.json").is_file()


def test_removing_one_commit_leaves_the_blobs_that_another_needs(full):
    older, newer = sorted(list_cached(kinds=["hub"]), key=lambda item: item.size)
    assert older.size < 1000 < newer.size
    before = sum(path.stat().st_size for path in (full / "hub").glob("*/blobs/*"))
    assert remove_cached([older]) == older.size
    (left,) = list_cached(kinds=["hub"])
    assert left.path == newer.path
    assert left.size == before - older.size
    commit = newer.path.name
    fetched = fetch(
        Entry(source="hf://org/saes", path="a", revision=commit, format="sparsify"),
        local_files_only=True,
    )
    assert (fetched.path / "sae.safetensors").read_bytes() == FILES["a/sae.safetensors"]


def test_what_was_removed_is_fetched_again_and_never_taken_for_there(full, hub):
    remove_cached(list_cached(kinds=["hub", "https"]))
    for source in (Entry(source=URL), Entry(source="hf://org/saes", path="a")):
        with pytest.raises(Offline):
            fetch(source, local_files_only=True)
    assert not [path for path in (full / "checked").rglob("*") if path.is_file()]
    hub.requests.clear()
    fetched = fetch(Entry(source="hf://org/saes", path="a", format="sparsify"))
    assert (fetched.path / "sae.safetensors").read_bytes() == FILES["a/sae.safetensors"]


@pytest.mark.usefixtures("full")
def test_what_is_gone_already_is_no_error():
    items = list_cached()
    remove_cached(items)
    remove_cached(items)
    assert list_cached() == []


def test_ls_is_a_table_or_json(run, full):
    _, table, _ = run("ls")
    assert table.splitlines()[0].split() == ["kind", "what", "size", "last", "used"]
    assert table.splitlines()[-1].endswith(f"in {full}")
    listed = json.loads(run("ls", "--json")[1])
    assert listed["root"] == str(full)
    assert listed["total"] == sum(item["size"] for item in listed["items"])
    assert {item["kind"] for item in listed["items"]} == set(KINDS)
    assert run("ls", "--kind", "tarot")[0] == 1


@pytest.mark.usefixtures("full")
def test_prune_shows_asks_and_removes_only_then(run, monkeypatch):
    code, out, _ = run("prune", "--kind", "kept", "--dry-run")
    assert code == 0
    assert URL in out
    assert out.endswith("would be removed\n")
    code, _, err = run("prune", "--kind", "kept")
    assert code == 1
    assert "--yes" in err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, left in (("n", set(KINDS)), ("y", set(KINDS) - {"kept"})):
        monkeypatch.setattr("click.termui.visible_prompt_func", lambda _, said=answer: said)
        run("prune", "--kind", "kept")
        assert kinds(list_cached()) == left
    code, out, _ = run("prune", "--yes")
    assert code == 0
    assert out.endswith("removed\n")
    assert kinds(list_cached()) == {"zoos"}


@pytest.mark.usefixtures("full")
def test_the_cache_dir_option_is_heeded(run, tmp_path):
    run("prune", "--yes", "--cache-dir", str(tmp_path / "other"))
    assert kinds(list_cached()) == set(KINDS)
    assert list_cached(tmp_path / "other") == []
