"""The registry: every file holds, names find what they should, and wrong YAML is refused by file
and key.
"""

import re
from collections import Counter

import pytest

from saezoo.errors import (
    AmbiguousName,
    BadName,
    FetchError,
    FormatError,
    RegistryError,
    UnknownSAE,
)
from saezoo.find import find_sae
from saezoo.formats import FAMILIES, FORMATS, REFUSED, format_module, is_read
from saezoo.hub import fetch
from saezoo.index import make_index
from saezoo.registry import expand, match_open, read_release, release_names
from saezoo.search import find_all, list_saes, parse_span, parse_width

COUNTS = {
    "openai-gpt2-small": 144,
    "smollm2-135m-instruct": 1,
    "gpt-oss-20b-andyrdt": 6,
    "llama-3.1-8b-instruct-andyrdt": 7,
    "qwen2.5-7b-instruct-andyrdt": 7,
    "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109": 144,
    "sae_bench_gemma-2-2b_topk_width-2pow14_date-1109": 144,
    "sae_bench_gemma-2-2b_topk_width-2pow16_date-1109": 18,
    "sae_bench_gemma-2-2b_vanilla_width-2pow12_date-1109": 144,
    "sae_bench_gemma-2-2b_vanilla_width-2pow14_date-1109": 144,
    "sae_bench_gemma-2-2b_vanilla_width-2pow16_date-1109": 18,
    "sae_bench_pythia70m_sweep_gated_ctx128_0730": 40,
    "sae_bench_pythia70m_sweep_panneal_ctx128_0730": 56,
    "sae_bench_pythia70m_sweep_standard_ctx128_0712": 44,
    "sae_bench_pythia70m_sweep_topk_ctx128_0730": 48,
    "saebench_gemma-2-2b_width-2pow12_date-0108": 6,
    "saebench_gemma-2-2b_width-2pow14_date-0107": 6,
    "saebench_gemma-2-2b_width-2pow16_date-0107": 6,
    "saebench_pythia-160m-deduped_width-2pow12_date-0108": 42,
    "saebench_pythia-160m-deduped_width-2pow14_date-0108": 42,
    "qwen3-1.7b-adamkarvonen": 12,
    "qwen3-8b-adamkarvonen": 12,
    "qwen3-32b-adamkarvonen": 12,
    "mistral-7b-sparse-autoencoder-layer16": 1,
    "gpt2-transcoders": 12,
    "evo-2-layer-26-mixed": 1,
    "llama-3.2-1b-instruct-sae-l9": 1,
    "deepseek-r1-sae-l37": 1,
    "mntss-skip-transcoder-llama-3.2-1b-131k-nobos": 16,
    "mntss-transcoder-llama-3.2-1b": 16,
    "mntss-clt-131k": 1,
    "mntss-clt-gemma-2-2b-2.5m": 1,
    "mntss-clt-gemma-2-2b-426k": 1,
    "mntss-clt-llama-3.2-1b-524k": 1,
    "crv-8b-instruct-transcoders": 32,
    "mlsae-pythia-70m-deduped": 5,
    "gemma-2-2b-chat-crosscoders": 2,
    "crosscoder-gemma-2-2b-model-diff": 1,
    "interplm-esm2-8m": 12,
    "interplm-esm2-650m": 12,
    "prisma-clip-b-32": 59,
}

OPENAI = "https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small"

