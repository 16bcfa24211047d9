"""Dunefsky's transcoders, Prisma and e2e_sae: what their configs may say, which SAE of a file is
meant, and where it belongs.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from saezoo.check import check_sae
from saezoo.config import Site
from saezoo.entry import Entry
from saezoo.errors import FormatError, MissingFile, SaezooError, UnsafeFile
from saezoo.formats import detect, e2e, split_part
from saezoo.formats import prisma as vision
from saezoo.load import load_sae
from saezoo.numerics import close
from tests.origins import dunefsky, goodfire, prisma
from tests.origins import e2e as apollo
from tests.origins._origin import D, K, N

pytestmark = pytest.mark.usefixtures("cache")


def made(origin):
    return origin.tensors(torch.Generator().manual_seed(0))


def refused(path, error, said, **options):
    with pytest.raises(error) as caught:
        load_sae(path, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


DUNEFSKY = [
    ({"d_in": 7}, "d_in is 7, but the tensors have 6"),
    ({"d_in": 6.0}, "d_in is 6.0"),
    ({"d_in": [6]}, "d_in is an object"),
    ({"d_sae": 25}, "d_sae is 25, but the tensors have 24"),
    ({"d_sae": 0}, "d_sae is 0"),
    ({"d_out": 7}, "d_out is 7, but the tensors have 6"),
    ({"is_transcoder": False}, "is_transcoder is False, but there is a b_dec_out"),
    ({"is_transcoder": "yes"}, "is_transcoder is 'yes'"),
    ({"normalize_activations": "layer_norm"}, "normalize_activations, which Dunefsky's code"),
    ({"activation_fn_str": "topk"}, "activation_fn_str"),
]


@pytest.mark.parametrize(("change", "said"), DUNEFSKY, ids=str)
def test_what_dunefskys_config_says_must_be_so(change, said, tmp_path):
    refused(dunefsky.writer(**change)(tmp_path, made(dunefsky.ORIGINS[0])), FormatError, said)


SAVED = [
    ({"cfg": None}, "cfg is NoneType"),
    ({"cfg": 3}, "cfg is int"),
    ({"state_dict": 3}, "state_dict is int"),
    ({"cfg": ...}, "has no cfg"),
    ({"state_dict": ...}, "has no state_dict"),
]


@pytest.mark.parametrize(("change", "said"), SAVED, ids=str)
@pytest.mark.parametrize("form", ["dunefsky", "prisma"])
def test_a_checkpoint_has_a_config_and_a_state_dict(form, change, said, tmp_path):
    saved = {"cfg": {"hook_point": "x"}, "state_dict": made(dunefsky.ORIGINS[0])} | change
    saved = {key: value for key, value in saved.items() if value is not ...}
    torch.save(saved, tmp_path / "sae.pt")
    if form == "prisma" and "state_dict" not in saved:
        said = "has no config in it"
    refused(tmp_path / "sae.pt", FormatError, said, format=form)


def test_a_config_that_is_a_plain_mapping_is_read_too(tmp_path):
    path = tmp_path / "transcoder.pt"
    tensors = made(dunefsky.ORIGINS[0])
    plain = {key: value for key, value in dunefsky.CONFIG.items() if key != "device"}
    torch.save({"cfg": plain, "state_dict": tensors}, path)
    assert detect(path) == "dunefsky"
    x = torch.randn(8, D)
    assert close(load_sae(path)(x), dunefsky.forward(tensors, x))


def test_a_dunefsky_transcoder_goes_from_the_norm_without_gain_to_the_mlps_output(tmp_path):
    cfg = load_sae(dunefsky.ORIGINS[0].write(tmp_path, made(dunefsky.ORIGINS[0]))).cfg
    assert cfg.is_transcoder
    assert cfg.site == Site(
        model="openai-community/gpt2",
        layer=8,
        point="mlp_in",
        hook_name="blocks.8.ln2.hook_normalized",
        rms_gain=False,
    )
    assert (cfg.out_site.module, cfg.out_site.point) == ("transformer.h.8.mlp", "mlp_out")
    sae = load_sae(dunefsky.ORIGINS[2].write(tmp_path / "b", made(dunefsky.ORIGINS[2])))
    assert (sae.cfg.is_transcoder, sae.cfg.subtract_b_dec) == (False, True)
    assert sae.cfg.site.module == "transformer.h.8.mlp"


PRISMA = [
    ({"normalize_activations": "expected_average_only_in"}, "is not known; there are none, const"),
    ({"normalize_activations": ...}, "nothing says normalize_activations"),
    ({"normalize_activations": 3}, "normalize_activations 3"),
    ({"normalize_activations": ["none"]}, "normalize_activations"),
    ({"architecture": "jumprelu"}, "architecture 'jumprelu' is not known"),
    ({"architecture": None}, "architecture None"),
    ({"activation_fn_str": "tanh-relu"}, "activation_fn_str 'tanh-relu' of a standard SAE"),
    ({"architecture": "gated", "activation_fn_str": "topk"}, "'topk' of a gated SAE"),
    ({"activation_fn_str": "topk"}, "k is None"),
    (prisma.TOPK | {"activation_fn_kwargs": {"k": 0}}, "k is 0"),
    (prisma.TOPK | {"activation_fn_kwargs": {"k": K, "postact_fn": "x"}}, "expected k alone"),
    (prisma.TOPK | {"activation_fn_kwargs": 3}, "activation_fn_kwargs is 3"),
    ({"is_transcoder": True}, "is_transcoder is True"),
    ({"is_transcoder": "no"}, "is_transcoder is 'no'"),
    ({"d_in": 7}, "d_in is 7"),
    ({"d_sae": "many"}, "d_sae is 'many'"),
]


@pytest.mark.parametrize(("change", "said"), PRISMA, ids=str)
@pytest.mark.parametrize("pickled", [True, False], ids=["pickled", "beside"])
def test_values_of_prismas_config_that_decide_arithmetic_must_be_known(
    change, said, pickled, tmp_path
):
    path = prisma.writer(pickled=pickled, **change)(tmp_path, made(prisma.ORIGINS[0]))
    refused(path, SaezooError, said)


DECIDE = [
    {"normalize_activations": "none"},
    prisma.TOPK,
    {"activation_fn_kwargs": {"k": 4}},
    {"is_transcoder": True},
    {"architecture": "gated"},
]


@pytest.mark.parametrize("change", DECIDE, ids=str)
def test_the_config_in_the_pickle_and_the_one_beside_must_agree(change, tmp_path):
    folder = prisma.writer()(tmp_path, made(prisma.ORIGINS[0]))
    (folder / "config.json").write_text(json.dumps(prisma.CONFIG | change))
    refused(folder, FormatError, "config.json says")
    # in what decides nothing they may differ
    (folder / "config.json").write_text(json.dumps(prisma.CONFIG | {"lr": 3, "model_name": "x"}))
    assert load_sae(folder).d_sae == N


def test_a_pickled_config_alone_is_enough_and_what_it_lacks_is_not_made_up(tmp_path):
    path = prisma.writer(beside=False)(tmp_path, made(prisma.ORIGINS[0]))
    assert load_sae(path, format="prisma").cfg.input_norm.kind == "layer_norm"
    old = prisma.writer(beside=False, normalize_activations=...)
    path = old(tmp_path / "old", made(prisma.ORIGINS[0]))
    refused(path, FormatError, "nothing says normalize_activations", format="prisma")
    bare = prisma.writer(beside=False, pickled=False)(tmp_path / "bare", made(prisma.ORIGINS[0]))
    refused(bare / "weights.pt", FormatError, "has no config in it", format="prisma")


def test_several_checkpoints_of_one_folder_say_to_name_one(tmp_path, hub):
    tensors = made(prisma.ORIGINS[0])
    folder = prisma.writer("n_images_520028.pt")(tmp_path, tensors)
    both = {"n_images_520028.pt", "n_images_2600058.pt"}
    (folder / "n_images_2600058.pt").write_bytes((folder / "n_images_520028.pt").read_bytes())
    hub.commit("org/vision", {item.name: item.read_bytes() for item in folder.iterdir()})
    for name in (folder, "hf://org/vision"):
        for form in (None, "prisma"):
            refused(name, FormatError, "name one of them", format=form)
    for file in both:
        assert load_sae(folder / file).d_sae == N
        assert load_sae(f"hf://org/vision/{file}").d_sae == N
    # the final one is the SAE
    (folder / "weights.pt").write_bytes((folder / "n_images_520028.pt").read_bytes())
    x = torch.randn(8, D)
    assert close(load_sae(folder)(x), prisma.ORIGINS[0].forward(tensors, x))


@pytest.mark.parametrize("identity", [True, False])
def test_a_skip_of_prismas_transcoders_is_what_the_entry_says(identity, tmp_path):
    """Their code has had two, and the file does not say which."""
    changes = prisma.TRANSCODER | prisma.NO_NORM | {"transcoder_with_skip_connection": True}
    tensors = prisma.tensors(transcoder=True, skip=True)(torch.Generator().manual_seed(0))
    path = prisma.writer(**changes)(tmp_path, tensors)
    refused(path, FormatError, "state `skip_identity: false` or `true`")
    manifest = {
        "release": "mine",
        "about": "One transcoder.",
        "saes": [{"id": "first", "path": path.name, "skip_identity": identity, "format": "prisma"}],
        "shared": {"source": str(tmp_path)},
    }
    (tmp_path / "saezoo.yaml").write_text(yaml.safe_dump(manifest))
    sae = load_sae(f"{tmp_path}#first", dtype=torch.float64)
    x = torch.randn(20, D, dtype=torch.float64)
    double = {key: value.double() for key, value in tensors.items()}
    cfg = prisma.CONFIG | changes
    # 1 is added in the file's float32, as there
    expected = prisma.forward(double, x, cfg, identity=identity)
    assert close(sae(x), expected, torch.float32 if identity else torch.float64)
    assert not close(sae(x), prisma.forward(double, x, cfg, identity=not identity), torch.float32)
    normed = prisma.writer(**changes | {"normalize_activations": "layer_norm"})
    entry = Entry(source="x", skip_identity=identity)
    with pytest.raises(FormatError, match="a skip under a normalisation"):
        vision.read(normed(tmp_path / "normed", tensors), entry)


def test_the_site_of_prismas_saes_is_their_hook_in_a_model_without_module_names(tmp_path):
    cfg = load_sae(prisma.writer(cls_token_only=True)(tmp_path, made(prisma.ORIGINS[0]))).cfg
    assert cfg.site == Site(
        model="laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
        layer=9,
        point="resid_post",
        hook_name="blocks.9.hook_resid_post",
    )
    assert cfg.notes == {"tokens": "of the class token alone"}
    transcoder = next(origin for origin in prisma.ORIGINS if origin.name == "transcoder")
    cfg = load_sae(transcoder.write(tmp_path / "b", made(transcoder))).cfg
    assert cfg.site.hook_name == "blocks.9.ln2.hook_normalized"
    assert cfg.out_site.hook_name == "blocks.9.hook_mlp_out"


APOLLO = [
    ({"saes": {"type_of_sparsifier": "codebook"}}, "type_of_sparsifier 'codebook' is not read"),
    ({"saes": {"dict_size_to_input_ratio": 5.0}}, "dict_size_to_input_ratio is 5.0, but"),
    ({"saes": {"dict_size_to_input_ratio": "many"}}, "dict_size_to_input_ratio is 'many'"),
    ({"saes": {"dict_size_to_input_ratio": float("inf")}}, "dict_size_to_input_ratio is inf"),
    ({"saes": {"dict_size_to_input_ratio": True}}, "dict_size_to_input_ratio is True"),
    ({"saes": ["sae"]}, "saes is list"),
]


@pytest.mark.parametrize(("change", "said"), APOLLO, ids=str)
def test_what_the_config_of_e2e_sae_says_must_be_so(change, said, tmp_path):
    refused(apollo.writer(**change)(tmp_path, made(apollo.ORIGINS[0])), FormatError, said)


def test_a_decoder_is_normalised_as_torch_does_it_zero_columns_and_all(tmp_path, monkeypatch):
    monkeypatch.setattr(e2e, "ROWS", 30)  # a few features at a time
    columns = torch.randn(D, N, generator=torch.Generator().manual_seed(0)) * 3
    columns[:, 4] = 0
    columns[:, 5] = 1e-14
    expected = torch.nn.functional.normalize(columns, dim=0).T
    rows = e2e.unit_rows(columns)
    assert rows.is_contiguous()
    assert close(rows, expected)
    assert not rows[4].any()
    assert 0 < rows[5].norm() < 0.1
    assert close(e2e.unit_rows(columns.bfloat16()).norm(dim=1)[6:], torch.ones(N - 6))
    drawn = apollo.tensors(columns=lambda g: torch.randn(D, N, generator=g) * 3)
    tensors = drawn(torch.Generator().manual_seed(0))
    x = torch.randn(64, D)
    assert close(load_sae(apollo.writer()(tmp_path, tensors))(x), apollo.forward(tensors, x))


GROWTH = """
import re, sys
from pathlib import Path
import torch
from saezoo.load import load_sae

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

