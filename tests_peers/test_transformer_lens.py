"""TransformerBridge, of 3.9 and of 4.3: the tensors of their hooks are those of the plain
HuggingFace model, and SAEs attach to both alike.
"""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from saezoo.attaching import attach
from saezoo.capture import activations, capture
from saezoo.config import SAEConfig, Site
from saezoo.errors import CaptureError
from saezoo.guard import compare_host
from saezoo.numerics import close
from saezoo.sae import build_sae
from saezoo.sites import run_model
from saezoo.steering import steer
from tests.hosts import HOSTS, VOCABULARY, D, make_host, make_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale:UserWarning"),
]
MODELS = {
    "gpt2": "gpt2",
    "neox": "EleutherAI/pythia-70m",
    "llama": "meta-llama/Llama-3.2-1B",
    "qwen3": "Qwen/Qwen3-0.6B",
    "gemma2": "google/gemma-2-2b",
    "gemma3": "google/gemma-3-270m",
}
"""Names under which the bridge builds such a model; nothing of theirs is loaded."""
POINTS = [
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_z",
    "attn_out",
    "mlp_in",
    "mlp_act",
    "mlp_out",
]
SITES = {point: Site(layer=1, point=point) for point in POINTS} | {
    "mlp_in, no gain": Site(layer=1, point="mlp_in", rms_gain=False),
    "attn_in, no gain": Site(layer=1, point="attn_in", rms_gain=False),
    "centred": Site(layer=1, point="resid_post", centred=True),
}


def make_tokenizer():
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words["<unk>"] = words.pop(f"w{VOCABULARY - 1}")
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", name_or_path="tiny", add_bos_token=True, **names
    )


def make_bridge(name):
    model = make_host(name)
    model.config.architectures = [type(model).__name__]
    return TransformerBridge.boot_transformers(
        MODELS[name], hf_model=model, device="cpu", tokenizer=make_tokenizer()
    )


@pytest.fixture(scope="module", params=HOSTS)
def both(request):
    """The plain model, and the bridge around another of the same weights."""
    return make_host(request.param), make_bridge(request.param)


def places(model):
    """The sites that a model of this architecture has."""
    parallel = "NeoX" in type(model).__name__  # attention and MLP read the same: no resid_mid
    return {key: SITES[key] for key in SITES if not (parallel and key == "resid_mid")}


def make_sae(site, seed=0, **spec):
    facts = {"architecture": "topk", "k": 4, "d_in": D, "d_sae": 24, "site": site} | spec
    cfg = SAEConfig.from_json(facts)
    generator = torch.Generator().manual_seed(seed)
    shapes = cfg.tensor_shapes().items()
    return build_sae(cfg, {key: torch.randn(shape, generator=generator) for key, shape in shapes})


def check_alike(plain, lens):
    """At every site both have the same tensor, and go on alike with the reconstruction of it."""
    ids = make_ids()
    for name, site in places(plain).items():
        x = capture(plain, site, ids)
        assert close(capture(lens, site, ids), x), name
        sae = make_sae(site, d_in=x.shape[-1])
        with attach(plain, sae, store=("x_hat",)) as run:
            expected = run_model(plain, ids)
        with attach(lens, sae, store=("x_hat",)) as lens_run:
            got = run_model(lens, ids)
        assert close(got.log_softmax(-1), expected.log_softmax(-1)), name
        assert close(lens_run.x_hat, run.x_hat), name
    assert not any("saezoo" in str(hook) for m in lens.modules() for hook in hooks(m))


def hooks(module):
    tables = (module._forward_hooks, module._forward_pre_hooks)
    return [hook.__module__ for table in tables for hook in table.values() if callable(hook)]


def test_a_bridge_has_the_tensors_of_the_model_it_wraps_and_goes_on_alike(both):
    check_alike(*both)


def test_a_transcoder_reads_its_input_and_writes_its_output_with_its_skip(both):
    plain, bridge = both
    ids, site = make_ids(), Site(layer=1, point="mlp_in")
    out = {"layer": 1, "point": "mlp_out"}
    for rms_gain in (None, False):
        site = Site(layer=1, point="mlp_in", rms_gain=rms_gain)
        sae = make_sae(site, architecture="relu", k=None, skip=True, out_site=out)
        x = capture(plain, site, ids)
        seen = []
        with attach(bridge, sae, store=("x",)) as run:
            hook = bridge.hook_dict["blocks.1.hook_mlp_out"]
            handle = hook.register_forward_hook(lambda _m, _a, value: seen.append(value))  # noqa: B023
            run_model(bridge, ids)
            handle.remove()
        assert close(run.x, x)
        assert close(seen[0], sae(x))
        assert not close(sae(x), sae.decode(sae.encode(x)))


