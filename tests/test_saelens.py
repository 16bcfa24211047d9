"""SAELens beyond what tests/origins/saelens.py can say: factors of the registry, sites, refusals,
and writing.
"""

import json
import logging

import pytest
import torch

from saezoo.capture import capture, find_module
from saezoo.config import SAEConfig, Site
from saezoo.convert import convert_sae
from saezoo.entry import Entry
from saezoo.errors import CannotConvert, FormatError, SaezooError
from saezoo.formats import saelens as saelens_format
from saezoo.formats._hooks import POINTS, canonical_model, site_of_hook
from saezoo.load import load_sae
from saezoo.numerics import TOLERANCE, close, largest_difference
from saezoo.sae import build_sae
from saezoo.save import save_sae
from tests.origins import saelens
from tests.origins._origin import D, K, N, draw

FACTOR = 1.75


def write(folder, cfg, kind="relu", drop=(), **more):
    tensors = saelens.tensors(kind, **more)(torch.Generator().manual_seed(0))
    kept = {key: value for key, value in tensors.items() if key not in drop}
    return saelens.writer(cfg)(folder, kept), kept


def read(path, **facts):
    weights = saelens_format.read(path, Entry(source=str(path), **facts))
    return build_sae(weights.cfg, weights.tensors)


def refused(path, said, error=FormatError):
    with pytest.raises(error) as caught:
        load_sae(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def inputs(seed=7):
    return torch.randn(64, D, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def folded(t):
    """fold_activation_norm_scaling_factor of saes/sae.py."""
    return t | {
        "W_enc": t["W_enc"] * FACTOR,
        "W_dec": t["W_dec"] / FACTOR,
        "b_dec": t["b_dec"] / FACTOR,
    }


AVERAGE = {"normalize_activations": "expected_average_only_in"}
FOLDED = {
    "standard": ({}, "relu", {}),
    "topk": ({"architecture": "topk", "k": K}, "relu", {"act": "topk"}),
    "topk, rescaled": (
        {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
        "relu",
        {"act": "topk", "rescale": True},
    ),
    "gated": ({"architecture": "gated"}, "gated", {"act": "gated"}),
    "jumprelu": ({"architecture": "jumprelu"}, "jumprelu", {"act": "jumprelu"}),
}


@pytest.mark.parametrize(("changes", "kind", "how"), FOLDED.values(), ids=FOLDED)
def test_the_registrys_factor_is_folded_into_both_matrices_and_b_dec(changes, kind, how, tmp_path):
    path, t = write(tmp_path, saelens.SIX | AVERAGE | changes, kind)
    sae, x = read(path, norm_scaling_factor=FACTOR), inputs()
    assert close(sae.encode(x), saelens.encode(folded(t), x, **how))
    assert close(sae(x), saelens.forward(folded(t), x, **how))
    for forgotten in (set(t), {"W_dec"}, {"b_dec"}):
        mistake = folded(t) | {key: t[key] for key in forgotten}
        difference = largest_difference(saelens.forward(mistake, x, **how), sae(x))
        assert difference > 100 * TOLERANCE[torch.float32]


def test_the_folded_sae_is_the_unfolded_one_on_scaled_activations(tmp_path):
    path, t = write(tmp_path, saelens.SIX | AVERAGE)
    x = inputs()
    sae = read(path, norm_scaling_factor=FACTOR)
    assert close(sae.encode(x), saelens.encode(t, x * FACTOR))
    assert close(sae(x), saelens.forward(t, x * FACTOR) / FACTOR)


def test_a_bfloat16_file_is_folded_in_float32(tmp_path):
    path, t = write(tmp_path, saelens.SIX | AVERAGE, dtype=torch.bfloat16)
    wide = {key: value.float() for key, value in t.items()}
    sae = read(path, norm_scaling_factor=FACTOR)
    assert sae.dtype == torch.float32
    assert close(sae(inputs()), saelens.forward(folded(wide), inputs()))


@pytest.mark.parametrize(
    "cfg",
    [
        saelens.SIX | AVERAGE,
        saelens.OLD | AVERAGE,
        saelens.OLDEST | {"normalize_activations": True},
    ],
    ids=["6", "2024", "oldest"],
)
def test_without_the_registrys_factor_it_is_refused(cfg, tmp_path):
    path, _ = write(tmp_path, cfg)
    refused(path, "norm_scaling_factor")
    assert read(path, norm_scaling_factor=FACTOR).cfg.input_norm is None
    with pytest.raises(FormatError, match="norm_scaling_factor, which is -1"):
        read(path, norm_scaling_factor=-1)


def test_a_factor_is_not_folded_where_the_file_does_not_ask_for_it(tmp_path, caplog):
    path, t = write(tmp_path, saelens.SIX)
    with caplog.at_level(logging.INFO, logger="saezoo"):
        sae = read(path, norm_scaling_factor=FACTOR)
    assert close(sae(inputs()), saelens.forward(t, inputs()))
    assert "no factor is folded" in caplog.text


def test_a_transcoder_may_write_another_width(tmp_path):
    wide = {"W_dec": lambda g: draw(g, N, 9), "b_dec": lambda g: draw(g, 9)}
    cfg = saelens.TRANSCODER | {"architecture": "skip_transcoder", "d_out": 9}
    path, t = write(tmp_path, cfg, W_skip=lambda g: draw(g, 9, D), **wide)
    x = inputs()
    acts = torch.relu(x @ t["W_enc"] + t["b_enc"])
    sae = load_sae(path)
    assert close(sae.encode(x), acts)
    assert close(sae(x), acts @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T)
    assert sae.cfg.is_transcoder


SIX_REFUSED = [
    ({"architecture": "matching_pursuit"}, "'matching_pursuit'"),
    ({"architecture": "temporal"}, "'temporal'"),
    ({"architecture": "batchtopk"}, "save_inference_model"),
    ({"architecture": "matryoshka_batchtopk"}, "save_inference_model"),
    ({"architecture": "crosscoder"}, "there are standard, gated"),
    ({"architecture": None}, "None"),
    ({"architecture": ["topk"]}, "['topk']"),
    ({"architecture": "topk"}, "k is None"),
    ({"architecture": "topk", "k": 0}, "k is 0"),
    ({"architecture": "topk", "k": 2.5}, "k is 2.5"),
    ({"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": 1}, "rescale_acts"),
    ({"architecture": "topk", "k": K, "activation_fn": "relu"}, "contradicts"),
    ({"activation_fn": "topk", "activation_fn_kwargs": {"k": K}}, "contradicts"),
    ({"activation_fn": "tanh-relu"}, "tanh-relu"),
    ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
    ({"normalize_activations": "constant_scalar_rescale"}, "constant_scalar_rescale"),
    ({"normalize_activations": True}, "normalize_activations True"),
    ({"normalize_activations": ["none"]}, "normalize_activations ['none']"),
    ({"reshape_activations": "hook_q"}, "hook_q"),
    ({"reshape_activations": "hook_z"}, "contradicts hook_name"),
    ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input"),
    ({"d_in": "6"}, "d_in"),
    ({"d_sae": None}, "d_sae"),
    ({"d_sae": N + 1}, "expected"),
    ({"metadata": [1]}, "metadata"),
    ({"metadata": {"sae_lens_version": "newest"}}, "newest"),
    ({"architecture": "transcoder"}, "d_out"),
    ({"architecture": "transcoder", "d_out": D}, "apply_b_dec_to_input must be false"),
    (
        {
            "architecture": "transcoder",
            "d_out": D,
            "apply_b_dec_to_input": False,
            "normalize_activations": "layer_norm",
        },
        "of a transcoder",
    ),
    ({"architecture": "skip_transcoder", "d_out": D, "apply_b_dec_to_input": False}, "W_skip"),
    ({"architecture": "jumprelu"}, "threshold"),
    ({"architecture": "gated"}, "b_gate"),
]


@pytest.mark.parametrize(("change", "said"), SIX_REFUSED, ids=str)
def test_values_that_decide_arithmetic_must_be_known(change, said, tmp_path):
    path, _ = write(tmp_path, saelens.SIX | change)
    refused(path, said)


OLD_REFUSED = [
    ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, "k is None"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": None}, "k is None"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K, "postact_fn": "Tanh"}}, "Tanh"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "k": 5}, "k is 5"),
    (
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "gated"},
        "contradicts",
    ),
    ({"architecture": "topk", "k": K}, "contradicts"),  # with activation_fn_str relu
    ({"normalize_activations": "whitening"}, "whitening"),
]


@pytest.mark.parametrize(("change", "said"), OLD_REFUSED, ids=str)
def test_and_in_the_keys_of_before_version_6(change, said, tmp_path):
    path, _ = write(tmp_path, saelens.OLD | change)
    refused(path, said)


TENSORS_REFUSED = [
    ("relu", {"extra": lambda _: torch.zeros(2)}, (), "extra"),
    ("relu", {}, ("b_dec",), "b_dec"),
    ("relu", {"W_enc": lambda _: torch.zeros(N, D)}, (), "expected"),
    ("relu", {"W_dec": lambda _: torch.zeros(D, N)}, (), "expected"),
    ("relu", {"W_enc": lambda _: torch.zeros(D * N)}, (), "2 dimensions"),
    ("jumprelu", {}, (), "threshold"),
    ("log_threshold", {}, (), "log_threshold"),
    ("relu", {"W_skip": lambda _: torch.zeros(D, D)}, (), "W_skip"),
    ("relu", {"scaling_factor": lambda _: torch.full((N,), 2.0)}, (), "finetuning_scaling_factor"),
    ("relu", {"scaling_factor": lambda _: torch.ones(N, 1)}, (), "1 dimensions"),
]


@pytest.mark.parametrize(("kind", "more", "drop", "said"), TENSORS_REFUSED)
@pytest.mark.parametrize("cfg", [saelens.SIX, saelens.OLD], ids=["6", "2024"])
def test_missing_unknown_and_misshapen_tensors_are_named(cfg, kind, more, drop, said, tmp_path):
    path, _ = write(tmp_path, cfg, kind, drop, **more)
    refused(path, said)


def test_two_thresholds_are_one_too_many(tmp_path):
    cfg = saelens.SIX | {"architecture": "jumprelu"}
    path, _ = write(tmp_path, cfg, "jumprelu", log_threshold=lambda _: torch.zeros(N))
    refused(path, "log_threshold")


def test_a_scaling_factor_of_another_length_is_refused(tmp_path):
    path, _ = write(
        tmp_path,
        saelens.OLD | {"finetuning_scaling_factor": True},
        scaling_factor=lambda _: torch.full((D,), 2.0),
    )
    refused(path, "scaling_factor")


@pytest.mark.parametrize("content", ["[]", "{", '{"architecture": 3}', "\xff"])
def test_a_broken_config_is_refused(content, tmp_path):
    path, _ = write(tmp_path, saelens.SIX)
    (path / "cfg.json").write_bytes(content.encode("latin-1"))
    refused(path, "cfg.json")


WEIRD = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    "",
    "9" * 5000,
    "blocks." + "9" * 5000 + ".x",
    [],
    [[]],
    {},
]


BASES = {"6": saelens.SIX, "2024": saelens.OLD, "transcoder": saelens.TRANSCODER}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_any_value_of_any_key_is_read_or_refused_in_one_line(base, tmp_path):
    path, _ = write(tmp_path, base)
    keys = [*base, "k", "activation_fn", "activation_fn_kwargs", "sae_lens_version", "hook_point"]
    inner = [*saelens.SIX["metadata"], "hf_hook_name", "hook_layer", "hook_name_out"]
    changed = [base | {key: value} for key in keys for value in WEIRD]
    changed += [base | {"metadata": {key: value}} for key in inner for value in WEIRD]
    changed += [
        base | {"sae_lens_version": "5.0.0", key: value} for key in inner for value in WEIRD
    ]
    said = []
    for data in changed:
        (path / "cfg.json").write_text(json.dumps(data))
        try:
            load_sae(path)
        except SaezooError as error:
            said.append(str(error))
    assert 10 < len(said) < len(changed)
    assert all(str(path) in text and "\n" not in text for text in said)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.97])
