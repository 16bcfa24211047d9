"""What spans several layers or models, by name: which files are fetched, and how much of them is
read.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saezoo.check import check_sae
from saezoo.cli import main
from saezoo.clt import CrossLayerTranscoder
from saezoo.clt_layer import CLTLayer
from saezoo.config_multi import CLTConfig
from saezoo.crosscoder import Crosscoder
from saezoo.errors import FormatError, MissingFile
from saezoo.find import find_sae
from saezoo.formats._stream import stream_safetensors
from saezoo.formats.native import write_config
from saezoo.hub import fetch
from saezoo.load import load_sae
from saezoo.metadata import Hosts
from saezoo.numerics import close
from tests.fakes.web import FakeWeb
from tests.origins import (
    finetuning_crosscoder,
    gemma_scope_2_multi,
    kissane_crosscoder,
    llamascopium_multi,
    mntss_clt,
)
from tests.origins._multi import D, L, N

pytestmark = pytest.mark.usefixtures("cache")

CLT, GEMMA = mntss_clt.ORIGINS[0], gemma_scope_2_multi.ORIGINS[0]
CROSS = gemma_scope_2_multi.ORIGINS[3]
OPEN, OPEN_CROSS = llamascopium_multi.ORIGINS[4], llamascopium_multi.ORIGINS[-2]
CHAT, KISSANE = finetuning_crosscoder.ORIGINS[2], kissane_crosscoder.ORIGINS[0]


@pytest.fixture
def web():
    server = FakeWeb()
    yield server
    server.close()


def made(origin):
    return origin.tensors(torch.Generator().manual_seed(0))


def publish(hub, origin, repo, at, tmp_path):
    """A checkpoint of this origin in a repo of the Hub; returns its tensors."""
    tensors = made(origin)
    folder = origin.write(tmp_path / "written", tensors)
    files = {f"{at}{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.commit(repo, files | {"README.md": b"# words"})
    return {key: value.double() for key, value in tensors.items() if value.is_floating_point()}


def asked(hub):
    """Names of the files that were sent."""
    sent = [path for method, path, _ in hub.requests if method == "GET" and "/api/" not in path]
    return sorted({path.rpartition("/")[2] for path in sent})


REGISTERED = [
    (CLT, "mntss/clt-gemma-2-2b-2.5M", "", "mntss-clt-gemma-2-2b-2.5m/clt"),
    (
        GEMMA,
        "google/gemma-scope-2-1b-pt",
        "clt/width_262k_l0_medium/",
        "gemma-scope-2-1b-pt-clt/clt/width_262k_l0_medium",
    ),
    (
        CROSS,
        "google/gemma-scope-2-1b-pt",
        "crosscoder/layer_7_13_22_width_262k_l0_medium/",
        "gemma-scope-2-1b-pt-crosscoder/crosscoder/layer_7_13_22_width_262k_l0_medium",
    ),
    (
        CHAT,
        "science-of-finetuning/gemma-2-2b-crosscoder-l13-mu4.1e-02-lr1e-04",
        "",
        "gemma-2-2b-chat-crosscoders/l13-mu4.1e-02-lr1e-04",
    ),
]


@pytest.mark.parametrize(("origin", "repo", "at", "name"), REGISTERED, ids=lambda v: str(v)[:30])
def test_a_registered_name_gives_what_its_authors_compute(origin, repo, at, name, hub, tmp_path):
    tensors = publish(hub, origin, repo, at, tmp_path)
    x = torch.randn(9, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for chosen in (name, f"hf://{repo}/{at}".rstrip("/")):
        model = load_sae(chosen, dtype=torch.float64)
        assert close(model(x), origin.forward(tensors, x))
    assert isinstance(model, CrossLayerTranscoder if origin.layered else Crosscoder)
    model = load_sae(name, local_files_only=True)
    assert model.cfg.sites is None or model.cfg.sites[0].model.startswith("google/gemma")


@pytest.mark.parametrize("origin", [OPEN, OPEN_CROSS], ids=str)
def test_llamascopium_says_in_its_config_which_kind_it_is(origin, hub, web, tmp_path):
    tensors = publish(hub, origin, "OpenMOSS-Team/Kinds", "a/b/", tmp_path)
    for path in (tmp_path / "written").rglob("*"):
        if path.is_file():
            web.files[f"/kinds/{path.name}"] = path.read_bytes()
    x = torch.randn(9, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name in ("hf://OpenMOSS-Team/Kinds/a/b", f"{web.url}/kinds"):
        assert close(load_sae(name, dtype=torch.float64)(x), origin.forward(tensors, x))
        if origin.layered:
            one = load_sae(f"{name}/layer_1", dtype=torch.float64)
            assert close(one.encode(x[:, 1]), origin.encode(tensors, x)[:, 1])
        else:
            with pytest.raises(MissingFile, match="a crosscoder has no layers"):
                load_sae(f"{name}/layer_1")


def test_the_registry_knows_the_scales_that_kissanes_files_do_not_hold(hub, tmp_path):
    repo, at = "ckkissane/crosscoder-gemma-2-2b-model-diff", "blocks.14.hook_resid_pre/"
    name = "crosscoder-gemma-2-2b-model-diff/blocks.14.hook_resid_pre"
    entry = find_sae(name)
    assert entry.source_scales == (0.2758961493232058, 0.24422852496546169)
    tensors = made(KISSANE)
    # of two models, as published
    two = {key: value[:2] for key, value in tensors.items() if key in ("W_enc", "b_dec")}
    tensors |= two | {"W_dec": tensors["W_dec"][:, :2]}
    folder = KISSANE.write(tmp_path / "written", {k: v.contiguous() for k, v in tensors.items()})
    hub.commit(repo, {f"{at}{path.name}": path.read_bytes() for path in folder.iterdir()})
    model = load_sae(name, dtype=torch.float64)
    x = torch.randn(9, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = {key: value.double() for key, value in tensors.items()}
    scale = torch.tensor(entry.source_scales, dtype=torch.float64)[:, None]
    assert close(model.encode(x), kissane_crosscoder.encode(t, x * scale))
    assert close(model(x), kissane_crosscoder.forward(t, x * scale) / scale)
    assert model.cfg.sites[0].hook_name == model.cfg.sites[1].hook_name
    raw = load_sae(f"hf://{repo}/{at}".rstrip("/"), dtype=torch.float64)
    assert close(raw(x), kissane_crosscoder.forward(t, x))
    assert "mean norm" in raw.cfg.notes["input"]


LAYERS = [
    (CLT, "", "mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_1"),
    (CLT, "", "mntss-clt-gemma-2-2b-2.5m/clt/layer_1"),
    (CLT, "", "hf://mntss/clt-gemma-2-2b-2.5M/layer_1"),
    (CLT, "", "hf://mntss/clt-gemma-2-2b-2.5M/1"),
    (
        GEMMA,
        "clt/width_262k_l0_medium/",
        "hf://mntss/clt-gemma-2-2b-2.5M/clt/width_262k_l0_medium/layer_1",
    ),
]


@pytest.mark.parametrize(("origin", "at", "name"), LAYERS, ids=lambda value: str(value)[-40:])
def test_a_layer_by_name_fetches_its_own_files_only(origin, at, name, hub, tmp_path):
    tensors = publish(hub, origin, "mntss/clt-gemma-2-2b-2.5M", at, tmp_path)
    entry = find_sae(name).model_copy(update={"d_sae": None})
    fetched = fetch(entry)
    own = {"config.yaml", "W_enc_1.safetensors", "W_dec_1.safetensors"}
    assert set(asked(hub)) == (
        own if origin is CLT else {"config.json", "params_layer_1.safetensors"}
    )
    with Hosts() as hosts:
        seen = hosts.look(entry)
        assert set(seen.files) == set(asked(hub))
    one = load_sae(f"{fetched.path}", dtype=torch.float64)
    assert isinstance(one, CLTLayer)
    x = torch.randn(9, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert close(one.encode(x[:, 1]), origin.encode(tensors, x)[:, 1])


def test_the_whole_after_a_layer_fetches_the_rest_and_offline_it_is_missed(hub, tmp_path):
    repo = "mntss/clt-gemma-2-2b-2.5M"
    publish(hub, CLT, repo, "", tmp_path)
    load_sae(f"hf://{repo}/layer_2")
    with pytest.raises(Exception, match="not in the cache"):
        load_sae(f"hf://{repo}", local_files_only=True)
    assert load_sae(f"hf://{repo}").cfg.layers == L
    with Hosts() as hosts:
        assert len(hosts.look(find_sae(f"hf://{repo}")).files) == 1 + 2 * L
    with pytest.raises(MissingFile, match="W_enc_3"):
        load_sae(f"hf://{repo}/layer_3")


def test_a_layer_of_what_has_none_is_no_such_folder(hub, tmp_path):
    publish(hub, KISSANE, "me/mine", "a/", tmp_path)
    for name in ("hf://me/mine/a/layer_1", "hf://me/mine/1"):
        with pytest.raises(MissingFile, match="no such file or folder"):
            load_sae(name)
    with pytest.raises(MissingFile, match="no such file or folder"):
        load_sae("hf://me/mine/a/layer_1", format="kissane_crosscoder")


def test_a_family_of_the_registry_takes_no_files_of_others(hub, tmp_path):
    publish(hub, CLT, "me/mine", "a/", tmp_path)
    assert load_sae("hf://me/mine/a", format="clt").cfg.layers == L
    with pytest.raises(FormatError, match="no known format"):
        load_sae("hf://me/mine/a", format="crosscoder")
    folder = tmp_path / "written" / "clt"
    assert load_sae(folder, format="clt").cfg.layers == L
    assert load_sae(folder / "layer_1", format="clt").layer == 1
    with pytest.raises(FormatError, match="which is no crosscoder"):
        load_sae(folder, format="crosscoder")
    with pytest.raises(FormatError, match="is a folder"):
        load_sae("hf://me/mine/a/W_enc_0.safetensors", format="clt")


def test_a_folder_at_an_https_host_is_asked_for_layer_after_layer(web, tmp_path):
    for origin in (CLT, GEMMA):
        folder = origin.write(tmp_path / origin.format, made(origin))
        for path in folder.iterdir():
            web.files[f"/{origin.format}/{path.name}"] = path.read_bytes()
        url = f"{web.url}/{origin.format}"
        assert load_sae(url).cfg.layers == L
        assert load_sae(f"{url}/layer_2").layer == 2
    with pytest.raises(FormatError, match="no known format"):
        load_sae(f"{url}/layer_7")


def run(capsys, *words):
    """(exit code, stdout, stderr) of the `saezoo` program."""
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return done.value.code, out, err


@pytest.mark.parametrize("origin", [CLT, GEMMA, OPEN, CHAT, KISSANE, OPEN_CROSS], ids=str)
def test_the_commands_take_it(origin, tmp_path, capsys):
    path = origin.write(tmp_path / "written", made(origin))
    for name in [path, path / "layer_1"] if origin.layered else [path]:
        code, out, _ = run(capsys, "check", name, "--json")
        assert code == 0
        assert {row["what"]: row["ok"] for row in json.loads(out)} == {
            "files": True,
            "hash": None,
            "shapes": True,
            "finite": True,
        }
        assert run(capsys, "info", name)[0] == 0
        code, out, _ = run(capsys, "convert", name, tmp_path / "native")
        assert (code, "largest difference 0.0e+00" in out) == (0, True)
        assert run(capsys, "check", tmp_path / "native")[0] == 0
    code, _, err = run(capsys, "convert", path, tmp_path / "out", "--to", "sparsify")
    assert (code, "cannot express" in err, err.count("\n")) == (1, True, 1)
    code, _, err = run(capsys, "demo", "--name", path)
    assert (code, "saezoo demo takes an SAE" in err, err.count("\n")) == (1, True, 1)


def test_check_says_shapes_of_layers_together_and_finds_what_is_not_finite(tmp_path):
    tensors = made(CLT)
    path = CLT.write(tmp_path / "a", tensors)
    shapes = {row.what: row.detail for row in check_sae(path)}["shapes"]
    assert f"layers.0 to {L - 1}: W_enc_rows ({N}, {D}) float32" in shapes
    tensors["W_dec_1"][0, 0, 0] = torch.nan
    path = CLT.write(tmp_path / "b", tensors)
    found = {row.what: row for row in check_sae(path)}["finite"]
    assert found.ok is False
    assert "layers.1.W_dec has 1 values" in found.detail


def test_only_the_decoder_rows_of_active_features_are_taken(tmp_path, monkeypatch):
    from saezoo.rows import Decoder

    model = load_sae(CLT.write(tmp_path, made(CLT)))
    taken, take = [], Decoder.take

    def spy(decoder, features, *rest):
        taken.extend(features.tolist())
        return take(decoder, features, *rest)

    monkeypatch.setattr(Decoder, "take", spy)
    x = torch.randn(1, D, generator=torch.Generator().manual_seed(3))
    features = model.layer(0).encode_sparse(x)
    model.layer(0).decode(features)
    used = features.indices[features.values != 0].unique().tolist()
    assert sorted(taken) == used
    assert 0 < len(used) < N


PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
torch.manual_seed(0)
from saezoo import load_sae
x = torch.randn(4, 4, 64)
model = load_sae(sys.argv[2])
model(x)
del model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_sae(sys.argv[1])
features = model.encode_sparse(x)
out = model.decode(features)
assert out.shape == (4, 4, 64) and all(int(f.counts.sum()) for f in features)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def write_native(folder: Path, d_sae: int) -> Path:
    """A CLT of 4 layers that is on for few features, written some rows at a time."""
    cfg = CLTConfig(architecture="jumprelu", layers=4, d_in=64, d_sae=d_sae, causal=False)
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for layer in range(4):
        shapes = cfg.layer_shapes(layer)
        tensors = {
            name: torch.randn(1, generator=generator).expand(shape)
            for name, shape in shapes.items()
        }
        tensors["W_enc_rows"] = torch.randn(64, 64, generator=generator).repeat(d_sae // 64, 1)
        threshold = torch.full((d_sae,), torch.inf)
        threshold[:: d_sae // 8] = 0
        stream_safetensors(
            tensors | {"threshold": threshold}, folder / f"layer_{layer}.safetensors"
        )
    stream_safetensors({"b_dec": torch.zeros(4, 64)}, folder / "sae.safetensors")
    write_config(cfg, folder)
    return folder


def test_a_transcoder_whose_decoders_are_large_is_used_without_holding_them(tmp_path):
    big, small = write_native(tmp_path / "big", 2**16), write_native(tmp_path / "small", 2**6)
    decoders = 4 * 2**16 * 4 * 64 * 4
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(big), str(small)],
        capture_output=True,
        text=True,
        check=True,
    )
    # the encoders, which are mapped and read once, are a quarter of the decoders
    assert int(done.stdout) < 0.4 * decoders