load_sae(sys.argv[1])  # whatever is imported and set up once
before = most()
sae = load_sae(sys.argv[2])
print(most() - before, sum(p.numel() * p.element_size() for p in sae.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_loading_takes_no_more_memory_than_the_sae_holds(tmp_path):
    small = apollo.writer()(tmp_path / "small", made(apollo.ORIGINS[0]))
    start, d, n = "blocks-6-hook_resid_pre", 512, 2**15
    tensors = {
        f"{start}.encoder.0.weight": torch.randn(n, d),
        f"{start}.encoder.0.bias": torch.zeros(n),
        f"{start}.decoder.weight": torch.randn(d, n),
        f"{start}.decoder.bias": torch.zeros(d),
    }
    large = apollo.writer(config=False)(tmp_path / "large", tensors)
    command = [sys.executable, "-c", GROWTH, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, held = map(int, done.stdout.split())
    assert held > 128 * 2**20
    assert grown < 1.15 * held + 2 * 4 * e2e.ROWS


def test_one_of_several_saes_is_named_by_its_hook(tmp_path, hub):
    drawn = apollo.tensors(apollo.HOOK, apollo.OTHER)
    tensors = drawn(torch.Generator().manual_seed(0))
    file = apollo.writer()(tmp_path, tensors)
    hub.commit("org/e2e", {f"run/{item.name}": item.read_bytes() for item in file.parent.iterdir()})
    x = torch.randn(8, D)
    for start in (str(file), "hf://org/e2e/run/samples_400000.pt"):
        with pytest.raises(FormatError) as caught:
            load_sae(start)
        told = f"name one, as …/samples_400000.pt/{apollo.OTHER}"
        assert told in str(caught.value)
        for hook in (apollo.HOOK, apollo.OTHER):
            sae = load_sae(f"{start}/{hook}")
            assert close(sae(x), apollo.forward(tensors, x, hook))
            assert (sae.cfg.site.hook_name, sae.cfg.site.layer) == (hook, int(hook.split(".")[1]))
            found = {finding.what: finding.ok for finding in check_sae(f"{start}/{hook}")}
            assert found["files"]
            assert found["finite"]
        refused(f"{start}/blocks.3.hook_resid_pre", MissingFile, "has no SAE of blocks.3")
    entry = Entry(source=str(file), site=Site(hook_name=apollo.OTHER))
    assert e2e.read(file, entry).cfg.site.hook_name == apollo.OTHER


def test_a_file_of_one_sae_has_no_parts(tmp_path, hub):
    origin = goodfire.ORIGINS[0]
    file = origin.write(tmp_path, made(origin))
    hub.commit("org/one", {"sae.pt": file.read_bytes()})
    for name in (file / "part", "hf://org/one/sae.pt/part"):
        refused(name, MissingFile, "so there is no 'part' in it", format="goodfire")
        refused(name, MissingFile, "'part'")
    assert split_part(file / "a" / "b") == (file, "a/b")
    assert split_part(file) == (file, "")
    assert split_part(tmp_path / "nothing" / "here") == (tmp_path / "nothing" / "here", "")


@pytest.mark.parametrize(
    ("model", "hook", "centred"),
    [
        ("gpt2-small", "blocks.6.hook_resid_pre", True),
        ("gpt2", "blocks.6.hook_mlp_out", True),
        ("gemma-2b", "blocks.6.hook_resid_pre", None),
        (None, "blocks.6.hook_resid_pre", None),
    ],
)
def test_the_host_of_e2e_sae_is_transformerlens_processed_one(model, hook, centred, tmp_path):
    tensors = apollo.tensors(hook)(torch.Generator().manual_seed(0))
    site = load_sae(apollo.writer(tlens_model_name=model)(tmp_path, tensors)).cfg.site
    assert (site.centred, site.hook_name, site.layer) == (centred, hook, 6)


def test_a_config_of_e2e_sae_that_is_not_plain_is_refused(tmp_path):
    file = apollo.writer()(tmp_path, made(apollo.ORIGINS[0]))
    (file.parent / "final_config.yaml").write_text("a: !!python/name:os.system")
    refused(file, UnsafeFile, "final_config.yaml")
    (file.parent / "final_config.yaml").write_text("tlens_model_name: [gpt2]")
    assert load_sae(file).cfg.site.model is None