def test_hook_names_alone_are_enough(both):
    plain, bridge = both
    for hook in ("hook_resid_pre", "hook_resid_post", "attn.hook_z", "ln2.hook_normalized"):
        site, ids = Site(hook_name=f"blocks.1.{hook}"), make_ids()
        assert close(capture(bridge, site, ids), capture(plain, site, ids))


def test_generate_is_one_pass_for_each_token(both):
    plain, bridge = both
    ids, sae = make_ids(), make_sae(SITES["resid_post"])
    stack = {"max_new_tokens": 4, "do_sample": False}
    with attach(plain, sae):
        mask = torch.ones_like(ids)
        expected = plain.generate(ids, attention_mask=mask, eos_token_id=None, **stack)
    options = {"stop_at_eos": False, "verbose": False}
    # a bridge's own cache gives other tokens than its model from some architectures on, SAE or not
    with attach(bridge, sae, keep="all") as run:
        got = bridge.generate(ids, use_past_kv_cache=False, **stack, **options)
    assert torch.equal(got, expected)
    assert [len(p[0].features.values[0]) for p in run.passes] == [9, 10, 11, 12]
    with attach(bridge, sae, keep="all") as run:
        bridge.generate(ids, use_past_kv_cache=True, **stack, **options)
    assert [len(p[0].features.values[0]) for p in run.passes] == [9, 1, 1, 1]


def test_a_bridge_in_compatibility_mode_is_seen_to_be_centred():
    bridge = make_bridge("gpt2")
    cfg = make_sae(SITES["resid_post"]).cfg
    assert not any("centred" in item.what for item in compare_host(bridge, cfg))
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert any("centred" in item.what for item in compare_host(bridge, cfg))
    site, ids = Site(layer=1, point="resid_post", centred=True), make_ids()
    assert close(capture(bridge, site, ids), capture(make_host("gpt2"), site, ids))


@pytest.mark.parametrize(
    ("hook", "flag"),
    [("hook_mlp_in", "use_hook_mlp_in"), ("hook_attn_in", "use_attn_in")],
)
def test_a_hook_that_a_flag_keeps_silent_is_an_error_that_names_it(hook, flag):
    bridge, sae = make_bridge("gpt2"), make_sae(Site(hook_name=f"blocks.1.{hook}"))
    with pytest.raises(CaptureError, match=f"{hook} stays silent unless .*cfg.{flag}"):
        attach(bridge, sae, "observe").__enter__()
    getattr(bridge, f"set_{flag}")(True)
    with attach(bridge, sae, "observe", store=("x",)) as run:
        run_model(bridge, make_ids())
    assert run.x.shape[:2] == (2, 9)


def test_what_is_not_there_is_one_clear_line(both):
    bridge = both[1]
    for site, said in (
        (Site(hook_name="blocks.1.hook_resid_poost"), "Closest: blocks.1.hook_resid_post"),
        (Site(layer=9, point="resid_post"), "3 layers, 0 to 2: no layer 9"),
        (Site(module="model.layers.1"), "names no hook of TransformerLens"),
    ):
        with pytest.raises(CaptureError, match=said):
            attach(bridge, make_sae(site)).__enter__()


def test_what_an_observer_sees_is_what_the_cache_holds(both):
    bridge, sae = both[1], make_sae(SITES["resid_post"])
    with attach(bridge, sae, "observe", store=("features", "x")) as run:
        _, cache = bridge.run_with_cache(make_ids())
    assert torch.equal(cache["blocks.1.hook_resid_post"], run.x)
    assert torch.equal(run.features.to_dense(), sae.encode(run.x))


def test_a_bridge_is_steered_as_its_model_and_left_alone_bit_for_bit(both):
    plain, bridge = both
    ids = make_ids()
    with torch.no_grad():
        clean = run_model(bridge, ids)
        for name, site in places(plain).items():
            sae = make_sae(site, d_in=capture(plain, site, ids).shape[-1])
            with steer(bridge, sae, dict.fromkeys(range(24), 1.0), "scale"):
                assert torch.equal(run_model(bridge, ids), clean), name
            with steer(bridge, sae, {3: 2.0}, unit="raw"):
                got = run_model(bridge, ids)
            with steer(plain, sae, {3: 2.0}, unit="raw"):
                expected = run_model(plain, ids)
            assert close(got.log_softmax(-1), expected.log_softmax(-1)), name
            assert not torch.equal(got, clean), name


def test_activations_stream_from_a_bridge_as_from_its_model(both):
    plain, bridge = both
    texts, site = ["w3 w4 w5 w6", "w7 w8"], SITES["resid_post"]
    got, expected = (
        torch.cat([batch.x for batch in activations(model, make_tokenizer(), texts, site)])
        for model in (bridge, plain)
    )
    assert close(got, expected)
    assert len(got) == 4
