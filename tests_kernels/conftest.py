"""The kernels on a GPU where there is one, else in Triton's interpreter, which must be asked for
before anything imports triton. A process of its own: `pytest tests_kernels`.
"""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

assert "triton" not in sys.modules, "imported before TRITON_INTERPRET could be set"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for results begins as NaN: what no program writes is seen."""
    monkeypatch.setattr("saezoo_train.kernels._launch.POISON", True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
