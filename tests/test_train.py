"""The trainer: gradients equal dense autograd's, AuxK reaches the encoder, folding changes no
output, runs repeat.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from saezoo_train.activations import breadth_first, held_out
from saezoo_train.architectures import TopKTrainer
from saezoo_train.config import Recipe, TopK, read_recipe
from saezoo_train.losses import auxk_loss, reconstruction_loss
from saezoo_train.step import TopKReconstruct, normalise_rows, remove_parallel_gradient
from saezoo_train.trainer import batches, k_at, measure_moments, rate_at, shard_paths, train

from saezoo.errors import ConfigError
from saezoo.load import load_sae
from saezoo.numerics import close
from saezoo.sae import build_sae

B, D, M, K = 37, 6, 96, 3


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (M, D), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,)}
    return {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def dense(x, W_enc, b_enc, W_dec, b_dec, k):
    """The same step as anyone would write it: every latent, zeros where it is not among the k
    largest.
    """
    pre = (x - b_dec) @ W_enc.T + b_enc
    kth = pre.topk(k).values[:, -1:]
    return torch.where(pre >= kth, pre, torch.zeros_like(pre)).clamp_min(0) @ W_dec + b_dec


def test_the_sparse_step_has_the_output_and_every_gradient_of_the_dense_one(parameters):
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(B, D, generator=torch.Generator().manual_seed(2))
    ours, _, _ = TopKReconstruct.apply(x, *parameters.values(), K)
    (ours * weights).sum().backward()
    got = {name: value.grad.clone() for name, value in parameters.items()}
    for value in parameters.values():
        value.grad = None
    theirs = dense(x, *parameters.values(), K)
    (theirs * weights).sum().backward()
    assert close(ours, theirs)
    for name, value in parameters.items():
        assert close(got[name], value.grad), name
        assert value.grad.abs().sum() > 0, name


def test_the_step_repeats_bitwise(parameters):
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    runs = []
    for _ in range(2):
        out, _, _ = TopKReconstruct.apply(x, *parameters.values(), K)
        grads = torch.autograd.grad(out.square().sum(), list(parameters.values()))
        runs.append([out.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_auxk_is_the_papers_formula_and_its_gradient_reaches_the_encoder_of_the_dead_only(
    parameters,
):
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(3))
    out = dense(x, *parameters.values(), K)
    dead = torch.tensor([1, 5, 40, 41, 95])
    loss = auxk_loss(x, out, *parameters.values(), dead, 2)
    error = (x - out).detach()
    pre = ((x - parameters["b_dec"]) @ parameters["W_enc"].T + parameters["b_enc"])[:, dead]
    kth = pre.topk(2).values[:, -1:]
    guess = (
        torch.where(pre >= kth, pre, torch.zeros_like(pre)).clamp_min(0) @ parameters["W_dec"][dead]
    )
    expected = (guess - error).square().sum() / (error - error.mean(0)).square().sum()
    assert close(loss, expected)
    grads = torch.autograd.grad(loss, [parameters["W_enc"], parameters["W_dec"]])
    for grad in grads:
        touched = grad.abs().sum(-1).nonzero().flatten().tolist()
        assert touched
        assert set(touched) <= set(dead.tolist())


def test_the_reconstruction_loss_is_the_fvu_of_the_batch():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    out = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 2.0]])
    variance = float((x - x.mean(0)).square().sum(-1).mean())
    assert float(reconstruction_loss(x, out, variance)) == pytest.approx(5 / 4)


def test_the_decoder_gradient_loses_the_part_along_its_row_and_rows_stay_of_length_one():
    rows, grad = torch.randn(M, D), torch.randn(M, D)
    normalise_rows(rows)
    assert torch.allclose(rows.norm(dim=1), torch.ones(M))
    across = grad - (grad * rows).sum(1, keepdim=True) * rows
    remove_parallel_gradient(rows, grad)
    assert close(grad, across)


def test_folding_the_input_scale_away_changes_no_output():
    model = TopKTrainer(TopK(d_sae=M, k=K), torch.randn(D), 0.07, torch.Generator().manual_seed(0))
    model.b_enc.data.normal_()
    x = torch.randn(B, D) * 20 + 5
    cfg, tensors = model.to_native({})
    sae = build_sae(cfg, tensors)
    out, acts, idx = model(x * 0.07, K)
    features = sae.encode_sparse(x)
    assert close(sae(x), out.detach() / 0.07)
    assert close(features.values, acts / 0.07)
    assert torch.equal(
        features.indices.masked_fill(features.values == 0, -1), idx.masked_fill(acts == 0, -1)
    )


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0), (75, 1.0), (90, 0.4), (99, 0.04)]
)
def test_the_learning_rate_rises_stays_and_falls_to_zero(step, share):
    assert rate_at(step, 100, 10, 0.25) == pytest.approx(share)


def test_k_falls_linearly_to_its_value_and_stays():
    assert [k_at(step, 4, 8, 4) for step in range(6)] == [8, 7, 6, 5, 4, 4]
    assert k_at(0, 4, None, 0) == 4


def write_shards(folder, tokens=3000, d=D, shards=3):
    """Activations that are sparse sums of 12 directions, with a mean, and 2 outliers a shard."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(12, d))
    folder.mkdir()
    for number in range(shards):
        on = generator.random((tokens, 12)) < 0.1
        x = (on * generator.exponential(5, size=(tokens, 12))) @ directions + 3
        x[:2] *= 1000
        np.save(folder / f"shard-{number:05d}.npy", x.astype(np.float16))
    (folder / "index.json").write_text(json.dumps({"shards": shards, "tokens": tokens * shards}))
    return folder


