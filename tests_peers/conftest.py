"""The real packages, offline, and a table of how near saezoo came to each of them."""

import os
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from saezoo.numerics import TOLERANCE, largest_difference

SCRATCH = tempfile.TemporaryDirectory(prefix="saezoo-peers-", ignore_cleanup_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "CUDA_VISIBLE_DEVICES": "",
    "SPARSIFY_DISABLE_TRITON": "1",  # its kernel needs a GPU
    "SAEZOO_CACHE": f"{SCRATCH.name}/saezoo",
}

FOUND: dict[tuple[str, str], float] = {}
"""Largest difference by test and dtype, as a share of the largest output."""


@pytest.fixture
def same(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Asserts that `got` is `expected` within the tolerance of their dtype, and keeps by how much
    it was off for the table at the end.
    """

    def check(got: Tensor, expected: Tensor) -> None:
        assert got.dtype == expected.dtype
        assert expected.abs().max() > 0.1, "a comparison of nothing"
        difference = largest_difference(got, expected)
        key = request.node.name, str(got.dtype).removeprefix("torch.")
        FOUND[key] = max(FOUND.get(key, 0.0), difference)
        assert difference <= TOLERANCE[got.dtype]

    return check


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FOUND:
        terminalreporter.section("largest differences, as shares of the largest output")
    for (test, dtype), difference in sorted(FOUND.items()):
        terminalreporter.line(f"{difference:8.1e}  {dtype:8} {test}")
