"""What the GPU benchmark says before it measures: bounds, and whether the kernels are right."""

import pytest
import torch
from saezoo_train.kernels import kit

from benchmarks.train import gpu, gpu_checks
from benchmarks.train.gpu_settings import SIZES, Size, activations, batches, bound_ms, synthetic
from tests_kernels.grid import device

SIZE = Size(40, 97, 5, 19, 0, 0)


@pytest.mark.parametrize(("name", "ms"), [("A", 1.0), ("B", 0.38), ("C", 20.8)])
def test_the_bounds_are_those_of_the_issue(name, ms):
    assert bound_ms(SIZES[name]) == pytest.approx(ms, rel=0.03)


def test_the_checks_pass_for_the_kernels_and_fail_for_a_wrong_one(monkeypatch):
    rows = gpu_checks.check_kernels(SIZE, torch.float32, device().type)
    assert all(row["right"] for row in rows)
    right, seen = kit.decode, {row["kernel"] for row in rows}
    assert seen == set(gpu_checks.Inputs(SIZE, torch.float32, device().type, kit).calls(kit))
    monkeypatch.setattr(kit, "decode", lambda *given: right(*given) * 1.001)
    rows = gpu_checks.check_kernels(SIZE, torch.float32, device().type)
    assert {row["kernel"] for row in rows if not row["right"]} == {"decode"}


def test_an_update_repeats_bitwise():
    assert gpu_checks.check_repeats(SIZE, torch.bfloat16, device().type)


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu.main()


def test_activations_are_a_function_of_the_seed():
    x = synthetic(100, 24, "cpu")
    assert torch.equal(x, synthetic(100, 24, "cpu"))
    assert not torch.equal(x, synthetic(100, 24, "cpu", seed=1))
    assert x.isfinite().all()
    size = Size(24, 96, 4, 48, 6, 4)
    x = activations(size, None, "cpu")
    parts = list(batches(x, size))
    assert len(parts) == 6
    assert torch.equal(parts[0], parts[4])
    assert not torch.equal(parts[0], parts[1])