def test_a_file_cut_short_is_not_taken_for_whole(keep, tmp_path):
    path, _ = write(tmp_path, saelens.SIX)
    file = path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    refused(path, file.name)


@pytest.mark.parametrize("fact", [{"d_in": 7}, {"d_sae": 25}, {"k": 4}], ids=str)
def test_a_file_that_contradicts_the_registry_is_refused(fact, tmp_path):
    path, _ = write(tmp_path, saelens.SIX | {"architecture": "topk", "k": K})
    with pytest.raises(FormatError, match="registry states"):
        read(path, **fact)


def test_unknown_keys_are_logged_once(tmp_path, caplog):
    path, _ = write(tmp_path, saelens.SIX | {"new_key": 1, "another": 2})
    with caplog.at_level(logging.INFO, logger="saezoo"):
        load_sae(path)
    told = [record.getMessage() for record in caplog.records if "new_key" in record.getMessage()]
    assert len(told) == 1
    assert "another" in told[0]


def test_the_matrices_stay_views_of_the_file(tmp_path):
    path, _ = write(tmp_path, saelens.TRANSCODER | {"architecture": "skip_transcoder"}, skip=True)
    tensors = saelens_format.read(path, None).tensors
    assert all(tensors[name].T.is_contiguous() for name in ("W_enc_rows", "W_skip"))
    assert tensors["W_dec"].is_contiguous()


