"""The card: everything that is known and nothing else, between marks; the rest of a README.md is
its author's, byte for byte.
"""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from saezoo.config import SAEConfig
from saezoo.errors import PublishError, RegistryError
from saezoo.publishing.card import Shown, write_card
from saezoo.publishing.front import LICENCES, front_matter
from saezoo.publishing.merge import (
    BEGIN,
    END,
    FRONT_BEGIN,
    FRONT_END,
    has_our_text,
    merge_card,
    merge_manifest,
)
from saezoo.publishing.words import spec_in_words, training
from saezoo.registry import expand, parse_release
from saezoo.stanza import id_key, put_rows, write_release
from tests.tiny_folders import METRICS, at_layer, spec


def shown(name="hf://my-org/my-sae", changes=None, **options):
    cfg = SAEConfig.from_json(spec(**(changes or {})))
    return Shown(cfg, name, **({"repo": "my-org/my-sae"} | options))


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_is_what_the_hub_knows_fields_by():
    text = write_card("my-sae", [shown(exports=("saelens",))])
    data = front(text)
    assert data["license"] == "mit"
    assert data["base_model"] == "my-org/tiny-llama"
    assert data["library_name"] == "saezoo"
    assert data["pipeline_tag"] == "feature-extraction"
    assert data["datasets"] == ["my-org/texts"]
    assert {"saezoo", "sparse-autoencoder", "topk", "saelens"} <= set(data["tags"])
    assert data["metrics"] == ["fvu", "l0", "loss_recovered", "kl"]
    card = ModelCard(text)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {key: METRICS[key] for key in ("fvu", "l0", "loss_recovered", "kl")}


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"notes": {"dataset": "docs.jsonl"}}, {"datasets", "model-index"}),
        ({"notes": {"provenance": "other texts"}}, {"datasets", "model-index"}),
        ({"metrics": None}, {"metrics", "model-index"}),
        ({"site": {"model": "a model of ours"}}, {"base_model"}),
        ({"origin": None}, {"license"}),
    ],
    ids=["a file", "really something else", "no metrics", "no Hub model", "no licence"],
)
def test_what_is_not_known_is_in_no_field(changes, absent):
    data = front(write_card("x", [shown(changes=changes)]))
    assert not absent & data.keys()
    assert None not in data.values()


def test_a_licence_that_the_hub_has_no_name_for_is_other_with_its_name():
    made = front_matter("x", [shown(changes={"origin": {"licence": "My Own 1.0"}}).cfg], [])
    assert (made["license"], made["license_name"]) == ("other", "my-own-1.0")
    assert {"apache-2.0", "cc-by-4.0", "gemma", "llama3.1"} <= LICENCES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "the 4 largest of a are kept, the others are 0; ReLU on what is kept"),
        ({"relu_after": False}, "the others are 0; no ReLU follows"),
        ({"relu_after": False, "signed": True}, "the 4 of a largest in magnitude"),
        ({"architecture": "jumprelu", "k": None}, "ReLU(a) where a is above the feature's thresh"),
        ({"architecture": "relu", "k": None, "skip": True}, "gives f W_dec + b_dec + x W_skip"),
        ({"architecture": "gated", "k": None}, "a gate decides"),
        ({"decoder_norm": "rank"}, "the choice is by a · ‖d‖"),
        ({"decoder_norm": "scale"}, "f is multiplied by ‖d‖"),
        ({"input_norm": {"kind": "layer_norm"}}, "mean 0 and standard deviation 1 (eps 1e-05)"),
        ({"input_norm": {"kind": "constant_norm"}}, "scaled to norm sqrt(d_in)"),
        ({"input_norm": {"kind": "scale", "factor": 0.5}}, "multiplied by 0.5"),
        ({"subtract_b_dec": False}, "a = x W_enc + b_enc"),
        ({"subtract_b_dec": False, "input_bias": True}, "a = (x - b_in) W_enc + b_enc"),
        ({"site": {"centred": True}}, "subtract the per-token mean"),
        ({"architecture": "groupmax"}, "cut into 4 groups"),
        ({"architecture": "tensor_topk"}, "over all tokens of one call"),
    ],
)
def test_the_arithmetic_is_said_in_words(changes, said):
    assert said in "\n".join(spec_in_words(SAEConfig.from_json(spec(**changes))))