FOUND = [
    # name, source, path, layer, module, hook
    (
        "openai-gpt2-small/mlp_post_act/0",
        OPENAI,
        "mlp_post_act/autoencoders/0.pt",
        0,
        "transformer.h.0.mlp.act",
        "blocks.0.mlp.hook_post",
    ),
    (
        "openai-gpt2-small/resid_delta_mlp_v4/11",
        OPENAI,
        "resid_delta_mlp_v4/autoencoders/11.pt",
        11,
        "transformer.h.11.mlp",
        "blocks.11.hook_mlp_out",
    ),
    (
        "openai-gpt2-small/resid_post_attn_v5_128k/7",
        OPENAI,
        "resid_post_attn_v5_128k/autoencoders/7.pt",
        7,
        "transformer.h.7.ln_2",
        "blocks.7.hook_resid_mid",
    ),
    (
        "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.5.hook_resid_post__trainer_5_step_9765",
        "hf://canrager/saebench_gemma-2-2b_width-2pow12_date-1109",
        "gemma-2-2b_topk_width-2pow12_date-1109/resid_post_layer_5_checkpoints/trainer_5_step_9765",
        5,
        "model.layers.5",
        "blocks.5.hook_resid_post",
    ),
    (
        "sae_bench_pythia70m_sweep_gated_ctx128_0730/blocks.4.hook_resid_post__trainer_7",
        "hf://canrager/lm_sae",
        "pythia70m_sweep_gated_ctx128_0730/resid_post_layer_4/trainer_7",
        4,
        "gpt_neox.layers.4",
        "blocks.4.hook_resid_post",
    ),
    (
        "qwen2.5-7b-instruct-andyrdt/resid_post_layer_27_trainer_1",
        "hf://andyrdt/saes-qwen2.5-7b-instruct",
        "resid_post_layer_27/trainer_1",
        27,
        "model.layers.27",
        "blocks.27.hook_resid_post",
    ),
    (
        "sae-llama-3-8b-32x/layers.10",
        "hf://EleutherAI/sae-llama-3-8b-32x",
        "layers.10",
        10,
        "model.layers.10",
        "blocks.10.hook_resid_post",
    ),
    (
        "sae-pythia-70m-deduped-32k/layers.3.mlp",
        "hf://EleutherAI/sae-pythia-70m-deduped-32k",
        "layers.3.mlp",
        3,
        "gpt_neox.layers.3.mlp",
        "blocks.3.hook_mlp_out",
    ),
    (
        "sae-llama-3.1-8b-64x/embed_tokens",
        "hf://EleutherAI/sae-llama-3.1-8b-64x",
        "embed_tokens",
        None,
        "model.embed_tokens",
        "hook_embed",
    ),
    (
        "smollm2-135m-instruct/layer_15_resid_post",
        "bundled:smollm2-135m-instruct/layer_15_resid_post",
        "",
        15,
        "model.layers.15",
        "blocks.15.hook_resid_post",
    ),
]


@pytest.mark.parametrize(("release", "count"), COUNTS.items())
def test_each_release_has_as_many_saes_as_were_published(release, count):
    assert len(expand(read_release(release))) == count


def test_as_many_saes_of_each_format_are_registered_as_were_published():
    rows = find_all().rows
    assert Counter(row["format"] for row in rows) == {
        "openai": 144,
        "native": 1,
        "dictionary_learning": 838 + 84 + 36,
        "saelens": 292 + 1,
        "gemma_scope": 2859,
        "gemma_scope_2": 8784,
        "qwen_scope": 544,
        "circuit_tracer": 208 + 64,
        "llama_scope": 192,
        "llama_scope_r1": 96,
        "clt": 26 + 4,
        "kissane_attn": 12,
        "temporal": 3,
        "goodfire": 2 + 1,
        "deepseek_r1": 1 + 1,
        "dunefsky": 12,
        "evo2": 1,
        "mlsae": 5,
        "crosscoder": 3,
        "interplm": 24,
        "prisma": 59,
    }
    stated = [row for row in rows if row["format"] == "dictionary_learning"]
    assert all(row["neuronpedia"] for row in stated if "unverified" not in row)


def test_hosts_whose_writing_weights_must_be_centred_are_marked():
    rows = find_all(model="gpt2").rows
    centred = Counter(row["release"] for row in rows if row["site"].get("centred"))
    assert centred == {
        "gpt2-small-res-jb": 13,
        "gpt2-small-res-jb-feature-splitting": 8,
        "gpt2-small-mlp-tm": 12,
    }


def test_a_factor_that_the_files_lack_is_in_the_registry():
    assert find_sae("gemma-2b-res-jb/blocks.12.hook_resid_post").norm_scaling_factor == (
        pytest.approx(0.2138, abs=1e-4)
    )
    entry = find_sae("mistral-7b-res-wg/blocks.8.hook_resid_pre")
    assert entry.normalize_activations == "constant_norm_rescale"