HOOKS = [
    # hook, model -> layer, point, module, side
    ("blocks.8.hook_resid_pre", "gpt2-small", 8, "resid_pre", "transformer.h.8", "input"),
    ("blocks.8.hook_resid_mid", "gpt2-small", 8, "resid_mid", "transformer.h.8.ln_2", "input"),
    ("blocks.8.hook_resid_post", "gpt2", 8, "resid_post", "transformer.h.8", "output"),
    ("blocks.5.attn.hook_z", "gpt2-small", 5, "attn_z", "transformer.h.5.attn.c_proj", "input"),
    ("blocks.5.hook_attn_out", "gpt2-xl", 5, "attn_out", "transformer.h.5.attn", "output"),
    ("blocks.5.hook_mlp_out", "distilgpt2", 5, "mlp_out", "transformer.h.5.mlp", "output"),
    ("hook_embed", "gpt2", None, "embed", "transformer.wte", "output"),
    ("blocks.3.hook_mlp_out", "pythia-70m", 3, "mlp_out", "gpt_neox.layers.3.mlp", "output"),
    (
        "blocks.3.attn.hook_z",
        "EleutherAI/pythia-70m-deduped",
        3,
        "attn_z",
        "gpt_neox.layers.3.attention.dense",
        "input",
    ),
    ("blocks.3.hook_resid_mid", "pythia-70m", 3, "resid_mid", None, "output"),
    ("blocks.6.hook_resid_post", "gemma-2b-it", 6, "resid_post", "model.layers.6", "output"),
    ("blocks.6.hook_mlp_out", "gemma-2b", 6, "mlp_out", "model.layers.6.mlp", "output"),
    (
        "blocks.6.hook_mlp_out",
        "google/gemma-2-9b",
        6,
        "mlp_out",
        "model.layers.6.post_feedforward_layernorm",
        "output",
    ),
    (
        "blocks.6.hook_attn_out",
        "google/gemma-3-1b-pt",
        6,
        "attn_out",
        "model.layers.6.post_attention_layernorm",
        "output",
    ),
    ("blocks.6.hook_resid_post", "google/gemma-3-4b-pt", 6, "resid_post", None, "output"),
    ("hook_embed", "google/gemma-2-2b", None, "embed", None, "output"),
    ("blocks.8.hook_resid_pre", "mistral-7b", 8, "resid_pre", "model.layers.8", "input"),
    (
        "blocks.25.attn.hook_z",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        25,
        "attn_z",
        "model.layers.25.self_attn.o_proj",
        "input",
    ),
    (
        "blocks.2.mlp.hook_in",
        "meta-llama/Llama-3.2-1B",
        2,
        "mlp_in",
        "model.layers.2.mlp",
        "input",
    ),
    (
        "blocks.2.mlp.hook_post",
        "Qwen/Qwen3-1.7B",
        2,
        "mlp_act",
        "model.layers.2.mlp.down_proj",
        "input",
    ),
    ("blocks.2.hook_resid_post", "Qwen/Qwen3-30B-A3B", 2, "resid_post", None, "output"),
    (
        "blocks.2.hook_resid_post",
        "meta-llama/Llama-3.2-11B-Vision",
        2,
        "resid_post",
        None,
        "output",
    ),
    ("blocks.2.hook_mlp_in", "google/gemma-2-2b", 2, "mlp_in", None, "output"),
    ("blocks.2.ln2.hook_normalized", "google/gemma-2-2b", 2, "mlp_in", None, "output"),
    ("blocks.2.attn.hook_q", "gpt2", 2, None, None, "output"),
    ("blocks.2.hook_resid_post", "somebody/some-model", 2, "resid_post", None, "output"),
    ("blocks.2.hook_resid_post", None, 2, "resid_post", None, "output"),
    ("no.such.hook", "gpt2", None, None, None, "output"),
    ("model.layers.9", "somebody/some-model", 9, "resid_post", "model.layers.9", "output"),
    ("model.layers.9.mlp", None, 9, None, "model.layers.9.mlp", "output"),
]


