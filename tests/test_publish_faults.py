"""What goes wrong between a tree on disk and a name on the Hub: each is waited out, or is one line
that says what is in the repo by then; and running it again finishes it.
"""

import logging
import re
import threading

import pytest

from saezoo.errors import MissingFile, NoAccess, Offline, PublishError, RemoteChanged
from saezoo.publishing.remote import read_head
from saezoo.publishing.staged import Staged
from saezoo.publishing.upload import Limit, upload
from saezoo.transfer import LONGEST_WAIT
from tests.fakes.hub import Repo
from tests.fakes.hub_lfs import User

TOKEN = "hf_s3cr3tS3CR3Ts3cr3t"
REPO = "me/saes"
CARD = b"---\nlicense: mit\n---\n# SAEs\n"
FILES = {f"layer_{n}/sae.safetensors": bytes([n]) * 5000 for n in range(3)} | {
    f"layer_{n}/config.json": b'{"layer": %d}' % n for n in range(3)
}
NAMES = {"README.md": CARD, "saezoo.yaml": b"release: saes\n"}
ALL = FILES | NAMES
STEPS = Limit(files=3)

REQUESTS = {
    "reading the repo": ("GET", "/api/models/me/saes"),
    "listing its files": ("GET", "/tree/"),
    "creating the repo": ("POST", "/api/repos/create"),
    "making the branch": ("POST", "/branch/"),
    "checking the card": ("POST", "/api/validate-yaml"),
    "asking how": ("POST", "/preupload/"),
    "asking where": ("POST", "/objects/batch"),
    "sending": ("PUT", "/lfs/"),
    "having it verified": ("POST", "/objects/verify"),
    "committing": ("POST", "/commit/"),
}
"""Every request of a publication, by what it is for."""


