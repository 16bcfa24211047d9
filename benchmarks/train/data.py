"""Activations for the benchmarks: real ones harvested from SmolLM2, or synthetic ones that cost as
much.

python -m benchmarks.train.data --dataset TEXTS --out FOLDER

writes FOLDER/train.safetensors and FOLDER/held.safetensors, each with x (tokens, d) float16: the
output of layer 15, in the order of the documents, without position 0, special tokens and norms
above three times the median. Held out is one document in twenty, by its content.
"""

import argparse
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TRAIN_TOKENS, HELD_TOKENS = 1_000_000, 49_984


def main() -> None:
    """Harvest; interrupted, the same command goes on where it was."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--dataset", required=True, help="as for `saezoo cache-activations`")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--tokens", type=int, default=TRAIN_TOKENS)
    made.add_argument("--held-tokens", type=int, default=HELD_TOKENS)
    words = made.parse_args()
    from saezoo.host import load_host

    host = load_host()
    limit = None
    for name, tokens, held in (
        ("train", words.tokens, False),
        ("held", words.held_tokens, True),
    ):
        limit = harvest(host, words.dataset, words.out, name, tokens, held, limit)


def harvest(
    host: Any, dataset: str, out: Path, name: str, tokens: int, held: bool, limit: float | None
) -> float:
    """One of the two files. limit: the largest norm that is kept; None: measured here. Returns
    it.
    """
    from saezoo_train.config import DEFAULT_SITE, DEFAULT_TOKENS, Data
    from saezoo_train.data import documents, held_out

    from saezoo.cache_activations import plan_cache, write_cache
    from saezoo.shards import read_shard

    def texts() -> Iterator[str]:
        data = Data(dataset=dataset)
        return (text for text in documents(data) if held_out(text, data.held_out_one_in) == held)

    rule = DEFAULT_TOKENS.model_copy(update={"max_norm_factor": None})
    folder = out / name
    # one in a hundred may be an outlier
    plan = plan_cache(host.model, DEFAULT_SITE, rule, folder, tokens + tokens // 100)
    index = write_cache(
        host.model, host.tokenizer, texts(), folder, plan, progress=lambda n: print(n, flush=True)
    )
    x = torch.cat([read_shard(folder, index, number)["x"] for number in range(len(index.shards))])
    norm = x.float().norm(dim=-1)
    limit = limit or 3 * float(norm.median())
    x = x[norm <= limit][:tokens].contiguous()
    save_file({"x": x}, out / f"{name}.safetensors")
    digest = hashlib.sha256(x.numpy().tobytes()).hexdigest()
    print(f"{name}: {len(x):,} activations, norms up to {limit:.2f}, sha256 {digest}")
    return limit


def synthetic(tokens: int = 16_384, d_in: int = 576, seed: int = 0) -> Path:
    """A file of sparse sums of random directions, (tokens, d_in) float16: for timing only."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    x = torch.zeros(tokens, d_in)
    for _ in range(24):
        chosen = torch.randint(4 * d_in, (tokens,), generator=generator)
        x += directions[chosen] * torch.rand(tokens, 1, generator=generator)
    path = Path(tempfile.mkdtemp(prefix="saezoo-bench-")) / "acts.safetensors"
    save_file({"x": x.half()}, path)
    return path


if __name__ == "__main__":
    main()