@pytest.mark.parametrize(("hook", "model", "layer", "point", "module", "side"), HOOKS)
def test_the_site_of_a_hook_is_what_is_known_of_the_host(hook, model, layer, point, module, side):
    site = site_of_hook(hook, model)
    assert (site.layer, site.point, site.module, site.side) == (layer, point, module, side)
    assert site.model == canonical_model(model)
    if hook.startswith(("blocks.", "hook_", "no.")):
        assert site.hook_name == hook


FAMILIES = {
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "EleutherAI/pythia-70m": ("GPTNeoX", {}),
    "meta-llama/Meta-Llama-3-8B": ("Llama", {"num_key_value_heads": 1}),
    "mistral-7b": ("Mistral", {"num_key_value_heads": 1}),
    "Qwen/Qwen2.5-0.5B": ("Qwen2", {"num_key_value_heads": 1}),
    "Qwen/Qwen3-0.6B": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma-2b": ("Gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma-2-2b": ("Gemma2", {"num_key_value_heads": 1, "head_dim": 8}),
    "google/gemma-3-1b-pt": ("Gemma3Text", {"num_key_value_heads": 1, "head_dim": 8}),
}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(params=FAMILIES, ids=str)
def seen(request):
    """What passes each hook's module in a tiny random model of the host's family, and the model."""
    transformers = pytest.importorskip("transformers")
    family, own = FAMILIES[request.param]
    small = {key: SMALL[key] for key in SMALL if family != "GPT2" or "token" in key}
    config = getattr(transformers, f"{family}Config")(**small | own | {"vocab_size": 40})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for value in model.parameters():
        value.data.normal_(0, 0.3)
    ids = torch.arange(3, 13).view(1, -1)
    sites = {hook: site_of_hook(f"blocks.1.{hook}", request.param) for hook in POINTS}
    found = {hook: capture(model, site, ids) for hook, site in sites.items() if site.module}
    return model, found, sites


