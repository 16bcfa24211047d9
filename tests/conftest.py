"""A Hub on loopback for every test. Its address is chosen here, before anything can import
huggingface_hub, which reads HF_ENDPOINT once.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.hub_upload import UploadHub

assert "huggingface_hub" not in sys.modules, "imported before HF_ENDPOINT could be set"

HUB = UploadHub()
SCRATCH = tempfile.TemporaryDirectory(prefix="saezoo-tests-", ignore_cleanup_errors=True)

for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": f"{SCRATCH.name}/huggingface",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "SAEZOO_CACHE": f"{SCRATCH.name}/saezoo",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    """The Hub that the real client talks to, without repos."""
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh cache folder, set as SAEZOO_CACHE."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SAEZOO_CACHE", str(folder))
    return folder


@pytest.fixture
def registry_at(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Callable[[Path], None]:  # noqa: ARG001 an index is made in the cache
    """Makes a folder the registry, everywhere."""

    def use(folder: Path) -> None:
        for module in ("saezoo.registry", "saezoo.index"):
            monkeypatch.setattr(f"{module}.registry_folder", lambda: folder)

    return use


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes with one thread: tiny products gain nothing from more, and what is compared
    bitwise with another process depends on their number.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
