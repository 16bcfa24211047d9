"""Files of Hub repos, of this package and of one's own, by the real client against a loopback Hub:
only what is needed, no request once cached, and nothing damaged is ever taken for whole.
"""

import errno
import hashlib
import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saezoo import files as files_module
from saezoo.entry import Entry
from saezoo.errors import (
    BadName,
    Corrupted,
    FetchError,
    FormatError,
    MissingFile,
    NoAccess,
    Offline,
)
from saezoo.hub import fetch, list_files, peek
from tests.fakes.hub import FakeHub

REPO = "org/saes"
WEIGHTS = bytes(range(256)) * 8
CFG = b'{"d_in": 6, "k": 3}'
FILES = {
    "README.md": b"# of the repo",
    "layers.10/cfg.json": CFG,
    "layers.10/sae.safetensors": WEIGHTS,
    "layers.10/optimizer.pt": b"not needed",
    "layers.11/cfg.json": CFG,
    "layers.11/sae.safetensors": WEIGHTS[::-1],
    "native/config.json": b'{"saezoo_format": 1}',
    "native/sae.safetensors": WEIGHTS,
    "native/golden.safetensors": b"golden",
    "native/README.md": b"# of the SAE",
    "trainer_0/ae.pt": WEIGHTS,
    "trainer_0/config.json": b"{}",
    "trainer_1/ae.pt": WEIGHTS,
    "gpt2/8.pt": WEIGHTS,
    "mixed/cfg.json": CFG,
    "mixed/config.json": b'{"of": "another tool"}',
    "mixed/sae.safetensors": WEIGHTS,
    "else/weights.onnx": b"",
    "foreign/config.json": b'{"of": "another tool"}',
    "foreign/sae.safetensors": WEIGHTS,
}
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


def entry(path: str = "layers.10", **facts: object) -> Entry:
    return Entry(source=f"hf://{REPO}", path=path, **facts)


def downloads(hub: FakeHub) -> list[str]:
    """The files whose bodies were sent, by the Hub or by its storage, as they are in the repo."""
    bodies = re.compile(rf"/{REPO}/resolve/[^/]+/(.+)|/storage/{REPO}/[^/]+/(.+)")
    asked = [bodies.fullmatch(path) for method, path, _ in hub.requests if method == "GET"]
    return sorted(found[1] or found[2] for found in asked if found)


def content(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in path.iterdir()}


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


@pytest.fixture(autouse=True)
def commit(hub: FakeHub, cache: Path) -> str:
    """The commit of main in a repo with an SAE of every format, and an empty cache."""
    assert not cache.exists()
    return hub.commit(REPO, FILES)


@pytest.mark.parametrize(
    ("path", "format_", "expected"),
    [
        ("layers.10", "sparsify", ["cfg.json", "sae.safetensors"]),
        ("native", "native", ["config.json", "sae.safetensors"]),
        ("trainer_0", "dictionary_learning", ["ae.pt", "config.json"]),
        ("trainer_1", "dictionary_learning", ["ae.pt"]),
    ],
)
@pytest.mark.parametrize("stated", [True, False])
def test_a_folder_is_fetched_with_the_files_that_its_format_needs_and_no_others(
    hub, commit, path, format_, expected, stated
):
    fetched = fetch(entry(path), format=format_ if stated else None)
    assert fetched.format == format_
    assert fetched.commit == commit
    assert content(fetched.path) == {name: FILES[f"{path}/{name}"] for name in expected}
    assert downloads(hub) == sorted(f"{path}/{name}" for name in expected)


@pytest.mark.parametrize(
    ("path", "format_", "beside"),
    [("gpt2/8.pt", "openai", []), ("trainer_0/ae.pt", "dictionary_learning", ["config.json"])],
)
def test_an_sae_that_is_one_file_is_fetched_as_that_file(hub, commit, path, format_, beside):
    fetched = fetch(entry(path))
    assert (fetched.format, fetched.commit) == (format_, commit)
    assert fetched.path.read_bytes() == WEIGHTS
    assert fetched.path.name == Path(path).name
    assert [item.name for item in fetched.path.parent.iterdir() if item != fetched.path] == beside
    assert len(downloads(hub)) == 1 + len(beside)


