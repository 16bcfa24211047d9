"""`saezoo publish` where something is wrong: one line, exit code 1, no traceback, no token, and a
word on what is on the Hub by then.
"""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from saezoo.cli import main
from saezoo.errors import SaezooError
from saezoo.load import load_sae
from saezoo.publishing.upload import Limit, upload
from tests.fakes.hub_lfs import User
from tests.tiny_folders import at_layer, write_native

pytestmark = pytest.mark.usefixtures("one_thread")

TOKEN = "hf_s3cr3tS3CR3Ts3cr3t"
REPO = "me/saes"


@pytest.fixture(autouse=True)
def me(hub, cache, monkeypatch):  # noqa: ARG001 a cache of its own
    hub.users[TOKEN] = User("me", writes={"me"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture(autouse=True)
def no_token_in_any_file(tmp_path):
    yield
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()


@pytest.fixture
def folder(tmp_path):
    return write_native(tmp_path / "sae")


def run(capfd, *words):
    """(exit code, stdout, stderr) of `saezoo publish …`."""
    with pytest.raises(SystemExit) as caught:
        main(["publish", *map(str, words)])
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err
    return caught.value.code, printed.out, printed.err


def refused(capfd, *words):
    """The one line that it fails with."""
    code, out, err = run(capfd, *words)
    assert (code, out) == (1, "")
    assert err.startswith("saezoo: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.strip()


def test_it_goes_well_and_anyone_can_load_it(hub, folder, capfd, tmp_path):
    code, out, err = run(capfd, folder, REPO, "--path", "layer_3")
    assert (code, err) == (0, "")
    commit = hub.repos[REPO].branches["main"]
    assert f"revision: {commit}" in out
    assert f'load_sae("hf://{REPO}@{commit}/layer_3")' in out
    hub.users.clear()
    there, here = (
        load_sae(name, cache_dir=tmp_path / "clean")
        for name in (f"hf://{REPO}@{commit}/layer_3", folder)
    )
    x = torch.randn(4, there.d_in)
    assert torch.equal(there(x), here(x))


def test_json_has_everything_and_no_token(hub, folder, capfd):
    code, out, _ = run(capfd, folder, REPO, "--json")
    done = json.loads(out)
    assert (code, done["revision"]) == (0, hub.repos[REPO].branches["main"])
    assert all(finding["ok"] in (True, None) for finding in done["findings"])


def test_without_a_token(folder, hub, capfd, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "no token: run `hf auth login`, set HF_TOKEN" in refused(capfd, folder, REPO)
    assert not hub.requests


def test_a_token_that_the_hub_does_not_know(folder, hub, capfd):
    hub.users = {"hf_another": User("me", {"me"})}
    assert "the Hub does not know the token" in refused(capfd, folder, REPO)
    hub.users = {}


@pytest.mark.parametrize("there", [False, True], ids=["a new repo", "one that is there"])
def test_without_permission(folder, hub, capfd, there):
    if there:
        hub.commit("others/saes", {"README.md": b"theirs"})
    line = refused(capfd, folder, "others/saes")
    assert "others/saes: the token has no permission for" in line
    assert "--pr opens a pull request" in line
    assert not hub.log
    if there:
        assert line.endswith("Nothing was published: others/saes is as it was")
        code, out, _ = run(capfd, folder, "others/saes", "--pr")
        assert code == 0
        assert f"pull request: {hub.url}/others/saes/discussions/1" in out


@pytest.mark.parametrize("name", ["saes", "me/sa es", "me/-saes", "me/saes/more", "me/saes@main"])
def test_a_bad_name(folder, hub, capfd, name):
    assert "org/repo" in refused(capfd, folder, name)
    assert not hub.requests


def test_a_name_that_only_the_hub_refuses(folder, hub, capfd):
    hub.fail(
        "/api/repos/create", "status", method="POST", status=400,
        headers={"X-Error-Message": "Invalid repo name"},
    )  # fmt: skip
    assert "creating the repo was refused by the Hub (400): Invalid repo name" in refused(
        capfd, folder, REPO
    )


def test_what_is_no_native_folder(tmp_path, hub, capfd):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.bin").write_bytes(b"x")
    for path in ("other", "other/model.bin", "nowhere"):
        refused(capfd, tmp_path / path, REPO)
    assert not [method for method, _, _ in hub.requests if method != "GET"]


def test_a_repo_that_goes_away_in_the_middle(folder, hub, capfd):
    hub.meanwhile("POST", "/commit/", hub.repos.clear)
    line = refused(capfd, folder, REPO)
    assert "the repo is gone from the Hub" in line
    assert "Nothing was published" in line


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for_in_silence(folder, hub, capfd, status):
    for method, where in (("POST", "/preupload/"), ("PUT", "/lfs/"), ("POST", "/commit/")):
        hub.fail(where, "status", method=method, status=status, headers={"Retry-After": "2"})
    code, _, err = run(capfd, folder, REPO)
    assert (code, err) == (0, "")
    assert len(hub.log) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stays_busy(folder, hub, capfd, status):
    hub.fail("/commit/", "status", method="POST", status=status, times=99)
    line = refused(capfd, folder, REPO)
    assert f"committing failed, the Hub is busy ({status}): run the same again later" in line
    assert line.endswith("Nothing was published: me/saes is there, without any of the files")
    hub.faults.clear()
    assert run(capfd, folder, REPO)[0] == 0


def test_a_connection_that_is_cut_in_the_middle(folder, hub, capfd):
    hub.fail("/lfs/", "hangup", method="PUT", times=2)
    hub.fail("/commit/", "cut", method="POST")
    code, _, err = run(capfd, folder, REPO)
    assert (code, err) == (0, "")
    assert len(hub.log) == 1


def test_a_connection_that_is_cut_again_and_again(folder, hub, capfd):
    hub.fail("/lfs/", "hangup", method="PUT", times=99)
    line = refused(capfd, folder, REPO)
    assert "uploading failed, the connection to the Hub broke" in line
    assert "Nothing was published" in line
    hub.faults.clear()
    assert run(capfd, folder, REPO)[0] == 0


def test_a_disk_that_is_full_when_it_is_checked(folder, hub, capfd, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        line = refused(capfd, folder, REPO, "--path", "layer_3")
    commit = hub.repos[REPO].branches["main"]
    assert f"me/saes is published, at commit {commit}, but could not be checked: the disk" in line
    assert line.endswith(f"Check it later: saezoo check hf://me/saes@{commit}#layer_3")
    # running it again sends nothing, and checks
    hub.requests.clear()
    assert run(capfd, folder, REPO, "--path", "layer_3")[0] == 0
    assert {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}


def test_a_card_field_that_the_hub_refuses(folder, hub, capfd):
    """One of theirs, which is kept as it is."""
    hub.commit(REPO, {"README.md": b"---\nwidget: 3\n---\n# theirs\n"})
    line = refused(capfd, folder, REPO)
    assert 'checking the card README.md was refused by the Hub (400): "widget" must be' in line
    assert line.endswith("Nothing was published: me/saes is as it was")
    assert not hub.log


def test_a_card_that_the_hub_refuses_for_reasons_of_its_own(folder, hub, capfd, monkeypatch):
    monkeypatch.setattr("tests.fakes.hub_upload.card_problems", lambda _: (['"x" is wrong'], []))
    line = refused(capfd, folder, REPO)
    assert 'checking the card README.md was refused by the Hub (400): "x" is wrong' in line
    assert line.endswith("Nothing was published, and no repo was made")
    assert not hub.repos


def test_bytes_that_come_back_as_others(folder, hub, capfd):
    hub.fail("sae.safetensors", "flip", times=99)
    line = refused(capfd, folder, REPO)
    commit = hub.repos[REPO].branches["main"]
    assert f"me/saes is published at {commit}, but what comes back is not what was sent" in line


def test_somebody_else_s_push(folder, hub, capfd):
    hub.commit(REPO, {"README.md": b"# theirs\n"})
    hub.meanwhile("POST", "/commit/", lambda: hub.commit(REPO, {"README.md": b"# theirs, later\n"}))
    line = refused(capfd, folder, REPO)
    assert "somebody else has changed it since it was read" in line
    assert line.endswith("Nothing was published: me/saes is as it was")
    files = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    assert files == {"README.md": b"# theirs, later\n"}
    assert run(capfd, folder, REPO)[0] == 0
    files = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    assert b"# theirs, later\n" in files["README.md"]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            "preupload_lfs_files",
            "Nothing was published: me/saes is there, without any of the files",
        ),
        (
            "create_commit",
            "Whether the last commit was made is not known: running the same again finds out",
        ),
    ],
)
def test_ctrl_c_says_what_is_there(folder, capfd, monkeypatch, where, said):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"saezoo.publishing.upload.HfApi.{where}", interrupt)
        code, _, err = run(capfd, folder, REPO)
    assert code == 130
    assert err.endswith(f"interrupted: {said}\n")
    assert run(capfd, folder, REPO)[0] == 0


def test_a_public_repo_does_not_become_private_without_a_word(folder, hub, capfd):
    hub.commit(REPO, {"x.md": b"x"})
    assert "there and public" in refused(capfd, folder, REPO, "--private")
    assert not hub.log


def test_a_dry_run_writes_nothing(folder, hub, capfd):
    code, out, _ = run(capfd, folder, REPO, "--dry-run")
    assert code == 0
    assert "this was a dry run" in out
    assert not hub.repos
    assert {method for method, _, _ in hub.requests} == {"GET"}


def test_a_collection_in_steps_has_no_name_until_it_is_whole(tmp_path, hub, capfd, monkeypatch):
    for layer in (3, 4):
        write_native(tmp_path / f"run/layer_{layer}", seed=layer, site=at_layer(layer))
    small = partial(upload, one_commit_limit=Limit(files=4))
    monkeypatch.setattr("saezoo.publishing.targets.upload", small)
    hub.fail("/commit/", "status", method="POST", times=99, after=1)
    line = refused(capfd, tmp_path / "run", REPO)
    assert "4 of 12 files are in me/saes, main at" in line
    assert line.endswith("but not those that give them a name: run the same again to finish it")
    half = hub.repos[REPO].branches["main"]
    for name in (f"hf://{REPO}@{half}/layer_3", f"hf://{REPO}@{half}#layer_3"):
        with pytest.raises(SaezooError):
            load_sae(name, cache_dir=tmp_path / "half")
    hub.faults.clear()
    code, out, _ = run(capfd, tmp_path / "run", REPO)
    assert code == 0
    assert [len(made["paths"]) for made in hub.log] == [4, 4, 2, 2]
    assert hub.log[-1]["paths"] == ["README.md", "saezoo.yaml"]
    for layer in (3, 4):
        there = load_sae(f"hf://{REPO}#layer_{layer}", cache_dir=tmp_path / "clean")
        here = load_sae(tmp_path / f"run/layer_{layer}")
        assert torch.equal(there.W_dec, here.W_dec)
        assert f"/layer_{layer}" in out


def test_another_process_is_as_quiet(folder, hub):
    """Nothing of what huggingface_hub logs, warns of or draws is seen."""
    hub.fail("/lfs/", "status", method="PUT", headers={"Retry-After": "0"})
    hub.fail("/commit/", "status", method="POST", status=400)
    done = subprocess.run(
        [sys.executable, "-m", "saezoo", "publish", str(folder), REPO],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "committing was refused by the Hub (400)" in done.stderr
    assert TOKEN not in done.stderr
