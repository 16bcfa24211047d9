"""What is shown of features, against the model and the SAE asked token by token."""

import pytest
import torch

from saezoo.capture import capture, find_module
from saezoo.config import SAEConfig, Site
from saezoo.errors import CaptureError, DataError, InputError
from saezoo.features import look_at_tokens, promoted_tokens, top_examples
from saezoo.metrics import ReconstructionSums
from saezoo.sae import build_sae
from tests.hosts import HOSTS, VOCABULARY, D, make_host

TEXTS = ["5 6 7 8 9 10 2 11 12 13", "14 5 15 16", "17 18 19 5 20 21 22", "23 24 25"]
FINAL_NORM = {"gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}


class Tokenizer:
    """Numbers are tokens; 0 pads, 1 begins, 2 ends."""

    bos_token_id, pad_token_id, all_special_ids = 1, 0, [0, 1, 2]

    def __call__(self, text, add_special_tokens=True):  # noqa: ARG002 the real ones' signature
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids):
        return f" {ids[0]}"


def make_sae(layers="model.layers", architecture="topk", **facts):
    cfg = SAEConfig.from_json(
        {
            "architecture": architecture,
            "d_in": D,
            "d_sae": 24,
            "site": {"module": f"{layers}.1", "point": "resid_post"},
            "tokens": {"skip_first": 1, "skip_special": True, "context": 6},
        }
        | ({"k": 4} if architecture == "topk" else {})
        | facts
    )
    generator = torch.Generator().manual_seed(4)
    shapes = cfg.tensor_shapes().items()
    return build_sae(cfg, {key: torch.randn(shape, generator=generator) for key, shape in shapes})


@pytest.fixture(params=HOSTS, scope="module")
def host(request):
    return request.param, make_host(request.param), HOSTS[request.param][3]


@pytest.fixture(scope="module")
def llama():
    return make_host("llama")


def contexts_of(text):
    ids = [int(word) for word in text.split()]
    return [ids[start : start + 6] for start in range(0, len(ids), 6)]


def activations(model, sae, piece):
    return capture(model, sae.cfg.site, torch.tensor([piece]))[0]


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_each_token_shows_its_own_features_strongest_first(host, architecture):
    _, model, layers = host
    sae = make_sae(layers, architecture)
    seen = look_at_tokens(model, Tokenizer(), sae, TEXTS[0])
    x = torch.cat([activations(model, sae, piece) for piece in contexts_of(TEXTS[0])])
    assert [token.text for token in seen] == [f" {word}" for word in TEXTS[0].split()]
    for token, dense in zip(seen, sae.encode(x), strict=True):
        shown = torch.zeros(24)
        for feature, value in token.features:
            shown[feature] = value
        assert torch.allclose(shown, dense, rtol=1e-4, atol=1e-4)
        values = [value for _, value in token.features]
        assert values == sorted(values, reverse=True)
        assert all(values)
    reasons = ["position 0", *[None] * 5, "special token", None, None, None]
    # the second context begins at the sixth token, which is special too
    assert [token.left_out for token in seen] == [*reasons[:6], "position 0", *reasons[7:]]
    assert seen[1].norm == pytest.approx(float(x[1].norm()), rel=1e-4)


def test_errors_are_shares_of_the_contexts_variance_so_their_mean_is_its_fvu(llama):
    sae, text = make_sae(), "5 6 7 8 9 10"
    counted = [
        token for token in look_at_tokens(llama, Tokenizer(), sae, text) if not token.left_out
    ]
    sums = ReconstructionSums(D, 24)
    sums.add(sae, activations(llama, sae, [5, 6, 7, 8, 9, 10])[1:])
    assert sum(token.error for token in counted) / 5 == pytest.approx(sums.fvu, rel=1e-4)