def test_a_folder_whose_names_fit_two_formats_is_what_its_files_say():
    assert fetch(entry("mixed")).format == "sparsify"
    assert fetch(entry("mixed"), local_files_only=True).format == "sparsify"
    for _ in range(2):
        with pytest.raises(FormatError, match="Looked for"):
            fetch(entry("foreign"))


def test_extras_of_a_native_folder_come_only_when_asked_for(hub):
    names = {item.name for item in fetch(entry("native")).path.iterdir()}
    assert names == {"config.json", "sae.safetensors"}
    names = {item.name for item in fetch(entry("native"), extras=True).path.iterdir()}
    assert names == {"config.json", "sae.safetensors", "golden.safetensors", "README.md"}
    assert len(downloads(hub)) == 4


def test_an_sae_at_the_root_of_a_repo_is_found(hub):
    hub.commit("org/one", {"cfg.json": CFG, "sae.safetensors": WEIGHTS, "x.md": b""})
    fetched = fetch(Entry(source="hf://org/one"))
    assert content(fetched.path) == {"cfg.json": CFG, "sae.safetensors": WEIGHTS}


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("path", ["layers.10", "trainer_1", "native", "gpt2/8.pt"])
def test_nothing_is_requested_once_it_is_cached(hub, commit, pinned, path):
    wanted = entry(path, revision=commit if pinned else None)
    first = fetch(wanted)
    hub.requests.clear()
    assert fetch(wanted) == first
    assert not hub.requests


def test_the_first_fetch_asks_once_for_the_repo_and_once_for_each_body(hub):
    fetch(entry("trainer_1"))
    asked = hub.asked()
    assert asked[f"GET /api/models/{REPO}"] == 1
    assert downloads(hub) == ["trainer_1/ae.pt"]
    # the size is asked for, then huggingface_hub asks for the ETag; nothing that is not there is
    assert sum(asked.values()) == 4


def test_a_branch_is_resolved_once_and_used_until_it_is_refreshed(hub, commit):
    first = fetch(entry())
    assert first.how.startswith(f"branch main, resolved to {commit[:8]}… on 20")
    assert first.how.endswith("--refresh asks again")
    newer = hub.commit(REPO, FILES | {"layers.10/cfg.json": b'{"d_in": 7}'})
    assert fetch(entry()) == first
    second = fetch(entry(), refresh=True)
    assert second.commit == newer
    assert (second.path / "cfg.json").read_bytes() == b'{"d_in": 7}'
    assert (first.path / "cfg.json").read_bytes() == CFG
    assert fetch(entry()) == second


def test_a_pinned_commit_stays_where_it_is_when_the_branch_moves(hub, commit):
    hub.commit(REPO, {"elsewhere.txt": b""})
    fetched = fetch(entry(revision=commit))
    assert fetched.commit == commit
    assert fetched.how == f"commit {commit[:8]}…, as pinned"


def test_a_branch_whose_name_has_a_slash_is_found(hub):
    other = hub.commit(REPO, FILES, branch="refs/pr/3")
    assert fetch(entry(revision="refs/pr/3")).commit == other


def test_a_memory_of_a_branch_that_is_broken_is_asked_for_again(cache):
    first = fetch(entry())
    (memory,) = (cache / "branches").rglob("main.json")
    for text in ("", "{", "[]", '{"commit": "main", "files": []}', '{"commit": null}'):
        memory.write_text(text)
        assert fetch(entry()) == first


def test_the_files_of_a_repo_are_listed_by_one_request(hub):
    assert list_files(REPO) == sorted(FILES)
    assert list_files(entry()) == sorted(FILES)
    assert list_files(f"hf://{REPO}", local_files_only=True) == sorted(FILES)
    assert len(hub.requests) == 1
    with pytest.raises(BadName, match="only the files of a Hub repo"):
        list_files(Entry(source="https://example.com"))


def test_peek_says_what_is_cached_without_a_request(hub, commit):
    pinned = entry(revision=commit)
    assert peek(pinned) == f"commit {commit[:8]}…, as pinned; not in the cache"
    assert peek(entry()) == "branch main; not in the cache"
    assert not hub.requests
    how = fetch(entry()).how
    hub.requests.clear()
    assert peek(entry()) == how
    assert not hub.requests