def test_the_card_has_how_to_load_what_was_measured_and_by_which_definitions():
    text = write_card("my-sae", [shown(exports=("saelens", "sparsify", "gemma_scope"), plot=True)])
    for said in (
        'from saezoo import load_sae\n\nsae = load_sae("hf://my-org/my-sae")\nfeatures = sae.enc',
        'SAE.from_pretrained("my-org/my-sae", "saelens")',
        'SparseCoder.load_from_hub("my-org/my-sae", "sparsify")',
        "`gemma_scope/` has it in the layout of gemma_scope",
        "on the output of `model.layers.3` (`blocks.3.hook_resid_post`) of [my-org/tiny-llama](",
        "`saezoo.metrics`, version 2",
        "| FVU: variance unexplained, 0 is perfect | 0.2500 |",
        "left out: position 0, special tokens, tokens whose norm is above 3 times the median norm",
        "![density of the features](density.png)",
        "100,000 activations seen in training",
        "Licence: MIT.",
    ):
        assert said in text, said


def test_settings_of_the_run_are_shown_as_yaml_and_broken_ones_are_not():
    chosen = {"sae": {"d_sae": 24}, "seed": 0}
    text = write_card("x", [shown(changes={"notes": {"settings": json.dumps(chosen)}})])
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]) == chosen
    for broken in ("{", "[1]"):
        assert "```yaml" not in write_card("x", [shown(changes={"notes": {"settings": broken}})])


def test_an_architecture_of_ones_own_is_loaded_by_its_class():
    own = {"name": "my_sae:SquaredSAE", "tensors": {"W_dec": [24, 6]}}
    sae = shown(changes={"architecture": "custom", "k": None, "custom": own}, golden=False)
    text = write_card("x", [sae])
    assert "from my_sae import SquaredSAE" in text
    assert 'load_sae("hf://my-org/my-sae", custom=SquaredSAE)' in text
    assert "golden" not in text


def many(count=4):
    return [
        shown(
            f"hf://my-org/my-sae/layer_{layer}",
            {"site": at_layer(layer)},
            id=f"layer_{layer}",
            path=f"layer_{layer}",
            plot=True,
        )
        for layer in range(count)
    ]


def test_a_collection_is_one_card_with_a_row_for_each_and_what_they_share_said_once():
    text = write_card("my-saes", many())
    assert text.count("| `layer_") == 4 + 4
    assert text.count("contexts of 32 tokens") == 1
    assert text.count("a = (x - b_dec) W_enc + b_enc") == 1
    assert "![density of the features](layer_2/density.png)" in text
    assert "[plot]" not in text
    long = write_card("my-saes", many(20))
    assert "![" not in long
    assert "[plot](layer_19/density.png)" in long


def test_of_saes_that_differ_each_kind_is_said_below_its_ids():
    other = shown("y", {"architecture": "relu", "k": None, "tokens": {"context": 64}}, id="other")
    text = write_card("x", [*many(2), other])
    assert "`layer_0`, `layer_1`:\n\n- contexts of 32 tokens" in text
    assert "`other`:\n\n- contexts of 64 tokens" in text


@pytest.mark.parametrize("saes", [[shown(exports=("saelens",), plot=True)], many(3)], ids=len)
def test_the_markdown_means_what_it_looks_like(saes):
    """Parsed as the Hub does: every table has its rows and every fence is closed."""
    body = write_card("x", saes).split("---\n", 2)[2]
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    kinds = [token.type for token in tokens]
    assert kinds.count("heading_open") == body.count("\n#")
    assert kinds.count("fence") * 2 == body.count("```")
    assert kinds.count("table_open") == (1 if len(saes) == 1 else 2)
    inline = [child.type for token in tokens for child in token.children or []]
    assert inline.count("image") == len(saes)


def test_notes_cannot_close_our_text_or_open_other():
    text = write_card("x", [shown(changes={"notes": {"provenance": f"a {END} b {BEGIN}"}})])
    assert text.count(END) == 1
    assert text.count("<!-- saezoo:begin") == 1
    assert write_card("x", [shown()], text).count(END) == 1


def test_training_says_only_what_is_known():
    assert training(SAEConfig.from_json(spec(notes=None, metrics=None, origin=None))) == []


OWN = """---
language: en
tags:
- mine
license: cc-by-4.0  # chosen with care
---
# My SAEs

Words of mine, with <b>markup</b>.
"""


