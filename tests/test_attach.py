"""Attached SAEs on tiny models: the tensor that the model goes on with is sae(x), for every
architecture, host and site; and nothing is silent when it is not.
"""

import gc

import pytest
import torch

from saezoo.attaching import attach
from saezoo.capture import capture
from saezoo.config import SAEConfig, Site
from saezoo.errors import CaptureError, InputError
from saezoo.numerics import close
from saezoo.sae import build_sae
from saezoo.sites import find_module
from saezoo.sparse import SparseFeatures
from tests.hosts import HOSTS, MORE, D, make_host, make_ids

N = 24
ARCHITECTURES = {
    "relu": {"architecture": "relu", "subtract_b_dec": True},
    "topk": {"architecture": "topk", "k": 4},
    "topk signed": {"architecture": "topk", "k": 4, "signed": True, "relu_after": False},
    "topk rescaled": {"architecture": "topk", "k": 4, "decoder_norm": "scale"},
    "topk ranked": {"architecture": "topk", "k": 4, "decoder_norm": "rank"},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated", "subtract_b_dec": True},
    "groupmax": {"architecture": "groupmax", "k": 4},
    "layer_norm": {"architecture": "topk", "k": 4, "input_norm": {"kind": "layer_norm"}},
    "constant_norm": {"architecture": "relu", "input_norm": {"kind": "constant_norm"}},
    "scale": {"architecture": "relu", "input_norm": {"kind": "scale", "factor": 0.3}},
    "input_bias": {"architecture": "relu", "input_bias": True},
    "skip": {"architecture": "topk", "k": 4, "skip": True, "out_site": {"module": "x"}},
}
TRANSCODER = {"architecture": "relu", "skip": True}


def make_sae(spec, seed=0, **more):
    cfg = SAEConfig.from_json({"d_in": D, "d_sae": N} | spec | more)
    generator = torch.Generator().manual_seed(seed)
    shapes = cfg.tensor_shapes().items()
    return build_sae(cfg, {key: torch.randn(shape, generator=generator) for key, shape in shapes})


def at(model, module, side="input"):
    """Tensors that pass a module from now on, seen by torch's own hook."""
    seen = []
    module = find_module(model, module)
    if side == "input":
        hook = module.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    else:
        hook = module.register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    return seen, hook


def hooks_of(model):
    """What of saezoo is in a model: its hooks, and modules whose forward it replaced."""
    tables = [table for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks)]
    hooks = [hook for table in tables for hook in table.values()]
    ours = [hook for hook in hooks if hook.__module__.startswith("saezoo")]
    return ours, [m for m in model.modules() if "forward" in vars(m)]


@pytest.fixture(scope="module", params=HOSTS)
def host(request):
    return make_host(request.param), HOSTS[request.param][3]


@pytest.fixture(scope="module")
def llama():
    return make_host("llama")


@pytest.fixture(autouse=True)
def nothing_stays_hooked(request):
    yield
    for name in ("llama", "host"):
        if name in request.fixturenames:
            model = request.getfixturevalue(name)
            model = model[0] if isinstance(model, tuple) else model
            assert hooks_of(model) == ([], [])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "skip"])
def test_the_model_goes_on_with_what_the_sae_makes_of_the_captured_x(llama, name):
    site, ids = Site(layer=1, point="resid_post"), make_ids()
    sae = make_sae(ARCHITECTURES[name], site=site)
    x = capture(llama, site, ids)
    seen, hook = at(llama, "model.layers.2")
    with torch.no_grad(), attach(llama, sae, store=("features", "x", "x_hat", "target")) as run:
        llama(ids)
    hook.remove()
    assert torch.equal(seen[0], sae(x))
    assert not close(seen[0], x)
    assert torch.equal(run.x, x)
    assert torch.equal(run.target, x)
    assert torch.equal(run.x_hat, sae(x))
    chosen = sae.cfg.architecture in ("topk", "groupmax")
    assert isinstance(run.features, SparseFeatures if chosen else torch.Tensor)
    dense = run.features.to_dense() if chosen else run.features
    assert torch.equal(dense, sae.encode(x))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "topk"])
