"""circuit-tracer's SingleLayerTranscoder: what it saves, saezoo reads; what saezoo writes, its own
loader loads; and where its sets point to Gemma Scope, both read the same files alike.
"""

import pytest
import torch
import torch.nn.functional as F
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_gemma_scope_2_transcoder,
    load_gemma_scope_transcoder,
    load_relu_transcoder,
    load_transcoder_set,
)
from safetensors.torch import load_file

from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.load import load_sae
from saezoo.numerics import close
from saezoo.sae import build_sae
from saezoo.save import save_sae
from tests.origins import gemma_scope, gemma_scope_2
from tests_peers._compare import DTYPES, D, K, N, check_loaded, inputs, randomise

CONFIG = {
    "model_name": "meta-llama/Llama-3.2-1B",
    "model_kind": "transcoder_set",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
}
CPU = torch.device("cpu")
LOADED = {"device": CPU, "lazy_encoder": False, "lazy_decoder": False}

KINDS = {
    # activation, with a skip, what config.yaml says of it
    "relu": (lambda: F.relu, False, {}),
    "relu, skip": (lambda: F.relu, True, {"activation": "relu"}),
    "jumprelu": (lambda: JumpReLU(torch.zeros(N)), False, {}),
    "jumprelu, skip": (lambda: JumpReLU(torch.zeros(N)), True, {"activation": "jumprelu"}),
    "topk": (lambda: TopK(K), False, {"activation": "topk", "k": K}),
    "topk, skip": (lambda: TopK(K), True, {"activation": "topk", "k": K}),
}


def transcoder(name, layer=0):
    """A random one; b_enc is low, so that the k largest are negative for some tokens."""
    act, skip, _ = KINDS[name]
    made = SingleLayerTranscoder(D, N, act(), layer, skip, device=CPU, dtype=torch.float32)
    made = randomise(made, layer)
    made.b_enc.data -= 9 if name.startswith("topk") else 0
    return made


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads(name, dtype, tmp_path, same):
    made = transcoder(name)
    made.to_safetensors(str(tmp_path / "layer_5.safetensors"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | KINDS[name][2]))
    made = made.to(dtype)
    if name.startswith("topk"):
        assert made.encode(inputs(dtype)).min() < 0
    for path in (tmp_path / "layer_5.safetensors", tmp_path / "layer_5"):
        check_loaded(path, made.encode, made, same, dtype)


def test_reads_a_set_layer_by_layer(tmp_path, same):
    made = {layer: transcoder("relu, skip", layer) for layer in range(3)}
    TranscoderSet(made, "hook_resid_mid", "hook_mlp_out").to_safetensors(str(tmp_path))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    for layer, one in made.items():
        check_loaded(tmp_path / f"layer_{layer}", one.encode, one, same, torch.float32)
        assert load_sae(tmp_path / f"layer_{layer}").cfg.site.layer == layer


WRITTEN = {
    "relu": {"architecture": "relu"},
    "relu, skip": {"architecture": "relu", "skip": True},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu without ReLU": {"architecture": "jumprelu", "relu_after": False},
    "jumprelu, skip": {"architecture": "jumprelu", "relu_after": False, "skip": True},
}
SITE = {"layer": 0, "hook_name": "blocks.0.hook_resid_mid", "model": CONFIG["model_name"]}


def written(spec, folder):
    """A random SAE, converted to circuit-tracer's format."""
    sites = {"site": SITE, "out_site": {"layer": 0, "hook_name": "blocks.0.hook_mlp_out"}}
    cfg = SAEConfig.from_json({"d_in": D, "d_sae": N} | sites | spec)
    generator = torch.Generator().manual_seed(1)
    shapes = cfg.tensor_shapes().items()
    sae = build_sae(cfg, {key: torch.randn(shape, generator=generator) for key, shape in shapes})
    save_sae(sae, folder / "native")
    convert_sae(folder / "native", folder / "set", to="circuit_tracer")
    return sae


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_what_its_own_loader_loads(name, dtype, tmp_path, same):
    sae = written(WRITTEN[name], tmp_path).to(dtype)
    file = tmp_path / "set" / "layer_0.safetensors"
    loaded = load_relu_transcoder(str(file), 0, dtype=dtype, **LOADED)
    x = inputs(dtype)
    same(sae.encode(x), loaded.encode(x))
    same(sae(x), loaded(x))


def test_writes_a_set_that_load_transcoder_set_loads_by_its_config(tmp_path, same):
    sae = written(WRITTEN["relu, skip"], tmp_path)
    config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    assert config == CONFIG | {"activation": "relu"}
    loaded = load_transcoder_set(
        {0: str(tmp_path / "set" / "layer_0.safetensors")},
        scan="mine",
        feature_input_hook=config["feature_input_hook"],
        feature_output_hook=config["feature_output_hook"],
        **LOADED,
    )
    x = inputs(torch.float32)
    same(sae(x), loaded[0](x))


@pytest.mark.parametrize("skip", [False, True])
def test_writes_topk_that_its_class_takes(skip, tmp_path, same):
    """Its loader on PyPI has no topk, so the class is given the file's tensors by hand."""
    spec = {"architecture": "topk", "k": K, "relu_after": False, "skip": skip}
    sae = written(spec, tmp_path)
    made = SingleLayerTranscoder(D, N, TopK(K), 0, skip, device=CPU, dtype=torch.float32)
    made.load_state_dict(load_file(tmp_path / "set" / "layer_0.safetensors"), strict=True)
    x = inputs(torch.float32) - 4
    same(sae.encode(x), made.encode(x))
    same(sae(x), made(x))


def drawn(origin):
    return origin.tensors(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_of_gemma_scope_that_sets_point_to_are_read_alike(dtype, tmp_path, same):
    origin = gemma_scope.ORIGINS[0]
    tensors = {
        key: value.abs() if key == "threshold" else value for key, value in drawn(origin).items()
    }
    path = origin.write(tmp_path, tensors)
    file = path if path.is_file() else path / "params.npz"
    theirs = load_gemma_scope_transcoder(str(file), 0, device=CPU, dtype=dtype)
    check_loaded(path, theirs.encode, theirs, same, dtype)


@pytest.mark.parametrize("origin", gemma_scope_2.ORIGINS, ids=str)
def test_files_of_gemma_scope_2_that_sets_point_to_are_read_alike(origin, tmp_path, same):
    tensors = drawn(origin)
    # where a threshold is negative circuit-tracer has no ReLU, and the authors of the files have
    tensors["threshold"] = tensors["threshold"].abs()
    path = origin.write(tmp_path, tensors)
    file = path if path.is_file() else path / "params.safetensors"
    theirs = load_gemma_scope_2_transcoder(str(file), 0, device=CPU, dtype=torch.float32)
    check_loaded(path, theirs.encode, theirs, same, torch.float32)
    x = inputs(torch.float32)
    assert close(load_sae(path)(x), theirs(x))