def test_the_modules_of_a_host_carry_what_its_hooks_carry(seen):
    """The residual stream adds up, and the products that follow attn.hook_z and mlp.hook_post give
    what the attention and the MLP add to it.
    """
    model, found, sites = seen
    pre, post = found["hook_resid_pre"], found["hook_resid_post"]
    after = {"hook_attn_out": "attn.hook_z", "hook_mlp_out": "mlp.hook_post"}
    for out, into in after.items():
        product = find_module(model, sites[into].module)(found[into])
        if "layernorm" in sites[out].module:
            product = find_module(model, sites[out].module)(product)
        assert close(product, found[out])
    mid = pre + found["hook_attn_out"]
    assert close(found.get("hook_resid_mid", mid), mid)
    assert close(mid + found["hook_mlp_out"], post)
    mlp = find_module(model, sites["mlp.hook_in"].module)(found["mlp.hook_in"])
    assert close(mlp, find_module(model, sites["mlp.hook_post"].module)(found["mlp.hook_post"]))


def test_what_is_normalised_but_has_no_gain_is_said_so():
    assert site_of_hook("blocks.2.ln2.hook_normalized", "google/gemma-2-2b").rms_gain is False
    assert site_of_hook("blocks.2.mlp.hook_in", "google/gemma-2-2b").rms_gain is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("attn-only-1l", None),
        (None, None),
    ],
)
def test_models_are_called_as_the_hub_calls_them(name, expected):
    assert canonical_model(name) == expected


