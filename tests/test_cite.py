"""Citing: what is known of a paper and of the weights, as BibTeX that closes every brace, and
nothing made up.
"""

import json
import re

import pytest

from saezoo import __version__
from saezoo.cite import PAPERS, cite_sae
from saezoo.cli import main
from saezoo.registry import read_release, release_names
from saezoo.zoo import Terms, add_zoo

OPENAI = "openai-gpt2-small/resid_post_mlp_v5_32k/8"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fields(bibtex):
    """Type, key and fields of one BibTeX entry; braces must close."""
    kind, key, body = re.fullmatch(r"@(\w+)\{([\w.-]+),\n(.*)\n\}", bibtex, re.DOTALL).groups()
    bare = re.sub(r"\\[{}]", "", body)
    assert bare.count("{") == bare.count("}")
    found = dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.MULTILINE))
    assert len(found) == body.count("\n") + 1
    return kind, key, found


def of_weights(name):
    return fields(cite_sae(name)[-1].to_bibtex())[2]


@pytest.fixture
def release(tmp_path, registry_at):
    """Write registry/mine.yaml with these shared facts and one SAE."""
    registry_at(tmp_path)

    def write(shared, row="{id: a}", about="x"):
        text = f"release: mine\nabout: {about}\nshared: {{{shared}}}\nsaes: [{row}]\n"
        (tmp_path / "mine.yaml").write_text(text)

    return write


def test_a_registered_sae_is_its_paper_and_its_weights():
    paper, weights = cite_sae(OPENAI)
    assert (paper.of, weights.of) == ("paper", "weights")
    kind, key, found = fields(paper.to_bibtex())
    assert (kind, key) == ("misc", "gao2024scaling")
    assert found["title"] == "{Scaling and evaluating sparse autoencoders}"
    assert found["author"].startswith("Gao, Leo and {Dupré la Tour}, Tom and Tillman, Henk and ")
    assert (found["eprint"], found["archivePrefix"]) == ("2406.04093", "arXiv")
    assert found["year"] == "2024"
    found = fields(weights.to_bibtex())[2]
    assert found["title"] == r"{openai-gpt2-small/resid\_post\_mlp\_v5\_32k/8}"
    assert found["author"] == "{openai}"
    assert found["howpublished"] == (
        r"\url{https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small"
        "/resid_post_mlp_v5_32k/autoencoders/8.pt}"
    )
    assert found["note"].endswith("Licence: MIT")
    assert read_release("openai-gpt2-small").about[:20] in found["note"]


def test_every_paper_that_the_registry_names_is_in_the_table_once():
    named = {read_release(name).shared.get("paper") for name in release_names()} - {None}
    assert set(PAPERS) <= named
    assert len({paper.key for paper in PAPERS.values()}) == len(PAPERS)
    for paper in PAPERS.values():
        assert all(re.fullmatch(r"[^,]+, [^,]+", author) for author in paper.authors)


