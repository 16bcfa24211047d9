"""Multi-layer files from strangers: what is missing, misshapen, contradicting or a lie is refused
in one line; hypothesis damages every file of every format.
"""

import json
import os

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saezoo.config_multi import CLTConfig, CrosscoderConfig
from saezoo.entry import Entry
from saezoo.errors import (
    ConfigError,
    FormatError,
    MissingFile,
    NotFinite,
    SaezooError,
    UnsafeFile,
)
from saezoo.formats import format_module
from saezoo.load import load_sae
from saezoo.save import save_sae
from tests.damage import EXAMPLES_OF_SEVERAL
from tests.origins import (
    finetuning_crosscoder,
    gemma_scope_2_multi,
    kissane_crosscoder,
    llamascopium_multi,
    mntss_clt,
)
from tests.origins._multi import D, L, N

CLT, GEMMA, AFFINE = mntss_clt.ORIGINS[2], *gemma_scope_2_multi.ORIGINS[:2]
CHAT, KISSANE = finetuning_crosscoder.ORIGINS[4], kissane_crosscoder.ORIGINS[0]
OPEN_CLT, OPEN_CROSS = llamascopium_multi.ORIGINS[4], llamascopium_multi.ORIGINS[-2]


def write(origin, folder, **changes):
    tensors = origin.tensors(torch.Generator().manual_seed(0)) | changes
    return origin.write(folder, {key: value for key, value in tensors.items() if value is not None})