@pytest.mark.parametrize("release", release_names())
def test_every_file_of_the_registry_holds(release):
    known = read_release(release)
    entries = list(expand(known).values())
    if known.is_open:
        ids = (re.sub(r"{\w+}", "x", p.id.replace("{layer}", "7")) for p in known.open)
        entries += [match_open(known, key) for key in ids]
    assert entries
    for entry in entries:
        assert entry.format in (*FORMATS, *FAMILIES, *REFUSED)
        assert entry.model
        if is_read(entry.format) and not entry.unverified and entry.format not in FAMILIES:
            # a normalised stream without its gain is no module's output
            assert entry.site.module or entry.site.hook_name.endswith("hook_normalized")
        assert not re.search(r"\{\w+\}", str(entry.to_json()))
    for entry in entries[:: max(1, len(entries) // 20)]:
        assert find_sae(entry.name) == entry


@pytest.mark.parametrize(
    ("name", "source", "path", "layer", "module", "hook"), FOUND, ids=lambda value: str(value)[:40]
)
def test_names_find_their_files_and_sites(name, source, path, layer, module, hook):
    entry = find_sae(name)
    assert (entry.source, entry.path, entry.layer) == (source, path, layer)
    assert (entry.site.module, entry.site.hook_name) == (module, hook)
    assert find_sae(*name.split("/", 1)) == entry


def test_a_skip_transcoder_reads_the_input_of_the_mlp_and_writes_its_output():
    entry = find_sae("skip-transcoder-llama-3.2-1b-131k/layers.2.mlp")
    assert (entry.site.module, entry.site.side) == ("model.layers.2.mlp", "input")
    assert (entry.out_site.module, entry.out_site.side) == ("model.layers.2.mlp", "output")


def test_names_of_other_kinds_become_entries_without_the_registry(tmp_path):
    assert find_sae("hf://org/repo@v1/a").to_json() == {
        "source": "hf://org/repo",
        "path": "a",
        "revision": "v1",
    }
    assert find_sae("https://host.org/8.pt").source == "https://host.org/8.pt"
    assert find_sae(tmp_path).source == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("openai-gpt2-smal/x", "openai-gpt2-small"),
        ("openai-gpt2-small/resid_post_mlp_v5_32k/12", "resid_post_mlp_v5_32k/1"),
        ("openai-gpt2-small", "144"),
        ("sae-llama-3-8b-32x/foo", "layers.{layer}"),
        ("nothing-like-it", "saezoo list"),
    ],
)
def test_unknown_names_list_the_closest(name, said):
    with pytest.raises(UnknownSAE) as caught:
        find_sae(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_org_and_repo_is_refused_with_both_fixes():
    with pytest.raises(AmbiguousName) as caught:
        find_sae("EleutherAI/sae-llama-3-8b-32x")
    assert "hf://EleutherAI/sae-llama-3-8b-32x" in str(caught.value)
    assert "./EleutherAI/sae-llama-3-8b-32x" in str(caught.value)
    assert isinstance(caught.value, BadName)
    assert isinstance(caught.value, UnknownSAE)


def test_a_revision_replaces_the_registered_one_and_the_facts_that_went_with_it():
    entry = find_sae("sae-llama-3-8b-32x/layers.10", revision="v2")
    assert entry.revision == "v2"
    assert entry.sha256 is entry.size is None
    with pytest.raises(BadName, match="revision"):
        find_sae("openai-gpt2-small/mlp_post_act/0", revision="v2")


@pytest.fixture
def yaml_file(tmp_path, registry_at):
    """Write registry/mine.yaml of a registry of its own."""
    registry_at(tmp_path)

    def write(text):
        (tmp_path / "mine.yaml").write_text("release: mine\nabout: x\n" + text)

    return write


SHARED = "shared: {format: native, source: 'hf://o/r'}\n"

WRONG = {
    "unknown key": ("colour: red\n", "colour"),
    "unknown key of a row": (SHARED + "saes: [{id: a, colour: red}]\n", "a: colour"),
    "no source": ("saes: [{id: a}]\n", "source"),
    "no id": (SHARED + "saes: [{path: a}]\n", "without an id"),
    "an id twice": (SHARED + "saes: [{id: a}, {id: a}]\n", "'a' appears twice"),
    "an id twice by pattern": (
        SHARED + "saes: [{id: l3}]\nfamilies: [{id: 'l{n}', each: {n: 0..5}}]\n",
        "'l3' appears twice",
    ),
    "a placeholder without values": (
        SHARED + "families: [{id: 'l{n}', each: {m: 0..5}}]\n",
        "placeholders: m, n",
    ),
    "too many ids": (SHARED + "families: [{id: 'l{n}', each: {n: 0..30000}}]\n", "20,000"),
    "another release's name": ("", None),
    "not YAML": ("saes: [a: b: c\n", "line"),
    "a python object": ("about: !!python/object/apply:os.system ['false']\n", "mine.yaml"),
    "a wrong point": (SHARED + "saes: [{id: a, site: {point: everywhere}}]\n", "site.point"),
    "a negative size": (SHARED + "saes: [{id: a, size: -1}]\n", "size"),
    "a list": ("- a\n", "mine.yaml"),
}


@pytest.mark.parametrize(
    ("text", "said"),
    [case for case in WRONG.values() if case[1]],
    ids=[k for k, v in WRONG.items() if v[1]],
)
def test_wrong_yaml_is_refused_in_one_line_with_file_and_key(yaml_file, text, said):
    yaml_file(text)
    with pytest.raises(RegistryError) as caught:
        expand(read_release("mine"))
    # a row without an id has no name to be looked up by
    place = r"registry/mine\.yaml(: a row without an id|, line \d+: )"
    assert re.match(place, str(caught.value))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_must_be_called_like_its_release(tmp_path, registry_at):
    registry_at(tmp_path)
    (tmp_path / "other.yaml").write_text("release: mine\nabout: x\n")
    with pytest.raises(RegistryError, match=r"'mine'.*'other'"):
        read_release("other")


def test_a_broken_release_does_not_keep_another_from_being_found(tmp_path, registry_at):
    registry_at(tmp_path)
    (tmp_path / "broken.yaml").write_text("[")
    (tmp_path / "mine.yaml").write_text("release: mine\nabout: x\n" + SHARED + "saes: [{id: a}]\n")
    assert find_sae("mine/a").source == "hf://o/r"


def test_shared_facts_are_inherited_and_a_rows_own_win(yaml_file):
    yaml_file(
        "shared: {format: native, source: 'hf://o/r', licence: MIT, site: {model: m, layer: 1}}\n"
        "saes: [{id: a, licence: Apache-2.0, site: {layer: 2}}, {id: b}]\n"
    )
    a, b = expand(read_release("mine")).values()
    assert (a.licence, a.site.model, a.site.layer) == ("Apache-2.0", "m", 2)
    assert (b.licence, b.site.layer) == ("MIT", 1)


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({"release": "openai-gpt2-small", "model": "openai-community/gpt2"}, 144),
        ({"release": "openai-gpt2-small", "model": "GPT2"}, 144),
        ({"release": "openai-gpt2-small", "layer": 8}, 12),
        ({"release": "openai-gpt2-small", "layer": (8, 9)}, 24),
        ({"release": "openai-gpt2-small", "site": "resid_post"}, 24),
        ({"release": "openai-gpt2-small", "width": "131k"}, 48),
        ({"release": "openai-gpt2-small", "width": 131072, "site": "mlp_out", "layer": 0}, 1),
        ({"release": "openai-gpt2-small", "l0": "1..100"}, 0),
        ({"model": "gemma-2-2b", "width": "16k", "search": "dictionary_learning"}, 294),
        ({"search": "pythia gated"}, 40 + 12),
        ({"release": "gpt2-small-res-jb", "l0": "41..54"}, 4),
        ({"model": "nobody"}, 0),
    ],
    ids=str,
)
def test_filters_find_what_fits_all_of_them(filters, count):
    assert len(list_saes(**filters)) == count


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("16k", (16_000, 16_999)),
        ("131K", (131_000, 131_999)),
        ("1m", (1_000_000, 1_999_999)),
        ("24576", (24_576, 24_576)),
        (7, (7, 7)),
    ],
)
def test_widths_are_read_as_the_field_writes_them(text, span):
    assert parse_width(text) == span


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("50..150", (50, 150)),
        ("50..", (50, float("inf"))),
        ("..9", (float("-inf"), 9)),
        ("7", (7, 7)),
        ((1, 2), (1, 2)),
        (3, (3, 3)),
    ],
    ids=str,
)
def test_spans_of_l0(text, span):
    assert parse_span(text) == span