def test_a_transcoder_replaces_the_output_by_what_it_makes_of_the_input(host, architecture, skip):
    model, _ = host
    sites = {"site": {"layer": 1, "point": "mlp_in"}, "out_site": {"layer": 1, "point": "mlp_out"}}
    spec = {"architecture": architecture, "skip": skip, "k": 4 if architecture == "topk" else None}
    sae, ids = make_sae(spec, **sites), make_ids()
    x, target = capture(model, sae.cfg.site, ids), capture(model, sae.cfg.out_site, ids)
    out_module = HOST_PLACES[type(model).__name__]["mlp_out"]
    with torch.no_grad(), attach(model, sae, store=("x", "x_hat", "target")) as run:
        seen, hook = at(model, out_module, "output")  # after ours, so it sees what goes on
        model(ids)
        hook.remove()
    assert torch.equal(run.x, x)
    assert torch.equal(seen[0], sae(x))
    assert torch.equal(run.target, target)
    # what the skip adds is not nothing
    if skip:
        assert not close(sae(x), sae.decode(sae.encode(x)))


HOST_PLACES = {
    "GPT2LMHeadModel": {
        "stack": "transformer.h.1",
        "mlp_out": "transformer.h.1.mlp",
        "norm": "transformer.h.1.ln_2",
        "after z": "transformer.h.1.attn.c_proj",
        "attn": "transformer.h.1.attn",
    },
    "GPTNeoXForCausalLM": {
        "stack": "gpt_neox.layers.1",
        "mlp_out": "gpt_neox.layers.1.mlp",
        "norm": "gpt_neox.layers.1.post_attention_layernorm",
        "after z": "gpt_neox.layers.1.attention.dense",
        "attn": "gpt_neox.layers.1.attention",
    },
} | {
    name: {
        "stack": "model.layers.1",
        "mlp_out": f"model.layers.1.{out}",
        "norm": f"model.layers.1.{norm}",
        "after z": "model.layers.1.self_attn.o_proj",
        "attn": "model.layers.1.self_attn",
    }
    for name, out, norm in (
        ("LlamaForCausalLM", "mlp", "post_attention_layernorm"),
        ("Qwen3ForCausalLM", "mlp", "post_attention_layernorm"),
        ("Gemma2ForCausalLM", "post_feedforward_layernorm", "pre_feedforward_layernorm"),
        ("Gemma3ForCausalLM", "post_feedforward_layernorm", "pre_feedforward_layernorm"),
    )
}


def test_layer_and_point_name_the_tensors_of_the_residual_stream(host):
    model, _ = host
    ids, parallel = make_ids(), "NeoX" in type(model).__name__

    def got(point):
        return capture(model, Site(layer=1, point=point), ids)

    states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(got("resid_pre"), states[1])
    assert torch.equal(got("resid_post"), states[2])
    if parallel:
        assert close(got("resid_pre") + got("attn_out") + got("mlp_out"), got("resid_post"))
        with pytest.raises(CaptureError, match="resid_mid in no module"):
            got("resid_mid")
    else:
        assert close(got("resid_pre") + got("attn_out"), got("resid_mid"))
        assert close(got("resid_mid") + got("mlp_out"), got("resid_post"))
    places = HOST_PLACES[type(model).__name__]
    with torch.no_grad():
        product = find_module(model, places["after z"])(got("attn_z"))
        attention = capture(model, Site(module=places["attn"]), ids)
    assert torch.equal(product, attention)
    # of GPT-2, the embeddings of tokens alone, as TransformerLens' hook_embed has them
    embedded = states[0] - (
        model.transformer.wpe.weight[:9] if "GPT2" in type(model).__name__ else 0
    )
    assert close(capture(model, Site(point="embed"), ids), embedded)