def refused(path, error, said, **options):
    with pytest.raises(error) as caught:
        load_sae(path, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def tensors_of(file, **changes):
    """Replace tensors of a safetensors file (None: leave out)."""
    data = {name: value.clone() for name, value in load_file(file).items()} | changes
    save_file({name: value for name, value in data.items() if value is not None}, file)


def config_of(file, **changes):
    """Replace keys of a config (...: leave out)."""
    is_yaml = file.suffix == ".yaml"
    text = file.read_text()
    data = (yaml.safe_load(text) if is_yaml else json.loads(text)) | changes
    data = {key: value for key, value in data.items() if value is not ...}
    file.write_text(yaml.safe_dump(data) if is_yaml else json.dumps(data))


def at(name, **changes):
    return lambda path: tensors_of(path / name, **changes)


def cfg(name, **changes):
    return lambda path: config_of(path / name, **changes)


def gone(name):
    return lambda path: (path / name).unlink()


def renamed(name, to):
    return lambda path: (path / name).rename(path / to)


Z = torch.zeros
GS, ENC, DEC = "params_layer_1.safetensors", "W_enc_1.safetensors", "W_dec_1.safetensors"
JSON, YAML, PT = "config.json", "config.yaml", "cc_weights.pt"
MODEL, SAE = "model.safetensors", "sae_weights.safetensors"
LOG = "activation_function.log_jumprelu_threshold"
BROKEN = [
    # origin, what is done to the folder, error, what is said
    (GEMMA, gone(GS), MissingFile, "params_layer_1"),
    (GEMMA, gone("params_layer_2.safetensors"), FormatError, "decoders are of 3"),
    (GEMMA, renamed(GS, "params_layer_9999.safetensors"), FormatError, "more than any model"),
    (GEMMA, at(GS, w_enc=None), FormatError, "'w_enc'"),
    (GEMMA, at(GS, threshold=None), FormatError, "'threshold'"),
    (GEMMA, at(GS, extra=Z(2)), FormatError, "extra"),
    (GEMMA, at(GS, w_enc=Z(N, D)), FormatError, "layers.1.W_enc_rows"),
    (GEMMA, at(GS, w_enc=Z(L, D, N)), FormatError, "2 dimensions"),
    (GEMMA, at(GS, w_dec=Z(N, L + 1, D)), FormatError, "its decoder is of 4 layers"),
    (GEMMA, at(GS, b_dec=Z(D + 1)), FormatError, "b_dec differs"),
    (GEMMA, at(GS, b_enc=Z(N, dtype=torch.int64)), FormatError, "int64"),
    (GEMMA, at(GS, affine_skip_connection=Z(D, D)), FormatError, "affine_connection"),
    (AFFINE, at(GS, affine_skip_connection=None), FormatError, "W_skip"),
    (AFFINE, at(GS, affine_skip_connection=Z(D, D + 1)), FormatError, "W_skip"),
    (GEMMA, cfg(JSON, type="sae"), FormatError, "'sae'"),
    (GEMMA, cfg(JSON, architecture="topk"), FormatError, "topk"),
    (GEMMA, cfg(JSON, affine_connection="no"), FormatError, "affine_connection"),
    (GEMMA, cfg(JSON, hf_hook_point_in="model.layers.{1,2}.output"), FormatError, "2 layers"),
    (CLT, gone(ENC), MissingFile, "W_enc_1"),
    (CLT, gone(DEC), MissingFile, "W_dec_1"),
    (CLT, gone("W_enc_2.safetensors"), FormatError, "decoders are of 3"),
    (CLT, at(ENC, W_enc_1=None), FormatError, "'W_enc_1'"),
    (CLT, at(ENC, extra=Z(2)), FormatError, "extra"),
    (CLT, at(ENC, threshold_1=None), FormatError, "some layers have a threshold"),
    (CLT, at(ENC, W_enc_1=Z(N + 1, D)), FormatError, "layers.1.W_enc_rows"),
    (CLT, at(DEC, W_dec_1=Z(N, L, D)), FormatError, "decoders are of 4"),
    (CLT, at(DEC, W_dec_1=Z(N, 2, D + 1)), FormatError, "layers.1.W_dec"),
    (CLT, at(DEC, W_dec_1=Z(N, 0, D)), FormatError, "decoders are of 1"),
    (CLT, cfg(YAML, model_kind="transcoder_set"), FormatError, "transcoder_set"),
    (CLT, cfg(YAML, activation="relu"), FormatError, "have thresholds"),
    (CLT, cfg(YAML, activation=["relu"]), FormatError, "activation"),
    (CLT, cfg(YAML, feature_input_hook="../x y"), FormatError, "feature_input_hook"),
    (CLT, cfg(YAML, model_name=3), FormatError, "model_name"),
    (CLT, lambda p: (p / YAML).write_text("a: [1"), FormatError, "not YAML"),
    (CLT, lambda p: (p / YAML).write_text("a: &x [1]\nb: *x"), UnsafeFile, "aliases"),
    (CLT, lambda p: (p / YAML).write_text("- 1"), FormatError, "mapping"),
    (CLT, lambda p: (p / YAML).write_bytes(b" " * 5_000_000), UnsafeFile, "too much"),
    (
        CLT,
        lambda p: (p / YAML).write_text("!!python/object/apply:os.mkdir [x]"),
        FormatError,
        "YAML",
    ),
    (CHAT, at(MODEL, **{"encoder.bias": None}), FormatError, "encoder.bias"),
    (CHAT, at(MODEL, extra=Z(2)), FormatError, "extra"),
    (CHAT, at(MODEL, **{"decoder.weight": Z(N, L, D)}), FormatError, "16 decoders"),
    (CHAT, at(MODEL, **{"decoder.bias": Z(D)}), FormatError, "2 dimensions"),
    (CHAT, at(MODEL, code_normalization_id=torch.tensor(9)), FormatError, "9"),
    (CHAT, at(MODEL, code_normalization_id=Z(2)), FormatError, "code_normalization_id"),
    (CHAT, at(MODEL, threshold=Z(L)), FormatError, "threshold"),
    (CHAT, at(MODEL, k=None), FormatError, "k is None"),
    (CHAT, at(MODEL, k=torch.tensor(-3)), FormatError, "k is -3"),
    (CHAT, at(MODEL, activation_mean=Z(D)), FormatError, "activation_mean"),
    (CHAT, cfg(JSON, dict_size=N + 1), FormatError, "dict_size"),
    (CHAT, cfg(JSON, activation_dim="many"), FormatError, "activation_dim"),
    (CHAT, cfg(JSON, code_normalization="SAE"), FormatError, "'SAE'"),
    (CHAT, cfg(JSON, encoder_layers=[0]), FormatError, "encoder_layers"),
    (CHAT, cfg(JSON, encoder_layers=[0, 1, 9]), ConfigError, "reads"),
    (CHAT, cfg(JSON, latent_processor="relu"), FormatError, "latent_processor"),
    (KISSANE, cfg("cfg.json", d_in=N), FormatError, "d_in"),
    (KISSANE, cfg("cfg.json", dict_size=True), FormatError, "dict_size"),
    (KISSANE, cfg("cfg.json", n_models=2), FormatError, "n_models"),
    (KISSANE, lambda p: torch.save([1], p / PT), FormatError, "list"),
    (OPEN_CLT, at(SAE, W_E=None), FormatError, "'W_E'"),
    (OPEN_CLT, at(SAE, **{"W_D.1": None}), FormatError, "W_D.1"),
    (OPEN_CLT, at(SAE, **{"W_D.1": Z(L, N, D)}), FormatError, "W_D.1"),
    (OPEN_CLT, at(SAE, **{"W_D.3": Z(L + 1, N, D)}), FormatError, "W_D.3"),
    (OPEN_CLT, at(SAE, **{LOG: None}), FormatError, LOG),
    (OPEN_CLT, at(SAE, **{LOG: Z(N)}), FormatError, "2 dimensions"),
    (OPEN_CLT, cfg(JSON, hook_points_in=["a"]), FormatError, "1 hook points in"),
    (OPEN_CLT, cfg(JSON, hook_points_in="a"), FormatError, "list of hook points"),
    (OPEN_CLT, cfg(JSON, act_fn="batchtopk"), FormatError, "batchtopk"),
    (OPEN_CLT, cfg(JSON, act_fn="batchlayertopk"), FormatError, "batchlayertopk"),
    (OPEN_CLT, cfg(JSON, norm_activation="token-wise"), FormatError, "token-wise"),
    (OPEN_CLT, cfg(JSON, norm_activation="batch-wise"), FormatError, "batch-wise"),
    (OPEN_CLT, cfg(JSON, expansion_factor=1e12), FormatError, "expansion_factor"),
    (OPEN_CLT, cfg(JSON, expansion_factor=0.33), FormatError, "not whole"),
    (OPEN_CLT, cfg(JSON, use_decoder_bias=False), FormatError, "use_decoder_bias"),
    (OPEN_CLT, cfg(JSON, sae_type="lorsa"), FormatError, "lorsa"),
    (OPEN_CLT, gone(SAE), FormatError, "sae_weights"),
    (
        OPEN_CLT,
        at(SAE, **{f"dataset_average_activation_norm.{llamascopium_multi.OUT[1]}": None}),
        FormatError,
        "not there",
    ),
    (
        OPEN_CLT,
        at(SAE, **{f"dataset_average_activation_norm.{llamascopium_multi.OUT[1]}": Z(())}),
        FormatError,
        "is 0.0",
    ),
    (OPEN_CROSS, cfg(JSON, sparsity_include_decoder_norm=False), FormatError, "may not have"),
    (OPEN_CROSS, cfg(JSON, hook_points=[]), FormatError, "hook_points"),
    (OPEN_CROSS, cfg(JSON, act_fn="layertopk"), FormatError, "layertopk"),
    (OPEN_CROSS, at(SAE, b_E=Z(L + 1, N)), FormatError, "b_E"),
    (OPEN_CROSS, at(SAE, W_D=Z(L, N, D + 1)), FormatError, "W_dec"),
]


@pytest.mark.parametrize(("origin", "breaking", "error", "said"), BROKEN, ids=str)
def test_files_that_are_not_what_they_say_are_refused_in_one_line(
    origin, breaking, error, said, tmp_path
):
    path = write(origin, tmp_path)
    load_sae(path)
    breaking(path)
    refused(path, error, said)


@pytest.mark.parametrize("origin", [CLT, GEMMA, CHAT, KISSANE, OPEN_CLT, OPEN_CROSS], ids=str)
@pytest.mark.parametrize("fact", [{"d_in": 7}, {"d_sae": 25}], ids=str)
def test_files_that_contradict_the_registry_are_refused(origin, fact, tmp_path):
    path = write(origin, tmp_path)
    with pytest.raises(FormatError, match="registry states"):
        format_module(origin.format).read(path, Entry(source=str(path), **fact))


@pytest.mark.parametrize("origin", [CLT, GEMMA, CHAT, KISSANE, OPEN_CLT, OPEN_CROSS], ids=str)
def test_a_plain_load_reads_no_weights_but_verify_refuses_what_is_not_finite(origin, tmp_path):
    tensors = origin.tensors(torch.Generator().manual_seed(0))
    decoders = (name for name in tensors if "dec" in name or "W_D" in name)
    name = next(name for name in decoders if tensors[name].dim() > 2)
    value = tensors[name].clone()
    value.view(-1)[-1] = torch.inf
    path = write(origin, tmp_path, **{name: value})
    load_sae(path)
    with pytest.raises(NotFinite, match="1 values"):
        load_sae(path, verify=True)


def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_none(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    path = write(KISSANE, tmp_path)
    torch.save({"W_enc": Bomb()}, path / PT)
    refused(path, UnsafeFile, "more than tensors")
    assert not (tmp_path / "run").exists()


FUZZED = [CLT, GEMMA, CHAT, KISSANE, OPEN_CLT, OPEN_CROSS, "native clt", "native crosscoder"]


def written(what, folder):
    """(origin, path) of a checkpoint, or of a native folder made of one."""
    if not isinstance(what, str):
        return what, write(what, folder)
    origin = AFFINE if "clt" in what else CHAT
    return origin, save_sae(load_sae(write(origin, folder)), folder / "native")


@pytest.mark.parametrize("what", FUZZED, ids=str)
@settings(max_examples=EXAMPLES_OF_SEVERAL, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_a_saezoo_error_or_a_module_of_sound_shapes(
    what, data, tmp_path_factory
):
    origin, path = written(what, tmp_path_factory.mktemp("fuzz"))
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, min(len(raw), 600) - 1)))
        length = data.draw(st.integers(1, 20))
        raw[place : place + length] = data.draw(st.binary(max_size=20))
    file.write_bytes(bytes(raw))
    said = ""
    try:
        model = load_sae(path)
    except SaezooError as error:
        said = str(error)
    else:
        x = torch.randn(2, len(getattr(model, "layers", range(model.b_dec.shape[0]))), model.d_in)
        assert model(x).shape == (*x.shape[:2], model.d_out)
    assert "\n" not in said


