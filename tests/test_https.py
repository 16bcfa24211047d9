"""Files of plain https hosts, here on loopback: of the promised length and hash, or not at all."""

import base64
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
from saezoo.https import cache_place, join_url
from saezoo.hub import fetch, peek
from tests.fakes.web import FakeWeb

WEIGHTS = bytes(range(256)) * 8
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {
    "/gpt2/autoencoders/8.pt": WEIGHTS,
    "/sparsify/cfg.json": b'{"d_in": 6}',
    "/sparsify/sae.safetensors": WEIGHTS,
    "/native/config.json": b'{"saezoo_format": 1}',
    "/native/sae.safetensors": WEIGHTS,
    "/native/golden.safetensors": b"golden",
    "/other/config.json": b'{"who": "knows"}',
    "/mixed/cfg.json": b'{"d_in": 6}',
    "/mixed/config.json": b'{"of": "another tool"}',
    "/mixed/sae.safetensors": WEIGHTS,
    "/trainer_0/ae.pt": WEIGHTS,
    "/trainer_0/config.json": b"{}",
    "/trainer_1/ae.pt": WEIGHTS,
}


@pytest.fixture(scope="module")
def host() -> Iterator[FakeWeb]:
    server = FakeWeb()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def web(host: FakeWeb, cache: Path) -> FakeWeb:
    """A host with an SAE of every format, and an empty cache."""
    assert not cache.exists()
    host.reset()
    host.files, host.headers, host.redirects = dict(FILES), {}, {}
    return host


@pytest.fixture
def one_file(web: FakeWeb) -> Entry:
    return Entry(source=web.url, path="gpt2/autoencoders/8.pt")


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("split", [True, False])
def test_a_file_is_fetched_once_and_then_used_without_a_request(web, split):
    path = "gpt2/autoencoders/8.pt"
    entry = Entry(source=web.url, path=path) if split else Entry(source=f"{web.url}/{path}")
    assert peek(entry) == "https, not in the cache"
    assert not web.requests
    fetched = fetch(entry)
    assert fetched.path.read_bytes() == WEIGHTS
    assert (fetched.path.name, fetched.format) == ("8.pt", "openai")
    assert (fetched.commit, fetched.how) == (None, "https, cached")
    assert fetch(entry, local_files_only=True) == fetch(entry) == fetched
    assert peek(entry) == "https, cached"
    assert web.asked() == {f"GET /{path}": 1}


@pytest.mark.parametrize(
    ("path", "format_", "names"),
    [
        ("sparsify", "sparsify", ["cfg.json", "sae.safetensors"]),
        ("sparsify/", "sparsify", ["cfg.json", "sae.safetensors"]),
        ("mixed", "sparsify", ["cfg.json", "sae.safetensors"]),
        ("native", "native", ["config.json", "sae.safetensors"]),
        ("trainer_0", "dictionary_learning", ["ae.pt", "config.json"]),
        ("trainer_1", "dictionary_learning", ["ae.pt"]),
    ],
)
@pytest.mark.parametrize("stated", [True, False])
def test_a_folder_is_fetched_with_what_its_format_needs(web, path, format_, names, stated):
    entry = Entry(source=web.url, path=path)
    fetched = fetch(entry, format=format_ if stated else None)
    assert fetched.format == format_
    got = {item.name: item.read_bytes() for item in fetched.path.iterdir()}
    wanted = {name: FILES[f"/{path.strip('/')}/{name}"] for name in names}
    # a probe of a folder that cannot be listed may have brought a config that is another format's
    assert {name: got[name] for name in names} == wanted
    assert not stated or set(got) == set(names)


@pytest.mark.parametrize("path", ["trainer_1", "trainer_1/ae.pt", "trainer_0/ae.pt"])
def test_an_optional_file_that_is_not_there_is_not_asked_for_again(web, path):
    entry = Entry(source=web.url, path=path, format="dictionary_learning")
    first = fetch(entry)
    assert len(web.requests) == 2
    assert fetch(entry) == first
    assert len(web.requests) == 2


def test_extras_of_a_native_folder_come_only_when_asked_for(web):
    entry = Entry(source=f"{web.url}/native", format="native")
    assert len(list(fetch(entry).path.iterdir())) == 2
    names = {item.name for item in fetch(entry, extras=True).path.iterdir()}
    assert names == {"config.json", "sae.safetensors", "golden.safetensors"}


def test_a_refresh_fetches_the_file_again(web, one_file):
    fetched = fetch(one_file)
    web.files["/gpt2/autoencoders/8.pt"] = b"newer"
    assert fetch(one_file).path.read_bytes() == WEIGHTS
    assert fetch(one_file, refresh=True).path == fetched.path
    assert fetched.path.read_bytes() == b"newer"