@pytest.mark.parametrize("name", MORE)
def test_so_do_they_in_the_other_architectures_that_are_known(name):
    model, ids = make_host(name), make_ids()

    def got(point, **more):
        return capture(model, Site(layer=1, point=point, **more), ids)

    assert close(got("resid_pre") + got("attn_out"), got("resid_mid"))
    assert close(got("resid_mid") + got("mlp_out"), got("resid_post"))
    layer = model.model.layers[1]
    with torch.no_grad():
        assert close(layer.self_attn.o_proj(got("attn_z")), got("attn_out"))
        assert close(layer.mlp.down_proj(got("mlp_act")), got("mlp_out"))
    gain = layer.post_attention_layernorm.weight + (name == "gemma")
    assert close(got("mlp_in", rms_gain=False) * gain, got("mlp_in"))
    states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(capture(model, Site(point="embed"), ids), states[0])


def test_hook_mlp_in_alone_is_refused_since_it_is_used_for_two_tensors(llama):
    ids, hook = make_ids(), "blocks.1.hook_mlp_in"
    with pytest.raises(CaptureError, match="before the norm in TransformerLens"):
        capture(llama, Site(hook_name=hook), ids)
    for rms_gain in (True, False):
        plain = Site(layer=1, point="mlp_in", rms_gain=rms_gain)
        named = Site(hook_name=hook, rms_gain=rms_gain)
        assert torch.equal(capture(llama, named, ids), capture(llama, plain, ids))