@pytest.mark.parametrize("call", [lambda: parse_width("wide"), lambda: parse_span("a..b")])
def test_filters_that_make_no_sense_are_refused(call):
    with pytest.raises(BadName):
        call()


def test_an_open_release_is_listed_by_the_folders_of_its_repo_and_says_when_it_cannot_be():
    files = [f"layers.{n}/{name}" for n in (2, 10, 1) for name in ("cfg.json", "sae.safetensors")]
    files += ["README.md", "layers.1.mlp/cfg.json", "logs/x.txt"]
    listing = find_all(release="sae-llama-3-8b-32x", list_files=lambda _entry: files)
    assert [entry.id for entry in listing.entries] == [
        "layers.1",
        "layers.1.mlp",
        "layers.2",
        "layers.10",
    ]
    assert not listing.not_listed

    def refuse(_entry):
        raise FetchError("no network")

    listing = find_all(model="Meta-Llama-3-8B", list_files=refuse)
    assert not listing.entries
    assert listing.not_listed == {
        "sae-llama-3-8b-32x": "no network",
        "sae-llama-3-8b-32x-v2": "no network",
    }


def test_a_format_that_cannot_be_read_is_found_and_listed_and_refused_before_any_fetch():
    entry = find_sae("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post")
    assert (entry.l0, entry.site.module) == (192, "model.layers.12")
    assert not is_read(entry.format)
    assert len(list_saes(release="temporal-sae-gemma-2-2b")) == 1
    for refused in (lambda: fetch(entry), lambda: format_module("temporal")):
        with pytest.raises(FormatError, match="its format temporal cannot be read: its codes come"):
            refused()
    with pytest.raises(FormatError, match="no format 'whatever'"):
        fetch(entry, format="whatever")


