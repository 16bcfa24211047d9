"""circuit-tracer's sets: what their configs say, layers by name, pointers to files of other repos,
and SAEs written in its format.
"""

import re

import pytest
import torch
import yaml

from saezoo.check import check_sae
from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.entry import Entry
from saezoo.errors import (
    BadName,
    CannotConvert,
    FormatError,
    MissingFile,
    Offline,
    SaezooError,
    UnsafeFile,
)
from saezoo.formats import circuit_tracer as ours
from saezoo.formats import detect
from saezoo.load import load_sae
from saezoo.numerics import TOLERANCE, close
from saezoo.pointers import parse_pointer
from saezoo.save import save_sae
from tests.origins import circuit_tracer, gemma_scope, gemma_scope_2
from tests.origins._origin import D, K, N
from tests.test_convert import tiny

pytestmark = pytest.mark.usefixtures("cache")

CONFIG = circuit_tracer.CONFIG
RELU = circuit_tracer.ORIGINS[0]


def made(origin=RELU, seed=0):
    return origin.tensors(torch.Generator().manual_seed(seed))


def files_of(path):
    """What lies beside a file, as a repo has it."""
    folder = path.parent if path.is_file() else path
    return {item.name: item.read_bytes() for item in folder.iterdir()}


WRONG = [
    ({"activation": "gelu"}, "activation 'gelu' is not known"),
    ({"activation": ["topk"]}, "activation ['topk']"),
    ({"activation": "topk"}, "nothing says k"),
    ({"activation": "topk", "k": 0}, "k is 0"),
    ({"activation": "topk", "k": "3"}, "k is '3'"),
    ({"activation": "topk", "k": True}, "k is True"),
    ({"activation": "topk", "k": N + 1}, "more than d_sae"),
    ({"activation": "jumprelu"}, "has no activation_function.threshold"),
    ({"model_kind": "cross_layer_transcoder"}, "model_kind 'cross_layer_transcoder'"),
    ({"model_kind": 3}, "model_kind 3"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=str)
def test_values_of_its_config_that_decide_arithmetic_must_be_known(change, said, tmp_path):
    path = circuit_tracer.writer(**change)(tmp_path, made())
    with pytest.raises(SaezooError, match=re.escape(said)) as caught:
        load_sae(path)
    assert "\n" not in str(caught.value)


TEXTS = [
    ("[]", FormatError, "expected a YAML mapping"),
    ("{", FormatError, "not YAML"),
    ("\x00", FormatError, "not YAML"),
    ("a: 2020-13-45", FormatError, "not YAML"),
    ("[" * 20_000, FormatError, "not YAML"),
    ("a: &x [1]\nb: *x", UnsafeFile, "aliases"),
    ("a: !!python/object/apply:os.system ['true']", UnsafeFile, "tags"),
    ("a: " + "x" * 300_000, UnsafeFile, "too much for a config"),
]


@pytest.mark.parametrize(("text", "error", "said"), TEXTS, ids=lambda value: str(value)[:20])
def test_a_config_that_is_no_plain_yaml_is_refused(text, error, said, tmp_path):
    path = circuit_tracer.writer()(tmp_path, made())
    (path.parent / "config.yaml").write_text(text)
    with pytest.raises(error, match=said) as caught:
        load_sae(path)
    assert "\n" not in str(caught.value)


CONTRADICTIONS = [
    # tensors, config, entry's k, what is said
    ({"k": True}, {"activation": "relu"}, None, "has a tensor k, but its activation is relu"),
    (
        {"k": True},
        {"activation": "topk", "k": K + 1},
        None,
        "k is 4 of config.yaml, but the file states 3",
    ),
    ({"k": True}, {}, K + 1, "k is 3 of the file, but the registry states 4"),
    ({"threshold": True}, {"activation": "relu"}, None, "has activation_function.threshold"),
    (
        {"threshold": True},
        {"activation": "topk", "k": K},
        None,
        "has activation_function.threshold",
    ),
    ({"threshold": True}, {}, K, "has activation_function.threshold"),
    ({}, {"activation": "relu"}, K, "activation is relu, but the registry states k=3"),
]


@pytest.mark.parametrize(("tensors", "config", "k", "said"), CONTRADICTIONS, ids=str)
def test_config_tensors_and_registry_must_agree(tensors, config, k, said, tmp_path):
    drawn = circuit_tracer.tensors(**tensors)(torch.Generator().manual_seed(0))
    path = circuit_tracer.writer(**config)(tmp_path, drawn)
    with pytest.raises(FormatError) as caught:
        ours.read(path, Entry(source=str(path), k=k))
    assert said in str(caught.value)


def test_k_is_the_registrys_where_nothing_else_says_it_and_metas_set_has_its_own(tmp_path):
    for config in ({"activation": "topk"}, {}):
        path = circuit_tracer.writer(**config)(tmp_path / str(config), made())
        cfg = ours.read(path, Entry(source="hf://org/set", k=5)).cfg
        assert (cfg.architecture, cfg.k, cfg.relu_after) == ("topk", 5, False)
    meta = Entry(source="hf://facebook/crv-8b-instruct-transcoders", path="layer_5.safetensors")
    wide = {"W_enc": torch.ones(200, D), "W_dec": torch.ones(200, D), "b_enc": torch.ones(200)}
    path = circuit_tracer.writer(activation="topk")(tmp_path, made() | wide)
    assert ours.read(path, meta).cfg.k == 128


@pytest.mark.parametrize("name", ["wandb-config.yaml", "wanb-config.yaml"])
@pytest.mark.parametrize(("key", "value"), [("d_model", 7), ("d_feature", 25), ("d_model", "six")])
def test_sizes_of_weights_and_biases_must_be_those_of_the_tensors(name, key, value, tmp_path):
    path = circuit_tracer.writer(wandb=name)(tmp_path, made())
    rows = circuit_tracer.WANDB | {key: {"value": value}}
    (path.parent / name).write_text(yaml.safe_dump(rows))
    with pytest.raises(FormatError, match=f"{name}: {key} is"):
        load_sae(path)


MLP_OUT = ("model.layers.5.mlp", "output", "mlp_out", "blocks.5.hook_mlp_out", None)
SITES = [
    (
        {},
        (
            "model.layers.5.post_attention_layernorm",
            "input",
            "resid_mid",
            "blocks.5.hook_resid_mid",
            None,
        ),
        MLP_OUT,
    ),
    (
        {"feature_input_hook": "mlp.hook_in", "model_name": "Qwen/Qwen3-4B"},
        ("model.layers.5.mlp", "input", "mlp_in", "blocks.5.mlp.hook_in", True),
        MLP_OUT,
    ),
    (
        {"feature_input_hook": "ln2.hook_normalized", "model_name": "google/gemma-2-2b"},
        (None, "output", "mlp_in", "blocks.5.ln2.hook_normalized", False),
        (
            "model.layers.5.post_feedforward_layernorm",
            "output",
            "mlp_out",
            "blocks.5.hook_mlp_out",
            None,
        ),
    ),
    (
        {"feature_input_hook": "blocks.{layer}.hook_resid_mid"},
        (
            "model.layers.5.post_attention_layernorm",
            "input",
            "resid_mid",
            "blocks.5.hook_resid_mid",
            None,
        ),
        MLP_OUT,
    ),
    (
        {"feature_input_hook": "hook_resid_post", "feature_output_hook": "hook_resid_post"},
        ("model.layers.5", "output", "resid_post", "blocks.5.hook_resid_post", None),
        None,
    ),
    ({"feature_input_hook": 3, "feature_output_hook": "a b"}, None, None),
]


@pytest.mark.parametrize(("config", "into", "out"), SITES, ids=str)
def test_sites_are_the_sets_hooks_in_the_layer_of_the_files_name(config, into, out, tmp_path):
    cfg = load_sae(circuit_tracer.writer(**config)(tmp_path, made())).cfg

    def said(site):
        keys = ("module", "side", "point", "hook_name", "rms_gain")
        return site and tuple(getattr(site, key) for key in keys)

    assert (said(cfg.site), said(cfg.out_site)) == (into, out)
    assert cfg.site is None or (cfg.site.layer, cfg.site.model) == (
        5,
        (CONFIG | config)["model_name"],
    )


def layers(folder, count=3):
    """A set of so many layers in one folder, and their tensors."""
    drawn = [made(seed=number) for number in range(count)]
    for number, tensors in enumerate(drawn):
        path = circuit_tracer.writer(layer=number)(folder / str(number), tensors)
    for number in range(count - 1):
        origin = folder / str(number) / "set" / f"layer_{number}.safetensors"
        origin.rename(path.parent / origin.name)
    return path.parent, drawn


def test_a_layer_is_loaded_by_its_file_or_by_its_number(tmp_path):
    folder, drawn = layers(tmp_path)
    x = torch.randn(8, D)
    for number, tensors in enumerate(drawn):
        for name in (f"layer_{number}.safetensors", f"layer_{number}"):
            sae = load_sae(folder / name)
            assert close(sae(x), circuit_tracer.forward(tensors, x))
            assert sae.cfg.site.layer == number


def test_a_set_of_several_layers_says_to_name_one(tmp_path):
    folder, _ = layers(tmp_path)
    for format_ in (None, "circuit_tracer"):
        with pytest.raises(FormatError, match=r"name one") as caught:
            load_sae(folder, format=format_)
        assert "layer_0" in str(caught.value)
    with pytest.raises(MissingFile, match="layer_7"):
        load_sae(folder / "layer_7")


def test_a_layer_of_a_repo_is_fetched_with_its_configs_and_no_other(hub, tmp_path):
    folder, drawn = layers(tmp_path)
    hub.commit("org/set", files_of(folder) | {"README.md": b"#"})
    x = torch.randn(8, D)
    for name in ("layer_1.safetensors", "layer_1"):
        sae = load_sae(f"hf://org/set/{name}")
        assert close(sae(x), circuit_tracer.forward(drawn[1], x))
        assert sae.cfg.site.hook_name == "blocks.1.hook_resid_mid"
    bodies = {path.rpartition("/")[2] for method, path, _ in hub.requests if "/storage/" in path}
    assert bodies == {"layer_1.safetensors"}
    assert {finding.what: finding.ok for finding in check_sae("hf://org/set/layer_1")}["shapes"]
    with pytest.raises(FormatError, match="name one"):
        load_sae("hf://org/set")
    with pytest.raises(MissingFile, match="layer_9"):
        load_sae("hf://org/set/layer_9")


GEMMA = "google/gemma-scope-2b-pt-transcoders"
NPZ = "layer_{}/width_16k/average_l0_54/params.npz"
GEMMA_2 = "google/gemma-scope-2-1b-pt"
AFFINE = "transcoder_all/layer_{}_width_16k_l0_small_affine"


def commit_gemma(hub, tmp_path, layer):
    """A Gemma Scope transcoder of a layer, in its own repo; returns its tensors."""
    origin = gemma_scope.ORIGINS[0]
    tensors = made(origin, layer)
    path = gemma_scope.writer()(tmp_path / f"npz {layer}", tensors)
    file = path if path.is_file() else next(path.rglob("params.npz"))
    hub.commit(GEMMA, {NPZ.format(layer): file.read_bytes()})
    return origin, tensors


def commit_set(hub, pointers, repo="org/pointers", folder="", **changes):
    data = CONFIG | {"feature_input_hook": "ln2.hook_normalized"} | changes
    text = yaml.safe_dump(data | {"transcoders": pointers})
    return hub.commit(repo, {f"{folder}config.yaml": text.encode(), "README.md": b"#"})


def test_a_pointer_is_followed_to_gemma_scope_and_read_in_its_format(hub, tmp_path):
    origin, tensors = commit_gemma(hub, tmp_path, 1)
    commit_set(hub, [f"hf://{GEMMA}/{NPZ.format(number)}" for number in (0, 1)])
    x = torch.randn(8, D)
    for _ in range(2):
        sae = load_sae("hf://org/pointers/layer_1")
        assert close(sae(x), origin.forward(tensors, x))
        # what the pointed repo's and folders' names say
        assert sae.cfg.site.hook_name == "blocks.1.ln2.hook_normalized"
        assert sae.cfg.site.rms_gain is False
        assert sae.cfg.out_site.module == "model.layers.1.post_feedforward_layernorm"
        hub.requests.clear()
    assert close(load_sae("hf://org/pointers/layer_1", local_files_only=True)(x), sae(x))
    assert not hub.requests


def test_a_pointer_names_the_revision_and_the_folder_of_its_set(hub, tmp_path):
    origin = gemma_scope_2.ORIGINS[0]
    folder = origin.write(tmp_path / "files", made(origin))
    files = {f"{AFFINE.format(0)}/{name}": body for name, body in files_of(folder).items()}
    pinned = hub.commit(GEMMA_2, files)
    hub.commit(GEMMA_2, {"README.md": b"all files are gone from main"})
    pointer = f"hf://{GEMMA_2}/{AFFINE.format(0)}/params.safetensors?revision="
    commit_set(hub, [pointer + pinned], folder="width_16k/")
    x = torch.randn(8, D)
    sae = load_sae("hf://org/pointers/width_16k/layer_0")
    assert close(sae(x), origin.forward(made(origin), x))
    proof = convert_sae("hf://org/pointers/width_16k/layer_0", tmp_path / "native")
    assert proof.difference <= TOLERANCE[torch.float32]


def test_a_pointer_config_on_this_machine_is_followed_too(hub, tmp_path):
    origin, tensors = commit_gemma(hub, tmp_path, 0)
    text = yaml.safe_dump(CONFIG | {"transcoders": [f"hf://{GEMMA}/{NPZ.format(0)}"]})
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(Offline):
        load_sae(tmp_path / "layer_0", local_files_only=True)
    x = torch.randn(8, D)
    assert close(load_sae(tmp_path / "layer_0")(x), origin.forward(tensors, x))


def test_what_the_registry_says_of_the_site_holds_for_what_is_pointed_to(hub, tmp_path):
    from saezoo.config import Site
    from saezoo.hub import fetch
    from saezoo.load import read_weights

    commit_gemma(hub, tmp_path, 0)
    commit_set(hub, [f"hf://{GEMMA}/{NPZ.format(0)}"])
    facts = {
        "release": "mine",
        "id": "first",
        "format": "circuit_tracer",
        "size": 3,
        "sha256": "00",
    }
    site = Site(model="google/gemma-2-2b-it", layer=0, point="mlp_in")
    entry = Entry(source="hf://org/pointers", path="layer_0", site=site, d_sae=N, **facts)
    fetched = fetch(entry)
    assert fetched.format == "gemma_scope"
    assert fetched.entry.source == f"hf://{GEMMA}"
    cfg = read_weights(fetched, entry).cfg
    assert cfg.site.model == "google/gemma-2-2b-it"
    assert cfg.site.hook_name == "blocks.0.ln2.hook_normalized"
    with pytest.raises(FormatError, match="registry states 9"):
        read_weights(fetch(entry.model_copy(update={"d_sae": 9})), entry)


def test_what_is_pinned_at_a_commit_is_followed_to_a_commit_only(hub, tmp_path):
    from saezoo.hub import fetch

    commit_gemma(hub, tmp_path, 0)
    pinned = hub.repos[GEMMA].branches["main"]
    file = f"hf://{GEMMA}/{NPZ.format(0)}"
    commit = commit_set(hub, [file, f"{file}?revision=main", f"{file}?revision={pinned}"])
    facts = {"source": "hf://org/pointers", "release": "mine", "id": "x"}
    for layer in (0, 1):
        entry = Entry(path=f"layer_{layer}", revision=commit, **facts)
        with pytest.raises(UnsafeFile, match="points to .* at no commit"):
            fetch(entry)
        assert fetch(entry.model_copy(update={"revision": "main"})).commit == pinned
    assert fetch(Entry(path="layer_2", revision=commit, **facts)).commit == pinned
    # who types the name decides
    assert load_sae(f"hf://org/pointers@{commit}/layer_0").d_sae == N


def test_a_set_of_pointers_says_to_name_a_layer(hub):
    commit_set(hub, [f"hf://{GEMMA}/{NPZ.format(number)}" for number in range(3)])
    with pytest.raises(FormatError, match=r"3 transcoders .* name one, as .*/layer_0"):
        load_sae("hf://org/pointers")
    with pytest.raises(MissingFile, match="no layer 3; the set has 0 to 2"):
        load_sae("hf://org/pointers/layer_3")


HOSTILE = [
    "https://example.org/params.npz",
    "http://127.0.0.1/params.npz",
    "file:///etc/passwd",
    "/etc/passwd",
    "layer_0.safetensors",
    "./layer_0.safetensors",
    "hf://org/repo/../../other/secret/params.npz",
    "hf://org/repo/a/../params.npz",
    "hf://org/repo/..",
    "hf://../repo/params.npz",
    "hf://org/../params.npz",
    "hf://org/repo//etc/passwd",
    "hf://org/repo/a//params.npz",
    "hf://org/repo/",
    "hf://org/repo",
    "hf://org/repo/C:\\x.npz",
    "hf://org/repo/params.npz?revision=../../main",
    "hf://org/repo/params.npz?revision=",
    "hf://org/repo/params.npz?revision=a&x=b",
    "hf://org/repo/params.npz?token=x",
    "hf://org/repo/params.npz#frag",
    "hf://user:secret@org/repo/params.npz",
    "hf://org/repo@main/params.npz",
    "hf://org/repo/params.npz\nx",
    "hf://org/repo/par ams.npz",
    "hf://datasets/org/repo/params.npz\x00",
    "HF://org/repo/params.npz",
    "hf://org/" + "r" * 600 + "/params.npz",
    "",
    None,
    3,
    ["hf://org/repo/params.npz"],
    {"hf": "org"},
]


@pytest.mark.parametrize("pointer", HOSTILE, ids=lambda value: str(value)[:40])
def test_only_pointers_to_a_file_of_a_hub_repo_are_followed(pointer, hub):
    with pytest.raises(UnsafeFile):
        parse_pointer(pointer, "config.yaml")
    commit_set(hub, [pointer])
    with pytest.raises(SaezooError) as caught:
        load_sae("hf://org/pointers/layer_0")
    assert "\n" not in str(caught.value)
    asked = {path for _, path, _ in hub.requests}
    assert all("org/pointers" in path for path in asked), "a hostile pointer was asked for"


def test_pointers_that_are_followed_are_read_part_by_part():
    assert parse_pointer("hf://org/repo/a/b.npz", "x") == ("hf://org/repo", "a/b.npz", None)
    found = parse_pointer("hf://org/re.po-1/layer_0.safetensors?revision=refs/pr/3", "x")
    assert found == ("hf://org/re.po-1", "layer_0.safetensors", "refs/pr/3")


SETS = [
    ({"transcoders": []}, FormatError, "not a list of 1 to 1000"),
    ({"transcoders": "hf://org/repo/x.npz"}, FormatError, "not a list"),
    ({"transcoders": {0: "hf://org/repo/x.npz"}}, FormatError, "not a list"),
    ({"transcoders": ["x"] * 1001}, FormatError, "not a list"),
    ({"model_kind": "cross_layer_transcoder"}, FormatError, "cross_layer_transcoder"),
    ({"activation": "topk", "k": 3}, FormatError, "by its own name"),
]


@pytest.mark.parametrize(("change", "error", "said"), SETS, ids=lambda value: str(value)[:40])
def test_what_a_pointer_config_may_say(change, error, said, hub):
    data = CONFIG | {"transcoders": [f"hf://{GEMMA}/{NPZ.format(0)}"]} | change
    hub.commit("org/pointers", {"config.yaml": yaml.safe_dump(data).encode()})
    with pytest.raises(error, match=said):
        load_sae("hf://org/pointers/layer_0")


def test_a_pointer_is_followed_to_files_only_and_once(hub):
    # to a second config, to a folder, to a pickle, to itself
    commit_set(hub, ["hf://org/pointers/layer_0"], repo="org/loop")
    commit_set(hub, ["hf://org/loop/layer_0", "hf://org/other/folder", "hf://org/other/ae.pt"])
    hub.commit("org/other", {"folder/params.npz": b"x", "ae.pt": b"x", "config.json": b"{}"})
    for layer in range(3):
        with pytest.raises((FormatError, MissingFile)) as caught:
            load_sae(f"hf://org/pointers/layer_{layer}")
        assert "\n" not in str(caught.value)


def test_a_pointer_to_a_file_of_circuit_tracers_own_format_is_followed(hub, tmp_path):
    folder, drawn = layers(tmp_path)
    hub.commit("org/set", files_of(folder))
    commit_set(hub, [f"hf://org/set/layer_{number}.safetensors" for number in (2, 1)])
    x = torch.randn(8, D)
    assert close(load_sae("hf://org/pointers/layer_0")(x), circuit_tracer.forward(drawn[2], x))


def test_folders_and_files_called_like_a_layer_are_what_they_are(tmp_path, hub):
    tensors = made()
    folder = circuit_tracer.writer(layer=0)(tmp_path, tensors).parent
    renamed = folder.rename(tmp_path / "layer_3")
    assert load_sae(renamed).cfg.site.layer == 0
    hub.commit("org/set", {f"layer_3/{name}": body for name, body in files_of(renamed).items()})
    assert load_sae("hf://org/set/layer_3").cfg.site.layer == 0
    with pytest.raises(BadName):
        load_sae("hf://org/set/../layer_3")


SITE = {
    "site": {
        "model": "meta-llama/Llama-3.2-1B",
        "layer": 4,
        "hook_name": "blocks.4.hook_resid_mid",
    },
    "out_site": {"layer": 4, "hook_name": "blocks.4.hook_mlp_out"},
}
CAN = {
    "relu": {"architecture": "relu"},
    "relu, with sites": {"architecture": "relu"} | SITE,
    "skip": {"architecture": "relu", "skip": True} | SITE,
    "jumprelu without ReLU": {"architecture": "jumprelu", "relu_after": False},
    "jumprelu": {"architecture": "jumprelu"},
    "topk without ReLU": {"architecture": "topk", "k": 3, "relu_after": False},
}
CANNOT = {
    "topk with ReLU": ({"architecture": "topk", "k": 3}, "ReLU after topk"),
    "signed": (
        {"architecture": "topk", "k": 3, "relu_after": False, "signed": True},
        "a choice by magnitude",
    ),
    "gated": ({"architecture": "gated"}, "the architecture gated"),
    "groupmax": ({"architecture": "groupmax", "k": 3}, "the architecture groupmax"),
    "centred": ({"architecture": "relu", "subtract_b_dec": True}, "b_dec subtracted"),
    "input bias": ({"architecture": "relu", "input_bias": True}, "an input bias subtracted"),
    "norm": ({"architecture": "relu", "input_norm": {"kind": "layer_norm"}}, "a normalisation"),
    "width": ({"architecture": "relu", "d_out": 9}, "d_out 9"),
    "ranked": (
        {"architecture": "topk", "k": 3, "relu_after": False, "decoder_norm": "rank"},
        "a choice by decoder norm",
    ),
}


@pytest.mark.parametrize("name", CAN)
def test_what_it_can_express_is_written_with_the_proof_and_comes_back_the_same(name, tmp_path):
    sae = tiny(**CAN[name])
    save_sae(sae, tmp_path / "a")
    proof = convert_sae(tmp_path / "a", tmp_path / "b", to="circuit_tracer")
    assert proof.difference <= proof.tolerance
    assert "own formula" in proof.through
    layer = sae.cfg.site.layer if sae.cfg.site else 0
    names = {"config.yaml", f"layer_{layer}.safetensors"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == names
    assert detect(tmp_path / "b") == "circuit_tracer"
    again = load_sae(tmp_path / "b")
    x = torch.randn(64, 6, dtype=torch.float64) * 3
    assert close(again.double()(x), sae.double()(x))
    same = {key: value for key, value in sae.named_parameters() if key != "threshold"}
    assert all(torch.equal(value, getattr(again, key)) for key, value in same.items())
    if sae.cfg.site:
        assert again.cfg.site.hook_name == "blocks.4.hook_resid_mid"
        assert again.cfg.out_site.hook_name == "blocks.4.hook_mlp_out"
        assert again.cfg.site.model == "meta-llama/Llama-3.2-1B"
    # an older export may be replaced
    convert_sae(tmp_path / "a", tmp_path / "b", to="circuit_tracer")


@pytest.mark.parametrize("name", CANNOT)
def test_what_it_cannot_express_is_refused_with_the_reason_and_nothing_is_written(name, tmp_path):
    spec, said = CANNOT[name]
    save_sae(tiny(**spec), tmp_path / "a")
    with pytest.raises(CannotConvert, match=said) as caught:
        convert_sae(tmp_path / "a", tmp_path / "b", to="circuit_tracer")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("spec", "bias"),
    [({"subtract_b_dec": True}, "b_dec"), ({"input_bias": True}, "b_in")],
    ids=str,
)
def test_a_subtracted_bias_of_zeros_is_no_obstacle(spec, bias, tmp_path):
    sae = tiny(architecture="relu", **spec)
    getattr(sae, bias).zero_()
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="circuit_tracer")
    x = torch.randn(64, 6)
    assert torch.equal(load_sae(tmp_path / "b")(x), sae(x))


