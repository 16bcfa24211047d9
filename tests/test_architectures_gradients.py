"""Every architecture's loss, and the gradient of every parameter, is that of its paper's formula in
dense autograd.
"""

import pytest
import torch
from saezoo_train import ops
from saezoo_train.architectures import ARCHITECTURES, Setting

from saezoo.numerics import close
from tests.dense_losses import DENSE

B, D, M = 41, 6, 96

CASES = {
    "topk": ("topk", {"k": 3}),
    "topk, multi": ("topk", {"k": 3, "multi_k": 12}),
    "topk, annealed": ("topk", {"k": 3, "k_start": 9, "k_steps": 20}),
    "topk, auxk of few": ("topk", {"k": 3, "auxk": 2, "auxk_coefficient": 0.5}),
    "batchtopk": ("batchtopk", {"k": 3}),
    "batchtopk, auxk of few": ("batchtopk", {"k": 3, "auxk": 2, "auxk_coefficient": 0.5}),
    "matryoshka": ("matryoshka", {"k": 3}),
    "matryoshka, weighted": (
        "matryoshka",
        {"k": 5, "group_shares": (0.25, 0.25, 0.5), "group_weights": (0.6, 0.3, 0.1)},
    ),
    "gated": ("gated", {}),
    "jumprelu, target": ("jumprelu", {"target_l0": 4}),
    "jumprelu, l0": ("jumprelu", {"target_l0": None, "l0_coefficient": 0.3}),
    "jumprelu, to the input": ("jumprelu", {"ste_to_input": True, "subtract_b_dec": True}),
    "jumprelu, dead drawn up": ("jumprelu", {"pre_act_coefficient": 0.7}),
    "relu": ("relu", {}),
}


def data(seed=0, tokens=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype) / 2 + 0.3


def setting(**changes):
    x = data(9, 500, torch.float32)
    known = {
        "mean_D": x.mean(0),
        "variance": float((x - x.mean(0)).pow(2).sum(-1).mean()),
        "scale": 0.25,
        "sample_SD": x,
        "steps": 100,
        "batch": B,
        "seed": 3,
    }
    return Setting(**known | changes)


def build(name, changes, dtype=torch.float64):
    """A model in the middle of training: no parameter at its initial value, some latents dead."""
    cls = ARCHITECTURES[name]
    wide = {"bandwidth": 0.4, "threshold_init": 0.5} if name == "jumprelu" else {}
    model = cls(cls.Options(**{"d_sae": M} | wide | changes), setting()).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=dtype)
        for row in (3, 17, 40, 41, 95):
            model.silent[row] = 10**9
            # so low that no token turns it on; AuxK and the pre-activation loss still see most
            for bias in ("b_enc", "b_gate"):
                if hasattr(model, bias):
                    getattr(model, bias)[row] = -0.7
    return model


@pytest.fixture(params=["sparse", "dense"])
def way(request, monkeypatch):
    """Both ways of taking the products: pair by pair, and dense some bags at a time."""
    share = {"sparse": 2.0, "dense": 0.0}[request.param]
    monkeypatch.setattr("saezoo_train.ops.active.SPARSE_BELOW", share)
    for module in ("select", "products"):
        monkeypatch.setattr(f"saezoo_train.ops.{module}.ROWS", 16)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_every_gradient_are_those_of_the_papers_formula(case, dtype):
    name, changes = CASES[case]
    model, x, step = build(name, changes, dtype), data(dtype=dtype), 4
    output = model.training_step(x, step)
    output.loss.backward()
    p = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}
    expected = DENSE[name](x, p, model.options, model.setting, step, model.silent)
    expected.backward()
    assert close(output.loss, expected, dtype)
    for key, value in model.named_parameters():
        assert value.grad.abs().sum() > 0, key
        assert close(value.grad, p[key].grad, dtype), key


@pytest.mark.parametrize("case", [case for case in CASES if "auxk" in case])
def test_auxk_alone_reaches_the_encoder_of_the_dead_and_of_nobody_else(case):
    name, changes = CASES[case]
    with_auxk = build(name, changes)
    without = build(name, changes | {"auxk_coefficient": 0})
    for model in (with_auxk, without):
        model.training_step(data(), 4).loss.backward()
    for key in ("W_enc", "b_enc", "W_dec"):
        difference = getattr(with_auxk, key).grad - getattr(without, key).grad
        touched = difference.flatten(1) if difference.dim() > 1 else difference[:, None]
        assert set(touched.abs().sum(1).nonzero().flatten().tolist()) <= {3, 17, 40, 41, 95}
        assert difference.abs().max() > 1e-3, key
    assert (with_auxk.b_dec.grad - without.b_dec.grad).abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_no_gradient_and_nothing_kept_for_one_has_the_size_of_tokens_times_latents(case):
    """Only what is on is kept. Large enough that M is not some other size; nothing dead."""
    name, changes = CASES[case]
    model, x = build(name, changes | {"d_sae": 1024}), data(tokens=64)
    model.silent.zero_()
    for bias in ("b_enc", "b_gate"):
        if hasattr(model, bias):
            getattr(model, bias).data -= 1.5  # few are on
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: (sizes.append(value.numel()), value)[1], lambda value: value
    ):
        loss = model.training_step(x, 4).loss
    assert sizes
    assert max(sizes) < 64 * 1024 / 2
    seen = []
    handles = [
        node.register_hook(lambda grads, _: seen.extend(grads))
        for node in nodes_of(loss.grad_fn)
        if not type(node).__name__.startswith("AccumulateGrad")
    ]
    loss.backward()
    assert handles
    assert max(grad.numel() for grad in seen if grad is not None) < 64 * 1024 / 2


def nodes_of(root):
    """Every node of an autograd graph."""
    found, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_step_repeats_bitwise(case):
    name, changes = CASES[case]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(2):
            model = build(name, changes, torch.float32)
            model.training_step(data(tokens=1500, dtype=torch.float32), 4).loss.backward()
            runs.append([value.grad for value in model.parameters()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_only_changes_a_rows_length_leaves_the_gradient_and_rows_stay_of_length_one():
    rows = torch.randn(1030, D)
    grad = torch.randn(1030, D)
    ops.normalise_rows(rows)
    assert torch.allclose(rows.norm(dim=1), torch.ones(1030))
    across = grad - (grad * rows).sum(1, keepdim=True) * rows
    ops.remove_parallel_gradient(rows, grad)
    assert close(grad, across)
    assert (grad * rows).sum(1).abs().max() < 1e-6
