"""The loopback Hub refuses what the real one refuses; else the tests of publishing prove little."""

import base64
import hashlib
import json

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import get_session

from tests.fakes.cards import card_problems
from tests.fakes.hub_lfs import User

TOKEN, REPO = "hf_writes", "me/saes"
BODY = b"\0weights" * 9
SIZE = len(BODY)
OID = hashlib.sha256(BODY).hexdigest()
HEADER = {"key": "header", "value": {"summary": "Publish"}}


@pytest.fixture(autouse=True)
def head(hub):
    hub.users[TOKEN] = User("me", writes={"me"})
    hub.users["hf_other"] = User("other", writes={"other"})
    commit = hub.commit(REPO, {"a.txt": b"a"})
    hub.repos[REPO].large[OID] = BODY
    return commit


def text(path="b.txt", content=b"b", encoding="base64"):
    value = {"content": base64.b64encode(content).decode(), "path": path, "encoding": encoding}
    return {"key": "file", "value": value}


def large(path="w.safetensors", oid=OID, size=SIZE, algo="sha256"):
    return {"key": "lfsFile", "value": {"path": path, "algo": algo, "oid": oid, "size": size}}


def commit(hub, *lines, token=TOKEN, branch="main", kind="application/x-ndjson", query=""):
    return get_session().post(
        f"{hub.url}/api/models/{REPO}/commit/{branch}{query}",
        content=b"".join(json.dumps(line).encode() + b"\n" for line in lines),
        headers={"authorization": f"Bearer {token}", "Content-Type": kind},
    )


def test_a_commit_that_is_as_it_must_be_is_made(hub, head):
    parent = {"key": "header", "value": {"summary": "Publish", "parentCommit": head}}
    answer = commit(hub, parent, text(), large())
    assert answer.status_code == 200
    made = answer.json()["commitOid"]
    assert hub.repos[REPO].branches["main"] == made
    assert hub.repos[REPO].commits[made] == {"a.txt": b"a", "b.txt": b"b", "w.safetensors": BODY}


REFUSED = {
    "no header": ([text()], 400),
    "no summary": ([{"key": "header", "value": {"summary": ""}}, text()], 400),
    "nothing to do": ([HEADER], 400),
    "an unknown operation": ([HEADER, {"key": "chmod", "value": {"path": "a.txt"}}], 400),
    "a path that leaves": ([HEADER, text("../b.txt")], 400),
    "an absolute path": ([HEADER, text("/b.txt")], 400),
    "git's own folder": ([HEADER, text(".git/config")], 400),
    "another encoding": ([HEADER, text(encoding="utf-8")], 400),
    "weights in the commit": ([HEADER, text("w.safetensors")], 400),
    "a binary file in the commit": ([HEADER, text(content=b"\x89PNG\0")], 400),
    "a card that is wrong": ([HEADER, text("README.md", b"---\nlicense: x\n---\n")], 400),
    "an object nobody sent": ([HEADER, large(oid="0" * 64)], 400),
    "another size": ([HEADER, large(size=1)], 400),
    "another hash": ([HEADER, large(algo="sha1")], 400),
    "a parent that there is not": (
        [{"key": "header", "value": {"summary": "x", "parentCommit": "1" * 40}}, text()],
        404,
    ),
}


@pytest.mark.parametrize(("lines", "status"), REFUSED.values(), ids=REFUSED)
def test_a_commit_that_is_not_is_refused(hub, head, lines, status):
    assert commit(hub, *lines).status_code == status
    assert hub.repos[REPO].branches["main"] == head
    assert not hub.log


def test_a_commit_needs_the_head_the_right_and_the_branch(hub, head):
    hub.commit(REPO, {"a.txt": b"later"})
    old = {"key": "header", "value": {"summary": "Publish", "parentCommit": head}}
    assert commit(hub, old, text()).status_code == 412
    assert commit(hub, HEADER, text(), kind="application/json").status_code == 415
    assert commit(hub, HEADER, text(), branch="next").status_code == 404
    assert commit(hub, HEADER, text(), token="hf_other").status_code == 403
    assert commit(hub, HEADER, text(), token="hf_nobody").status_code == 401
    assert not hub.log
    answer = commit(hub, old, text(), token="hf_other", query="?create_pr=1")
    assert answer.json()["pullRequestUrl"].endswith(f"{REPO}/discussions/1")
    assert hub.repos[REPO].branches["refs/pr/1"] == answer.json()["commitOid"]


def test_storage_takes_what_has_the_hash_and_no_token(hub):
    other = hashlib.sha256(b"other").hexdigest()
    url = f"{hub.url}/lfs/{REPO}/{other}"
    put = get_session().put
    assert put(url, content=b"wrong").status_code == 400
    auth = {"authorization": f"Bearer {TOKEN}"}
    assert put(url, content=b"other", headers=auth).status_code == 400
    assert put(url, content=iter([b"other"])).status_code == 411
    assert other not in hub.repos[REPO].large
    assert put(url, content=b"other").status_code == 200
    assert hub.repos[REPO].large[other] == b"other"


def test_who_a_token_is_for(hub):
    assert HfApi(token=TOKEN).whoami()["name"] == "me"
    answer = get_session().get(f"{hub.url}/api/whoami-v2")
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("front", "error"),
    [
        ("license: mit\ntags: [sae]\nbase_model: openai-community/gpt2", None),
        ("license: [mit, apache-2.0]\nbase_model: [gpt2, me/x]", None),
        ("license: MIT", '"license" must be one of'),
        ("license: mit\nlibrary_name: [saezoo]", '"library_name" must be a string'),
        ("license: mit\ndatasets: me/texts", '"datasets" must be an array'),
        ("license: mit\nmetrics: [1]", '"metrics[0]" must be a string'),
        ("base_model: ./here", '"base_model" with value "./here" is not valid'),
        ("model-index: [{name: x}]", '"model-index[0].results" is required'),
        ("- a\n- b", "must be an object"),
    ],
)
def test_cards_are_looked_at(front, error):
    errors, warnings = card_problems(f"---\n{front}\n---\n# A card\n")
    assert not warnings
    assert (error is None and not errors) or error in errors[0]


def test_a_card_without_metadata_is_warned_of():
    assert card_problems("# A card\n") == ([], ["empty or missing yaml metadata in repo card"])