def recipe(**changes):
    data = {
        "name": "tiny",
        "site": {"model": "tiny", "layer": 0, "module": "layers.0"},
        "data": {"dataset": "none"},
        "sae": {"d_sae": 48, "k": 3, "auxk": 4, "dead_after_tokens": 2000},
        "batch": 64,
        "train_tokens": 64 * 400,
        "optimiser": {"lr": 3e-3, "warmup_steps": 10},
    }
    return Recipe.model_validate(data | changes)


def test_moments_leave_outliers_out_of_mean_and_variance(tmp_path):
    paths = shard_paths(write_shards(tmp_path / "acts"))
    x = np.concatenate([np.load(path) for path in paths]).astype(np.float64)
    norms = np.linalg.norm(x, axis=1)
    moments = measure_moments(paths, 5.0)
    kept = x[norms <= 5 * np.median(norms)]
    assert moments.tokens == len(kept)
    assert moments.outliers == len(x) - len(kept) > 0
    assert moments.median_norm == pytest.approx(float(np.median(norms)), rel=1e-3)
    assert np.allclose(moments.mean_D.numpy(), kept.mean(0), rtol=1e-4)
    assert moments.variance == pytest.approx(((kept - kept.mean(0)) ** 2).sum(1).mean(), rel=1e-4)


def test_batches_go_through_every_kept_token_once_an_epoch_in_an_order_of_the_seed(tmp_path):
    paths = shard_paths(write_shards(tmp_path / "acts", tokens=640, shards=1))
    everything = torch.from_numpy(np.load(paths[0])).float()
    stream = batches(paths, 64, float("inf"), seed=1)
    epoch = torch.cat([next(stream) for _ in range(10)])
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, everything.tolist()))
    again = batches(paths, 64, float("inf"), seed=1)
    assert torch.equal(next(again), epoch[:64])
    assert not torch.equal(next(batches(paths, 64, float("inf"), seed=2)), epoch[:64])


def test_training_learns_sparse_directions_and_repeats_bitwise(tmp_path):
    acts = write_shards(tmp_path / "acts")
    rows: list[dict] = []
    model, moments = train(recipe(), acts, log=rows.append, every=50)
    again, _ = train(recipe(), acts)
    assert rows[-1]["fvu"] < 0.25 < rows[0]["fvu"]
    assert torch.equal(model.W_enc, again.W_enc)
    assert torch.allclose(model.W_dec.norm(dim=1), torch.ones(48), atol=1e-5)
    cfg, tensors = model.to_native({})
    x = next(batches(shard_paths(acts), 2000, 3 * moments.median_norm, 9))
    out = build_sae(cfg, tensors)(x)
    fvu = float((x - out).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu < 0.25


def test_a_recipe_with_an_unknown_key_is_refused_by_name(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nsite: {module: a}\ndata: {dataset: y}\nlearning: 3\n")
    with pytest.raises(ConfigError, match="learning"):
        read_recipe(path)
    path.write_text("name: [x\n")
    with pytest.raises(ConfigError, match="recipe.yaml"):
        read_recipe(path)


def test_changes_go_to_the_place_their_dotted_key_names(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nsite: {module: a}\ndata: {dataset: y}\n")
    read = read_recipe(path, {"optimiser.lr": 0.5, "batch": 7})
    assert (read.optimiser.lr, read.batch) == (0.5, 7)


class Words:
    """A tokenizer of one token a word."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=True):  # noqa: ARG002 the real ones' signature
        return {"input_ids": [int(word) for word in text.split()]}


def test_harvesting_takes_one_context_of_every_document_before_a_second_of_any():
    texts = [
        " ".join(str(100 * number + place) for place in range(8 * (number + 1)))
        for number in range(5)
    ]
    pieces = list(breadth_first(Words(), texts, 8, smallest=2))
    assert sorted(number for number, _ in pieces[:5]) == [0, 1, 2, 3, 4]
    assert sorted(number for number, _ in pieces[5:9]) == [1, 2, 3, 4]
    assert sorted(token for _, piece in pieces for token in piece) == sorted(
        int(word) for text in texts for word in text.split()
    )


def test_a_document_is_held_out_by_its_content_alone():
    texts = [f"document {number}" for number in range(4000)]
    share = sum(map(held_out, texts)) / len(texts)
    assert 0.03 < share < 0.07
    assert [held_out(text) for text in texts] == [held_out(text) for text in texts]


def test_what_is_trained_is_a_folder_that_load_sae_opens(tmp_path):
    from saezoo_train.finish import write_result
    from transformers import LlamaConfig, LlamaForCausalLM

    from saezoo.check import check_sae

    torch.manual_seed(0)
    sizes = {
        "hidden_size": D * 2,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    host = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)).eval()
    tokenizer = Words()
    tokenizer.all_special_ids, tokenizer.pad_token_id = [0], 0
    chosen = recipe(
        site={"model": "tiny", "layer": 0, "module": "model.layers.0"}, train_tokens=64 * 20
    )
    texts = [" ".join(str(1 + (7 * a + b * b) % 49) for b in range(40)) for a in range(6)]
    acts = write_shards(tmp_path / "acts", tokens=500, d=D * 2)
    trained, moments = train(chosen, acts)
    out = tmp_path / "tiny-sae"
    metrics = write_result(
        chosen, trained, moments, acts, host, tokenizer, texts, out, stats_tokens=1000
    )
    sae = load_sae(out)
    assert sae.cfg.metrics["fvu"] == metrics.fvu
    assert sae.cfg.tokens.median_norm == moments.median_norm
    assert all(finding.ok is not False for finding in check_sae(out))
    x = torch.randn(5, D * 2) * 10
    scaled, _, _ = trained(x / moments.mean_norm, 3)
    assert close(sae(x), scaled.detach() * moments.mean_norm, torch.float16)
    assert F.mse_loss(sae(x), x) > 0
