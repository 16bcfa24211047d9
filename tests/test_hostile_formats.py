"""Foreign files from strangers: no code is run, no memory is spent on lies, each is refused in one
line.
"""

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saezoo.entry import Entry
from saezoo.errors import FormatError, MissingFile, SaezooError, UnsafeFile
from saezoo.formats import detect, format_module
from saezoo.load import load_sae
from tests.origins import (
    circuit_tracer,
    dictionary_learning,
    dunefsky,
    e2e,
    esmc,
    evo2,
    goodfire,
    interplm,
    kissane_attn,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    mlsae,
    openai,
    prisma,
    qwen_scope,
    sparsify,
)
from tests.origins._origin import D, N

SAE, TOPK, GATED = sparsify.ORIGINS[0], openai.ORIGINS[0], dictionary_learning.ORIGINS[3]
SCOPE, R1, SCOPIUM = llama_scope.ORIGINS[0], llama_scope_r1.ORIGINS[0], llamascopium.ORIGINS[0]
GOODFIRE, QRESEARCH, TIED = goodfire.ORIGINS[0], goodfire.ORIGINS[3], evo2.ORIGINS[0]
QWEN, KISSANE, LAYERS = qwen_scope.ORIGINS[0], kissane_attn.ORIGINS[0], mlsae.ORIGINS[0]
PROTEIN, CAMBRIAN = interplm.ORIGINS[2], esmc.ORIGINS[0]
TRACER, SKIP, JUMP = circuit_tracer.ORIGINS[0], circuit_tracer.ORIGINS[3], circuit_tracer.ORIGINS[4]
TRACED = circuit_tracer.ORIGINS[5]
APOLLO, DUNEFSKY, PRISMA = e2e.ORIGINS[0], dunefsky.ORIGINS[0], prisma.ORIGINS[0]
PICKLED = [TOPK, GATED, GOODFIRE, QRESEARCH, TIED, QWEN, KISSANE, PROTEIN, APOLLO, DUNEFSKY, PRISMA]
MAPPED = [SAE, SCOPE, R1, SCOPIUM, LAYERS, CAMBRIAN, TRACER]


def write(origin, folder, **changes):
    tensors = origin.tensors(torch.Generator().manual_seed(0)) | changes
    return origin.write(folder, {key: value for key, value in tensors.items() if value is not None})