@pytest.mark.parametrize("by_variable", [True, False])
def test_offline_serves_what_is_cached_and_asks_nobody(hub, monkeypatch, by_variable):
    fetched = fetch(entry())
    hub.requests.clear()
    if by_variable:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(entry(), local_files_only=not by_variable) == fetched
    for lacking in (entry("layers.11"), entry(revision="v2"), entry(revision="0" * 40)):
        with pytest.raises(Offline) as caught:
            fetch(lacking, local_files_only=not by_variable)
        assert "not in the cache" in one_line(caught.value)
    with pytest.raises(Offline, match="refresh needs the network"):
        fetch(entry(), local_files_only=not by_variable, refresh=True)
    assert not hub.requests


def test_a_pinned_commit_in_the_cache_needs_no_listing_when_offline(commit, cache):
    fetched = fetch(entry(revision=commit))
    for memory in (cache / "branches").rglob("*.json"):
        memory.unlink()
    assert fetch(entry(revision=commit), local_files_only=True) == fetched


@pytest.mark.parametrize(
    ("repo", "facts", "error", "words"),
    [
        ("org/none", {}, MissingFile, ["no repo org/none", "private", "token"]),
        (REPO, {"revision": "v9"}, MissingFile, ["'v9'", REPO]),
        (REPO, {"revision": "f" * 40}, MissingFile, ["f" * 40]),
        (REPO, {"path": "layers.1O"}, MissingFile, ["layers.1O", "Closest: ", "layers.10"]),
        (REPO, {"path": "layers.10", "format": "native"}, MissingFile, ["config.json", "native"]),
        (REPO, {"path": "layers.10", "format": "openai"}, FormatError, ["one file", "*.pt"]),
        (REPO, {"path": "gpt2/8.pt", "format": "native"}, FormatError, ["is a folder"]),
        (REPO, {"path": "layers.10", "format": "tarot"}, FormatError, ["tarot", "sparsify"]),
        (REPO, {"path": "else"}, FormatError, ["weights.onnx", "cfg.json", "*.pt", "--from"]),
        (REPO, {"path": "else/weights.onnx"}, FormatError, ["weights.onnx", "*.pt (openai)"]),
        ("org/../x", {}, BadName, ["org/../x"]),
        (REPO, {"path": "../layers.10"}, BadName, ["'..'"]),
        (REPO, {"path": "/layers.10"}, BadName, ["/layers.10"]),
        (REPO, {"path": "a\\b"}, BadName, ["relative"]),
        (REPO, {"path": "a\0b"}, BadName, ["relative"]),
        (REPO, {"path": "C:/b"}, BadName, ["relative"]),
    ],
)
def test_what_is_not_there_is_named_in_one_line(hub, repo, facts, error, words):
    with pytest.raises(error) as caught:
        fetch(Entry(**({"source": f"hf://{repo}", "path": "layers.10"} | facts)))
    text = one_line(caught.value)
    assert [word for word in words if word not in text] == []
    assert downloads(hub) == []


def test_a_gated_repo_says_where_its_licence_is_accepted(hub):
    hub.repos[REPO].gated = True
    with pytest.raises(NoAccess) as caught:
        fetch(entry())
    text = one_line(caught.value)
    assert f"https://huggingface.co/{REPO}" in text
    assert "licence" in text
    assert "token" in text


def test_a_private_repo_is_had_with_its_token_which_no_message_shows(hub, caplog):
    hub.repos[REPO].private_to = "hf_secret"
    caplog.set_level("DEBUG")
    for token in (None, "hf_another"):
        with pytest.raises(MissingFile) as caught:
            fetch(entry(), token=token)
        assert "private" in one_line(caught.value)
        assert "hf_another" not in str(caught.value)
    assert fetch(entry(), token="hf_secret").path.is_dir()
    with pytest.raises(NoAccess) as caught:
        fetch(entry("layers.11"), token="hf_secret\n")
    assert "hf_secret" not in one_line(caught.value)
    hub.fail("/resolve/", "status", status=401, method="HEAD", times=9)
    with pytest.raises(NoAccess) as caught:
        fetch(entry("layers.11"), token="hf_secret")
    assert "hf_secret" not in one_line(caught.value)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("saezoo")]
    assert "hf_" not in " ".join(ours)


@pytest.mark.parametrize(
    ("where", "method"),
    [("/api/models/", "GET"), ("sae.safetensors", "HEAD"), ("sae.safetensors", "GET")],
)
@pytest.mark.parametrize("status", [503, 429])
def test_a_busy_hub_is_asked_again_as_soon_as_it_says(hub, where, method, status):
    hub.fail(where, "status", status=status, method=method, headers={"Retry-After": "0"})
    fetched = fetch(entry())
    assert content(fetched.path) == {"cfg.json": CFG, "sae.safetensors": WEIGHTS}