def test_a_norm_without_its_gain_is_computed_and_the_gain_put_back(host):
    model, _ = host
    places, ids = HOST_PLACES[type(model).__name__], make_ids()
    site = Site(layer=1, point="mlp_in", rms_gain=False)
    norm = find_module(model, places["norm"])
    raw = capture(model, Site(module=places["norm"], side="input"), ids).double()
    centred = raw - raw.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else raw
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    x = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    assert close(capture(model, site, ids), x.float())
    hooked = Site(hook_name="blocks.1.ln2.hook_normalized")
    assert torch.equal(capture(model, hooked, ids), capture(model, site, ids))
    gain = 1 + norm.weight if "Gemma" in type(model).__name__ else norm.weight
    bias = getattr(norm, "bias", None)
    sae = make_sae(ARCHITECTURES["relu"], site=site)
    with torch.no_grad(), attach(model, sae, store=("x",)) as run:
        seen, hook = at(model, places["norm"], "output")
        model(ids)
        hook.remove()
    out = sae(run.x) * gain
    assert close(seen[0], out if bias is None else out + bias)
    assert close(
        find_module(model, places["norm"])(raw.float()),
        x.float() * gain + (0 if bias is None else bias),
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2", "gemma3"])
def test_resid_mid_is_replaced_for_the_residual_stream_too(name):
    model, ids, site = make_host(name), make_ids(), Site(layer=1, point="resid_mid")
    sae = make_sae(ARCHITECTURES["topk"], site=site)
    x = capture(model, site, ids)
    with torch.no_grad(), attach(model, sae, store=("x", "x_hat")) as run:
        mlp_out, first = at(model, HOST_PLACES[type(model).__name__]["mlp_out"], "output")
        after, second = at(model, HOST_PLACES[type(model).__name__]["stack"], "output")
        model(ids)
        first.remove(), second.remove()
    assert torch.equal(run.x, x)
    assert torch.equal(run.x_hat, sae(x))
    assert close(after[0], sae(x) + mlp_out[0])


def test_a_centred_site_is_read_without_and_written_with_the_mean_of_each_token(llama):
    ids, plain = make_ids(), Site(layer=1, point="resid_post")
    raw = capture(llama, plain, ids)
    mean = raw.mean(-1, keepdim=True)
    sae = make_sae(ARCHITECTURES["relu"], site={"layer": 1, "point": "resid_post", "centred": True})
    seen, hook = at(llama, "model.layers.2")
    with torch.no_grad(), attach(llama, sae, store=("x",)) as run:
        llama(ids)
    hook.remove()
    assert mean.abs().min() > 1e-4
    assert torch.equal(run.x, raw - mean)
    assert torch.equal(seen[0], sae(raw - mean) + mean)
    assert torch.equal(capture(llama, sae.cfg.site, ids), raw - mean)


def test_the_error_term_leaves_every_logit_as_it_is_and_gives_the_features_the_gradient(llama):
    site, ids = Site(layer=1, point="resid_post"), make_ids()
    sae = make_sae(ARCHITECTURES["relu"], site=site)
    clean = llama(ids).logits
    with attach(llama, sae, error_term=True) as run:
        logits = llama(ids).logits
        run.features.retain_grad()
        logits.square().sum().backward()
    assert torch.equal(logits, clean)
    assert run.features.grad.abs().sum() > 0
    llama.zero_grad()
    with attach(llama, make_sae(TRANSCODER, **MLP), error_term=True):
        assert torch.equal(llama(ids).logits, clean)


MLP = {"site": {"layer": 1, "point": "mlp_in"}, "out_site": {"layer": 1, "point": "mlp_out"}}


@pytest.mark.parametrize("place", [{"site": {"layer": 1, "point": "resid_mid"}}, MLP])
def test_gradients_flow_through_the_reconstruction_into_what_is_before_it(llama, place):
    sae, ids = make_sae({"architecture": "relu"}, **place), make_ids()
    with attach(llama, sae, store=("x", "x_hat")) as run:
        logits = llama(ids).logits
        run.x.retain_grad()
        logits[0, -1, 5].backward()
    assert run.x.grad.abs().sum() > 0
    assert llama.model.embed_tokens.weight.grad.abs().sum() > 0
    llama.zero_grad()
    with torch.no_grad(), attach(llama, sae) as run:
        llama(ids)
    assert run.features.grad_fn is None


def test_gradient_checkpointing_computes_a_layer_again_without_counting_it_again():
    model, ids = make_host("llama"), make_ids()
    sae = make_sae({"architecture": "relu"}, site={"layer": 1, "point": "mlp_out"})
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        with attach(model, sae, keep="all") as run:
            model(ids, use_cache=False).logits.square().sum().backward()
        grads.append(model.model.embed_tokens.weight.grad.clone())
        assert len(run.passes) == 1
    assert close(*grads)


def test_observing_changes_no_bit_and_keeps_of_topk_only_what_is_on(host):
    model, stack = host
    ids = make_ids()
    # a width that no other test has, so that a dense tensor of it is known anywhere
    sae = make_sae(ARCHITECTURES["topk"] | {"d_sae": 29}, site={"module": f"{stack}.1"})
    clean = model(ids).logits
    with torch.no_grad(), attach(model, sae, "observe") as run:
        assert torch.equal(model(ids).logits, clean)
    assert run.features.values.shape == (2, 9, 4)
    gc.collect()
    held = [
        o
        for o in gc.get_objects()
        if type(o) is torch.Tensor and o.dim() == 3 and o.shape[-1] == 29
    ]
    assert not held
    for name in ("x", "x_hat", "target"):
        with pytest.raises(CaptureError, match=f"{name} was not stored"):
            getattr(run, name)


@pytest.mark.parametrize("mode", ["splice", "observe"])
def test_generate_with_a_cache_is_one_pass_for_each_token(host, mode):
    model, stack = host
    ids = make_ids(rows=1)
    sae = make_sae(ARCHITECTURES["topk"], site={"module": f"{stack}.1"})
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with attach(model, sae, mode, keep="all", store=("x",)) as run:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert [entry[0].x.shape[1] for entry in run.passes] == [9, 1, 1, 1]
    whole = torch.cat([entry[0].x for entry in run.passes], dim=1)
    with torch.no_grad(), attach(model, sae, mode, store=("x",)) as run:
        logits = model(out[:, :-1]).logits
    assert close(whole, run.x)
    assert torch.equal(logits[:, 8:].argmax(-1), out[:, 9:])


def test_the_last_pass_replaces_those_before_unless_all_are_kept(llama):
    sae = make_sae(ARCHITECTURES["relu"], site={"layer": 1, "point": "resid_post"})
    for keep, count in (("last", 1), ("all", 2)):
        with torch.no_grad(), attach(llama, sae, "observe", keep=keep) as run:
            with pytest.raises(CaptureError, match="no forward pass"):
                run.features  # noqa: B018 the access is what is tested
            llama(make_ids(2, 9))
            llama(make_ids(3, 5))
        assert run.features.shape == (3, 5, N)
        assert len(run.passes) == count


def test_inference_mode_and_batch_1(llama):
    for place in ({"site": {"layer": 1, "point": "resid_mid"}}, MLP):
        sae, ids = make_sae({"architecture": "relu"}, **place), make_ids(1, 1)
        x = capture(llama, sae.cfg.site, ids)
        with torch.inference_mode(), attach(llama, sae, store=("x", "x_hat")) as run:
            llama(ids)
        assert torch.equal(run.x_hat, sae(x))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing_at_the_tokens_that_are_real(llama, side):
    sae = make_sae(ARCHITECTURES["topk"], site={"layer": 1, "point": "resid_post"})
    ids = make_ids(1, 5)
    filler, real = torch.zeros(1, 3, dtype=torch.int64), torch.ones_like(ids)
    parts = (ids, filler) if side == "right" else (filler, ids)
    masks = (real, filler) if side == "right" else (filler, real)
    keep = slice(0, 5) if side == "right" else slice(3, 8)
    mask = torch.cat(masks, 1)
    with torch.no_grad(), attach(llama, sae):
        alone = llama(ids).logits
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        both = llama(torch.cat(parts, 1), attention_mask=mask, position_ids=places).logits
    assert close(both[:, keep], alone)


@pytest.mark.parametrize("name", ["relu", "topk", "layer_norm"])
def test_a_bfloat16_model_takes_a_float32_sae(host, name):
    stack = host[1]
    model = make_host(next(key for key in HOSTS if isinstance(host[0], HOSTS[key][0]))).bfloat16()
    sae = make_sae(ARCHITECTURES[name], site={"module": f"{stack}.1"})
    seen, hook = at(model, f"{stack}.2")
    with torch.no_grad(), attach(model, sae, store=("features", "x")) as run:
        model(make_ids())
    hook.remove()
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], sae(run.x.float()).bfloat16())


