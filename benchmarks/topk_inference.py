"""TopK on a CPU: sparse decode against the dense product, and the whole forward against SAELens',
dictionary_learning's and sparsify's TopK, all with the same weights and inputs in one process.
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

D_IN, D_SAE, K, TOKENS = 768, 32_768, 32, 1_024


def main() -> None:
    """Run the measurement under the peers' interpreter, where all of them are."""
    options = parser(__doc__)
    options.add_argument("--one", action="store_true", help="measure here, and print")
    chosen = options.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.runs)))
        return
    result = child(need_peers(), Path(__file__).resolve(), "--one", "--runs", str(chosen.runs))
    write_result(
        "topk_inference",
        f"{D_IN} x {D_SAE:,}, k {K}, {TOKENS:,} tokens, float32, {result['threads']} threads; "
        f"medians of {chosen.runs} in turns",
        result["rows"],
        agreement=result["agreement"],
    )


def measure(runs: int) -> dict[str, Any]:
    """Time every function in turns. The forwards agree, or nothing is reported."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(TOKENS, D_IN)
    W_enc = torch.randn(D_IN, D_SAE) / D_IN**0.5
    W_dec = torch.nn.functional.normalize(W_enc.T.contiguous() + 0.01, dim=1)
    b_enc, b_dec = torch.randn(D_SAE) * 0.01, torch.randn(D_IN) * 0.01
    ours = _saezoo(W_enc, b_enc, W_dec, b_dec)
    sparse = ours.encode_sparse(x)
    dense = sparse.to_dense()
    forwards = {"saezoo forward": ours} | {
        name: make(W_enc, b_enc, W_dec, b_dec) for name, make in PEERS.items()
    }
    wanted = ours(x)
    agreement = {
        name: float((run(x) - wanted).abs().max() / wanted.abs().max())
        for name, run in forwards.items()
        if name != "saezoo forward"
    }
    if max(agreement.values()) > 1e-4:
        sys.exit(f"the forwards differ, so their times mean nothing: {agreement}")
    calls: dict[str, Callable[[], Any]] = {
        "saezoo decode, sparse": lambda: ours.decode(sparse),
        "saezoo decode of the same features as a dense tensor": lambda: ours.decode(dense),
        "dense product, f @ W_dec + b_dec": lambda: dense @ W_dec + b_dec,
    }
    for name, run in forwards.items():
        calls[name] = lambda run=run: run(x)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for turn in range(runs + 2):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                if turn > 1:
                    times[name].append(time.perf_counter() - started)
    rows = [
        {"what": name, "milliseconds": round(statistics.median(values) * 1000, 2)}
        for name, values in times.items()
    ]
    return {"rows": rows, "agreement": agreement, "threads": torch.get_num_threads()}


def _saezoo(W_enc, b_enc, W_dec, b_dec):  # type: ignore[no-untyped-def]
    from saezoo.config import SAEConfig
    from saezoo.sae import build_sae

    cfg = SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K, subtract_b_dec=True)
    rows = W_enc.T.contiguous()
    return build_sae(cfg, {"W_enc_rows": rows, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec})


def _sae_lens(rescale: bool):  # type: ignore[no-untyped-def]
    def make(W_enc, b_enc, W_dec, b_dec):  # type: ignore[no-untyped-def]
        from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

        cfg = TopKSAEConfig(
            d_in=D_IN,
            d_sae=D_SAE,
            k=K,
            device="cpu",
            apply_b_dec_to_input=True,
            rescale_acts_by_decoder_norm=rescale,
        )
        sae = TopKSAE(cfg)
        sae.load_state_dict({"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec})
        return sae

    return make


def _dictionary_learning(W_enc, b_enc, W_dec, b_dec):  # type: ignore[no-untyped-def]
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = AutoEncoderTopK(D_IN, D_SAE, K)
    made.encoder.weight.data = W_enc.T.contiguous()
    made.encoder.bias.data, made.b_dec.data = b_enc, b_dec
    made.decoder.weight.data = W_dec.T
    return made


def _sparsify(W_enc, b_enc, W_dec, b_dec):  # type: ignore[no-untyped-def]
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    made = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K))
    made.encoder.weight.data = W_enc.T.contiguous()
    made.encoder.bias.data, made.W_dec.data, made.b_dec.data = b_enc, W_dec, b_dec
    return lambda x: made(x).sae_out


PEERS = {
    "SAELens TopKSAE, rescale_acts_by_decoder_norm on (its default)": _sae_lens(True),
    "SAELens TopKSAE, rescale_acts_by_decoder_norm off": _sae_lens(False),
    "dictionary_learning AutoEncoderTopK": _dictionary_learning,
    "sparsify SparseCoder": _sparsify,
}


if __name__ == "__main__":
    main()