@pytest.mark.parametrize("by_variable", [True, False])
def test_offline_serves_what_is_cached_and_asks_nobody(web, one_file, monkeypatch, by_variable):
    fetched = fetch(one_file)
    web.requests.clear()
    if by_variable:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(one_file, local_files_only=not by_variable) == fetched
    for path in ("sparsify", "gpt2/autoencoders/9.pt"):
        with pytest.raises(Offline, match="no network is wanted") as caught:
            fetch(Entry(source=web.url, path=path), local_files_only=not by_variable)
        one_line(caught.value)
    assert not web.requests


@pytest.mark.parametrize("promise", ["length", "md5", "sha256", "size", "cut"])
def test_what_is_not_as_promised_is_refused_and_the_next_call_repairs_it(
    web, one_file, cache, promise
):
    path = "/gpt2/autoencoders/8.pt"
    md5 = base64.b64encode(hashlib.md5(WEIGHTS).digest()).decode()
    facts: dict[str, object] = {}
    if promise == "length":
        web.headers[path] = {"Content-Length": str(len(WEIGHTS) + 1), "Connection": "close"}
    elif promise == "md5":
        web.headers[path] = {"Content-MD5": md5}
        web.fail(path, "flip")
    elif promise == "sha256":
        facts = {"sha256": SHA256}
        web.fail(path, "flip")
    elif promise == "size":
        facts = {"size": len(WEIGHTS)}
        web.fail(path, "short")
    else:
        web.fail(path, "cut")
    entry = one_file.model_copy(update=facts)
    with pytest.raises(Corrupted) as caught:
        fetch(entry)
    one_line(caught.value)
    assert not [item for item in (cache / "https").rglob("*") if item.is_file()]
    if promise == "length":
        web.headers.clear()
    assert fetch(entry).path.read_bytes() == WEIGHTS


def test_a_content_md5_that_fits_is_accepted(web, one_file):
    md5 = base64.b64encode(hashlib.md5(WEIGHTS).digest()).decode()
    web.headers["/gpt2/autoencoders/8.pt"] = {"Content-MD5": md5}
    assert fetch(one_file).path.read_bytes() == WEIGHTS


def test_a_hash_stated_later_is_held_against_what_is_cached(web, one_file):
    fetch(one_file)
    fitting = one_file.model_copy(update={"sha256": SHA256})
    web.requests.clear()
    assert fetch(fitting).path.read_bytes() == WEIGHTS
    assert not web.requests
    wrong = one_file.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(Corrupted):
        fetch(wrong, local_files_only=True)
    with pytest.raises(Corrupted):
        fetch(wrong)
    assert fetch(fitting).path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("sha256", [None, SHA256])
@pytest.mark.parametrize("damage", ["cut", "no marker"])
def test_a_file_whose_check_is_not_known_of_is_not_trusted(web, one_file, cache, damage, sha256):
    entry = one_file.model_copy(update={"sha256": sha256})
    path = fetch(entry).path
    path.write_bytes(WEIGHTS[:100])
    if damage == "no marker":
        for marker in (cache / "checked").rglob("*.json"):
            marker.unlink()
    with pytest.raises((Corrupted, Offline)):
        fetch(entry, local_files_only=True)
    assert fetch(entry).path.read_bytes() == WEIGHTS
    assert web.asked()["GET /gpt2/autoencoders/8.pt"] == 2


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (404, MissingFile, "no such file (404)"),
        (410, MissingFile, "no such file (410)"),
        (401, NoAccess, "gives no access"),
        (403, NoAccess, "gives no access"),
        (500, FetchError, "answered 500"),
        (418, FetchError, "answered 418"),
    ],
)
def test_each_refusal_is_an_error_of_ours_in_one_line(web, one_file, status, error, words):
    web.fail("8.pt", "status", status=status, times=9, headers={"Retry-After": "0"})
    with pytest.raises(error) as caught:
        fetch(one_file)
    assert words in one_line(caught.value)


@pytest.mark.parametrize("pause", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_host_is_asked_again_as_soon_as_it_says(web, one_file, status, pause):
    web.fail("8.pt", "status", status=status, times=3, headers={"Retry-After": pause})
    assert fetch(one_file).path.read_bytes() == WEIGHTS
    assert len(web.requests) == 4


@pytest.mark.parametrize(
    ("pause", "times", "asked"),
    [("0", 99, 4), ("3600", 1, 1), ("Fri, 01 Jan 2999 00:00:00 GMT", 1, 1)],
)
def test_a_host_that_stays_busy_is_left_alone(web, one_file, pause, times, asked):
    web.fail("8.pt", "status", times=times, headers={"Retry-After": pause})
    with pytest.raises(FetchError, match="answered 503"):
        fetch(one_file)
    assert len(web.requests) == asked


def test_a_host_that_is_down_is_said_to_be():
    gone = FakeWeb()
    gone.close()
    with pytest.raises(Offline, match="cannot be reached") as caught:
        fetch(Entry(source=f"{gone.url}/8.pt"))
    one_line(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/8.pt",
        "http://127.0.0.1.example.com/8.pt",
        "https://user:word@example.com/8.pt",
        "https://example.com/a/../8.pt",
        "https://example.com/a/%2e%2e/8.pt",
    ],
)
def test_an_unsafe_url_is_refused_before_any_request(url):
    with pytest.raises(BadName) as caught:
        fetch(Entry(source=url))
    assert "word" not in one_line(caught.value).replace("password", "")