def test_site_and_tokens_are_those_of_the_metadata(tmp_path):
    path, _ = write(tmp_path, saelens.SIX)
    cfg = load_sae(path).cfg
    assert cfg.site == Site(
        model="openai-community/gpt2",
        layer=8,
        point="resid_pre",
        module="transformer.h.8",
        side="input",
        hook_name="blocks.8.hook_resid_pre",
        centred=True,
    )
    assert cfg.tokens.to_json() == {"prepend_bos": False, "context": 128, "skip_special": False}


def test_the_oldest_keys_name_a_site_and_a_bos_too(tmp_path):
    path, _ = write(tmp_path, saelens.OLDEST)
    cfg = load_sae(path).cfg
    assert (cfg.site.layer, cfg.site.hook_name) == (8, "blocks.8.hook_resid_pre")
    assert cfg.tokens.to_json() == {"prepend_bos": True, "context": 128}


METADATA = [
    ({"seqpos_slice": [5, None]}, {"skip_first": 5}),
    ({"seqpos_slice": [5]}, {}),  # slice(5): the first five, not all but them
    ({"seqpos_slice": [-5, None]}, {}),
    ({"exclude_special_tokens": True}, {"skip_special": True}),
    ({"exclude_special_tokens": [0, 2]}, {}),
    ({"context_size": "128", "prepend_bos": "yes"}, {}),
    ({"context_size": True}, {}),
]


@pytest.mark.parametrize(("meta", "expected"), METADATA, ids=str)
def test_a_rule_on_tokens_is_taken_or_left_but_never_guessed(meta, expected, tmp_path):
    path, _ = write(tmp_path, saelens.SIX | {"metadata": {"sae_lens_version": "6.0.0"} | meta})
    cfg = load_sae(path).cfg
    assert (cfg.tokens.to_json() if cfg.tokens else {}) == expected
    assert cfg.site is None
    untold = {"seqpos_slice": [5]}, {"seqpos_slice": [-5, None]}, {"exclude_special_tokens": [0, 2]}
    assert cfg.notes == ({key: str(meta[key]) for key in meta} if meta in untold else None)


def test_an_sae_of_one_head_names_no_module(tmp_path):
    meta = saelens.HOOK_Z | {"hook_head_index": 7}
    path, _ = write(tmp_path, saelens.SIX | {"metadata": meta})
    cfg = load_sae(path).cfg
    assert (cfg.site.layer, cfg.site.point, cfg.site.module) == (5, None, None)
    assert cfg.notes["hook_head_index"] == "7"