def test_several_saes_at_once_at_several_layers_and_several_at_one_site(llama):
    first = make_sae(ARCHITECTURES["topk"], site={"layer": 0, "point": "resid_post"})
    second = make_sae(ARCHITECTURES["relu"], 1, site={"layer": 2, "point": "resid_post"})
    third = make_sae(ARCHITECTURES["relu"], 2, site={"layer": 0, "point": "resid_post"})
    ids = make_ids()
    # given in another order than that of the layers
    with torch.no_grad(), attach(llama, [second, first, third], "observe") as run:
        llama(ids)
    for sae, features in zip((second, first, third), run.features, strict=True):
        dense = features.to_dense() if sae is first else features
        assert torch.equal(dense, sae.encode(capture(llama, sae.cfg.site, ids)))
    with torch.no_grad(), attach(llama, {2: second, 0: first}, store=("x", "x_hat")) as run:
        llama(ids)
    assert list(run.x) == [2, 0]
    assert torch.equal(run.x[0], capture(llama, first.cfg.site, ids))
    assert not close(run.x[2], capture(llama, second.cfg.site, ids))  # it sees what the first made
    with (
        pytest.raises(CaptureError, match=r"two SAEs would replace model.layers.0"),
        attach(llama, [first, third]),
    ):
        pass


