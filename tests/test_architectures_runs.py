"""Whole runs of every architecture: what is learned is exported exactly, state_dict is the whole
state, and how a model begins.
"""

import pytest
import torch
from pydantic import ValidationError
from saezoo_train.architectures import ARCHITECTURES, Setting
from saezoo_train.architectures.dictionary import geometric_median

from saezoo.numerics import close
from saezoo.sae import build_sae

D, M, B, STEPS, SCALE = 8, 64, 128, 300, 0.125
SMALL = {
    "topk": {"k": 3, "auxk": 8},
    "batchtopk": {"k": 3, "auxk": 8, "threshold_beta": 0.9},
    "matryoshka": {"k": 3, "auxk": 8, "threshold_beta": 0.9, "group_shares": (0.25, 0.75)},
    "gated": {"l1_coefficient": 0.3},
    "jumprelu": {"target_l0": 3, "bandwidth": 0.1, "threshold_init": 0.02},
    "relu": {"l1_coefficient": 0.3},
}
each = pytest.mark.parametrize("name", ARCHITECTURES)


def raw(seed, tokens=B):
    """Sparse sums of 16 directions, with a mean."""
    directions = torch.randn(16, D, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(tokens, 16, generator=generator) < 0.12
    size = torch.rand(tokens, 16, generator=generator) + 0.5
    return (on * size) @ directions * 3 + 1


def setting(**changes):
    x = raw(10**6, 4000) * SCALE
    known = {
        "mean_D": x.mean(0),
        "variance": float((x - x.mean(0)).pow(2).sum(-1).mean()),
        "scale": SCALE,
        "sample_SD": x,
        "steps": STEPS,
        "batch": B,
        "seed": 5,
    }
    return Setting(**known | changes)


def build(name, **changes):
    cls = ARCHITECTURES[name]
    return cls(
        cls.Options(**{"d_sae": M, "dead_after_tokens": 3000} | SMALL[name] | changes), setting()
    )


def run(model, adam, steps):
    outputs = []
    for step in steps:
        output = model.training_step(raw(step) * SCALE, step)
        adam.zero_grad(set_to_none=True)
        output.loss.backward()
        model.before_update()
        adam.step()
        model.after_update()
        outputs.append(output)
    return outputs


def adam_of(model):
    return torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)