def test_a_redirect_is_followed_but_never_to_plain_http(web, one_file):
    web.redirects["/gpt2/autoencoders/8.pt"] = "/trainer_0/ae.pt"
    assert fetch(one_file).path.read_bytes() == WEIGHTS
    web.redirects["/gpt2/autoencoders/8.pt"] = "http://example.com/8.pt?signature=secret"
    with pytest.raises(FetchError, match="not https") as caught:
        fetch(one_file, refresh=True)
    assert "secret" not in one_line(caught.value)
    assert fetch(one_file).path.read_bytes() == WEIGHTS


def test_a_query_is_sent_but_never_shown(web):
    entry = Entry(source=f"{web.url}/gpt2/autoencoders/8.pt?signature=secret")
    web.fail("8.pt", "status", status=403)
    with pytest.raises(NoAccess) as caught:
        fetch(entry)
    assert "secret" not in one_line(caught.value)
    fetched = fetch(entry)
    assert fetched.path.read_bytes() == WEIGHTS
    assert "secret" not in str(fetched.path)
    assert fetch(Entry(source=f"{web.url}/gpt2/autoencoders/8.pt")).path != fetched.path


@pytest.mark.parametrize(
    ("path", "format_", "error", "words"),
    [
        ("other", None, FormatError, "Looked for"),
        ("nowhere", None, FormatError, "Looked for"),
        ("nowhere", "sparsify", MissingFile, "cfg.json"),
        ("trainer_0", "native", MissingFile, "sae.safetensors"),
        ("a/../b", "native", BadName, "'..'"),
    ],
)
def test_a_folder_that_is_no_sae_is_refused(web, path, format_, error, words):
    with pytest.raises(error) as caught:
        fetch(Entry(source=web.url, path=path), format=format_)
    assert words in one_line(caught.value)


@pytest.mark.parametrize("progress", [True, False])
def test_bars_and_the_size_are_for_people_and_not_for_pipes(
    one_file, monkeypatch, capsys, progress
):
    monkeypatch.setattr("saezoo.transfer.LARGE", 1000)
    fetch(one_file, progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("MB to fetch" in shown.err) == progress
    assert ("100%" in shown.err) == progress
    assert progress or shown.err == ""


def test_ctrl_c_in_the_middle_leaves_the_cache_usable(one_file, cache, monkeypatch):
    def interrupt(_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("saezoo.https.sha256_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(one_file)
    assert not [item for item in cache.rglob("*") if item.is_file()]
    assert fetch(one_file).path.read_bytes() == WEIGHTS


def test_two_processes_at_once_both_get_whole_files(one_file):
    code = (
        "import sys; from saezoo.entry import Entry; from saezoo.hub import fetch\n"
        f"path = fetch(Entry(source={one_file.source!r}, path={one_file.path!r})).path\n"
        "sys.stdout.write(path.read_bytes().hex())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=120)
        assert bytes.fromhex(out.decode()) == WEIGHTS


def test_places_in_the_cache_stay_below_it_and_are_not_shared(tmp_path):
    urls = [
        "https://example.com/a/b.pt",
        "https://example.com:8443/a/b.pt",
        "https://example.com/a/b.pt?x=1",
        "https://example.com/a/b.pt?x=2",
        "https://example.com/a%2Fb.pt",
        "https://example.com/C:%5Cb.pt",
    ]
    places = [place for url in urls for place in cache_place(url, tmp_path)]
    assert len(set(places)) == 2 * len(urls)
    assert all(tmp_path in place.resolve().parents for place in places)


@pytest.mark.parametrize(
    ("url", "path", "joined"),
    [
        ("https://a.b/c", "d/e.pt", "https://a.b/c/d/e.pt"),
        ("https://a.b/c/", "/d e.pt", "https://a.b/c/d%20e.pt"),
        ("https://a.b", "d#1.pt", "https://a.b/d%231.pt"),
        ("https://a.b/c?sig=1", "d.pt", "https://a.b/c/d.pt?sig=1"),
        ("https://a.b/c/d.pt", "", "https://a.b/c/d.pt"),
    ],
)
def test_a_path_is_joined_to_the_url_of_its_folder(url, path, joined):
    assert join_url(url, path) == joined