def test_a_whole_layers_worth_of_transcoders_sees_what_the_earlier_ones_made(llama):
    saes = {
        layer: make_sae(
            TRANSCODER,
            layer,
            site={"layer": layer, "point": "mlp_in"},
            out_site={"layer": layer, "point": "mlp_out"},
        )
        for layer in range(3)
    }
    ids = make_ids()
    with torch.no_grad(), attach(llama, saes) as run:
        spliced = llama(ids).logits
    replaced = make_host("llama")
    for layer, sae in saes.items():
        replaced.model.layers[layer].mlp.forward = sae.forward
    with torch.no_grad():
        assert torch.equal(spliced, replaced(ids).logits)
    assert list(run.features) == [0, 1, 2]


SITES = {
    "no such layer": ({"layer": 7, "point": "resid_post"}, "3 layers, 0 to 2: no layer 7"),
    "no such module": (
        {"module": "model.layers.1.mpl"},
        r"no module .* Closest: model.layers.1.mlp",
    ),
    "no point": ({"layer": 1}, r"layer 1, which names no module .*Site\(module="),
    "no norm": ({"rms_gain": False, "module": "model.layers.1.mlp"}, "no LayerNorm or RMSNorm"),
    "another width": ({"layer": 1, "point": "mlp_act"}, "is 16 wide, but the SAE reads 12"),
    "no tensor": ({"module": "model.rotary_emb"}, "float|wide"),
}


@pytest.mark.parametrize("name", SITES)
def test_a_site_that_is_not_there_or_does_not_fit_is_one_clear_line(llama, name):
    site, said = SITES[name]
    sae = make_sae(ARCHITECTURES["relu"], site=site)
    with pytest.raises(CaptureError, match=said) as caught, attach(llama, sae):
        llama(make_ids())
    assert "\n" not in str(caught.value)


