"""Evaluation on tiny random models of six architectures: every loss against whole forward passes
that are written out here.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import saezoo.resume
from saezoo.capture import capture, find_module, hook_site
from saezoo.config import SAEConfig, Site, TokenRule
from saezoo.errors import CaptureError, DataError, InputError, SaezooError
from saezoo.evaluation import (
    batches,
    context_length,
    evaluate,
    evaluate_many,
    evaluate_pieces,
    take_pieces,
)
from saezoo.passes import see_places
from saezoo.sae import SAE, build_sae
from saezoo.sites import find_place
from tests.hosts import HOSTS, LAYERS, VOCABULARY, D, make_host

PIECES = [[5, 6, 7, 8, 9, 10, 2, 11], [12, 13, 14], [15, 16, 17, 18, 19]]


class Tokenizer:
    """Numbers are tokens; 0 pads, 1 begins, 2 ends."""

    bos_token_id, pad_token_id, all_special_ids = 1, 0, [0, 1, 2]

    def __len__(self):
        return VOCABULARY

    def __call__(self, text, add_special_tokens=True):  # noqa: ARG002 the real ones' signature
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture(params=HOSTS, scope="module")
def host(request):
    return make_host(request.param), HOSTS[request.param][3]


@pytest.fixture(scope="module")
def llama():
    return make_host("llama")


def make_sae(site, *, out_site=None, seed=0, tokens=None, **facts):
    cfg = SAEConfig.from_json(
        {"architecture": "topk", "k": 4, "d_in": D, "d_sae": 24}
        | facts
        | {"site": site, "out_site": out_site, "tokens": tokens or {"skip_first": 1}}
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = cfg.tensor_shapes().items()
    return build_sae(cfg, {key: torch.randn(shape, generator=generator) for key, shape in shapes})


def perfect(site):
    """x = relu(x) - relu(-x): nothing is lost."""
    cfg = SAEConfig.from_json(
        {"architecture": "relu", "d_in": D, "d_sae": 2 * D, "site": site, "tokens": {}}
    )
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    zeros = {"b_enc": torch.zeros(2 * D), "b_dec": torch.zeros(D)}
    return build_sae(cfg, {"W_enc_rows": both, "W_dec": both} | zeros)


def one(model, sae, pieces=PIECES, **options):
    return evaluate_pieces(model, {"": sae}, pieces, special_ids=[0, 1, 2], **options)[""]


def expected_losses(model, site, pieces, new):
    """(losses, logits) of whole passes, one context at a time, `new(x)` at positions >= 1."""

    def see(x):
        return torch.cat([x[:, :1], new(x)[:, 1:]], 1)

    losses, all_logits = [], []
    for piece in pieces:
        ids = torch.tensor([piece])
        with torch.no_grad(), hook_site(model, site, see):
            logits = model(ids).logits[0]
        losses += F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
        all_logits.append(logits[:-1])
    return math.fsum(losses) / len(losses), torch.cat(all_logits)


SITES = {
    "output of a layer": ("{}.1", "output"),
    "input of a layer": ("{}.2", "input"),
    "inside a layer": ("{}.1.mlp", "output"),
    "the last layer": ("{}.2", "output"),
    "the first layer": ("{}.0", "output"),
}


@pytest.mark.parametrize("where", SITES)
def test_losses_and_kl_are_those_of_whole_passes_written_out(host, where):
    model, layers = host
    path, side = SITES[where]
    site = Site(module=path.format(layers), side=side)
    sae = make_sae(site.to_json())
    x = torch.cat([capture(model, site, torch.tensor([piece]))[0, 1:] for piece in PIECES])
    mean = x.double().mean(0).float()
    clean, p = expected_losses(model, site, PIECES, lambda x: x)
    spliced, q = expected_losses(model, site, PIECES, sae)
    zero, _ = expected_losses(model, site, PIECES, torch.zeros_like)
    ablated, _ = expected_losses(model, site, PIECES, lambda x: mean.expand_as(x))
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    got = one(model, sae, batch_tokens=10).metrics
    assert got.loss_clean == pytest.approx(clean, rel=1e-5)
    assert got.loss_spliced == pytest.approx(spliced, rel=1e-5)
    assert got.loss_zero == pytest.approx(zero, rel=1e-5)
    assert got.loss_mean == pytest.approx(ablated, rel=1e-5)
    assert got.kl == pytest.approx(float(kl), rel=1e-4)
    assert got.loss_recovered == pytest.approx((zero - spliced) / (zero - clean), rel=1e-4)
    assert got.loss_recovered_mean == pytest.approx(
        (ablated - spliced) / (ablated - clean), rel=1e-3
    )
    out = sae(x).double()
    assert got.fvu == pytest.approx(
        float((x - out).square().sum() / (x.double() - x.double().mean(0)).square().sum()),
        rel=1e-5,
    )
    assert got.tokens == len(x) == sum(len(piece) - 1 for piece in PIECES)


@pytest.mark.parametrize("where", SITES)
def test_resumed_passes_give_bitwise_what_whole_ones_do(host, where, monkeypatch):
    model, layers = host
    path, side = SITES[where]
    sae = make_sae({"module": path.format(layers), "side": side})
    resumed = one(model, sae)
    monkeypatch.setattr(saezoo.resume, "FAMILIES", {})
    assert resumed.metrics == one(model, sae).metrics


def count_runs(module, run):
    ran = []
    handle = module.register_forward_hook(lambda *_: ran.append(1))
    run()
    handle.remove()
    return len(ran)


def test_layers_below_the_site_run_once_a_batch_and_once_for_the_proof(host):
    model, layers = host
    sae = make_sae({"module": f"{layers}.1"})
    below, above = (find_module(model, f"{layers}.{layer}.mlp") for layer in (0, 2))
    assert count_runs(below, lambda: one(model, sae, batch_tokens=99)) == 2
    # clean, spliced, zeros, mean, and the proof's two
    assert count_runs(above, lambda: one(model, sae, batch_tokens=99)) == 6


def test_a_model_that_hands_on_more_than_the_hidden_state_is_run_as_a_whole():
    model = make_host("llama")
    handed_on = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: handed_on.append(0.5))
    model.model.layers[2].mlp.register_forward_hook(
        lambda _m, _a, out: out + handed_on.pop() if handed_on else out
    )
    sae = make_sae({"module": "model.layers.1"})
    runs = count_runs(model.model.layers[0].mlp, lambda: one(model, sae, batch_tokens=99))
    assert runs == 5  # the proof's full one, clean, spliced, zeros, mean


def test_many_saes_share_one_clean_pass_and_each_gets_what_it_gets_alone(host):
    model, layers = host
    saes = {
        "a": make_sae({"module": f"{layers}.1"}),
        "b": make_sae({"module": f"{layers}.1"}, seed=1),
        "c": make_sae({"module": f"{layers}.0.mlp"}, tokens={"skip_first": 3}),
    }
    together = evaluate_pieces(model, saes, PIECES, special_ids=[0, 1, 2])
    assert list(together) == list(saes)
    for name, sae in saes.items():
        assert together[name].metrics == one(model, sae).metrics
    # the proof's full pass, one clean pass, and what is put into layer 0 itself: c, zeros, mean
    first = find_module(model, f"{layers}.0.mlp")
    runs = count_runs(
        first, lambda: evaluate_pieces(model, saes, PIECES, special_ids=[0], batch_tokens=99)
    )
    assert runs == 5


def test_a_transcoder_is_spliced_at_its_output_and_measured_against_what_is_there(host):
    model, layers = host
    sites = [Site(module=f"{layers}.1.mlp", side=side) for side in ("input", "output")]
    sae = make_sae(sites[0].to_json(), out_site=sites[1].to_json(), skip=True)
    got = one(model, sae).metrics
    x, y = (
        torch.cat([capture(model, site, torch.tensor([piece]))[0, 1:] for piece in PIECES])
        for site in sites
    )
    left, spread = (y - sae(x)).double(), (y - y.mean(0)).double()
    assert got.fvu == pytest.approx(float(left.square().sum() / spread.square().sum()), rel=1e-5)
    losses = []
    for piece in PIECES:
        ids = torch.tensor([piece])
        made = sae(capture(model, sites[0], ids))
        loss, _ = expected_losses(model, sites[1], [piece], lambda _, made=made: made)
        losses += [loss] * (len(piece) - 1)
    assert got.loss_spliced == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)


def test_a_perfect_reconstruction_recovers_all_and_zeros_recover_nothing(host):
    model, layers = host
    site = {"module": f"{layers}.1"}
    assert one(model, perfect(site)).metrics.loss_recovered == pytest.approx(1.0, abs=1e-5)
    got = one(model, perfect(site)).metrics
    assert (got.kl, got.fvu) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-9))
    assert got.relative_reconstruction_bias == pytest.approx(1)
    nothing = SAE(make_sae(site).cfg)  # all weights zero
    got = one(model, nothing).metrics
    assert got.loss_recovered == pytest.approx(0.0, abs=1e-6)
    assert got.dead_fraction == 1
    assert got.relative_reconstruction_bias is None
    assert "relative_reconstruction_bias" not in got.to_json()


def test_a_centred_site_is_measured_less_its_tokens_mean(llama):
    plain = make_sae({"module": "model.layers.1"})
    centred = make_sae({"module": "model.layers.1", "centred": True})
    x = torch.cat(
        [capture(llama, plain.cfg.site, torch.tensor([piece]))[0, 1:] for piece in PIECES]
    )
    x = x - x.mean(-1, keepdim=True)
    spread = (x - x.mean(0)).square().sum()
    got = one(llama, centred).metrics
    assert got.fvu == pytest.approx(float((x - centred(x)).square().sum() / spread), rel=1e-5)
    assert one(llama, perfect({"module": "model.layers.1", "centred": True})).metrics.kl < 1e-6


def test_16_bit_models_are_measured_with_float32_saes(llama):
    model = make_host("llama").to(torch.bfloat16)
    sae = make_sae({"module": "model.layers.1"})
    got, exact = one(model, sae).metrics, one(llama, sae).metrics
    assert got.loss_spliced == pytest.approx(exact.loss_spliced, rel=0.1)
    assert got.fvu == pytest.approx(exact.fvu, rel=0.1)


def test_a_model_without_a_head_is_measured_without_losses(llama):
    got = one(llama.model, make_sae({"module": "layers.1"})).metrics
    with_head = one(llama, make_sae({"module": "model.layers.1"})).metrics
    assert got.fvu == pytest.approx(with_head.fvu)
    assert (got.kl, got.loss_clean, got.loss_recovered) == (None, None, None)
    # and then no layer after the site has to run
    runs = count_runs(
        llama.model.layers[2], lambda: one(llama, make_sae({"module": "model.layers.1"}), losses=0)
    )
    assert runs == 0


def test_the_mean_is_ablated_the_same_when_no_hidden_state_was_kept(llama, monkeypatch):
    sae = make_sae({"module": "model.layers.1"})
    kept = one(llama, sae, batch_tokens=10).metrics
    monkeypatch.setattr("saezoo.passes.KEPT_STATES", 0)
    assert one(llama, sae, batch_tokens=10).metrics == kept


TEXTS = ["5 6 7 8 9 10 11", "12 13 14 15", "16 17 18 19 20 21"]


def test_texts_are_cut_by_the_rule_of_each_sae_and_up_to_so_many_tokens(llama):
    with_bos = make_sae(
        {"module": "model.layers.1"}, tokens={"prepend_bos": True, "context": 4, "skip_first": 1}
    )
    without = make_sae({"module": "model.layers.1"}, tokens={"context": 5, "skip_first": 1})
    both = evaluate_many(llama, Tokenizer(), {"b": with_bos, "n": without}, TEXTS, tokens=12)
    assert (
        both["b"].metrics
        == one(llama, with_bos, [[1, 5, 6, 7], [1, 8, 9, 10], [1, 11], [1, 12]]).metrics
    )
    assert (
        both["n"].metrics
        == one(llama, without, [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15]]).metrics
    )
    alone = evaluate(llama, Tokenizer(), without, iter(TEXTS), tokens=12, text="numbers")
    assert (alone.metrics, alone.text) == (both["n"].metrics, "numbers")


def test_progress_ends_at_its_total(llama):
    told = []
    one(
        llama,
        make_sae({"module": "model.layers.1"}),
        batch_tokens=9,
        progress=lambda *now: told.append(now),
    )
    assert told[-1] == (32, 32)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_contexts_are_no_longer_than_the_model_takes(llama):
    assert context_length(llama, TokenRule(context=4096)) == 64
    assert context_length(llama, TokenRule(context=16)) == 16
    assert [len(piece) for piece in take_pieces(Tokenizer(), ["3 " * 9], 4, tokens=6)] == [4, 2]
    assert [len(batch) for batch in batches([[1] * 4, [1] * 8, [1] * 4, [1] * 3], 8)] == [1, 2, 1]


def test_a_place_that_never_runs_is_an_error_unless_it_may_be_missing():
    model = make_host("llama")
    model.unused = torch.nn.Linear(D, D)
    sites = {"x": Site(module="model.layers.0"), "y": Site(module="unused")}
    places = {key: find_place(model, site) for key, site in sites.items()}
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(CaptureError, match=r"unused \(output\) never ran"):
        see_places(model, places, ids, torch.ones_like(ids))
    seen = see_places(model, places, ids, torch.ones_like(ids), all_of_them=False)
    assert list(seen) == ["x"]
    assert torch.equal(seen["x"], capture(model, sites["x"], ids))


WRONG = {
    "width": ({"module": "model.layers.1.mlp.down_proj", "side": "input"}, "16 wide, but the SAE"),
    "layer": ({"module": "model.layers.7", "layer": 7}, f"has {LAYERS} layers, 0 to 2"),
    "module": ({"module": "model.layers.1.nonsense"}, "no module"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_site_that_is_not_there_or_has_another_width_is_one_line(llama, mistake):
    site, said = WRONG[mistake]
    with pytest.raises(CaptureError, match=said):
        evaluate(llama, Tokenizer(), make_sae(site), TEXTS)


def test_texts_without_a_token_that_counts_are_refused_and_why_is_said(llama):
    sae = make_sae({"module": "model.layers.1"}, tokens={"skip_first": 1, "skip_special": True})
    for empty in ([], [""], ["5"]):
        with pytest.raises(DataError, match="no context of at least two tokens"):
            evaluate(llama, Tokenizer(), sae, empty)
    with pytest.raises(CaptureError, match="all 3 .1 as first of their context, 2 as special"):
        evaluate(llama, Tokenizer(), sae, ["5 2 2"])


def test_what_spans_several_layers_is_refused_by_name(llama):
    class CLTLayer(torch.nn.Module):
        cfg = object()

    with pytest.raises(InputError, match="a CLTLayer spans several layers"):
        evaluate(llama, Tokenizer(), CLTLayer(), TEXTS)


def test_activations_with_nan_and_an_sae_without_a_site_are_refused():
    model = make_host("llama")
    sae = make_sae({"module": "model.layers.1"})
    homeless = build_sae(sae.cfg.model_copy(update={"site": None}), dict(sae.named_parameters()))
    with pytest.raises(CaptureError, match="which site"):
        evaluate(model, Tokenizer(), homeless, TEXTS)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(SaezooError, match="NaN"):
        evaluate(model, Tokenizer(), sae, TEXTS)


def test_features_that_depend_on_each_other_are_chosen_over_a_whole_batch(llama):
    sae = make_sae({"module": "model.layers.1"}, architecture="tensor_topk")
    piece = PIECES[0]
    x = capture(llama, sae.cfg.site, torch.tensor([piece]))[0]
    on = (sae.encode(x) != 0).sum(-1)
    got = one(llama, sae, [piece])
    assert got.l0.tolist() == on[1:].tolist()
    assert len(set(on.tolist())) > 1


class OwnSAE(torch.nn.Module):
    """What a trainer's own architecture offers: no dense encode, no d_out."""

    def __init__(self, sae):
        super().__init__()
        self.sae, self.d_in, self.d_sae = sae, sae.d_in, sae.d_sae
        custom = {"name": "mine:Mine", "tensors": {"W": (1,)}}
        facts = {"architecture": "custom", "k": None, "custom": custom}
        self.cfg = SAEConfig.from_json(sae.cfg.to_json() | facts)

    def encode_sparse(self, x):
        return self.sae.encode_sparse(x)

    def decode(self, features, x=None):
        return self.sae.decode(features, x)


def test_an_architecture_of_one_s_own_is_measured_by_what_it_offers(llama):
    sae = make_sae({"module": "model.layers.1"})
    assert one(llama, OwnSAE(sae)).metrics == one(llama, sae).metrics