def test_how_an_sae_may_be_used_and_its_k_are_in_the_registry():
    entry = find_sae("qwen-scope-3-8b-base-w64k-l50/layer3")
    assert (entry.k, entry.d_sae, entry.site.module) == (50, 65536, "model.layers.3")
    assert entry.use_restriction
    assert len(list_saes(model="Qwen3-8B-Base", layer=3, width="65k")) == 2


@pytest.mark.parametrize(
    ("alias", "release", "key"),
    [
        ("Llama3_1-8B-Base-LXR-8x", "llama_scope_lxr_8x", "l7r_8x"),
        ("qwen3-8b-saes", "qwen3-8b-adamkarvonen", "resid_post_layer_9_trainer_2"),
        ("sae-Llama-3.2-1B-131k", "sae-llama-3.2-1b-131k", "layers.3"),
    ],
)
def test_a_release_is_found_by_its_other_names_too(alias, release, key):
    assert find_sae(alias, key) == find_sae(release, key)
    assert find_sae(f"{alias}/{key}").name == f"{release}/{key}"
    assert find_all(release=alias).rows == find_all(release=release).rows


def test_no_alias_is_a_release_or_another_ones_alias(tmp_path, registry_at):
    make_index()  # refuses that in the registry as it is
    registry_at(tmp_path)
    text = "release: %s\nabout: x\naliases: [%s]\n" + SHARED + "saes: [{id: a}]\n"
    for first, second, said in (("b", "c", "a release too"), ("c", "c", "one of a too")):
        (tmp_path / "a.yaml").write_text(text % ("a", first))
        (tmp_path / "b.yaml").write_text(text % ("b", second))
        with pytest.raises(RegistryError, match=said):
            make_index()


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("Mistral-7B", "mistralai/Mistral-7B-v0.1"),
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gemma-3-4b", "google/gemma-3-4b-pt"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
    ],
)
def test_host_models_have_usual_names(name, same):
    found = find_all(model=name).rows
    assert found
    assert found == find_all(model=same).rows


def test_files_at_the_root_of_an_open_release_are_listed():
    files = ["config.json", "layer_2.safetensors", "layer_10.safetensors", "layer_2.txt"]
    listing = find_all(release="esmc-600m-sae-k64-codebook16384", list_files=lambda _entry: files)
    assert [entry.id for entry in listing.entries] == ["layer_2", "layer_10"]