def test_a_transcoder_s_error_is_against_its_target(llama):
    out_site = {"module": "model.layers.1.mlp", "side": "output"}
    sae = make_sae(site={"module": "model.layers.1.mlp", "side": "input"}, out_site=out_site)
    piece = [5, 6, 7, 8, 9, 10]
    x = activations(llama, sae, piece)
    y = capture(llama, Site(**out_site), torch.tensor([piece]))[0]
    counted = y[1:]
    spread = (counted - counted.mean(0)).square().sum(-1).mean()
    seen = look_at_tokens(llama, Tokenizer(), sae, "5 6 7 8 9 10")
    expected = ((y - sae(x)).square().sum(-1) / spread).tolist()
    assert [token.error for token in seen] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_top_examples_are_the_strongest_places_of_each_context(host, architecture):
    _, model, layers = host
    sae = make_sae(layers, architecture)
    places, counted = [], 0
    for text in TEXTS:
        for piece in contexts_of(text):
            if len(piece) < 2:
                continue
            strength = sae.encode(activations(model, sae, piece))
            keep = torch.tensor([place > 0 and token != 2 for place, token in enumerate(piece)])
            strength[~keep] = 0
            places.append((piece, strength))
            counted += int(keep.sum())
    feature = int(torch.cat([strength for _, strength in places]).sum(0).argmax())
    best = sorted((-float(s[:, feature].max()), piece, s) for piece, s in places)[:3]
    seen = top_examples(model, Tokenizer(), sae, feature, TEXTS, count=3, before=2, after=1)
    assert seen.tokens == counted
    fired = sum(int((s[:, feature] > 0).sum()) for _, s in places)
    assert seen.density == pytest.approx(fired / counted)
    assert len(seen.examples) == sum(value < 0 for value, *_ in best)
    for example, (value, piece, strength) in zip(seen.examples, best, strict=False):
        peak = int(strength[:, feature].argmax())
        start = max(peak - 2, 0)
        assert example.strongest == pytest.approx(-value, rel=1e-4)
        assert (example.position, example.peak) == (peak, peak - start)
        assert example.tokens == [f" {token}" for token in piece[start : peak + 2]]
        assert example.activations == pytest.approx(
            strength[start : peak + 2, feature].tolist(), rel=1e-4, abs=1e-4
        )


def test_the_same_stretch_of_text_is_shown_once_and_a_silent_feature_not_at_all(llama):
    sae = make_sae(architecture="relu")
    seen = top_examples(llama, Tokenizer(), sae, 3, [TEXTS[2]] * 5)
    assert len({tuple(example.tokens) for example in seen.examples}) == len(seen.examples)
    silent = build_sae(sae.cfg, dict(sae.named_parameters()) | {"b_enc": torch.full((24,), -1e4)})
    assert top_examples(llama, Tokenizer(), silent, 3, TEXTS).examples == []


def test_promoted_tokens_are_those_that_the_model_s_own_norm_and_head_favour(host):
    name, model, layers = host
    sae = make_sae(layers)
    norm = find_module(model, FINAL_NORM.get(name, "model.norm"))
    row = sae.W_dec[7]
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        # a norm gives a multiple of what its gain makes of a vector
        made = norm(row) - (0 if bias is None else bias)
        scores = model.get_output_embeddings().weight @ made
        expected = scores - scores.mean()
    found = promoted_tokens(model, Tokenizer(), sae, 7, 5)
    assert [token for token, _ in found.up] == [f" {token}" for token in expected.topk(5).indices]
    assert [token for token, _ in found.down] == [
        f" {token}" for token in (-expected).topk(5).indices
    ]
    factor = found.up[0][1] / float(expected.max())
    assert found.down[0][1] == pytest.approx(float(expected.min()) * factor, rel=1e-3)
    assert found.down[0][1] < 0 < found.up[0][1]
    assert len(promoted_tokens(model, Tokenizer(), sae, 7, 500).up) == VOCABULARY


def test_what_is_not_of_the_residual_stream_promotes_nothing(llama):
    site = {"module": "model.layers.1.self_attn.o_proj", "side": "input", "point": "attn_z"}
    assert promoted_tokens(llama, Tokenizer(), make_sae(site=site), 0) is None
    assert promoted_tokens(llama.model, Tokenizer(), make_sae("layers"), 0) is None


def test_bad_input_is_one_line(llama):
    sae = make_sae()
    for feature in (-1, 24):
        with pytest.raises(InputError, match=f"no feature {feature}: this SAE has 0 to 23"):
            top_examples(llama, Tokenizer(), sae, feature, TEXTS)
        with pytest.raises(InputError, match="0 to 23"):
            promoted_tokens(llama, Tokenizer(), sae, feature)
    with pytest.raises(DataError, match="no context of at least two tokens"):
        top_examples(llama, Tokenizer(), sae, 0, [])
    with pytest.raises(CaptureError, match="no token counts"):
        top_examples(llama, Tokenizer(), sae, 0, ["5 2 2", "7 2"])
    wide = make_sae(site={"module": "model.layers.1.mlp.down_proj", "side": "input"})
    with pytest.raises(CaptureError, match="16 wide, but the SAE reads 12"):
        look_at_tokens(llama, Tokenizer(), wide, "5 6 7")