def test_a_model_whose_layers_are_not_known_says_how_to_name_them():
    class Unknown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(D, D)])

        def forward(self, x):
            return self.blocks[0](x)

    model, x = Unknown(), torch.randn(4, D)
    sae = make_sae(ARCHITECTURES["relu"], site={"layer": 0, "point": "resid_post"})
    with pytest.raises(CaptureError, match=r"not known: name the module: Site\(module="):
        attach(model, sae).__enter__()
    named = Site(module="blocks.0")
    with attach(model, sae, site=named):
        assert torch.equal(model(x), sae(model.blocks[0].forward(x)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_an_error(bad):
    model = make_host("llama")
    model.model.layers[0].mlp.down_proj.weight.data[3, 3] = bad
    sae = make_sae(ARCHITECTURES["topk"], site={"layer": 1, "point": "resid_post"})
    with pytest.raises(CaptureError, match=r"model.layers.1 .*NaN or infinity"), attach(model, sae):
        model(make_ids())


def run_without_last_layer(model):
    last = model.model.layers[2]
    del model.model.layers[2]
    model.config.num_hidden_layers = 2
    try:
        model(make_ids())
    finally:
        model.model.layers.append(last)
        model.config.num_hidden_layers = 3


def run_and_raise(model, error):
    model(make_ids())
    raise error


def test_a_place_that_did_not_run_in_a_forward_pass_is_an_error_even_when_others_did(llama):
    early = make_sae(ARCHITECTURES["relu"], site={"layer": 0, "point": "resid_post"})
    late = make_sae(ARCHITECTURES["relu"], site={"layer": 2, "point": "resid_post"})
    last = llama.model.layers[2]
    with (
        pytest.raises(CaptureError, match=r"model.layers.2 \(output\) did not run in this forward"),
        attach(llama, [early, late], "observe"),
    ):
        run_without_last_layer(llama)
    with pytest.raises(CaptureError, match="was not run"), attach(llama, early):
        pass
    with pytest.raises(CaptureError, match="was not run"), attach(llama, early):
        last(torch.randn(1, 3, D), position_embeddings=(torch.ones(1, 3, 6), torch.zeros(1, 3, 6)))


def test_nothing_stays_hooked_after_an_exception(llama):
    good = make_sae(ARCHITECTURES["relu"], site={"layer": 0, "point": "resid_post"})
    lost = make_sae(ARCHITECTURES["relu"], site={"layer": 9, "point": "resid_post"})
    with pytest.raises(CaptureError), attach(llama, [good, lost]):
        pass
    assert hooks_of(llama) == ([], [])
    with pytest.raises(ZeroDivisionError), attach(llama, good):
        run_and_raise(llama, ZeroDivisionError)
    assert hooks_of(llama) == ([], [])
    with attach(llama, good) as run:
        with pytest.raises(IndexError):
            llama(torch.tensor([[1000]]))
        llama(make_ids())
    assert run.features.shape == (2, 9, N)


def test_the_base_model_alone_is_a_forward_pass_too(llama):
    sae = make_sae(ARCHITECTURES["relu"], site={"layer": 1, "point": "resid_post"})
    with torch.no_grad(), attach(llama, sae, keep="all") as run:
        llama.model(make_ids())
        llama.forward(make_ids())
    assert len(run.passes) == 2


def test_a_transcoder_that_does_not_say_where_it_writes_is_not_spliced(llama):
    sae = make_sae(TRANSCODER, site={"layer": 1, "point": "mlp_in"})
    with pytest.raises(CaptureError, match="out_site=Site"), attach(llama, sae):
        pass
    with torch.no_grad(), attach(llama, sae, "observe"):
        llama(make_ids())
    named = Site(layer=1, point="mlp_out")
    with torch.no_grad(), attach(llama, sae, out_site=named, store=("x", "x_hat")) as run:
        llama(make_ids())
    assert torch.equal(run.x_hat, sae(run.x))
    # an output site that runs before the input was seen
    early = Site(layer=0, point="mlp_out")
    with pytest.raises(CaptureError, match="ran before"), attach(llama, sae, out_site=early):
        llama(make_ids())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "replace"}, "'splice' and 'observe'"),
        ({"store": ("f",)}, "features, x, x_hat, target"),
        ({"keep": "some"}, "'last' and 'all'"),
        ({"guard": "strict"}, "'error', 'warn' and 'off'"),
        ({"sae": []}, "expected an SAE"),
        ({"sae": ["gpt2"]}, "got a str among them"),
    ],
)
def test_wrong_options_are_refused(llama, options, said):
    sae = make_sae(ARCHITECTURES["relu"], site={"layer": 1, "point": "resid_post"})
    with pytest.raises(InputError, match=said), attach(llama, **({"sae": sae} | options)):
        pass


def test_an_sae_without_a_site_asks_for_one(llama):
    sae = make_sae(ARCHITECTURES["relu"])
    with pytest.raises(CaptureError, match="which site it reads: give site="), attach(llama, sae):
        pass
    with torch.no_grad(), attach(llama, sae, site=Site(layer=1, point="resid_post")) as run:
        llama(make_ids())
    assert run.features.shape == (2, 9, N)
    with pytest.raises(InputError, match="for one SAE"), attach(llama, [sae], site=Site(layer=1)):
        pass


@pytest.mark.real
def test_the_real_model_goes_on_with_what_the_bundled_sae_makes_of_x():
    from saezoo.host import load_host
    from saezoo.load import load_sae

    host, sae = load_host(), load_sae("smollm2-135m-instruct/layer_15_resid_post")
    ids = host.tokenizer("The capital of France is Paris.", return_tensors="pt")["input_ids"]
    x = capture(host.model, sae.cfg.site, ids)
    clean = host.model(ids).logits
    seen, hook = at(host.model, "model.layers.16")
    with torch.no_grad(), attach(host.model, sae, tokenizer=host.tokenizer, store=("x",)) as run:
        host.model(ids)
    hook.remove()
    assert torch.equal(run.x, x)
    assert torch.equal(seen[0], sae(x))
    with torch.no_grad(), attach(host.model, sae, error_term=True):
        assert torch.equal(host.model(ids).logits, clean)