@pytest.fixture(autouse=True)
def me(hub, cache, monkeypatch):  # noqa: ARG001 no cache of the machine's is used
    hub.users[TOKEN] = User("me", writes={"me"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds that were to be waited; nobody waits them."""
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture(autouse=True)
def no_word_of_the_token(tmp_path, capfd, caplog):
    """Nothing that is printed, logged at any level or written holds the token."""
    caplog.set_level(logging.DEBUG)
    yield
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err + caplog.text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()


@pytest.fixture
def staged(tmp_path):
    for path, body in FILES.items():
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / path).write_bytes(body)
    return Staged({path: tmp_path / "tree" / path for path in FILES}, NAMES)


def publish(staged, *, branch=None, **how):
    head = read_head(REPO, branch=branch)
    return upload(staged, head, message="Publish", **how)


def at(hub, branch="main"):
    repo = hub.repos[REPO]
    files = repo.commits[repo.branches[branch]]
    return {path: body for path, body in files.items() if path != ".gitattributes"}


def fails(kind, match, what):
    """Call it; the error is of that kind, says that, and is one line without the token."""
    with pytest.raises(kind, match=match) as caught:
        what()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700
    error = caught.value
    while error is not None:
        assert TOKEN not in f"{error} {error.args}"
        error = error.__cause__ or error.__context__
    return line


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize(
    ("kind", "how", "pauses"),
    [
        ("status", {"status": 503}, {1.0}),
        ("status", {"status": 503, "headers": {"Retry-After": "7"}}, {7.0, 8.0}),
        ("status", {"status": 429, "headers": {"Retry-After": "7"}}, {7.0, 8.0}),
        ("status", {"status": 502}, {1.0}),
        ("hangup", {}, {1.0}),
        ("cut", {}, {1.0}),
    ],
    ids=["503", "503 with a delay", "429 with a delay", "502", "cut on the way", "answer cut"],
)
def test_what_passes_is_waited_out(hub, staged, waits, request_, kind, how, pauses):
    method, where = request_
    hub.fail(where, kind, method=method, **how)
    uploaded = publish(staged, branch="next")
    assert at(hub, "next") == ALL
    # an answer that was lost does not make two commits
    assert len(hub.log) == 1
    assert hub.log[0]["oid"] == uploaded.revision
    assert not any(fault.times for fault in hub.faults)
    # the client adds a second to what a server says
    empty_answer = kind == "cut" and method == "PUT"
    assert empty_answer or set(waits) & pauses


@pytest.mark.parametrize(("name", "request_"), REQUESTS.items(), ids=REQUESTS)
@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_wants_an_hour_gets_its_hour_but_not_ours(
    hub, staged, waits, name, request_, status
):
    method, where = request_
    hub.fail(where, "status", method=method, status=status, headers={"Retry-After": "3600"})
    line = fails(
        PublishError,
        rf"busy \({status}\) and wants to be left alone for 3600 s",
        lambda: publish(staged, branch="next"),
    )
    assert all(seconds <= LONGEST_WAIT + 1 for seconds in waits)
    assert not hub.log
    assert name.startswith("reading") or "Nothing was published" in line
    publish(staged, branch="next")
    assert at(hub, "next") == ALL


def test_the_hub_s_own_rate_limit_is_bounded_too(hub, staged):
    for headers in (
        {"ratelimit": '"api";r=0;t=299', "ratelimit-policy": '"fixed window";"api";q=500;w=300'},
        {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"},
    ):
        hub.fail("/preupload/", "status", method="POST", status=429, headers=headers)
        fails(PublishError, "left alone for", lambda: publish(staged))
        assert not hub.log


@pytest.mark.parametrize(("name", "request_"), REQUESTS.items(), ids=REQUESTS)
@pytest.mark.parametrize("kind", ["status", "hangup"])
def test_what_does_not_pass_is_one_line_and_can_be_run_again(
    hub, staged, waits, name, request_, kind
):
    method, where = request_
    hub.fail(where, kind, method=method, times=100)
    line = fails(
        PublishError, "busy|the connection to the Hub broke", lambda: publish(staged, branch="next")
    )
    if name in ("checking the card", "creating the repo"):
        assert line.endswith("Nothing was published, and no repo was made")
        assert not hub.repos
    elif name != "reading the repo":
        assert "Nothing was published: me/saes is there, without any of the files" in line
    assert sum(waits) < 120
    assert not hub.log
    hub.faults.clear()
    publish(staged, branch="next")
    assert at(hub, "next") == ALL


def test_a_commit_of_which_nothing_is_heard_is_found_when_it_is_run_again(hub, staged):
    hub.commit(REPO, {})
    head = read_head(REPO)
    hub.fail("/commit/", "cut", method="POST")
    hub.meanwhile(
        "POST", "/commit/", lambda: hub.fail("/api/models/", "hangup", method="GET", times=100)
    )
    line = fails(PublishError, "broke", lambda: upload(staged, head, message="Publish"))
    assert line.endswith(
        "Whether the last commit was made is not known: running the same again finds out"
    )
    hub.faults.clear()
    assert at(hub) == ALL
    assert not publish(staged).changed
    assert len(hub.log) == 1


def test_a_last_step_of_which_nothing_is_heard_says_what_is_there_besides(hub, staged):
    hub.commit(REPO, {})
    hub.fail("/commit/", "cut", method="POST", after=2)

    def go_silent():
        hub.fail("/api/models/", "hangup", method="GET", times=100)

    def at_next(do):
        return lambda: hub.meanwhile("POST", "/commit/", do)

    at_next(at_next(at_next(go_silent)))()
    line = fails(PublishError, "broke", lambda: publish(staged, one_commit_limit=STEPS))
    assert "6 of 8 files are in me/saes, main at" in line
    assert line.endswith(
        ", and whether the last commit was made is not known: running the same again finds out"
    )
    hub.faults.clear()
    assert not publish(staged).changed


def test_bytes_that_rot_on_their_way_are_refused_by_the_storage_and_sent_again(hub, staged):
    hub.fail("/lfs/", "rot", method="PUT")
    fails(
        PublishError,
        r"uploading was refused by the Hub \(400\).*sha256.*Nothing was published",
        lambda: publish(staged),
    )
    assert at(hub) == {}
    publish(staged)
    assert at(hub) == ALL


def test_somebody_else_s_commit_is_never_overwritten(hub, staged):
    theirs = {"README.md": b"theirs", "layer_0/config.json": b"theirs"}
    hub.commit(REPO, {})
    hub.meanwhile("POST", "/commit/", lambda: hub.commit(REPO, theirs))
    line = fails(RemoteChanged, "somebody else has changed it", lambda: publish(staged))
    assert line.endswith("Nothing was published: me/saes is as it was")
    assert at(hub) == theirs
    assert not hub.log


def test_somebody_else_s_commit_in_the_middle_stops_the_steps(hub, staged):
    theirs = {"NOTES.md": b"theirs"}

    def push():
        hub.commit(REPO, at(hub) | theirs)

    hub.meanwhile("POST", "/commit/", lambda: hub.meanwhile("POST", "/commit/", push))
    line = fails(RemoteChanged, "somebody else", lambda: publish(staged, one_commit_limit=STEPS))
    assert re.search(
        r"3 of 8 files are in me/saes, main at [0-9a-f]{8}…, but not those that give them a name: "
        "run the same again to finish it",
        line,
    )
    assert at(hub).keys() == {f"layer_{n}/sae.safetensors" for n in range(3)} | theirs.keys()
    publish(staged, one_commit_limit=STEPS)
    assert at(hub) == ALL | theirs


def test_a_commit_that_another_follows_at_once_is_not_made_twice(hub, staged):
    """The answer is lost, and by the time that the head is asked for it is somebody else's."""
    hub.commit(REPO, {})
    theirs = {"NOTES.md": b"theirs"}
    hub.fail("/commit/", "cut", method="POST")
    hub.meanwhile(
        "POST",
        "/commit/",
        lambda: hub.meanwhile("GET", "/api/models/", lambda: hub.commit(REPO, at(hub) | theirs)),
    )
    uploaded = publish(staged)
    assert at(hub) == ALL | theirs
    assert hub.repos[REPO].branches["main"] == uploaded.revision
    assert len(hub.log) == 1


def test_a_repo_that_appears_meanwhile_with_files_of_ours_is_not_overwritten(hub, staged):
    head = read_head(REPO)
    hub.commit(REPO, {"README.md": b"theirs"})
    fails(RemoteChanged, "somebody else", lambda: upload(staged, head, message="Publish"))
    assert at(hub) == {"README.md": b"theirs"}


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        # the storage takes the file still: only the verification after it finds the repo gone
        ("PUT", "/lfs/"),
        ("POST", "/objects/verify"),
        ("POST", "/commit/"),
    ],
)
def test_a_repo_that_is_gone_is_said_to_be(hub, staged, method, where):
    hub.commit(REPO, {})
    hub.meanwhile(method, where, hub.repos.clear)
    line = fails(MissingFile, "gone from the Hub", lambda: publish(staged))
    assert "Nothing was published" in line
    assert not hub.log


