"""The guard: what a host says of itself against what the SAE's spec says."""

import logging
import re

import pytest
import torch

from saezoo.attaching import attach
from saezoo.config import SAEConfig
from saezoo.errors import CaptureError
from saezoo.guard import check_host, compare_host, host_facts
from saezoo.sae import SAE
from tests.hosts import VOCABULARY, D, make_host, make_ids

COMMIT = "a" * 40
SITE = {"layer": 1, "point": "resid_post", "model": "google/gemma-2-2b"}


class Tokenizer:
    def __init__(self, size=VOCABULARY, bos=1, adds=None, name=""):
        self.size, self.bos_token_id, self.name_or_path = size, bos, name
        if adds is not None:
            self.add_bos_token = adds

    def __len__(self):
        return self.size


def spec(tokens=None, **site):
    facts = {"architecture": "relu", "d_in": D, "d_sae": 4, "site": SITE | site, "tokens": tokens}
    return SAEConfig.from_json(facts)


def host(name="google/gemma-2-2b", commit=None, quantised=None):
    model = make_host("gemma2")
    model.config._name_or_path = name
    if commit:
        model.config._commit_hash = commit
    if quantised:
        model.config.quantization_config = {"quant_method": quantised}
    return model


SAME = {
    "its id": ("google/gemma-2-2b", {}),
    "a mirror": ("unsloth/gemma-2-2b", {}),
    "a folder of its name": ("/models/gemma-2-2b", {}),
    "the Hub's cache": (f"/cache/models--google--gemma-2-2b/snapshots/{COMMIT}", {}),
    "its commit": (f"/cache/models--google--gemma-2-2b/snapshots/{COMMIT}", {"revision": COMMIT}),
    "an id without organisation": ("gpt2", {"model": "openai-community/gpt2"}),
    "another spelling": ("meta-llama/Meta-Llama-3.1-8B", {"model": "meta-llama/Llama-3.1-8B"}),
    "nothing is said": ("x/y", {"model": None}),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_host_differs_in_nothing(name):
    path, site = SAME[name]
    assert compare_host(host(path), spec(**site)) == []


WRONG = {
    "another model": (host("google/gemma-2-9b"), {}, "expected google/gemma-2-2b, this is google"),
    "another commit": (
        host(commit="b" * 40),
        {"revision": COMMIT},
        f"expected revision {COMMIT}, this is bbbb",
    ),
}
DOUBTS = {
    "another folder": (host("/models/mine"), {}, "cannot be told from its folder /models/mine"),
    "no name": (host(""), {}, "does not say which it is"),
    "no commit": (host(), {"revision": COMMIT}, "this is not known"),
    "a branch": (host(commit=COMMIT), {"revision": "step1000"}, "expected revision step1000"),
    "quantised": (host(quantised="bitsandbytes"), {}, "quantisation none, this is bitsandbytes"),
    "not quantised": (host(), {"quantisation": "awq"}, "expected quantisation awq, this is not"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_numbers_wrong_is_an_error_unless_one_asks_for_a_warning(name, caplog):
    model, site, said = WRONG[name]
    with pytest.raises(CaptureError, match=rf"not the SAE's host: {said}.*guard='warn'"):
        check_host(model, spec(**site))
    with caplog.at_level(logging.WARNING):
        assert [item.wrong for item in check_host(model, spec(**site), guard="warn")] == [True]
    assert said in caplog.text
    assert check_host(model, spec(**site), guard="off") == []


@pytest.mark.parametrize("name", DOUBTS)
def test_what_cannot_be_told_is_a_warning(name, caplog):
    model, site, said = DOUBTS[name]
    with caplog.at_level(logging.WARNING):
        assert [item.wrong for item in check_host(model, spec(**site))] == [False]
    assert said in caplog.text


@pytest.mark.parametrize(
    ("tokenizer", "rule", "wrong", "said"),
    [
        (Tokenizer(size=50), None, True, "the tokeniser has 50 tokens, the model embeds 40"),
        (Tokenizer(bos=None), {"prepend_bos": True}, True, "wants BOS in front, and this tok"),
        (Tokenizer(adds=True), {"prepend_bos": False}, False, "without BOS in front, this .* one"),
        (Tokenizer(adds=False), {"prepend_bos": True}, False, "with BOS in front, this .* none"),
        (Tokenizer(name="Qwen/Qwen3-0.6B"), None, False, "the tokeniser of google/gemma-2-2b"),
    ],
)
def test_a_tokeniser_that_does_not_go_with_the_sae_is_seen(tokenizer, rule, wrong, said):
    found = compare_host(host(), spec(rule), tokenizer=tokenizer)
    assert [item.wrong for item in found] == [wrong]
    assert re.search(said, found[0].what)


def test_a_tokeniser_that_goes_with_it_is_not():
    for rule, adds in (
        ({"prepend_bos": True}, True),
        ({"prepend_bos": False}, False),
        (None, True),
    ):
        tokenizer = Tokenizer(adds=adds, name="google/gemma-2-2b")
        assert compare_host(host(), spec(rule), tokenizer=tokenizer) == []


def test_attach_asks_the_guard():
    sae = SAE(spec())
    with pytest.raises(CaptureError, match="not the SAE's host"), attach(host("a/b"), sae):
        pass
    model = host("a/b")
    with torch.no_grad(), attach(model, sae, "observe", guard="off") as run:
        model(make_ids())
    assert run.features.shape == (2, 9, 4)


@pytest.mark.real
def test_the_packaged_model_says_which_it_is_and_how_it_was_quantised():
    from saezoo.host import load_host
    from saezoo.load import load_sae

    host = load_host()
    facts = host_facts(host.model)
    assert facts.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "Q4_1" in facts.quantisation
    cfg = load_sae("smollm2-135m-instruct/layer_15_resid_post").cfg
    assert compare_host(host.model, cfg, tokenizer=host.tokenizer) == []
