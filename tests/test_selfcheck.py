"""Each usual mistake is planted in turn, in an SAE that really reconstructs its site and whose
declared numbers were measured with the right spec; the self-check names it.
"""

import json
import re

import pytest
import torch

from saezoo.capture import capture_pieces
from saezoo.config import SAEConfig, Site, TokenRule
from saezoo.entry import Entry
from saezoo.errors import CaptureError, DataError
from saezoo.evaluation import evaluate, take_pieces
from saezoo.sae import build_sae
from saezoo.selfcheck import Declared, declared_of, self_check
from tests.hosts import VOCABULARY, D, make_host

CONTEXT, KEPT = 12, 8
LOUD, BOS = 39, 1


class Tokenizer:
    """Numbers are tokens; 0 pads, 1 begins, 2 ends."""

    bos_token_id, pad_token_id, all_special_ids = BOS, 0, [0, 1, 2]

    def __len__(self):
        return VOCABULARY

    def __call__(self, text, add_special_tokens=True):  # noqa: ARG002 the real ones' signature
        return {"input_ids": [int(word) for word in text.split()]}


def make_texts(*, loud=False, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, LOUD, (60, 24), generator=generator)
    if loud:
        ids[::4, 7] = LOUD
    return [" ".join(map(str, row)) for row in ids.tolist()]


def make_model():
    """As in real models, the stream has a mean that dwarfs what is about it, BOS changes what all
    tokens after it carry, and BOS and one other token are far louder than the rest.
    """
    made = make_host("llama")
    generator = torch.Generator().manual_seed(9)
    mean, shift = torch.randn(2, D, generator=generator) * torch.tensor([[3.0], [4.0]])
    with torch.no_grad():
        made.model.embed_tokens.weight[BOS] *= 100
        made.model.embed_tokens.weight[LOUD] *= 400

    def move(_module, args, out):
        return out + mean + (args[0][:, :1] == BOS).unsqueeze(-1) * shift

    made.model.embed_tokens.register_forward_hook(move)
    return made


@pytest.fixture(scope="module")
def model():
    return make_model()


def rows_of(model, site, rule, texts):
    pieces = take_pieces(
        Tokenizer(), texts, rule.context, prepend_bos=bool(rule.prepend_bos), tokens=None
    )
    found = capture_pieces(model, Tokenizer(), enumerate(pieces), site, rule)
    return torch.cat([batch.x for batch in found])


def inward(x, norm):
    match norm:
        case {"kind": "layer_norm"}:
            return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        case {"kind": "constant_norm"}:
            return x * D**0.5 / x.norm(dim=-1, keepdim=True)
        case {"kind": "scale", "factor": factor}:
            return x * factor
    return x


def fit(model, texts, *, site, tokens=None, kept=KEPT, threshold=None, lengths=None, **facts):
    """An SAE whose features are the principal directions of the site, each in both signs, about
    the mean. threshold: jumprelu's. lengths (2 kept): of the decoder rows, the encoder's being
    their inverse.
    """
    rule = {"context": CONTEXT, "skip_first": 1} | (tokens or {})
    facts = {"architecture": "relu", "subtract_b_dec": True, "input_norm": None} | facts
    cfg = SAEConfig.from_json(facts | {"d_in": D, "d_sae": 2 * kept, "site": site, "tokens": rule})
    x = inward(rows_of(model, cfg.site, cfg.tokens, texts), facts["input_norm"])
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    both = torch.cat([directions[:kept], -directions[:kept]])
    size = torch.ones(2 * kept, 1) if lengths is None else lengths.unsqueeze(1)
    bias = torch.zeros(2 * kept) if cfg.subtract_b_dec else -(both / size) @ mean
    tensors = {"W_enc_rows": both / size, "W_dec": both * size, "b_enc": bias, "b_dec": mean}
    if cfg.architecture == "jumprelu":
        tensors["threshold"] = torch.full((2 * kept,), threshold)
    if cfg.skip:
        tensors["W_skip"] = torch.randn(D, D)
    return build_sae(cfg, tensors)


def declare(model, texts, sae):
    """The SAE with the numbers that its own spec gives."""
    m = evaluate(model, Tokenizer(), sae, texts, losses=False, guard="off").metrics
    return respec(sae, metrics={"l0": m.l0, "fvu": m.fvu})


