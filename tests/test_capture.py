"""Capture on tiny random models made without a download: the right tensor, the right tokens."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from saezoo.capture import (
    Dropped,
    activations,
    capture,
    capture_pieces,
    contexts,
    find_module,
    hook_site,
    keep_tokens,
)
from saezoo.config import SAEConfig, Site, TokenRule
from saezoo.errors import CaptureError, DataError
from saezoo.numerics import close
from saezoo.sae import SAE, build_sae

D = 12


def llama():
    cfg = LlamaConfig(
        vocab_size=40,
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(cfg)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=D, n_layer=3, n_head=2, n_positions=32))


def neox():
    cfg = GPTNeoXConfig(
        vocab_size=40,
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return GPTNeoXForCausalLM(cfg)


HOSTS = {
    "llama": (llama, "model.layers.{}"),
    "gpt2": (gpt2, "transformer.h.{}"),
    "neox": (neox, "gpt_neox.layers.{}"),
}


@pytest.fixture(params=HOSTS, scope="module")
def host(request):
    torch.manual_seed(0)
    make, path = HOSTS[request.param]
    return make().eval(), path


@pytest.fixture
def ids():
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def test_the_output_of_layer_i_is_hidden_state_i_plus_1_and_its_input_is_hidden_state_i(host, ids):
    model, path = host
    states = model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        out = capture(model, Site(module=path.format(layer)), ids)
        into = capture(model, Site(module=path.format(layer), side="input"), ids)
        assert torch.equal(out, states[layer + 1])
        assert torch.equal(into, states[layer])


def test_layers_after_the_site_are_not_run(host, ids):
    model, path = host
    ran = []
    handle = find_module(model, path.format(2)).register_forward_hook(lambda *_: ran.append(1))
    capture(model, Site(module=path.format(1)), ids)
    handle.remove()
    assert not ran


def test_a_module_is_found_without_its_prefix_and_a_wrong_one_is_refused_with_the_nearest(host):
    model, path = host
    full = path.format(1)
    assert find_module(model, full.partition(".")[2]) is find_module(model, full)
    with pytest.raises(CaptureError, match=r"Closest: "):
        find_module(model, path.format(7))


def test_a_hook_that_never_fired_is_an_error(host):
    model, path = host
    with (
        pytest.raises(CaptureError, match="never ran"),
        hook_site(model, Site(module=path.format(1)), lambda _: None),
    ):
        pass


def test_what_see_returns_goes_on_in_the_tensors_place(host, ids):
    model, path = host
    clean = model(ids).logits
    with hook_site(model, Site(module=path.format(1)), lambda x: x.clone()):
        same = model(ids).logits
    with hook_site(model, Site(module=path.format(1)), torch.zeros_like):
        changed = model(ids).logits
    with hook_site(model, Site(module=path.format(2), side="input"), torch.zeros_like):
        from_input = model(ids).logits
    assert torch.equal(clean, same)
    assert not torch.allclose(clean, changed)
    assert torch.equal(changed, from_input)
    assert torch.equal(model(ids).logits, clean)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_token_rule_drops_padding_first_positions_specials_and_outliers_and_counts_each(side):
    ids = torch.tensor([[5, 6, 1, 8, 9], [5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    x = torch.ones(2, 5, 4)
    x[0, 3] = 100
    expected = torch.tensor([[0, 1, 0, 0, 1], [0, 1, 1, 0, 0]]).bool()
    if side == "left":
        ids, mask, expected = (torch.stack([a[0], a[1].roll(2)]) for a in (ids, mask, expected))
    rule = TokenRule(skip_first=1, skip_special=True, median_norm=2.0, max_norm_factor=3.0)
    keep, dropped = keep_tokens(rule, ids, mask, torch.tensor([0, 1]), x)
    assert torch.equal(keep, expected)
    assert dropped == Dropped(seen=10, kept=4, padding=2, first=2, special=1, outlier=1)


class Tokenizer:
    """Numbers are tokens; 0 pads, 1 begins."""

    bos_token_id, pad_token_id, all_special_ids = 1, 0, [0, 1]

    def __call__(self, text, add_special_tokens=True):  # noqa: ARG002 the real ones' signature
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize(
    ("bos", "pieces"),
    [(False, [[5, 6, 7], [8, 9], [4, 5]]), (True, [[1, 5, 6], [1, 7, 8], [1, 9], [1, 4, 5]])],
)
def test_texts_are_cut_into_contexts_each_with_its_own_bos(bos, pieces):
    got = list(contexts(Tokenizer(), ["5 6 7 8 9", "4 5"], 3, prepend_bos=bos))
    assert [piece for _, piece in got] == pieces
    assert [number for number, _ in got] == [0] * (len(pieces) - 1) + [1]


def test_streamed_activations_are_those_of_each_context_alone(host):
    model, path = host
    site = Site(module=path.format(1))
    pieces = [(0, [5, 6, 7, 8]), (1, [9, 10]), (2, [11, 12, 13])]
    got = list(
        capture_pieces(model, Tokenizer(), pieces, site, TokenRule(skip_first=1), batch_size=2)
    )
    expected = torch.cat(
        [capture(model, site, torch.tensor([piece]))[0, 1:] for _, piece in pieces]
    )
    assert close(torch.cat([batch.x for batch in got]), expected)
    assert torch.cat([batch.token_ids for batch in got]).tolist() == [6, 7, 8, 10, 12, 13]
    assert torch.cat([batch.positions for batch in got]).tolist() == [1, 2, 3, 1, 1, 2]
    assert torch.cat([batch.documents for batch in got]).tolist() == [0, 0, 0, 1, 2, 2]


def test_activations_stream_the_tokens_that_count_and_say_how_many_do_not(host):
    model, path = host
    site, texts = Site(module=path.format(1)), ["5 6 7 8 9", "10", "11 0 13"]
    rule = TokenRule(skip_first=1, skip_special=True, context=4)
    stream = activations(model, Tokenizer(), texts, site, rule=rule, batch_size=2)
    batches = list(stream)
    ids = torch.cat([batch.token_ids for batch in batches])
    assert ids.tolist() == [6, 7, 8, 13]
    assert torch.cat([batch.documents for batch in batches]).tolist() == [0, 0, 0, 2]
    assert torch.cat([batch.positions for batch in batches]).tolist() == [1, 2, 3, 2]
    expected = capture(model, site, torch.tensor([[5, 6, 7, 8]]))[0, 1:]
    assert close(torch.cat([batch.x for batch in batches])[:3], expected)
    assert str(stream.dropped) == (
        "4 of 9 tokens kept; left out: 4 at the start of a context, 1 special"
    )


def topk_sae(seed=0, module="model.layers.1"):
    site = {"model": "tiny", "layer": 1, "module": module}
    cfg = SAEConfig.from_json(
        {
            "architecture": "topk",
            "k": 4,
            "d_in": D,
            "d_sae": 24,
            "site": site,
            "tokens": {"skip_first": 1},
        }
    )
    generator = torch.Generator().manual_seed(seed)
    return build_sae(
        cfg,
        {
            key: torch.randn(shape, generator=generator)
            for key, shape in cfg.tensor_shapes().items()
        },
    )


def test_an_sae_brings_its_site_its_rule_and_its_width(host):
    model, path = host
    sae = topk_sae(module=path.format(1))
    got = torch.cat([b.x for b in activations(model, Tokenizer(), "5 6 7 8", sae)])
    assert close(got, capture(model, sae.cfg.site, torch.tensor([[5, 6, 7, 8]]))[0, 1:])
    wide = SAE(sae.cfg.model_copy(update={"d_in": D + 1}))
    with pytest.raises(CaptureError, match="12 wide, but the SAE reads 13"):
        list(activations(model, Tokenizer(), "5 6 7 8", wide))
    with pytest.raises(CaptureError, match="which site"):
        activations(model, Tokenizer(), "5", SAE(sae.cfg.model_copy(update={"site": None})))


def test_no_text_no_token_that_counts_no_layer_and_nan_are_one_clear_line_each(host):
    model, path = host
    site = Site(module=path.format(1))
    with pytest.raises(DataError, match="no text"):
        list(activations(model, Tokenizer(), [], site))
    with pytest.raises(CaptureError, match="no token counts under the rule: 0 of 2 tokens kept"):
        list(activations(model, Tokenizer(), ["5", "6"], site))
    with pytest.raises(CaptureError, match="no layer 9"):
        activations(model, Tokenizer(), "5 6", Site(layer=9, point="resid_post"))
    weight = next(p for name, p in model.named_parameters() if "mlp" in name and p.dim() == 2)
    kept = weight.detach().clone()
    weight.data[0] = float("nan")
    with pytest.raises(CaptureError, match="NaN or infinity, in tokens that count"):
        list(activations(model, Tokenizer(), "5 6 7", site))
    weight.data.copy_(kept)
