"""What attaching costs: a forward pass with the bundled SAE attached, less the bare forward pass,
over the SAE's own arithmetic on the same activations.

The model is two random layers of SmolLM2-135M's shape without a head: of the whole model, the SAE's
share of a forward pass is smaller than what one pass differs from the next, and what attaching adds
does not depend on how many layers there are.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._run import parser, write_result

NAME = "smollm2-135m-instruct/layer_15_resid_post"
BATCH, LENGTH = 4, 256
SHAPE = {
    "vocab_size": 1_000,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> None:
    """Time bare, attached and the SAE alone in turns, in one process."""
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=BATCH)
    options.add_argument("--length", type=int, default=LENGTH)
    chosen = options.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaModel

    from saezoo.attaching import attach
    from saezoo.capture import capture
    from saezoo.config import Site
    from saezoo.load import load_sae

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    sae, model = load_sae(NAME), LlamaModel(LlamaConfig(**SHAPE)).eval()
    site = Site(layer=0, point="resid_post")
    ids = torch.randint(0, SHAPE["vocab_size"], (chosen.batch, chosen.length))
    x = capture(model, site, ids)

    def attached(mode: Any) -> None:
        with attach(model, sae, mode, site=site, guard="off"):
            model(ids, use_cache=False)

    calls: dict[str, Callable[[], Any]] = {
        "bare forward": lambda: model(ids, use_cache=False),
        "SAE alone, encode and decode": lambda: sae(x),
        "SAE alone, encode": lambda: sae.encode_sparse(x),
        "splice": lambda: attached("splice"),
        "observe": lambda: attached("observe"),
    }
    times = in_turns(calls, chosen.runs)
    rows = [{"what": name, "seconds": statistics.median(times[name])} for name in calls]
    for mode, alone in (("splice", "encode and decode"), ("observe", "encode")):
        # turn by turn, so that what the machine does meanwhile is in both
        over = [
            with_it - bare for with_it, bare in zip(times[mode], times["bare forward"], strict=True)
        ]
        own = statistics.median(times[f"SAE alone, {alone}"])
        ratio = statistics.median(over) / own
        rows.append({"what": f"{mode}: cost over the SAE's own arithmetic", "ratio": ratio})
    write_result(
        "attach",
        f"two layers of SmolLM2-135M's shape, {NAME}, {chosen.batch} x {chosen.length} tokens, "
        f"float32, {torch.get_num_threads()} threads; medians of {chosen.runs} in turns",
        rows,
        goal="at most 1.1 x",
    )


def in_turns(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each a turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