def test_a_branch_that_is_gone_is_said_to_be(hub, staged):
    hub.commit(REPO, {}, branch="main")
    hub.commit(REPO, {}, branch="next")
    head = read_head(REPO, branch="next")
    del hub.repos[REPO].branches["next"]
    fails(MissingFile, "no such branch", lambda: upload(staged, head, message="Publish"))


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("license: MIT License", r'"license" must be one of \[apache-2.0, mit'),
        ("license: mit\nbase_model: /home/me/model", r'"base_model" with value "/home/me/model"'),
        ("license: mit\ntags: sae", '"tags" must be an array'),
        ("license: mit\nbroken: [", "Invalid YAML"),
    ],
)
def test_a_card_that_the_hub_refuses_stops_it_before_anything_is_sent(hub, staged, front, said):
    bad = Staged(staged.files, NAMES | {"README.md": f"---\n{front}\n---\n# x\n".encode()})
    line = fails(
        PublishError,
        f"checking the card README.md was refused by the Hub.*{said}",
        lambda: publish(bad),
    )
    assert line.endswith("Nothing was published, and no repo was made")
    assert not hub.repos


def test_an_interruption_between_two_steps_leaves_no_name_and_is_finished_later(hub, staged):
    with pytest.raises(KeyboardInterrupt, match="3 of 8 files are in me/saes, main at"):
        publish(staged, one_commit_limit=STEPS, progress=ctrl_c_at_the_second_commit([]))
    assert at(hub).keys() == {f"layer_{n}/sae.safetensors" for n in range(3)}
    sent = len([path for method, path, _ in hub.requests if method == "PUT"])
    publish(staged, one_commit_limit=STEPS)
    assert at(hub) == ALL
    assert sent == len([path for method, path, _ in hub.requests if method == "PUT"]) == 3


def ctrl_c_at_the_second_commit(told):
    def progress(what, *_):
        told.append(what)
        if what == "committing" and told.count("committing") == 2:
            raise KeyboardInterrupt

    return progress


def test_a_file_that_was_sent_before_an_interruption_is_not_sent_again(hub, staged):
    hub.fail("/commit/", "status", method="POST", status=400)
    fails(PublishError, "committing was refused", lambda: publish(staged))
    publish(staged)
    assert at(hub) == ALL
    assert len([path for method, path, _ in hub.requests if method == "PUT"]) == 3