def test_in_a_readme_that_is_there_only_our_marks_are_written_between():
    once = write_card("my-sae", [shown()], OWN)
    start, _, rest = once.partition(FRONT_BEGIN)
    assert OWN.startswith(start)
    assert once.count(OWN.split("---\n")[2]) == 1
    data = front(once)
    # what its author says outside our marks counts
    assert (data["license"], data["tags"], data["language"]) == ("cc-by-4.0", ["mine"], "en")
    assert data["library_name"] == "saezoo"
    assert write_card("my-sae", [shown()], once) == once
    more = once + "\nMore of mine.\n"
    new = write_card("my-saes", many(), more)
    assert new.endswith(f"{END}\n\nMore of mine.\n")
    assert "# my-saes" in new
    assert "# my-sae\n" not in new


@pytest.mark.parametrize(
    "existing",
    [
        "",
        "\n",
        "# Hello\n",
        "# Hello",
        "---\n---\n",
        "---\nlanguage: en\n---\n",
        "---\n# c\n---\nx",
    ],
)
def test_any_readme_has_a_place_for_it_and_keeps_its_words(existing):
    text = merge_card(existing, {"library_name": "saezoo"}, "# ours")
    assert merge_card(text, {"library_name": "saezoo"}, "# ours") == text
    assert front(text)["library_name"] == "saezoo"
    assert all(line in text for line in existing.splitlines())


def test_lines_keep_the_ends_that_they_have():
    text = merge_card(OWN.replace("\n", "\r\n"), {"library_name": "saezoo"}, "# ours\n\nx")
    assert "\n" not in text.replace("\r\n", "")
    assert merge_card(text, {"library_name": "saezoo"}, "# ours\n\nx") == text