def test_a_transcoder_has_a_site_to_write_to(tmp_path):
    path, _ = write(tmp_path, saelens.TRANSCODER | {"architecture": "transcoder"})
    cfg = load_sae(path).cfg
    assert (cfg.site.point, cfg.site.module) == ("mlp_in", None)
    assert (cfg.out_site.point, cfg.out_site.module) == ("mlp_out", "transformer.h.8.mlp")
    bare = saelens.TRANSCODER | {"metadata": {"sae_lens_version": "6.0.0"}}
    path, _ = write(tmp_path / "bare", bare | {"architecture": "transcoder"})
    assert load_sae(path).cfg.is_transcoder


def test_the_module_that_the_metadata_names_is_the_one(tmp_path):
    meta = {
        "sae_lens_version": "6.0.0",
        "model_name": "google/gemma-3-4b-pt",
        "hook_name": "blocks.9.hook_mlp_in",
        "hf_hook_name": "model.layers.9.pre_feedforward_layernorm.output",
    }
    path, _ = write(tmp_path, saelens.SIX | {"metadata": meta})
    site = load_sae(path).cfg.site
    assert (site.module, site.side) == ("model.layers.9.pre_feedforward_layernorm", "output")


def test_what_the_registry_says_of_the_site_wins(tmp_path):
    path, _ = write(tmp_path, saelens.SIX)
    site = read(path, site={"model": "google/gemma-2b", "centred": False}).cfg.site
    assert (site.model, site.module, site.side) == ("google/gemma-2b", "model.layers.8", "input")
    assert site.centred is False
    site = read(path, site={"module": "transformer.h.7", "layer": 7}).cfg.site
    assert (site.module, site.side, site.layer) == ("transformer.h.7", "output", 7)
    site = read(path, site={"hook_name": "blocks.2.hook_mlp_out"}).cfg.site
    assert (site.layer, site.point, site.module) == (2, "mlp_out", "transformer.h.2.mlp")


def tiny(**spec):
    cfg = SAEConfig.from_json({"d_in": D, "d_sae": N} | spec)
    generator = torch.Generator().manual_seed(0)
    shapes = cfg.tensor_shapes().items()
    return build_sae(cfg, {name: torch.randn(shape, generator=generator) for name, shape in shapes})


SITE = {"model": "openai-community/gpt2", "hook_name": "blocks.5.attn.hook_z", "layer": 5}
SITE |= {"point": "attn_z", "module": "transformer.h.5.attn.c_proj", "side": "input"}
OUT = {"model": "openai-community/gpt2", "hook_name": "blocks.5.hook_mlp_out", "layer": 5}
OUT |= {"point": "mlp_out", "module": "transformer.h.5.mlp"}
CAN = {
    "relu": {"architecture": "relu", "subtract_b_dec": True},
    "relu, site and tokens": {
        "architecture": "relu",
        "site": SITE | {"centred": True},
        "tokens": {"prepend_bos": True, "context": 64, "skip_first": 2, "skip_special": True},
        "notes": {"neuronpedia_id": "gpt2-small/5-att"},
    },
    "gated": {"architecture": "gated", "subtract_b_dec": True},
    "jumprelu": {"architecture": "jumprelu", "subtract_b_dec": True},
    "topk": {"architecture": "topk", "k": K, "subtract_b_dec": True},
    "topk, scaled": {"architecture": "topk", "k": K, "decoder_norm": "scale"},
    "signed": {"architecture": "topk", "k": K, "signed": True, "relu_after": False},
    "layer norm": {"architecture": "relu", "input_norm": {"kind": "layer_norm"}},
    "constant norm": {"architecture": "topk", "k": K, "input_norm": {"kind": "constant_norm"}},
    "transcoder": {"architecture": "relu", "d_out": 9, "out_site": OUT},
    "skip transcoder": {"architecture": "relu", "d_out": 9, "skip": True, "out_site": OUT},
    "jumprelu transcoder": {"architecture": "jumprelu", "out_site": OUT},
    "jumprelu skip transcoder": {"architecture": "jumprelu", "skip": True, "out_site": OUT},
}
CANNOT = {
    "groupmax": {"architecture": "groupmax", "k": K},
    "topk transcoder": {"architecture": "topk", "k": K, "skip": True},
    "topk without ReLU": {"architecture": "topk", "k": K, "relu_after": False},
    "jumprelu, no ReLU": {"architecture": "jumprelu", "relu_after": False},
    "ranked": {"architecture": "topk", "k": K, "decoder_norm": "rank"},
    "eps": {"architecture": "relu", "input_norm": {"kind": "layer_norm", "eps": 0.1}},
    "ddof": {"architecture": "relu", "input_norm": {"kind": "layer_norm", "ddof": 0}},
    "input bias": {"architecture": "relu", "input_bias": True},
    "transcoder minus b_dec": {"architecture": "relu", "skip": True, "subtract_b_dec": True},
    "transcoder, norm": {
        "architecture": "relu",
        "skip": True,
        "input_norm": {"kind": "constant_norm"},
    },
}