@each
def test_a_run_learns_and_its_export_computes_on_raw_activations_what_was_trained(name):
    model = build(name)
    outputs = run(model, adam_of(model), range(STEPS))
    assert float(outputs[-1].fvu) < 0.25
    assert 0.5 < float(outputs[-1].l0) < 12
    if model.unit_rows:
        assert torch.allclose(model.W_dec.norm(dim=1), torch.ones(M), atol=1e-5)
    x = raw(77, 500)
    cfg, tensors = model.to_native({"notes": {"from": "a test"}})
    assert cfg.notes == {"from": "a test"}
    sae = build_sae(
        cfg, {key: value.double() for key, value in tensors.items()}, dtype=torch.float64
    )
    with torch.no_grad():
        if name in ("batchtopk", "matryoshka"):
            z = (x * SCALE - model.b_dec).double() @ model.W_enc.double().T + model.b_enc
            acts = z.clamp_min(0) * (z > model.threshold)
            expected = acts @ model.W_dec.double() + model.b_dec
            l0 = float((acts > 0).sum(1).double().mean())
            assert l0 == pytest.approx(3, abs=0.7)
        else:
            expected = model.double().reconstruct(x.double() * SCALE)
    assert close(sae(x.double()), expected / SCALE, torch.float32)
    assert float((sae(x.double()) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()) < 0.25


@pytest.mark.parametrize("target", [2.0, 3.0])
@pytest.mark.parametrize("name", ["gated", "relu"])
def test_the_weight_of_a_penalty_is_found_that_gives_a_wanted_l0(name, target):
    model = build(name, target_l0=target)
    outputs = run(model, adam_of(model), range(3 * STEPS))
    l0 = sum(float(output.l0) for output in outputs[-50:]) / 50
    assert l0 == pytest.approx(target, rel=0.1)


STATES = {name: (name, {}) for name in ARCHITECTURES}
STATES |= {f"{name}, target_l0": (name, {"target_l0": 3.0}) for name in ("gated", "relu")}


@pytest.mark.parametrize(("name", "options"), STATES.values(), ids=STATES)
def test_state_dict_is_the_whole_state(name, options, tmp_path):
    """Saved at step 20 into a file and loaded into a fresh model, a run goes on bitwise."""
    model = build(name, dead_after_tokens=500, **options)
    adam = adam_of(model)
    run(model, adam, range(20))
    torch.save((model.state_dict(), adam.state_dict()), tmp_path / "state.pt")
    run(model, adam, range(20, 40))
    again = build(name, dead_after_tokens=500, **options)
    adam = adam_of(again)
    for target, state in zip((again, adam), torch.load(tmp_path / "state.pt"), strict=True):
        target.load_state_dict(state)
    run(again, adam, range(20, 40))
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@each
def test_a_model_is_decided_by_its_seed(name):
    first, second = build(name), build(name)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    cls = ARCHITECTURES[name]
    other = cls(first.options, setting(seed=6))
    assert not torch.equal(first.W_dec, other.W_dec)


@each
def test_a_matched_encoder_gives_reconstructions_of_the_length_of_the_data(name):
    small = {"threshold_init": 1e-9} if name == "jumprelu" else {}
    model = build(name, encoder_init="matched", **small)
    x = model.setting.sample_SD
    ours = (model.reconstruct(x) - model.b_dec).norm(dim=-1).mean()
    theirs = (x - model.b_dec).norm(dim=-1).mean()
    assert float((ours / theirs).detach()) == pytest.approx(1, rel=0.02)
    ratio = model.W_enc.norm(dim=1) / model.W_dec.norm(dim=1)
    assert torch.allclose(ratio, ratio[0].expand(M))
    copied = build(name, encoder_init="decoder")
    assert torch.equal(copied.W_enc, copied.W_dec)


@pytest.mark.parametrize("matched", ["matched", "decoder"])
@pytest.mark.parametrize("subtract", [True, False])
def test_thresholds_may_begin_where_every_latent_is_on_equally_often(subtract, matched):
    options = {"subtract_b_dec": subtract, "encoder_init": matched, "threshold_init": None}
    model = build("jumprelu", initial_l0=6.4, **options)
    x = model.setting.sample_SD
    pre = (x - model.b_dec if subtract else x) @ model.W_enc.T + model.b_enc
    share = (pre > model.threshold).double().mean(0)
    assert torch.allclose(share, torch.full((M,), 0.1, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("matched", ["matched", "decoder"])
def test_gates_may_begin_open_equally_often(matched):
    model = build("gated", initial_l0=6.4, encoder_init=matched)
    x = model.setting.sample_SD
    share = ((x - model.b_dec) @ model.W_enc.T + model.b_gate > 0).double().mean(0)
    assert torch.allclose(share, torch.full((M,), 0.1, dtype=torch.float64), atol=1e-3)
    assert not build("gated", initial_l0=None).b_gate.any()


def test_jumprelu_begins_as_if_b_dec_were_subtracted():
    x = raw(3) * SCALE
    given, taken = build("jumprelu"), build("jumprelu", subtract_b_dec=True)
    assert given.b_dec.norm() > 0
    assert close(given.reconstruct(x).detach(), taken.reconstruct(x).detach(), torch.float32)


def test_rows_may_begin_at_activations_and_b_dec_at_mean_median_or_zero():
    model = build("topk", decoder_init="data")
    centred = model.setting.sample_SD - model.setting.mean_D
    cosine = (model.W_dec @ torch.nn.functional.normalize(centred, dim=1).T).amax(1)
    assert torch.allclose(cosine, torch.ones(M), atol=1e-5)
    few = setting(sample_SD=setting().sample_SD[:10])
    rows = ARCHITECTURES["topk"](model.options, few).W_dec
    assert torch.allclose(rows.norm(dim=1), torch.ones(M), atol=1e-5)
    assert torch.equal(build("topk", b_dec_init="mean").b_dec, model.setting.mean_D)
    assert not build("topk", b_dec_init="zero").b_dec.any()
    median = build("topk", b_dec_init="median").b_dec
    assert torch.equal(median, geometric_median(model.setting.sample_SD))


def test_the_geometric_median_has_the_least_sum_of_distances():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:20] += 50
    median = geometric_median(x)

    def total(point):
        return float((x - point).norm(dim=1).sum())

    for direction in torch.eye(3, dtype=torch.float64):
        assert total(median) < min(
            total(median + 0.02 * direction), total(median - 0.02 * direction)
        )
    assert float(median.norm()) < 1 < float(x.mean(0).norm())
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert float(geometric_median(corner).norm()) < 1e-3


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("topk", {"d_sae": 16, "k": 17}, "k=17 is more than d_sae=16"),
        ("topk", {"d_sae": 16, "k": 4, "k_start": 20}, "k=20 is more than d_sae=16"),
        ("topk", {"d_sae": 16, "k": 4, "multi_k": 4}, "multi_k=4 is not between k=4 and"),
        ("topk", {"d_sae": 16, "k": 4, "multi_k": 17}, "multi_k=17 is not between k=4 and"),
        ("topk", {"k": 0}, "greater than 0"),
        ("topk", {"l1_coefficient": 1}, "Extra inputs"),
        ("batchtopk", {"d_sae": 16, "k": 17}, "k=17 is more than d_sae=16"),
        ("batchtopk", {"threshold_beta": 1.0}, "less than 1"),
        ("matryoshka", {"group_shares": (0.5, 0.4)}, "do not sum to 1"),
        ("matryoshka", {"group_shares": (1.5, -0.5)}, "not all above 0"),
        ("matryoshka", {"group_weights": (1.0,)}, "1 group_weights for 5 groups"),
        ("matryoshka", {"d_sae": 16, "k": 2}, "d_sae=16 is too small"),
        ("gated", {"l1_coefficient": -1.0}, "greater than or equal to 0"),
        ("jumprelu", {"bandwidth": 0.0}, "greater than 0"),
        ("relu", {"sparsity_warmup": 1.5}, "less than or equal to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, complaint):
    with pytest.raises(ValidationError, match=complaint):
        ARCHITECTURES[name].Options(**options)


@each
def test_every_option_has_a_default_and_says_what_it_is(name):
    options = ARCHITECTURES[name].Options
    options()
    assert options.__doc__
    for key, field in options.model_fields.items():
        assert len(field.description or "") > 10, key
