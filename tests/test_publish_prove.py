"""After the upload: what the Hub gives to others is fetched and compared with what was sent."""

import errno
import shutil
from collections import namedtuple

import pytest

from saezoo.entry import Entry
from saezoo.errors import PublishError
from saezoo.load import load_sae
from saezoo.publishing.pipeline import publish_sae
from saezoo.publishing.prove import SPARE, prove
from saezoo.publishing.staged import Staged
from saezoo.publishing.upload import Uploaded
from tests.fakes.hub_lfs import User
from tests.tiny_folders import at_layer, files_of, write_native

pytestmark = pytest.mark.usefixtures("one_thread")

TOKEN = "hf_s3cr3tS3CR3Ts3cr3t"
REPO = "me/saes"
MANIFEST = b"""release: saes
about: Two SAEs.
shared: {format: native}
saes:
- {id: layer_3, path: layer_3}
- {id: layer_4, path: layer_4}
"""
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def me(hub, cache, monkeypatch):  # noqa: ARG001 a cache of its own
    hub.users[TOKEN] = User("me", writes={"me"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def folder(tmp_path):
    for layer in (3, 4):
        write_native(tmp_path / f"run/layer_{layer}", seed=layer, site=at_layer(layer))
    return tmp_path / "run"


@pytest.fixture
def there(hub, folder):
    """What prove takes, for two SAEs that lie on the Hub."""
    files = {path: folder / path for path in files_of(folder)}
    staged = Staged(files, {"saezoo.yaml": MANIFEST})
    commit = hub.commit(REPO, files_of(folder) | {"saezoo.yaml": MANIFEST})
    entries = [Entry(id=name, path=name, source=f"hf://{REPO}") for name in ("layer_3", "layer_4")]
    return Uploaded(REPO, commit, "url"), staged, entries


def wrong(findings):
    return [f"{found.what}: {found.detail}" for found in findings if found.ok is False]


def test_every_file_and_every_sae_is_looked_at_and_nothing_is_left_behind(hub, there, cache):
    uploaded, staged, entries = there
    findings = prove(uploaded, staged, entries)
    assert not wrong(findings)
    looked = {found.what for found in findings if found.ok}
    assert looked >= set(staged.paths)
    for name in ("layer_3", "layer_4"):
        assert looked >= {f"{name}: {what}" for what in ("files", "shapes", "finite", "golden")}
    assert list(cache.iterdir()) == []
    # a cache of before is of no account
    load_sae(f"hf://{REPO}@{uploaded.revision}/layer_3")
    hub.requests.clear()
    prove(uploaded, staged, entries)
    bodies = [path for method, path, _ in hub.requests if method == "GET" and "/storage/" in path]
    assert len(bodies) == len([path for path in staged.files if path.endswith(".safetensors")])


def test_a_private_repo_is_proven_with_the_token(hub, folder):
    done = publish_sae(folder, REPO, private=True)
    assert hub.repos[REPO].private_to == TOKEN
    assert {found.ok for found in done.findings} == {True}


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_bytes_that_arrive_damaged_once_are_fetched_again(hub, there, kind):
    hub.fail("/storage/", kind)
    assert not wrong(prove(*there))


def test_bytes_that_are_not_those_that_were_sent_are_found(hub, there):
    hub.fail("layer_3/sae.safetensors", "flip", times=99)
    hub.fail("layer_4/config.json", "flip", times=99)
    (weights, spec) = wrong(prove(*there))
    assert weights.startswith(
        "layer_3/sae.safetensors: me/saes/layer_3/sae.safetensors: the sha256"
    )
    assert spec.startswith("layer_4/config.json: ")


@pytest.mark.parametrize("path", ["layer_4/config.json", "layer_4/density.safetensors"])
def test_a_commit_that_holds_another_file_is_found(hub, there, path):
    """The Hub gives it as it has it, and it is not what was sent."""
    uploaded, staged, entries = there
    staged.files[path] = staged.files["layer_3/config.json"].with_name("sent")
    staged.files[path].write_bytes(b"{}")
    files = hub.repos[REPO].commits[uploaded.revision]
    commit = hub.commit(REPO, files | {path: b"[]"})
    (found,) = wrong(prove(Uploaded(REPO, commit, "url"), staged, entries))
    assert found.startswith(f"{path}: me/saes/{path}: the sha256 is not the promised")


def test_what_is_not_in_the_commit_is_found(there, tmp_path):
    uploaded, staged, entries = there
    (tmp_path / "more.md").write_text("x")
    more = Staged(staged.files | {"layer_3/more.md": tmp_path / "more.md"}, staged.name_files)
    assert wrong(prove(uploaded, more, entries)) == ["layer_3/more.md: is not in the commit"]


def test_an_sae_that_gives_other_numbers_than_its_golden_ones_is_found(hub, there):
    uploaded, staged, entries = there
    path = "layer_3/golden.safetensors"
    shutil.copy(staged.files["layer_4/golden.safetensors"], staged.files[path])
    files = {name: file.read_bytes() for name, file in staged.files.items()}
    commit = hub.commit(REPO, files | staged.name_files)
    findings = prove(Uploaded(REPO, commit, "url"), staged, entries)
    (golden,) = wrong(findings)
    assert golden.startswith("layer_3: golden: largest difference")
    assert uploaded.revision != commit


def test_a_name_that_saezoo_yaml_does_not_have_is_found(there):
    uploaded, staged, entries = there
    other = entries[0].model_copy(update={"id": "layer_9"})
    with pytest.raises(PublishError, match="is published, at commit .*layer_9"):
        prove(uploaded, staged, [other])


def says_it_is_published(caught, uploaded):
    line = str(caught.value)
    assert line.startswith(
        f"me/saes is published, at commit {uploaded.revision}, but could not be checked: "
    )
    assert line.endswith(f". Check it later: saezoo check hf://me/saes@{uploaded.revision}#layer_3")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_says_that_the_upload_is_done(there, cache, monkeypatch, code):
    def full(_url, file, **_):
        file.write(b"half")
        raise OSError(code, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        with pytest.raises(PublishError) as caught:
            prove(*there)
    assert f"the disk of {cache} has no room" in says_it_is_published(caught, there[0])
    assert list(cache.iterdir()) == []
    assert not wrong(prove(*there))


def test_a_disk_without_room_is_seen_before_anything_is_fetched(hub, there, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(2**40, 2**40 - 2**20, 2**20))
    hub.requests.clear()
    with pytest.raises(PublishError) as caught:
        prove(*there)
    says_it_is_published(caught, there[0])
    assert not hub.requests


def test_no_more_room_is_needed_than_the_largest_sae_takes(there, monkeypatch):
    _, staged, _ = there
    sizes = [
        sum(staged.size_of(path) for path in staged.files if path.startswith(name))
        for name in ("layer_3/", "layer_4/")
    ]
    free = SPARE + max(sizes)
    assert free < SPARE + sum(sizes)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(2**40, 2**40 - free, free))
    assert not wrong(prove(*there))


@pytest.mark.parametrize("where", ["/api/models/", "/resolve/", "/storage/"])
def test_a_connection_that_is_lost_says_that_the_upload_is_done(hub, there, where):
    hub.fail(where, "status", times=99, status=503)
    hub.fail(where, "status", times=99, status=503, method="HEAD")
    with pytest.raises(PublishError) as caught:
        prove(*there)
    says_it_is_published(caught, there[0])


def test_a_cache_that_cannot_be_written_says_that_the_upload_is_done(there, cache):
    cache.write_text("a file where the cache should be")
    with pytest.raises(PublishError) as caught:
        prove(*there)
    says_it_is_published(caught, there[0])