def refused(path, error, said, **options):
    with pytest.raises(error) as caught:
        load_sae(path, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


CHANGED = [
    # origin, tensors that replace others (None: left out), what is said
    (SAE, {"encoder.bias": None}, "encoder.bias"),
    (SAE, {"extra": torch.zeros(2)}, "extra"),
    (SAE, {"W_dec": torch.zeros(D, N)}, "W_dec"),
    (SAE, {"W_skip": torch.zeros(D, D)}, "W_skip"),
    (SAE, {"encoder.weight": torch.zeros(N)}, "2 dimensions"),
    (SAE, {"b_dec": torch.zeros(D, dtype=torch.int64)}, "int64"),
    (SAE, {"encoder.weight": torch.zeros(N + 1, D)}, "expected"),
    (TOPK, {"pre_bias": None}, "pre_bias"),
    (TOPK, {"extra": torch.zeros(2)}, "extra"),
    (TOPK, {"decoder.weight": torch.zeros(N, D)}, "W_dec"),
    (TOPK, {"latent_bias": "words"}, "str"),
    (GATED, {"r_mag": None}, "r_mag"),
    (GATED, {"extra": torch.zeros(2)}, "extra"),
    (GATED, {"gate_bias": torch.zeros(N + 1)}, "b_gate"),
    (SCOPE, {"decoder.bias": None}, "decoder.bias"),
    (SCOPE, {"extra": torch.zeros(2)}, "extra"),
    (SCOPE, {"encoder.bias": torch.zeros(N + 1)}, "b_enc"),
    (SCOPE, {"encoder_glu.weight": torch.zeros(N, D)}, "GLU"),
    (R1, {"log_jumprelu_threshold": None}, "log_jumprelu_threshold"),
    (R1, {"encoder.weight": torch.zeros(N)}, "2 dimensions"),
    (R1, {"encoder.bias": torch.zeros(N, dtype=torch.int64)}, "int64"),
    (SCOPIUM, {"W_D": torch.zeros(D, N)}, "W_dec"),
    (SCOPIUM, {"W_E_glu": torch.zeros(D, N), "b_E_glu": torch.zeros(N)}, "GLU"),
    (SCOPIUM, {"extra": torch.zeros(2)}, "extra"),
    (SCOPIUM, {llamascopium.NORM + llamascopium.OUT: None}, llamascopium.OUT),
    (SCOPIUM, {llamascopium.NORM + llamascopium.OUT: torch.tensor(0.0)}, "positive number"),
    (SCOPIUM, {llamascopium.NORM + llamascopium.OUT: torch.tensor(float("nan"))}, "nan"),
    (SCOPIUM, {llamascopium.NORM + llamascopium.OUT: torch.ones(2)}, "positive number"),
    (GOODFIRE, {"encoder_linear.bias": None}, "encoder_linear.bias"),
    (GOODFIRE, {"decoder_linear.weight": torch.zeros(N, D)}, "W_dec"),
    (GOODFIRE, {"encoder_linear.weight": "words"}, "str"),
    (QRESEARCH, {"extra": torch.zeros(2)}, "extra"),
    (TIED, {"extra": torch.zeros(2)}, "extra"),
    (TIED, {"W": torch.zeros(N, D)}, "b_dec"),
    (QWEN, {"W_enc": torch.zeros(D, N), "W_dec": torch.zeros(N, D)}, "d_model"),
    (QWEN, {"b_dec": None}, "b_dec"),
    (KISSANE, {"W_enc": torch.zeros(N, D)}, "act_size"),
    (KISSANE, {"scale": torch.zeros(2)}, "scale"),
    (LAYERS, {"pre_encoder_bias": None}, "pre_encoder_bias"),
    (LAYERS, {"autoencoder.encoder.weight": torch.zeros(N, D)}, "-tfm"),
    (LAYERS, {"encoder.weight": torch.zeros(N + 1, D)}, "n_latents"),
    (PROTEIN, {"bias": None}, "bias"),
    (PROTEIN, {"decoder.bias": torch.zeros(D)}, "decoder.bias"),
    (PROTEIN, {"normalize_to_sqrt_d": torch.tensor(2.0)}, "normalize_to_sqrt_d"),
    (PROTEIN, {"activation_rescale_factor": torch.zeros(N + 1)}, "activation_rescale_factor"),
    (CAMBRIAN, {"b_enc": torch.zeros(N)}, "b_enc"),
    (CAMBRIAN, {"W_enc": torch.zeros(D, N + 1)}, "codebook_dim"),
    (TRACER, {"b_enc": None}, "b_enc"),
    (TRACER, {"extra": torch.zeros(2)}, "extra"),
    (TRACER, {"W_enc": torch.zeros(D, N), "W_dec": torch.zeros(D, N)}, "b_dec"),
    (TRACER, {"W_dec": torch.zeros(N, D + 1)}, "W_dec"),
    (TRACER, {"W_enc": torch.zeros(N, D, 1)}, "2 dimensions"),
    (TRACER, {"b_dec": torch.zeros(D, dtype=torch.int64)}, "int64"),
    (TRACER, {"k": torch.tensor(0)}, "k is 0"),
    (TRACER, {"k": torch.tensor([3, 3])}, "k is tensor"),
    (SKIP, {"W_skip": torch.zeros(D, D + 1)}, "W_skip"),
    (SKIP, {"W_skip": torch.zeros(D)}, "2 dimensions"),
    (JUMP, {circuit_tracer.THRESHOLD: torch.zeros(N + 1)}, "threshold"),
    (JUMP, {circuit_tracer.THRESHOLD: torch.tensor(0.5)}, "1 dimensions"),
    (JUMP, {"log_thresholds": torch.zeros(N)}, "log_thresholds"),
    (APOLLO, {"blocks-6-hook_resid_pre.encoder.0.bias": None}, "encoder.0.bias"),
    (APOLLO, {"blocks-6-hook_resid_pre.decoder.weight": torch.zeros(N, D)}, "decoder.weight"),
    (APOLLO, {"blocks-6-hook_resid_pre.scale": torch.zeros(2)}, "scale"),
    (APOLLO, {"extra": torch.zeros(2)}, "extra"),
    (APOLLO, {"blocks-6-hook_resid_pre.encoder.0.weight": "words"}, "str"),
    (DUNEFSKY, {"W_enc": None}, "W_enc"),
    (DUNEFSKY, {"b_dec_out": None}, "is_transcoder"),
    (DUNEFSKY, {"extra": torch.zeros(2)}, "extra"),
    (DUNEFSKY, {"W_enc": torch.zeros(N, D)}, "d_in"),
    (DUNEFSKY, {"b_dec": torch.zeros(D + 1)}, "b_in"),
    (DUNEFSKY, {"W_dec": [1, 2]}, "list"),
    (PRISMA, {"b_enc": None}, "b_enc"),
    (PRISMA, {"extra": torch.zeros(2)}, "extra"),
    (PRISMA, {"b_dec_out": torch.zeros(D)}, "is_transcoder"),
    (PRISMA, {"b_gate": torch.zeros(N)}, "b_gate"),
    (PRISMA, {"W_skip": torch.zeros(D, D)}, "normalisation"),
    (PRISMA, {"W_enc": torch.zeros(N, D)}, "d_in"),
]


@pytest.mark.parametrize(("origin", "changes", "said"), CHANGED, ids=lambda value: str(value)[:30])
def test_missing_unknown_and_misshapen_tensors_are_named(origin, changes, said, tmp_path):
    refused(write(origin, tmp_path, **changes), FormatError, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation": "relu"}, "relu"),
        ({"activation": 3}, "3"),
        ({"k": 0}, "k is 0"),
        ({"k": 1.5}, "k is 1.5"),
        ({"k": True}, "k is True"),
        ({"k": None}, "k is None"),
        ({"d_in": "6"}, "d_in"),
        ({"transcode": "yes"}, "transcode"),
        ({"signed": 1}, "signed"),
        ({"signed": True, "activation": "groupmax"}, "signed"),
        ({"num_latents": 0, "expansion_factor": 0}, "expansion_factor"),
        ({"num_latents": "many"}, "num_latents"),
        ({"skip_connection": True}, "W_skip"),
    ],
    ids=str,
)
def test_values_of_sparsifys_config_that_decide_arithmetic_must_be_known(change, said, tmp_path):
    path = write(SAE, tmp_path)
    (path / "cfg.json").write_text(json.dumps(sparsify.FULL | change))
    refused(path, FormatError, said)