SPECS = [
    ({"layers": 0}, "layers"),
    ({"layers": 2000}, "layers"),
    ({"layer": 3}, "layer 3 of 3"),
    ({"k": 3}, "k=3"),
    ({"architecture": "topk"}, "k=None"),
    ({"architecture": "topk", "k": 9}, "k=9 is more than d_sae=8"),
    ({"architecture": "topk", "k": 25, "k_over": "layers"}, "k=25 is more than d_sae=24"),
    ({"relu_after": False}, "relu_after"),
    ({"input_scale": [1.0]}, "input_scale has 1"),
    ({"output_scale": [1.0, -1.0, 1.0]}, "output_scale"),
    ({"sites": [{}]}, "sites has 1"),
    ({"colour": 1}, "colour"),
    ({"kind": "crosscoder"}, "kind"),
]


@pytest.mark.parametrize(("change", "said"), SPECS, ids=str)
def test_a_spec_that_contradicts_itself_is_refused_in_one_line(change, said):
    good = {"architecture": "relu", "layers": 3, "d_in": 4, "d_sae": 8}
    CLTConfig.from_json(good)
    with pytest.raises(ConfigError) as caught:
        CLTConfig.from_json(good | change, "here")
    assert said in str(caught.value)
    assert str(caught.value).startswith("here: ")
    assert "\n" not in str(caught.value)