def test_a_hub_that_stays_busy_is_not_asked_for_ever(hub):
    hub.fail("/api/models/", "status", times=99, headers={"Retry-After": "0"})
    with pytest.raises(FetchError, match="503") as caught:
        fetch(entry())
    one_line(caught.value)
    assert len(hub.requests) == 4


def test_a_hub_that_wants_a_long_pause_is_left_alone_at_once(hub):
    hub.fail("/api/models/", "status", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(FetchError, match="429"):
        fetch(entry())
    assert len(hub.requests) == 1


def test_an_answer_that_is_no_listing_is_an_error_of_ours(monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda _: "<html>a proxy's login page</html>")
    with pytest.raises(FetchError) as caught:
        fetch(entry())
    assert "makes no sense" in one_line(caught.value)


def test_a_body_that_is_cut_is_completed(hub):
    hub.fail("sae.safetensors", "cut")
    fetched = fetch(entry())
    assert content(fetched.path) == {"cfg.json": CFG, "sae.safetensors": WEIGHTS}


@pytest.mark.parametrize("name", ["sae.safetensors", "cfg.json"])
@pytest.mark.parametrize("kind", ["flip", "short"])
def test_a_damaged_download_is_refused_and_the_next_call_repairs_it(hub, name, kind):
    hub.fail(name, kind)
    with pytest.raises(Corrupted) as caught:
        fetch(entry())
    assert name in one_line(caught.value)
    with pytest.raises(Offline):
        fetch(entry(), local_files_only=True)
    fetched = fetch(entry())
    assert content(fetched.path) == {"cfg.json": CFG, "sae.safetensors": WEIGHTS}


@pytest.mark.parametrize("sha256", [SHA256, SHA256.upper(), {"sae.safetensors": SHA256}])
def test_a_stated_hash_that_fits_is_accepted(sha256):
    fetched = fetch(entry(sha256=sha256, size=len(CFG) + len(WEIGHTS)))
    assert (fetched.path / "sae.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "facts", [{"sha256": "0" * 64}, {"sha256": {"cfg.json": "0" * 64}}, {"size": 1}]
)
@pytest.mark.parametrize("cached", [True, False])
def test_a_stated_fact_that_does_not_fit_is_refused_and_spoils_nothing(facts, cached):
    if cached:
        fetch(entry())
    with pytest.raises(Corrupted) as caught:
        fetch(entry(**facts))
    assert "promised" in one_line(caught.value)
    assert content(fetch(entry()).path) == {"cfg.json": CFG, "sae.safetensors": WEIGHTS}


def test_a_crash_between_download_and_check_leaves_nothing_unchecked(hub, cache):
    hub.fail("sae.safetensors", "flip")
    with pytest.raises(Corrupted):
        fetch(entry())
    fetched = fetch(entry())
    weights = fetched.path / "sae.safetensors"
    # as a crash leaves it: in its place, damaged, and without the marker of a check
    weights.resolve().write_bytes(bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:])
    for marker in (cache / "checked").rglob("sae.safetensors.json"):
        marker.unlink()
    with pytest.raises(Corrupted):
        fetch(entry(), local_files_only=True)
    assert fetch(entry()) == fetched
    assert weights.read_bytes() == WEIGHTS


def test_a_file_that_was_cut_in_the_cache_is_fetched_again(hub):
    fetched = fetch(entry())
    weights = fetched.path / "sae.safetensors"
    weights.resolve().write_bytes(WEIGHTS[:100])
    hub.requests.clear()
    assert fetch(entry()) == fetched
    assert weights.read_bytes() == WEIGHTS
    assert downloads(hub) == ["layers.10/sae.safetensors"]


def test_files_are_hashed_on_download_and_not_on_every_load(monkeypatch):
    wanted = entry(sha256=SHA256)
    fetch(wanted)

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was hashed again")

    monkeypatch.setattr("saezoo.transfer.sha256_of", refuse)
    assert fetch(wanted).format == "sparsify"


def test_a_full_disk_is_an_error_of_ours_and_leaves_the_cache_usable(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "replace", full)
        with pytest.raises(FetchError, match="No space left on device") as caught:
            fetch(entry())
        one_line(caught.value)
    assert content(fetch(entry()).path) == {"cfg.json": CFG, "sae.safetensors": WEIGHTS}