def test_thresholds_below_zero_are_what_a_relu_makes_of_them(tmp_path):
    sae = tiny(architecture="jumprelu")
    assert sae.threshold.min() < 0 < sae.threshold.max()
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="circuit_tracer")
    again = load_sae(tmp_path / "b")
    assert again.threshold.min() == 0
    assert again.cfg.relu_after is False
    x = torch.randn(500, 6)
    assert torch.equal(again.encode(x), sae.encode(x))


def test_hooks_that_are_not_known_are_left_out_and_told(tmp_path, caplog):
    cfg = SAEConfig.from_json({"architecture": "relu", "d_in": 6, "d_sae": 24})
    sae = tiny(architecture="relu")
    ours.write(cfg, dict(sae.named_parameters()), tmp_path)
    data = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert data == {"model_kind": "transcoder_set", "activation": "relu"}
    assert caplog.text.count("which is not known: add it") == 2


def test_a_refresh_asks_for_the_listing_once_and_for_that_of_the_pointed_repo_too(hub, tmp_path):
    from saezoo.hub import fetch

    folder, _ = layers(tmp_path)
    hub.commit("org/set", files_of(folder))
    commit_gemma(hub, tmp_path, 0)
    commit_set(hub, [f"hf://{GEMMA}/{NPZ.format(0)}"])
    for source in ("hf://org/set", "hf://org/pointers"):
        entry = Entry(source=source, path="layer_0")
        fetch(entry)
        hub.requests.clear()
        fetch(entry, refresh=True)
        asked = {f"GET /api/models/{source.removeprefix('hf://')}": 1}
        asked |= {f"GET /api/models/{GEMMA}": 1} if source.endswith("pointers") else {}
        assert {key: n for key, n in hub.asked().items() if "/api/" in key} == asked


def test_topk_is_written_with_a_warning_that_an_older_loader_takes_it_for_relu(tmp_path, caplog):
    save_sae(tiny(**CAN["topk without ReLU"]), tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="circuit_tracer")
    assert "takes topk for relu" in caplog.text