def test_k_larger_than_the_number_of_latents_is_refused(tmp_path):
    path = write(SAE, tmp_path)
    (path / "cfg.json").write_text(json.dumps(sparsify.FULL | {"k": N + 1}))
    refused(path, SaezooError, "more than d_sae")


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"dict_class": "Transformer"}, "Transformer"),
        ({"dict_class": ["a"]}, "dict_class"),
        ({"activation_dim": 7}, "activation_dim"),
        ({"dict_size": 25}, "dict_size"),
        ({"dict_class": "AutoEncoder"}, "bias"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_its_tensors_is_refused(trainer, said, tmp_path):
    path = write(GATED, tmp_path)
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"trainer": data["trainer"] | trainer}))
    refused(path, FormatError, said)


@pytest.mark.parametrize("content", ["[]", "{", '{"trainer": 3}', '{"buffer": []}{', "\xff"])
def test_a_broken_config_of_dictionary_learning_is_refused(content, tmp_path):
    path = write(GATED, tmp_path)
    (path / "config.json").write_bytes(content.encode("latin-1"))
    refused(path, FormatError, "config.json")


@pytest.mark.parametrize(
    ("activation", "state", "said"),
    [
        ("Tanh", {}, "Tanh"),
        ("Identity", {}, "Identity"),
        (None, {}, "None"),
        ("TopK", {}, "k is None"),
        ("TopK", {"k": -3}, "k is -3"),
        ("TopK", {"k": 3, "postact_fn": "Tanh"}, "Tanh"),
    ],
)
def test_activations_that_openais_code_does_not_have_are_refused(activation, state, said, tmp_path):
    tensors = TOPK.tensors(torch.Generator().manual_seed(0))
    refused(openai.writer(activation, **state)(tmp_path, tensors), FormatError, said)


@pytest.mark.parametrize("fact", [{"d_in": 7}, {"d_sae": 25}, {"k": 4}], ids=str)
@pytest.mark.parametrize("origin", [SAE, TOPK, TIED, QWEN, LAYERS, CAMBRIAN, TRACED], ids=str)
def test_a_file_that_contradicts_the_registry_is_refused(origin, fact, tmp_path):
    path = write(origin, tmp_path)
    with pytest.raises(FormatError, match="registry states"):
        format_module(origin.format).read(path, Entry(source=str(path), **fact))