def test_a_pull_request_of_which_no_answer_came_is_not_opened_twice(hub, staged):
    hub.commit("others/saes", {})
    head = read_head("others/saes")
    hub.fail("/commit/", "cut", method="POST")
    line = fails(PublishError, "broke", lambda: upload(staged, head, message="Publish", pr=True))
    assert line.endswith(
        "A pull request may have been opened all the same: look at "
        f"{hub.url}/others/saes/discussions before running this again"
    )
    assert len(hub.log) == 1


def test_an_interrupted_pull_request_says_where_to_go_on(hub, staged):
    hub.commit("others/saes", {})
    head = read_head("others/saes")
    hub.fail("/commit/", "status", method="POST", status=400, after=1)

    def again(**how):
        return upload(staged, head, message="Publish", one_commit_limit=STEPS, **how)

    line = fails(PublishError, "refused", lambda: again(pr=True))
    assert line.endswith("go on with --branch refs/pr/1, and without --pr to finish it")
    head = read_head("others/saes", branch="refs/pr/1")
    again()
    repo = hub.repos["others/saes"]
    assert repo.commits[repo.branches["refs/pr/1"]] == ALL
    assert set(repo.branches) == {"main", "refs/pr/1"}


def test_a_hub_that_says_the_token_back_is_not_repeated(hub, staged):
    said = {"X-Error-Message": f"no rights for {TOKEN}"}
    for status, kind in ((403, NoAccess), (400, PublishError)):
        hub.fail("/preupload/", "status", method="POST", status=status, headers=said)
        fails(kind, "no rights for …", lambda: publish(staged))


def test_a_hub_that_is_down_cannot_be_reached(staged, monkeypatch):
    import socket

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
    fails(Offline, "reading the repo failed, the Hub cannot be reached", lambda: publish(staged))


def test_without_a_network_it_says_so(hub, staged, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails(Offline, "HF_HUB_OFFLINE forbids that", lambda: publish(staged))
    assert not hub.requests


@pytest.mark.parametrize("body", ["", "<html>busy</html>", "[]", "{}"])
def test_an_answer_that_makes_no_sense_is_one_line(hub, staged, body, monkeypatch):
    from tests.fakes.server import Answer

    hub.commit(REPO, {})
    real = hub.answer

    def answer(path, headers):
        return Answer(200, {}, body.encode()) if "/preupload/" in path else real(path, headers)

    monkeypatch.setattr(hub, "answer", answer)
    fails(PublishError, "uploading failed", lambda: publish(staged))


def test_a_commit_that_is_none_is_not_taken_for_one(hub, staged, monkeypatch):
    monkeypatch.setattr(hub, "commit", lambda *_: "../../etc")
    hub.repos[REPO] = Repo({"1" * 40: {}}, {"main": "1" * 40})
    fails(PublishError, "does not say which commit it made", lambda: publish(staged))
    hub.repos[REPO] = Repo({"HEAD": {}}, {"main": "HEAD"})
    fails(PublishError, "does not say at which commit main is", lambda: publish(staged))


def test_a_connection_on_which_nothing_comes_counts_as_broken(hub, staged, monkeypatch):
    hub.meanwhile("PUT", "/lfs/", lambda: threading.Event().wait(1.0))
    with monkeypatch.context() as patch:
        patch.setattr("saezoo.publishing.asking.STALLED", 0.2)
        publish(staged)
    assert at(hub) == ALL
    assert len([path for method, path, _ in hub.requests if method == "PUT"]) > 3


def test_no_right_to_the_hub_s_own_storage_is_one_line(staged, monkeypatch):
    """hf_xet's error, of the protocol that the loopback Hub does not speak."""
    from hf_xet import XetAuthenticationError

    def refuse(*_, **__):
        raise XetAuthenticationError("403 for the write token")

    monkeypatch.setattr("huggingface_hub._commit_api._upload_lfs_files", refuse)
    fails(NoAccess, "no permission for uploading: 403 for the write", lambda: publish(staged))


def test_the_client_is_left_as_it_was(hub, staged):
    from huggingface_hub.utils import are_progress_bars_disabled, get_session, logging

    def state():
        client = get_session()
        hooks = dict(client.event_hooks)
        return logging.get_verbosity(), hooks, client.timeout, are_progress_bars_disabled()

    before = state()
    publish(staged)
    hub.fail("/commit/", "status", method="POST", status=400)
    fails(PublishError, "refused", lambda: publish(Staged(staged.files, {"saezoo.yaml": b"x"})))
    assert state() == before
