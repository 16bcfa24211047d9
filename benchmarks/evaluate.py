"""Evaluation on SmolLM2-135M and the bundled SAE: its throughput against the forward passes and the
SAE's arithmetic that it is made of, and beside SAELens' run_evals on the same model and tokens.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._run import child, need_peers, parser, write_result

CONTEXT, BATCH = 256, 4
STRIDE = 96
"""Contexts overlap, so that a short text gives many of them: time does not depend on what they
say.
"""
NAME = "smollm2-135m-instruct/layer_15_resid_post"


def main() -> None:
    """Run the measurement under the peers' interpreter, where SAELens is."""
    options = parser(__doc__)
    options.add_argument("--contexts", type=int, default=16, help=f"of {CONTEXT} tokens")
    options.add_argument("--one", metavar="FOLDER", help="measure here, on this model, and print")
    chosen = options.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one, chosen.contexts, chosen.runs)))
        return
    from saezoo.files import cache_root
    from saezoo.host import load_host

    load_host()  # puts the packaged model into the cache, where any interpreter can read it
    folder = cache_root(None) / "hosts" / "smollm2-135m-instruct-q4_1"
    words = ["--one", str(folder), "--contexts", str(chosen.contexts), "--runs", str(chosen.runs)]
    result = child(need_peers(), Path(__file__).resolve(), *words)
    write_result(
        "evaluate",
        f"SmolLM2-135M-Instruct, {NAME}, {chosen.contexts} contexts of {CONTEXT} tokens, "
        f"{BATCH} at a time, float32, {result['threads']} threads; "
        f"medians of {chosen.runs} in turns",
        result["rows"],
        ratios=result["ratios"],
        agreement=result["agreement"],
    )


def measure(folder: str, contexts: int, runs: int) -> dict[str, Any]:
    """Time everything in turns. The two hosts' losses agree, or nothing is reported."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saezoo.evaluation import own_text
    from saezoo.load import load_sae

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(own_text(), add_special_tokens=False)["input_ids"]
    starts = [place % (len(ids) - CONTEXT) for place in range(0, contexts * STRIDE, STRIDE)]
    pieces = [ids[start : start + CONTEXT] for start in starts]
    sae = load_sae(NAME)
    calls, agreement = _calls(model, tokenizer, sae, pieces)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(runs):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    forward, arithmetic = seconds["bare forward"], seconds["the SAE's own arithmetic"]
    bare, all_ = forward + arithmetic, seconds["saezoo evaluate"]
    tokens = contexts * CONTEXT
    return {
        "rows": [
            {"what": name, "seconds": round(value, 3), "tokens_per_second": round(tokens / value)}
            for name, value in seconds.items()
        ],
        "ratios": {
            "throughput without losses / (forward + SAE)": bare
            / seconds["saezoo evaluate, without losses"],
            "throughput / (four forwards + SAE): clean, spliced, zeros, mean": (bare + 3 * forward)
            / all_,
            "throughput / (one forward + SAE)": bare / all_,
            "throughput / SAELens run_evals": seconds["SAELens run_evals"] / all_,
        },
        "agreement": agreement,
        "threads": torch.get_num_threads(),
    }


def _calls(
    model: Any, tokenizer: Any, sae: Any, pieces: list[list[int]]
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What is timed, and how far the clean losses of both hosts are apart."""
    import torch

    from saezoo.capture import capture
    from saezoo.evaluation import evaluate_pieces

    batches = torch.tensor(pieces).split(BATCH)
    states = [capture(model, sae.cfg.site, batch) for batch in batches]
    special = tokenizer.all_special_ids

    def ours(losses: bool) -> Any:
        return evaluate_pieces(
            model,
            {"": sae},
            pieces,
            special_ids=special,
            losses=losses,
            batch_tokens=BATCH * CONTEXT,
        )[""]

    theirs = _run_evals(model, sae, special, batches)
    mine, other = ours(True).metrics, theirs()
    agreement = {
        "loss_clean": abs(
            mine.loss_clean - other["model_performance_preservation"]["ce_loss_without_sae"]
        ),
        "l0": abs(mine.l0 - other["sparsity"]["l0"]),
    }
    if agreement["loss_clean"] > 1e-2:
        sys.exit(f"the two hosts differ, so their times mean nothing: {agreement}")
    calls: dict[str, Callable[[], Any]] = {
        "bare forward": lambda: [model(input_ids=batch, use_cache=False) for batch in batches],
        "the SAE's own arithmetic": lambda: [sae(x) for x in states],
        "saezoo evaluate, without losses": lambda: ours(False),
        "saezoo evaluate": lambda: ours(True),
        "SAELens run_evals": theirs,
    }
    return calls, agreement


class _Tokens:
    """What run_evals asks of an ActivationsStore: the same batches each time."""

    context_size, store_batch_size_prompts = CONTEXT, BATCH

    def __init__(self, batches: Any) -> None:
        self.batches, self.next = batches, 0

    def get_batch_tokens(self, _size: int) -> Any:
        self.next += 1
        return self.batches[(self.next - 1) % len(self.batches)]

    def reset_input_dataset(self) -> None:
        self.next = 0


def _run_evals(model: Any, sae: Any, special: list[int], batches: Any) -> Callable[[], Any]:
    """SAELens' evaluation of the same SAE in the same model as a HookedTransformer, every metric of
    the first two groups; without those of single features.
    """
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    from saezoo.interop import to_saelens

    hooked, other = _hooked(model), to_saelens(sae)
    chosen = EvalConfig(
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=len(batches),
        compute_kl=True,
        compute_ce_loss=True,
        n_eval_sparsity_variance_batches=len(batches),
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )

    def run() -> Any:
        store: Any = _Tokens(batches)
        found, _ = run_evals(
            other, store, hooked, ActivationScaler(), chosen, exclude_special_tokens=special
        )
        return found

    return run


def _hooked(model: Any) -> Any:
    """The Llama as a HookedTransformer with the same weights, nothing folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=config.hidden_size // config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=CONTEXT,
        act_fn="silu",
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=config.hidden_size // config.num_attention_heads,
        rotary_adjacent_pairs=False,
        rotary_base=int(rope.get("rope_theta", getattr(config, "rope_theta", 10_000))),
        device="cpu",
    )
    hooked = HookedTransformer(cfg)
    hooked.load_and_process_state_dict(
        convert_llama_weights(model, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked.eval()


if __name__ == "__main__":
    main()