@pytest.mark.parametrize("spec", CAN.values(), ids=CAN)
def test_native_to_saelens_and_back_keeps_every_bit_and_every_fact(spec, tmp_path):
    sae = tiny(**spec)
    save_sae(sae, tmp_path / "a")
    proof = convert_sae(tmp_path / "a", tmp_path / "b", to="saelens")
    assert proof.difference <= TOLERANCE[torch.float32]
    assert "own formula" in proof.through
    again = load_sae(tmp_path / "b")
    assert all(torch.equal(value, getattr(again, name)) for name, value in sae.named_parameters())
    cfg = again.cfg.to_json()
    assert {key: cfg.get(key) for key in spec if key != "d_out"} == {
        key: value for key, value in sae.cfg.to_json().items() if key in spec and key != "d_out"
    }
    assert again.d_out == sae.d_out


@pytest.mark.parametrize("spec", CANNOT.values(), ids=CANNOT)
def test_what_saelens_cannot_express_is_refused_with_the_reason(spec, tmp_path):
    save_sae(tiny(**spec), tmp_path / "a")
    with pytest.raises(CannotConvert, match="SAELens cannot express"):
        convert_sae(tmp_path / "a", tmp_path / "b", to="saelens")
    assert not (tmp_path / "b").exists()


def test_a_scale_is_folded_when_written(tmp_path):
    sae = tiny(architecture="relu", subtract_b_dec=True, input_norm={"kind": "scale", "factor": 3})
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="saelens")
    again, x = load_sae(tmp_path / "b"), inputs()
    assert again.cfg.input_norm is None
    assert close(again.encode(x), sae.encode(x))
    assert close(again(x), sae(x))


def test_a_jumprelu_without_relu_is_written_where_its_thresholds_make_no_difference(tmp_path):
    sae = tiny(architecture="jumprelu", relu_after=False)
    sae.threshold.data = sae.threshold.data.abs()
    save_sae(sae, tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", to="saelens")
    assert torch.equal(load_sae(tmp_path / "b").encode(inputs()), sae.encode(inputs()))


@pytest.mark.parametrize("origin", saelens.ORIGINS, ids=str)
def test_what_was_read_can_be_written_again(origin, tmp_path):
    path = origin.write(tmp_path / "a", origin.tensors(torch.Generator().manual_seed(0)))
    proof = convert_sae(path, tmp_path / "b", to="saelens")
    assert proof.difference <= TOLERANCE[torch.float32]
    data = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert data["metadata"]["sae_lens_version"] >= "6"


def test_k_larger_than_the_number_of_latents_is_refused(tmp_path):
    path, _ = write(tmp_path, saelens.SIX | {"architecture": "topk", "k": N + 1})
    refused(path, "more than d_sae", SaezooError)