def test_ctrl_c_in_the_middle_leaves_the_cache_usable(cache, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("saezoo.hf._Silent.update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(entry())
    assert not list(cache.rglob("*.incomplete"))
    assert content(fetch(entry()).path) == {"cfg.json": CFG, "sae.safetensors": WEIGHTS}


def test_two_processes_at_once_both_get_whole_files():
    code = (
        "import sys; from saezoo.entry import Entry; from saezoo.hub import fetch\n"
        f"path = fetch(Entry(source='hf://{REPO}', path='layers.10')).path\n"
        "sys.stdout.write((path / 'sae.safetensors').read_bytes().hex())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=120)
        assert bytes.fromhex(out.decode()) == WEIGHTS


def test_threads_at_once_all_get_whole_files():
    got: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: got.append((fetch(entry()).path / "sae.safetensors").read_bytes())
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [WEIGHTS] * 4


def test_a_hub_that_is_down_is_said_to_be_and_the_cache_still_serves(monkeypatch):
    fetched = fetch(entry())
    gone = FakeHub()
    gone.close()
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", gone.url)
    assert fetch(entry()) == fetched
    with pytest.raises(Offline, match="cannot be reached") as caught:
        fetch(Entry(source="hf://org/other"))
    one_line(caught.value)


@pytest.mark.parametrize("progress", [True, False])
def test_bars_and_the_size_are_for_people_and_not_for_pipes(monkeypatch, capsys, caplog, progress):
    monkeypatch.setattr("saezoo.transfer.LARGE", 1000)
    caplog.set_level("INFO", logger="saezoo")
    fetch(entry(), progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("sae.safetensors" in shown.err) == progress
    assert ("MB to fetch" in shown.err) == progress
    assert f"{REPO} (layers.10/cfg.json, layers.10/sae.safetensors): 0 MB to fetch" in caplog.text


def test_without_a_word_bars_are_shown_where_stderr_is_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    fetch(entry("layers.11"))
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(entry("layers.10"))
    assert pipe.getvalue() == ""
    assert "sae.safetensors" in terminal.getvalue()


def test_a_local_folder_or_file_is_used_where_it_lies(tmp_path):
    (tmp_path / "cfg.json").write_bytes(CFG)
    (tmp_path / "sae.safetensors").write_bytes(WEIGHTS)
    fetched = fetch(Entry(source=str(tmp_path)))
    assert (fetched.path, fetched.format) == (tmp_path, "sparsify")
    assert (fetched.how, fetched.commit) == ("local", None)
    assert peek(Entry(source=str(tmp_path))) == "local"
    (tmp_path / "8.pt").write_bytes(WEIGHTS)
    assert fetch(Entry(source=str(tmp_path), path="8.pt")).format == "openai"


@pytest.mark.parametrize(
    ("facts", "error", "words"),
    [
        ({"source": "/nowhere/at/all"}, MissingFile, "no such file or folder"),
        ({"source": "bundled:nowhere"}, MissingFile, "no such file or folder"),
        ({"source": "bundled:../formats"}, BadName, "'..'"),
        ({"source": "bundled:/etc"}, BadName, "relative"),
        ({"source": "bundled:x", "path": "../../.."}, BadName, "'..'"),
    ],
)
def test_a_local_or_bundled_path_that_is_not_there_is_refused(facts, error, words):
    with pytest.raises(error, match=words) as caught:
        fetch(Entry(**facts))
    one_line(caught.value)


def test_a_local_folder_without_the_files_of_the_format_asked_for_is_refused(tmp_path):
    with pytest.raises(MissingFile, match=r"native needs config\.json, sae\.safetensors"):
        fetch(Entry(source=str(tmp_path)), format="native")
    with pytest.raises(FormatError, match="Looked for"):
        fetch(Entry(source=str(tmp_path)))


def test_a_bundled_folder_lies_in_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "bundled" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"saezoo_format": 1}')
    (folder / "sae.safetensors").write_bytes(WEIGHTS)
    monkeypatch.setattr("saezoo.hub.__file__", str(tmp_path / "hub.py"))
    fetched = fetch(Entry(source="bundled:tiny"), local_files_only=True)
    assert (fetched.path, fetched.format, fetched.how) == (folder, "native", "bundled")