@pytest.mark.parametrize(
    "url",
    [
        "https://arxiv.org/abs/2406.04093v2",
        "http://www.arxiv.org/pdf/2406.04093",
        "https://arxiv.org/pdf/2406.04093v1.pdf",
    ],
)
def test_an_arxiv_paper_is_known_by_any_of_its_urls(release, url):
    release(f"source: hf://o/r, paper: '{url}'")
    found = fields(cite_sae("mine/a")[0].to_bibtex())[2]
    assert found["eprint"] == "2406.04093"
    assert found["title"] == "{Scaling and evaluating sparse autoencoders}"
    assert found["url"] == url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://arxiv.org/abs/2512.99999", {"eprint", "archivePrefix", "url"}),
        ("https://arxiv.org/abs/cs.LG/0101001v3", {"eprint", "archivePrefix", "url"}),
        ("https://example.com/post", {"url"}),
        ("a talk, 2024", {"howpublished"}),
    ],
)
def test_of_a_paper_that_nobody_knows_only_its_place_is_said(release, url, expected):
    release(f"source: hf://o/r, paper: '{url}'")
    assert set(fields(cite_sae("mine/a")[0].to_bibtex())[2]) == expected


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("hf://o/r", "https://huggingface.co/o/r"),
        ("hf://o/r/layers.1", "https://huggingface.co/o/r/tree/main/layers.1"),
        ("hf://o/r@v1/a b/ae.pt", "https://huggingface.co/o/r/blob/v1/a%20b/ae.pt"),
        (f"hf://o/r@{COMMIT}", f"https://huggingface.co/o/r/tree/{COMMIT}"),
        ("https://a.b/c/8.pt?signature=secret", "https://a.b/c/8.pt"),
    ],
)
def test_a_bare_name_is_its_weights_alone_at_their_revision(hub, name, url):
    (weights,) = cite_sae(name)
    assert set(weights.fields) == {"title", "howpublished"}
    assert of_weights(name)["howpublished"] == rf"\url{{{url}}}"
    assert "secret" not in weights.to_bibtex()
    assert not hub.requests


def test_a_pinned_release_is_cited_at_its_commit(release):
    release(f"source: hf://o/r, revision: '{COMMIT}'", "{id: a, path: x}")
    assert COMMIT in of_weights("mine/a")["howpublished"]


def test_what_ships_with_saezoo_and_what_lies_here_is_said_in_words(tmp_path):
    found = of_weights("smollm2-135m-instruct/layer_15_resid_post")
    assert found["howpublished"] == f"in the Python package saezoo {__version__}"
    assert of_weights(tmp_path)["howpublished"] == "local files"


def test_a_release_that_says_nothing_is_cited_without_author_note_or_paper(release):
    release("source: hf://o/r", about="''")
    (weights,) = cite_sae("mine/a")
    assert set(weights.fields) == {"title", "howpublished"}


def test_an_sae_of_a_pinned_zoo_is_cited_with_what_the_zoo_says(hub, cache):
    assert not cache.exists()
    text = "release: own\nabout: Of mine.\nshared: {author: me, format: native}\nsaes: [{id: a}]\n"
    commit = hub.commit("org/zoo", {"saezoo.yaml": text.encode()})
    add_zoo("hf://org/zoo", Terms())
    found = of_weights("zoo/own/a")
    assert (found["author"], found["note"]) == ("{me}", "Of mine")
    assert commit in found["howpublished"]
    assert of_weights("hf://org/zoo#a")["author"] == "{me}"


def test_no_word_of_a_stranger_ends_a_field(release):
    release(
        "source: 'hf://o/r', author: 'a}b\\and{', licence: '50% & #1_$ ~^',"
        " paper: 'https://x.y/}{\\z'",
        "{id: a, path: 'p}{'}",
        about="'two\n\n  lines }'",
    )
    paper, weights = cite_sae("mine/a")
    assert fields(paper.to_bibtex())[2]["url"] == "https://x.y/%7D%7B%5Cz"
    found = fields(weights.to_bibtex())[2]
    assert found["author"] == r"{a\}b\textbackslash{}and\{}"
    assert found["note"] == (
        r"two lines \}. Licence: 50\% \& \#1\_\$ \textasciitilde{}\textasciicircum{}"
    )
    assert found["howpublished"] == r"\url{https://huggingface.co/o/r/tree/main/p%7D%7B}"


def test_the_command_prints_bibtex_or_json(capsys):
    for words in (["cite", OPENAI], ["cite", OPENAI, "--json"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert not caught.value.code
    plain, _, parsed = capsys.readouterr().out.partition("[\n")
    rows = json.loads("[" + parsed)
    assert plain == "\n\n".join(row["bibtex"] for row in rows) + "\n"
    assert [row["of"] for row in rows] == ["paper", "weights"]
    assert rows[1]["fields"]["title"] == OPENAI