@pytest.mark.parametrize(
    ("existing", "said"),
    [
        (f"{BEGIN}\n", "do not pair"),
        (f"{END}\n", "do not pair"),
        (f"{END}\n{BEGIN}\n", "do not pair"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", "do not pair"),
        (f"---\n{FRONT_BEGIN}\n---\n", "do not pair"),
        (f"---\n{FRONT_END}\na: 1\n{FRONT_BEGIN}\n---\n", "do not pair"),
        ("---\na: [\n---\n", "not YAML"),
        ("---\n- a\n---\n", "no mapping"),
        ("---\n{a: 1}\n---\n", "no model card"),
    ],
)
def test_marks_that_do_not_pair_and_broken_front_matter_are_one_line(existing, said):
    with pytest.raises(PublishError, match=said) as caught:
        merge_card(existing, {"library_name": "saezoo"}, "# ours")
    assert "\n" not in str(caught.value)


def test_whether_a_readme_is_ours():
    assert has_our_text(write_card("x", [shown()]))
    assert not has_our_text(OWN)


ROW = {
    "id": "layer_3",
    "path": "layer_3",
    "format": "native",
    "licence": "MIT",
    "d_in": 6,
    "d_sae": 24,
    "site": {"model": "my-org/tiny", "layer": 3, "point": "resid_post"},
}
THEIRS = """# mine
release: my-saes   # a name
about: "Some: SAEs"
shared:
  format: native
  site: {model: my-org/tiny}

saes:
# the first
- id: layer_1
  path: a/one
  licence: MIT   # yes
# the last
- {id: layer_12, path: twelve, licence: MIT}

# the end
"""


def at(layer, **changes):
    return ROW | {"id": f"layer_{layer}", "path": f"layer_{layer}"} | changes


def entries(text):
    release = parse_release(text, "saezoo.yaml")
    home = release.model_copy(update={"shared": {"source": "x"} | release.shared})
    return expand(home, "saezoo.yaml")


def test_a_new_manifest_is_sorted_and_says_what_is_shared_once():
    text = merge_manifest(None, "my-saes", "SAEs: some.", [at(10), at(2), at(1)])
    assert list(entries(text)) == ["layer_1", "layer_2", "layer_10"]
    assert text.count("format: native") == text.count("licence: MIT") == 1
    assert text.count("my-org/tiny") == 1
    assert entries(text)["layer_10"].site.layer == 3
    assert merge_manifest(text, "other", "x", [at(2)]) == text


def test_in_a_manifest_that_is_there_only_our_rows_are_written():
    text = merge_manifest(THEIRS, "other", "x", [at(3), at(20)])
    found = entries(text)
    assert list(found) == ["layer_1", "layer_3", "layer_12", "layer_20"]
    assert found["layer_3"].model == "my-org/tiny"
    kept = [line for line in THEIRS.splitlines() if line]
    assert [line for line in text.splitlines() if line in kept] == kept
    again = merge_manifest(text, "other", "x", [at(3, d_sae=48)])
    assert entries(again)["layer_3"].d_sae == 48
    changed = [
        (old, new)
        for old, new in zip(text.splitlines(), again.splitlines(), strict=True)
        if old != new
    ]
    assert changed == [("  d_sae: 24", "  d_sae: 48")]
    # ours replaced in its place, and put back, is the same file
    assert merge_manifest(again, "other", "x", [at(3)]) == text


@pytest.mark.parametrize("eol", ["\n", "\r\n"])
def test_rows_go_where_their_ids_stand_and_a_comment_stays_with_its_row(eol):
    text = put_rows(THEIRS.replace("\n", eol), [at(0), at(2)], "saezoo.yaml")
    lines = text.split(eol)
    assert lines.index("- id: layer_0") < lines.index("# the first")
    assert lines.index("# the first") + 1 == lines.index("- id: layer_1")
    assert lines.index("- id: layer_2") < lines.index("# the last")
    assert "\n" not in text.replace(eol, "")


def test_ids_are_sorted_as_people_do():
    ids = ["b", "a/10", "a/9", "layer_2/x", "layer_10/x", "a"]
    assert sorted(ids, key=id_key) == ["a", "a/9", "a/10", "b", "layer_2/x", "layer_10/x"]


WITHOUT_FORMAT = {key: value for key, value in at(3).items() if key != "format"}
REFUSED = {
    "an id of another": (THEIRS, at(1), "the id 'layer_1' is that of 'a/one' there"),
    "a fact of all that ours lacks": (
        THEIRS.replace("native", "saelens"),
        WITHOUT_FORMAT,
        "says format: saelens of all its SAEs, which is not so of layer_3",
    ),
    "a restriction of all": (
        THEIRS.replace("format: native", "use_restriction: x"),
        at(3),
        "use_restriction: x of all",
    ),
    "a list on one line": ("release: r\nabout: x\nsaes: []\n", at(3), "put into as text"),
    "an id of a pattern": (
        "release: r\nabout: x\nfamilies: [{id: 'layer_{n}', each: {n: 3..4}}]\n",
        at(3),
        "appears twice",
    ),
    "no YAML": ("release: r\nabout: [\n", at(3), "not YAML"),
    "no mapping": ("- a\n", at(3), "put into as text"),
    "rows that are none": ("release: r\nabout: x\nsaes: [a, b]\n", at(3), "is no list of rows"),
}


@pytest.mark.parametrize(("text", "row", "said"), REFUSED.values(), ids=REFUSED)
def test_a_manifest_that_rows_cannot_be_put_into_is_one_line(text, row, said):
    with pytest.raises(PublishError) as caught:
        merge_manifest(text, "r", "x", [row])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_release_of_rows_that_are_none_is_refused():
    with pytest.raises(RegistryError, match="twice"):
        write_release("r", "x", [at(1), at(1)])
    with pytest.raises(RegistryError, match="colour"):
        write_release("r", "x", [at(1, colour="red")])


IDS = st.lists(st.from_regex(r"\A[a-c0-3_./-]{1,6}\Z"), unique=True, min_size=2, max_size=8)


@settings(deadline=None)
@given(IDS, st.integers(1, 7), st.booleans())
def test_rows_put_in_later_say_the_same_as_rows_that_were_there_at_once(ids, first, crlf):
    rows = [ROW | {"id": name, "path": name, "d_sae": 8 + at} for at, name in enumerate(ids)]
    first = min(first, len(rows) - 1)
    before = write_release("r", "x", rows[:first]).replace("\n", "\r\n" if crlf else "\n")
    text = put_rows(before, rows[first:], "saezoo.yaml")
    assert entries(text) == entries(write_release("r", "x", rows))
    assert list(entries(text)) == sorted(ids, key=id_key)
    lines = iter(text.splitlines(keepends=True))
    assert all(line in lines for line in before.splitlines(keepends=True))


PIECES = st.sampled_from(
    ["---\n", "a: 1\n", "tags: [x]\n", "# words\n", "\n", " ", "x", "\r\n", BEGIN, END, FRONT_BEGIN]
    + [FRONT_END, "<!-- saezoo:begin", "-->", "\u2028", "ä", "`"]
)


@settings(deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
def test_whatever_a_readme_holds_it_is_refused_or_kept(existing):
    made = {"library_name": "saezoo", "tags": ["y"]}
    try:
        text = merge_card(existing, made, "# ours")
    except PublishError as error:
        refused = str(error)
    else:
        refused = None
        assert merge_card(text, made, "# ours") == text
        assert text.count(END) == 1
        assert ModelCard(text).data.library_name == "saezoo"
    assert refused is None or "\n" not in refused
