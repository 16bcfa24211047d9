"""Whether a device can run the Triton kernels. Triton itself is imported only to find that out."""

import importlib
import importlib.util

import torch

OLDEST = (8, 0)
"""The compute capability that the kernels are compiled for at least: bf16 products need it."""
TRITON = (3, 3)
"""The Triton that they need at least: masked histograms came with it."""


def why_no_triton(device: torch.device | str) -> str | None:
    """Why the kernels cannot run there, in words that fit behind "because"; None where they can."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, on which the kernels were never run"
    if torch.cuda.get_device_capability(device) < OLDEST:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}, below 8.0"
    return why_no_package()


def why_no_package() -> str | None:
    """Why Triton cannot be used, whatever the device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'saezoo[train]', on Linux)"
    try:
        triton = importlib.import_module("triton")
        importlib.import_module("triton.language")
    except Exception as error:  # noqa: BLE001 a broken install fails in its own ways
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    version = str(getattr(triton, "__version__", ""))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < TRITON:
        return f"triton {version or '?'} is older than {'.'.join(map(str, TRITON))}"
    return None