class Bomb:
    """Unpickled by the trusting, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("origin", PICKLED, ids=str)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_none(origin, old, tmp_path):
    path = write(origin, tmp_path)
    file = next(path.glob("*.pt")) if path.is_dir() else path
    torch.save({"bias": Bomb(tmp_path / "run")}, file, _use_new_zipfile_serialization=not old)
    refused(path, UnsafeFile, "more than tensors", format=origin.format)
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "run")))
    refused(path, FormatError, file.name)
    assert not (tmp_path / "run").exists()


def test_a_tensor_that_shows_one_number_a_thousand_times_is_refused(tmp_path):
    path = write(TOPK, tmp_path, **{"encoder.weight": torch.zeros(1).expand(N, D)})
    refused(path, UnsafeFile, "claims")


def test_an_archive_that_deflates_a_hundredfold_is_refused_unread(tmp_path):
    path = write(GATED, tmp_path)
    torch.save({"bias": torch.zeros(20_000_000)}, path / "ae.pt")
    with (
        zipfile.ZipFile(path / "ae.pt") as plain,
        zipfile.ZipFile(path / "small", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for member in plain.infolist():
            small.writestr(member.filename, plain.read(member))
    (path / "small").rename(path / "ae.pt")
    assert (path / "ae.pt").stat().st_size < 1_000_000
    refused(path, UnsafeFile, "deflates")


def test_an_archive_that_says_it_holds_terabytes_is_refused_unread(tmp_path):
    path = write(GATED, tmp_path)
    raw = bytearray((path / "ae.pt").read_bytes())
    place = raw.index(b"PK\x01\x02") + 24
    raw[place : place + 4] = struct.pack("<I", 0xFFFFFFF0)
    (path / "ae.pt").write_bytes(bytes(raw))
    refused(path, FormatError, "ae.pt")


@pytest.mark.parametrize("origin", [*PICKLED, *MAPPED], ids=str)
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.97])
def test_a_file_cut_short_is_not_taken_for_whole(origin, keep, tmp_path):
    path = write(origin, tmp_path)
    weights = [*path.rglob("*.pt"), *path.rglob("*.safetensors")]
    file = path if path.is_file() else weights[0]
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep)])
    refused(path, FormatError, file.name)


@pytest.mark.parametrize("origin", [*PICKLED, *MAPPED], ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_a_saezoo_error_or_a_module_of_sound_shapes(
    origin, data, tmp_path_factory
):
    path = write(origin, tmp_path_factory.mktemp("fuzz"))
    folder = path.parent if path.is_file() else path
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    file = data.draw(st.sampled_from(files))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(raw) - 1))
        length = data.draw(st.integers(1, 20))
        raw[place : place + length] = data.draw(st.binary(max_size=20))
        if not raw:
            break
    file.write_bytes(bytes(raw))
    said = ""
    try:
        sae = load_sae(path, format=origin.format)
    except SaezooError as error:
        said = str(error)
    else:
        assert sae.W_enc.shape == (sae.d_in, sae.d_sae)
    assert "\n" not in said


def test_a_folder_of_no_known_format_says_what_was_looked_for(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(FormatError) as caught:
        detect(tmp_path)
    for looked in (
        "config.json + sae.safetensors (native)",
        "cfg.json + sae.safetensors (sparsify)",
        "ae.pt",
    ):
        assert looked in str(caught.value)
    with pytest.raises(FormatError, match=r"\*\.pt \(openai\)"):
        detect(tmp_path / "model.bin")
    with pytest.raises(MissingFile):
        detect(tmp_path / "nothing")


def test_a_format_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    refused(write(SAE, tmp_path), FormatError, "native, openai, sparsify", format="nonsense")


def test_files_of_another_format_than_the_one_named_are_refused(tmp_path):
    refused(write(SAE, tmp_path), SaezooError, "native", format="native")
    refused(write(TOPK, tmp_path / "b"), FormatError, "bias", format="dictionary_learning")


def test_extra_dimensions_of_one_are_no_matrix(tmp_path):
    path = write(SAE, tmp_path)
    tensors = SAE.tensors(torch.Generator().manual_seed(0))
    save_file(tensors | {"W_dec": tensors["W_dec"].unsqueeze(0)}, path / "sae.safetensors")
    refused(path, FormatError, "2 dimensions")