CROSS_SPECS = [
    ({"mixed": [1.0, 2.0]}, "mixed"),
    ({"code_norm": "mixed"}, "mixed=None"),
    ({"reads": []}, "reads"),
    ({"reads": [1, 0]}, "reads"),
    ({"input_norm": {"kind": "scale", "factors": [1.0]}}, "factors has 1"),
    ({"input_norm": {"kind": "constant_norm"}, "d_out": 9}, "d_out == d_in"),
]


@pytest.mark.parametrize(("change", "said"), CROSS_SPECS, ids=str)
def test_a_crosscoders_spec_that_contradicts_itself_is_refused(change, said):
    good = {"architecture": "relu", "sources": 3, "d_in": 4, "d_sae": 8}
    CrosscoderConfig.from_json(good)
    with pytest.raises(ConfigError) as caught:
        CrosscoderConfig.from_json(good | change)
    assert said in str(caught.value)


NATIVE = [
    (gone("layer_1.safetensors"), MissingFile, "layer_1"),
    (renamed("layer_2.safetensors", "layer_3.safetensors"), FormatError, "layer_3"),
    (cfg(JSON, kind="lorsa"), ConfigError, "upgrade saezoo"),
    (cfg(JSON, kind=...), ConfigError, "layers"),
    (cfg(JSON, layers=4), ConfigError, "sites"),
    (cfg(JSON, d_sae=2 * N), FormatError, "expected"),
    (at("layer_1.safetensors", extra=Z(2)), FormatError, "extra"),
    (at("layer_1.safetensors", W_dec=Z(N, 2, L, D)), FormatError, "W_dec"),
    (at("layer_1.safetensors", W_dec=Z(300_000, L, D)), UnsafeFile, "more than"),
    (at("sae.safetensors", b_dec=Z(L, D + 1)), FormatError, "b_dec"),
]


@pytest.mark.parametrize(("breaking", "error", "said"), NATIVE, ids=lambda value: str(value)[:20])
def test_a_broken_native_folder_is_refused_in_one_line(breaking, error, said, tmp_path):
    _, path = written("native clt", tmp_path)
    breaking(path)
    with pytest.raises(error) as caught:
        load_sae(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_saezoo_of_before_refuses_the_kind_by_name(tmp_path):
    from saezoo.config import SAEConfig

    _, path = written("native clt", tmp_path)
    data = json.loads((path / "config.json").read_text())
    assert data.pop("saezoo_format") == 1
    with pytest.raises(ConfigError, match="kind"):
        SAEConfig.from_json(data)
