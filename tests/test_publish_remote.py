"""What is put into a repo, how, and what is left alone: by the real client, against a loopback Hub
that refuses what the real one refuses.
"""

import pytest

from saezoo.errors import BadName, NoAccess, PublishError
from saezoo.publishing.remote import Head, read_head, read_text, same
from saezoo.publishing.staged import Staged
from saezoo.publishing.upload import Limit, upload
from tests.fakes.hub_lfs import User

TOKEN = "hf_s3cr3tS3CR3Ts3cr3t"
REPO = "me/saes"
CARD = b"---\nlicense: mit\nlibrary_name: saezoo\n---\n# Two SAEs\n"
WEIGHTS = bytes(range(256)) * 40
FILES = {
    "layer_3/sae.safetensors": WEIGHTS,
    "layer_3/config.json": b'{"saezoo_format": 1}',
    "layer_3/density.png": b"\x89PNG\r\n\x1a\n\0\1",
    "layer_4/sae.safetensors": WEIGHTS[::-1],
    "layer_4/config.json": b'{"saezoo_format": 1, "k": 2}',
    "layer_4/empty.txt": b"",
}
NAMES = {"README.md": CARD, "saezoo.yaml": b"release: saes\n"}
ALL = FILES | NAMES


@pytest.fixture(autouse=True)
def me(hub, cache, monkeypatch):  # noqa: ARG001 texts are fetched into a cache of its own
    hub.users[TOKEN] = User("me", writes={"me", "org"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def staged(tmp_path):
    return stage(tmp_path / "tree", FILES)


def stage(folder, files, names=NAMES):
    """A tree of these files on disk."""
    for path, body in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(body)
    return Staged({path: folder / path for path in files}, dict(names))


def publish(staged, **how):
    """As `saezoo publish` does it: read the head, upload on top of it."""
    head = read_head(how.pop("repo", REPO), branch=how.pop("branch", None))
    return upload(staged, head, message="Publish two SAEs", **how)


def at(hub, branch="main"):
    """The files of a branch, but for the one that the Hub starts a repo with."""
    repo = hub.repos[REPO]
    files = repo.commits[repo.branches[branch]]
    return {path: body for path, body in files.items() if path != ".gitattributes"}


def puts(hub):
    return [path for method, path, _ in hub.requests if method == "PUT"]


def test_a_new_repo_gets_the_whole_tree_in_one_commit(hub, staged):
    uploaded = publish(staged)
    assert at(hub) == ALL
    assert [set(commit["paths"]) for commit in hub.log] == [set(ALL)]
    assert hub.log[0]["summary"] == "Publish two SAEs"
    assert uploaded.revision == hub.repos[REPO].branches["main"] == hub.log[0]["oid"]
    assert uploaded.url == f"{hub.url}/{REPO}/tree/{uploaded.revision}"
    assert uploaded.pull_request is None
    # weights, and the picture since it is binary; the Hub keeps text in the commit itself
    assert len(puts(hub)) == 3


def test_what_lies_there_already_is_neither_sent_nor_committed_again(hub, staged):
    first = publish(staged)
    hub.requests.clear()
    again = publish(staged)
    assert (again.revision, again.changed) == (first.revision, False)
    assert len(hub.log) == 1
    assert {method for method, _, _ in hub.requests} == {"GET"}


def test_only_what_differs_is_sent_and_nothing_else_is_touched(hub, staged, tmp_path):
    theirs = {"NOTES.md": b"mine", "old/ae.pt": WEIGHTS[:100]}
    hub.commit(REPO, theirs | {"layer_3/sae.safetensors": WEIGHTS})
    publish(staged)
    assert at(hub) == theirs | ALL
    assert set(hub.log[0]["paths"]) == ALL.keys() - {"layer_3/sae.safetensors"}
    assert len(puts(hub)) == 2
    newer = stage(tmp_path / "newer", FILES | {"layer_3/config.json": b"{}"})
    publish(newer)
    assert hub.log[1]["paths"] == ["layer_3/config.json"]


@pytest.mark.parametrize("limit", [Limit(files=3), Limit(bytes=15_000)])
def test_what_is_too_much_for_one_commit_goes_in_steps_and_gets_its_name_in_the_last(
    hub, staged, limit
):
    hub.commit(REPO, {"layer_3/config.json": b"{}", "README.md": CARD + b"old", "x.md": b"x"})
    told = []
    uploaded = publish(staged, one_commit_limit=limit, progress=lambda *words: told.append(words))
    assert at(hub) == ALL | {"x.md": b"x"}
    *steps, last = [commit["paths"] for commit in hub.log]
    assert len(steps) >= 2
    # what replaces something goes with the names: an older name never stands for half of it
    assert set(last) == {"layer_3/config.json", *NAMES}
    assert steps[0][0].endswith(".safetensors")
    assert sorted(path for step in steps for path in step) == sorted(
        FILES.keys() - {"layer_3/config.json"}
    )
    assert uploaded.revision == hub.log[-1]["oid"]
    size = sum(map(len, ALL.values()))
    assert told[0] == ("uploading", 0, size)
    assert told[-1] == ("committing", size, size)


def test_large_files_go_in_parts_where_the_hub_wants_parts(hub, staged):
    hub.part_size = 3000
    publish(staged)
    assert at(hub) == ALL
    assert len(puts(hub)) == 2 * 4 + 1


def test_a_gitignore_in_the_repo_leaves_nothing_out(hub, staged):
    theirs = {".gitignore": b"*.png\n*.safetensors\n"}
    hub.commit(REPO, theirs)
    publish(staged)
    assert at(hub) == theirs | ALL


def test_a_branch_that_is_not_there_starts_at_main(hub, staged):
    main = hub.commit(REPO, {"README.md": CARD, "x.md": b"x"})
    head = read_head(REPO, branch="try/two")
    assert (head.has_branch, head.revision, set(head.files)) == (False, main, {"README.md", "x.md"})
    publish(staged, branch="try/two")
    assert at(hub, "try/two") == ALL | {"x.md": b"x"}
    assert hub.repos[REPO].branches["main"] == main
    # and one that is there is committed to
    publish(stage_more(staged), branch="try/two")
    assert set(hub.log[1]["paths"]) == {"README.md"}


def stage_more(staged):
    return Staged(staged.files, NAMES | {"README.md": CARD + b"more\n"})


def test_a_branch_of_a_new_repo_starts_at_the_hub_s_own_commit(hub, staged):
    publish(staged, branch="next")
    assert at(hub, "next") == ALL
    assert at(hub) == {}


@pytest.mark.parametrize("limit", [Limit(), Limit(files=3)])
def test_a_pull_request_is_opened_once_and_main_stays(hub, staged, limit):
    main = hub.commit("others/saes", {"README.md": CARD, "x.md": b"x"})
    head = read_head("others/saes")
    uploaded = upload(staged, head, message="Publish", pr=True, one_commit_limit=limit)
    assert uploaded.pull_request == f"{hub.url}/others/saes/discussions/1"
    repo = hub.repos["others/saes"]
    assert set(repo.branches) == {"main", "refs/pr/1"}
    assert repo.branches["main"] == main
    assert repo.branches["refs/pr/1"] == uploaded.revision
    assert repo.commits[uploaded.revision] == ALL | {"x.md": b"x"}
    # going on with it needs no rights either
    head = read_head("others/saes", branch="refs/pr/1")
    upload(stage_more(staged), head, message="More")
    assert repo.commits[repo.branches["refs/pr/1"]]["README.md"] == CARD + b"more\n"


def test_a_long_list_of_files_is_read_to_its_end(hub):
    hub.page = 2
    hub.commit(REPO, ALL)
    head = read_head(REPO)
    assert set(head.files) == set(ALL)
    for path, body in ALL.items():
        assert same(body, head.files[path])
        assert not same(body + b"x", head.files[path])
        assert not same(body[:-1] + b"x", head.files[path])


def test_a_repo_that_is_not_there_has_no_head(hub):
    head = read_head(REPO)
    assert (head.exists, head.revision, head.files) == (False, None, {})
    hub.commit(REPO, ALL)
    hub.repos[REPO].private_to = "hf_another"
    assert not read_head(REPO).exists


def test_reading_needs_no_token_where_the_repo_is_public(hub, monkeypatch):
    hub.commit(REPO, ALL)
    monkeypatch.delenv("HF_TOKEN")
    head = read_head(REPO)
    assert set(head.files) == set(ALL)
    assert read_text(head, "README.md") == CARD.decode()
    assert not read_head("me/none").exists


def test_texts_are_read_at_the_head_and_only_if_they_are_texts(hub):
    hub.commit(REPO, {"README.md": CARD, "saezoo.yaml": b"\xff\xfe", "big.md": b"x" * (2**20 + 1)})
    head = read_head(REPO)
    hub.commit(REPO, {"README.md": b"later"})
    assert read_text(head, "README.md") == CARD.decode()
    assert read_text(head, "none.md") is None
    for path, why in (("saezoo.yaml", "no UTF-8 text"), ("big.md", "1,048,577 bytes")):
        with pytest.raises(PublishError, match=why):
            read_text(head, path)


@pytest.mark.parametrize(
    "name", ["saes", "me/", "/saes", "me/two/saes", "me/s aes", "me/-x", "me/x--y", "me/.git", ""]
)
def test_a_bad_name_is_refused_before_anything_is_asked(hub, name):
    with pytest.raises(BadName):
        read_head(name)
    assert not hub.requests


def test_a_repo_is_made_once_private_if_it_is_wanted(hub, staged):
    publish(staged, private=True)
    assert hub.repos[REPO].private_to == TOKEN
    assert read_head(REPO).private
    publish(stage_more(staged), private=True)
    publish(staged, repo="org/saes")
    assert hub.repos["org/saes"].private_to is None
    assert hub.asked()["POST /api/repos/create"] == 2
    with pytest.raises(PublishError, match="there and public.*Nothing was published"):
        publish(stage_more(staged), repo="org/saes", private=True)
    assert len(hub.log) == 3


def test_who_may_not_write_is_told_so_and_nothing_happens(hub, staged, monkeypatch):
    hub.commit("others/saes", {"x.md": b"x"})
    with pytest.raises(NoAccess, match="no permission for uploading.*--pr opens a pull request"):
        publish(staged, repo="others/saes")
    with pytest.raises(NoAccess, match='creating the repo: You don\'t have the rights.*"others"'):
        publish(staged, repo="others/new")
    hub.users[TOKEN].read_only = True
    with pytest.raises(NoAccess, match="must use a write token.*repo is as it was|is as it was"):
        publish(staged, repo="others/saes", pr=True)
    with pytest.raises(
        NoAccess, match="no permission.*Nothing was published, and no repo was made"
    ):
        publish(staged)
    head = read_head("others/saes")
    hub.users.clear()
    hub.users["hf_new"] = User("me", {"me"})
    for what in (lambda: publish(staged), lambda: upload(staged, head, message="Publish")):
        with pytest.raises(NoAccess, match="the Hub does not know the token: run `hf auth login`"):
            what()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NoAccess, match="no token: run `hf auth login`, set HF_TOKEN"):
        upload(staged, head, message="Publish")
    assert set(hub.repos) == {"others/saes"}
    assert not hub.log


def test_a_401_to_a_token_is_about_the_token_whatever_else_it_says(hub):
    hub.commit(REPO, ALL)
    said = {"X-Error-Code": "RepoNotFound"}
    hub.fail("/api/models/", "status", status=401, headers=said)
    with pytest.raises(NoAccess, match="does not know the token"):
        read_head(REPO)


@pytest.mark.parametrize("private", [True, False])
def test_a_repo_that_came_to_be_there_meanwhile_is_published_to(hub, staged, private):
    head = read_head(REPO)
    hub.commit(REPO, {"x.md": b"x"})
    upload(staged, head, message="Publish", private=private)
    assert at(hub) == ALL | {"x.md": b"x"}


@pytest.mark.parametrize("bad", ["hf_s3cr3t\nX-Evil: 1", "hf_s3cr3t ", "hf_s3cr3t\u00e9"])
def test_a_token_that_is_none_is_refused_without_being_sent_or_said(hub, staged, bad):
    for what in (
        lambda: read_head(REPO, token=bad),
        lambda: upload(staged, Head(REPO, "main", None), message="Publish", token=bad),
    ):
        with pytest.raises(NoAccess) as caught:
            what()
        assert "s3cr3t" not in str(caught.value)
    assert not hub.requests


def test_a_file_that_went_away_meanwhile_is_named(hub, staged):
    staged.files["layer_4/config.json"].unlink()
    with pytest.raises(PublishError, match=r"layer_4/config.json: No such file.*Nothing was pub"):
        publish(staged)
    assert not hub.log
