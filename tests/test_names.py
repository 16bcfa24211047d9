"""Names: each form is read, and what is ambiguous or unsafe is refused with the way to write it."""

from pathlib import Path

import pytest

from saezoo.errors import BadName
from saezoo.names import parse_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"

READ = {
    "gpt2/blocks.8.hook_resid_pre": (
        "registry",
        {"release": "gpt2", "id": "blocks.8.hook_resid_pre"},
    ),
    "scope/layer_0/width_16k/l0_105": (
        "registry",
        {"release": "scope", "id": "layer_0/width_16k/l0_105"},
    ),
    "gpt2": ("registry", {"release": "gpt2", "id": None}),
    "hf://org/repo": ("hub", {"repo": "org/repo", "path": "", "revision": None}),
    "hf://org/repo/a/b.pt": ("hub", {"repo": "org/repo", "path": "a/b.pt"}),
    "hf://org/repo@v1/a": ("hub", {"repo": "org/repo", "path": "a", "revision": "v1"}),
    f"hf://org/repo@{COMMIT}/a": ("hub", {"revision": COMMIT, "path": "a"}),
    "https://huggingface.co/org/repo/tree/main/a": (
        "hub",
        {"repo": "org/repo", "revision": "main", "path": "a"},
    ),
    "https://host.org/a/8.pt": ("https", {"url": "https://host.org/a/8.pt"}),
    "http://127.0.0.1:8000/8.pt": ("https", {"url": "http://127.0.0.1:8000/8.pt"}),
    "./sae": ("local", {"path": "sae"}),
    "/tmp/sae": ("local", {"path": "/tmp/sae"}),
    ".": ("local", {"path": "."}),
    "~/sae": ("local", {"path": str(Path("~/sae").expanduser())}),
}

REFUSED = {
    "": "empty",
    " gpt2/x": "spaces",
    "gpt2/x\n": "spaces",
    "gpt2/\x1b[31m": "control",
    "gpt2/": "release/id",
    "/": None,
    "gpt2//x": "release/id",
    "gpt2/../x": "'..'",
    "../sae": "absolute path",
    "./../sae": "absolute path",
    "/tmp/../sae": "absolute path",
    "hf://org/repo/../x": "'..'",
    "https://host.org/../x": "'..'",
    "a\\b": "backslash",
    "ftp://host/x": "scheme",
    "s3://bucket/x": "scheme",
    "http://host.org/x": "https",
    "hf://": "hf://org/repo",
    "hf://datasets/org/set/x": "dataset",
}


@pytest.mark.parametrize(
    ("text", "kind", "parts"), [(text, *rest) for text, rest in READ.items()], ids=list(READ)
)
def test_each_form_is_read_into_its_parts(text, kind, parts):
    name = parse_name(text)
    assert name.kind == kind
    assert {key: getattr(name, key) for key in parts} == parts


@pytest.mark.parametrize(("text", "said"), [item for item in REFUSED.items() if item[1]], ids=repr)
def test_what_cannot_be_read_is_refused_in_one_line_that_says_how_to_write_it(text, said):
    with pytest.raises(BadName) as caught:
        parse_name(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_release_and_id_may_be_given_apart_as_saelens_does():
    assert parse_name("gpt2", "blocks.8/x") == parse_name("gpt2/blocks.8/x")


@pytest.mark.parametrize(
    ("name", "id"),
    [("a/b", "c"), ("./a", "b"), ("hf://o/r", "b"), (Path("a"), "b"), ("a", "../b"), ("a", "")],
)
def test_an_id_goes_with_a_release_only(name, id):
    with pytest.raises(BadName):
        parse_name(name, id)


def test_a_path_object_is_always_local():
    assert parse_name(Path("a/b")).kind == "local"
    assert parse_name(Path("../a")).path == "../a"


def test_a_revision_may_stand_in_the_name_or_beside_it_but_not_two_of_them():
    assert parse_name("hf://org/repo/a", revision="v1") == parse_name("hf://org/repo@v1/a")
    with pytest.raises(BadName, match="v1"):
        parse_name("hf://org/repo@v1/a", revision="v2")
    with pytest.raises(BadName, match="revision"):
        parse_name("https://host.org/a.pt", revision="v2")


@pytest.mark.parametrize(
    "text", ["gpt2/x", "hf://org/repo@v1/a/b", "https://host.org/8.pt", "/tmp/sae"]
)
def test_a_name_prints_as_what_reads_back_to_itself(text):
    assert parse_name(str(parse_name(text))) == parse_name(text)


@pytest.mark.parametrize("wrong", [None, 3, b"gpt2/x"], ids=repr)
def test_what_is_no_string_is_refused(wrong):
    with pytest.raises(BadName, match="string"):
        parse_name(wrong)