def respec(sae, tensors=None, **facts):
    """The same weights under another spec."""
    site = facts.pop("site", None)
    cfg = SAEConfig.from_json(
        sae.cfg.to_json() | {k: v for k, v in facts.items()} | ({"site": site} if site else {})
    )
    have = dict(sae.named_parameters()) | (tensors or {})
    return build_sae(cfg, {name: have[name] for name in cfg.tensor_shapes()})


def at(layer=1, point="resid_post", **facts):
    return {"layer": layer, "point": point} | facts


UNIT = {"kind": "constant_norm"}
NORMED = {"kind": "layer_norm"}
RULE = {"context": CONTEXT, "skip_first": 1}
LENGTHS = torch.linspace(0.2, 5, 2 * KEPT)

MISTAKES = {
    "the wrong layer": ({"site": at(1)}, {"site": at(2)}, "reading layer 1 in place of 2"),
    "one layer too early": ({"site": at(2)}, {"site": at(1)}, "reading layer 2 in place of 1"),
    "the input of a layer for its output": (
        {"site": at(2)},
        {"site": at(2, "resid_pre")},
        "reading resid_post of layer 2 in place of resid_pre",
    ),
    "the stream for what the MLP adds": (
        {"site": at(1, "mlp_out")},
        {"site": at(1)},
        "reading mlp_out of layer 1 in place of resid_post",
    ),
    "a module's path that is off by one": (
        {"site": {"module": "model.layers.1"}},
        {"site": {"module": "model.layers.2"}},
        "reading layer 1 in place of 2",
    ),
    "the norm's gain left in": (
        {"site": at(1, "mlp_in", rms_gain=False)},
        {"site": at(1, "mlp_in")},
        "reading mlp_in without the norm's gain of layer 1",
    ),
    "no BOS": (
        {"site": at(), "tokens": {"prepend_bos": True}},
        {"tokens": RULE},
        "putting BOS in front of each context",
    ),
    "a BOS too many": (
        {"site": at()},
        {"tokens": RULE | {"prepend_bos": True}},
        "leaving BOS away",
    ),
    "BOS counted": (
        {"site": at(), "tokens": {"prepend_bos": True}, "kept": 6},
        {"tokens": RULE | {"prepend_bos": True, "skip_first": 0}},
        "leaving out position 0",
    ),
    "no layer norm": (
        {"site": at(), "input_norm": NORMED},
        {"input_norm": None},
        r"normalising x \(layer_norm\)",
    ),
    "a layer norm too many": (
        {"site": at()},
        {"input_norm": NORMED},
        "leaving x as it is, not normalised",
    ),
    "no constant norm": (
        {"site": at(), "input_norm": UNIT},
        {"input_norm": None},
        r"normalising x \(constant_norm\)",
    ),
    "a scale too many": (
        {"site": at()},
        {"input_norm": {"kind": "scale", "factor": 0.05}},
        "leaving x as it is, not normalised",
    ),
    "a scale forgotten": (
        {"site": at(), "input_norm": {"kind": "scale", "factor": 37.0}},
        {"input_norm": None},
        r"multiplying x by 3[5-9]",
    ),
    "b_dec not subtracted": (
        {"site": at()},
        {"subtract_b_dec": False},
        "subtracting b_dec from x explains",
    ),
    "b_dec subtracted twice": (
        {"site": at(), "subtract_b_dec": False},
        {"subtract_b_dec": True},
        "not subtracting b_dec from x",
    ),
    "centring forgotten": (
        {"site": at(centred=True)},
        {"site": at(centred=False)},
        r"reading the same tensor centred \(less the mean of each token\)",
    ),
    "centring too many": (
        {"site": at(0, "embed")},
        {"site": at(0, "embed", centred=True)},
        "reading the same tensor without centring",
    ),
    "decoder norms forgotten": (
        {
            "site": at(),
            "architecture": "jumprelu",
            "threshold": 0.3,
            "lengths": LENGTHS,
            "decoder_norm": "rank",
        },
        {"decoder_norm": "none"},
        "decoder_norm 'rank'",
    ),
    "the ReLU after the choice forgotten": (
        {"site": at(), "architecture": "topk", "k": 2 * KEPT - 1},
        {"relu_after": False},
        "a ReLU after the choice",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_named(model, mistake):
    right, wrong, said = MISTAKES[mistake]
    texts = make_texts()
    sae = declare(model, texts, fit(model, texts, **right))
    # only where the numbers are right with the right spec does finding a mistake mean something
    assert sae.cfg.metrics["fvu"] < 0.35
    good = self_check(model, Tokenizer(), sae, texts)
    assert good.ok, good.sentence
    verdict = self_check(model, Tokenizer(), respec(sae, **wrong), texts)
    assert not verdict.ok
    assert verdict.explained_by is not None, verdict.sentence
    assert re.search(said, verdict.sentence), verdict.sentence
    assert f"(declared {sae.cfg.metrics['fvu']:.4g})" in verdict.sentence
    assert verdict.trials[0].miss <= 1 < verdict.measured.miss


def test_a_threshold_that_is_not_the_sae_s_own_is_named(model):
    texts = make_texts()
    sae = declare(model, texts, fit(model, texts, site=at()))
    wrong = respec(sae, {"threshold": torch.full((2 * KEPT,), 9.0)}, architecture="jumprelu")
    verdict = self_check(model, Tokenizer(), wrong, texts)
    assert "leaving out the threshold explains it" in verdict.sentence


def test_a_lost_threshold_and_a_lost_choice_of_k_are_named(model):
    texts = make_texts()
    jump = fit(model, texts, site=at(), kept=D, architecture="jumprelu", threshold=1.2)
    verdict = self_check(
        model, Tokenizer(), respec(declare(model, texts, jump), architecture="relu"), texts
    )
    assert re.match(r"a threshold of 1\.[12]\d* on every feature explains it", verdict.sentence)
    top = declare(model, texts, fit(model, texts, site=at(), kept=D, architecture="topk", k=5))
    wrong = respec(top, architecture="relu", k=None)
    verdict = self_check(model, Tokenizer(), wrong, texts)
    assert "a top-k of 5 in place of the ReLU explains it" in verdict.sentence


def test_a_scale_of_sqrt_d_by_mean_norm_is_recognised(model):
    texts, site = make_texts(), at()
    norms = rows_of(model, Site(**site), TokenRule(**RULE), texts).norm(dim=-1)
    usual = {"kind": "scale", "factor": float(D**0.5 / norms.mean())}
    sae = declare(model, texts, fit(model, texts, site=site, input_norm=usual))
    verdict = self_check(model, Tokenizer(), respec(sae, input_norm=None), texts)
    assert "sqrt(d) / mean norm, explains it" in verdict.sentence


def test_tokens_of_huge_norm_are_named():
    model, texts = make_model(), make_texts(loud=True)
    site, rule = at(0, "resid_pre"), {"median_norm": 14.0, "max_norm_factor": 10.0}
    sae = declare(model, texts, fit(model, texts, site=site, tokens=rule))
    _, _, directions = torch.linalg.svd(sae.W_dec)
    with torch.no_grad():
        # loud along what the SAE never learned, as an outlier is
        model.model.embed_tokens.weight[LOUD] = 600 * directions[-1]
    assert self_check(model, Tokenizer(), sae, texts).ok
    verdict = self_check(model, Tokenizer(), respec(sae, tokens=RULE), texts)
    assert "leaving out tokens above 10 times the median norm explains it" in verdict.sentence


def fit_transcoder(model, texts, *, skip=False):
    """Random features of what the MLP of layer 1 reads, and the best linear way to what it adds."""
    rule = TokenRule(**RULE)
    sites = [Site(**at(1, point)) for point in ("mlp_in", "mlp_out")]
    x, y = (rows_of(model, site, rule, texts) for site in sites)
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(400, D, generator=generator) / x.std(0)
    bias = torch.randn(400, generator=generator) * 2 - rows @ x.mean(0)
    W_skip = torch.randn(D, D, generator=generator) * 30
    features = torch.relu(x @ rows.T + bias)
    ones = torch.ones(len(x), 1)
    solved = torch.linalg.lstsq(
        torch.cat([features, ones], 1).double(), y.double()
    ).solution.float()
    cfg = SAEConfig.from_json(
        {
            "architecture": "relu",
            "d_in": D,
            "d_sae": 400,
            "skip": skip,
            "site": sites[0].to_json(),
            "out_site": sites[1].to_json(),
            "tokens": RULE,
        }
    )
    tensors = {"W_enc_rows": rows, "b_enc": bias, "W_dec": solved[:-1], "b_dec": solved[-1]}
    return build_sae(cfg, tensors | ({"W_skip": W_skip} if skip else {}))


TRANSCODERS = {
    "target of another layer": (
        {"out_site": at(2, "mlp_out")},
        "taking as its target layer 1 in place of 2",
    ),
    "target of another point": (
        {"out_site": at(1)},
        "taking as its target mlp_out of layer 1 in place of resid_post",
    ),
    "input of another layer": ({"site": at(2, "mlp_in")}, "reading layer 1 in place of 2"),
    "taken for an SAE": ({"out_site": None}, "taking mlp_out of layer 1 as its target"),
}


@pytest.mark.parametrize("mistake", TRANSCODERS)
def test_what_goes_wrong_with_transcoders_is_named(model, mistake):
    wrong, said = TRANSCODERS[mistake]
    texts = make_texts()
    sae = declare(model, texts, fit_transcoder(model, texts))
    assert self_check(model, Tokenizer(), sae, texts).ok
    assert sae.cfg.metrics["fvu"] < 0.2
    verdict = self_check(model, Tokenizer(), respec(sae, **wrong), texts)
    assert said in verdict.sentence, verdict.sentence


def test_a_skip_that_does_not_belong_is_named(model):
    texts = make_texts()
    stated = declare(model, texts, fit_transcoder(model, texts)).cfg.metrics
    wrong = respec(fit_transcoder(model, texts, skip=True), metrics=stated)
    verdict = self_check(model, Tokenizer(), wrong, texts)
    assert verdict.sentence.startswith("leaving out the skip explains it")


def test_a_miss_that_nothing_explains_says_so_with_the_nearest(model):
    texts = make_texts()
    sae = declare(model, texts, fit(model, texts, site=at()))
    broken = respec(sae, {"W_dec": sae.W_dec.roll(3, 0)})
    verdict = self_check(model, Tokenizer(), broken, texts)
    assert (verdict.ok, verdict.explained_by) == (False, None)
    assert re.match(
        r"not as declared: FVU .* \(declared .*; none of the \d+ usual suspects explains it; "
        "the nearest is ",
        verdict.sentence,
    )
    assert len(verdict.trials) > 20
    assert json.loads(json.dumps(verdict.to_json(), allow_nan=False))["explained_by"] is None


def test_an_sae_that_declares_nothing_is_measured_and_not_called_right(model):
    texts = make_texts()
    sae = fit(model, texts, site=at())
    verdict = self_check(model, Tokenizer(), sae, texts)
    assert verdict.ok
    assert verdict.sentence.startswith("nothing is declared to compare with; measured: FVU 0.")
    lost = self_check(model, Tokenizer(), respec(sae, subtract_b_dec=False), texts)
    assert "subtracting b_dec from x explains it" in lost.sentence


def test_what_is_declared_is_the_folder_s_and_else_the_registry_s():
    cfg = SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2)
    entry = Entry(source="hf://a/b", l0=40, variance_explained=0.75)
    assert declared_of(cfg) == Declared(2, None)
    assert declared_of(cfg, entry) == Declared(40, 0.25)
    own = cfg.model_copy(update={"metrics": {"l0": 1.5, "fvu": 0.1}})
    assert declared_of(own, entry).l0 == 1.5
    assert declared_of(own, Entry(source="hf://a/b")) == Declared(1.5, 0.1)


@pytest.mark.parametrize(
    ("l0", "fvu", "fits"),
    [(32, 0.2, True), (47, 0.29, True), (49, 0.2, False), (21, 0.2, False), (32, 0.33, False)]
    + [(32, 0.07, False), (32, 0.09, True), (32, float("nan"), False), (0, 0.2, False)],
)
def test_another_text_moves_numbers_within_these_bounds_only(l0, fvu, fits):
    assert (Declared(32, 0.2).miss(l0, fvu) <= 1) is fits


def test_bad_input_is_one_line(model):
    texts, sae = make_texts(), fit(model, make_texts(), site=at())
    with pytest.raises(DataError, match="no context"):
        self_check(model, Tokenizer(), sae, [])
    with pytest.raises(CaptureError, match="0 to 2: no layer 9"):
        self_check(model, Tokenizer(), respec(sae, site=at(9)), texts)
    wide = respec(sae, site={"module": "model.layers.1.mlp.down_proj", "side": "input"})
    with pytest.raises(CaptureError, match="16 wide, but the SAE reads 12"):
        self_check(model, Tokenizer(), wide, texts)
    with pytest.raises(CaptureError, match="no token counts"):
        self_check(model, Tokenizer(), respec(sae, tokens=RULE | {"skip_first": 12}), texts)
