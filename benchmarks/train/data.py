"""Activations for the benchmarks: real ones harvested from SmolLM2, or synthetic ones that cost as
much.

python -m benchmarks.train.data --dataset TEXTS --out FOLDER

writes FOLDER/train.safetensors and FOLDER/held.safetensors, each with x (tokens, d) float16: the
output of layer 15, in the order of the documents, without position 0, special tokens and norms
above three times the median. Held out is one document in twenty, by its content.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TRAIN_TOKENS, HELD_TOKENS = 1_000_000, 49_984


def main() -> None:
    """Harvest, in a process of one thread for each job; interrupted, the same command goes on with
    the shards that are not there yet. What is written does not depend on the number of jobs.
    """
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--dataset", required=True, help="as for `saezoo cache-activations`")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--tokens", type=int, default=TRAIN_TOKENS)
    made.add_argument("--held-tokens", type=int, default=HELD_TOKENS)
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    made.add_argument("--job", type=int, help=argparse.SUPPRESS)
    words = made.parse_args()
    if words.job is not None:
        harvest(words)
        return
    words.out.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, "-m", "benchmarks.train.data", *sys.argv[1:], "--job"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*again, str(job)], env=one_thread)  # noqa: S603
        for job in range(words.jobs)
    ]
    if any([process.wait() for process in running]):
        raise SystemExit("a job failed: see above; the same command goes on")
    train = join(words.out, "train", words.tokens, None)
    join(words.out, "held", words.held_tokens, train)


def harvest(words: argparse.Namespace) -> None:
    """The shards of one job: every so many'th."""
    from saezoo_train.config import DEFAULT_SITE, DEFAULT_TOKENS, Data
    from saezoo_train.data import documents, held_out

    from saezoo.cache_activations import _Writer, plan_cache
    from saezoo.host import load_host

    host = load_host()
    data = Data(dataset=words.dataset)
    rule = DEFAULT_TOKENS.model_copy(update={"max_norm_factor": None})

    def texts(held: bool) -> Iterator[str]:
        return (text for text in documents(data) if held_out(text, data.held_out_one_in) == held)

    shards = []
    for name, tokens in (("train", words.tokens), ("held", words.held_tokens)):
        # one in a hundred may be an outlier
        tokens += tokens // 100
        nowhere = words.out / "nowhere"
        index = plan_cache(host.model, DEFAULT_SITE, rule, nowhere, tokens).index
        # which documents are whose follows from the tokens alone, so a model without arithmetic
        # tells it
        counting = _Writer(Hollow(), host.tokenizer, index, lambda _tokens: None)
        rest = texts(name == "held")
        while not index.complete:
            shards.append((name, tokens, index))
            found, index = counting.next_shard(rest, index, tokens)
            place = f"shard-{len(index.shards):05d}.safetensors"
            shard = {"name": place, "tokens": len(found["x"])}
            index = index.model_validate(index.model_dump() | {"shards": [*index.shards, shard]})
    for number, (name, tokens, index) in list(enumerate(shards))[words.job :: words.jobs]:
        path = words.out / f"{name}-{len(index.shards):05d}.safetensors"
        if not path.is_file():
            print(f"{path.name}: {number + 1} of {len(shards)}", flush=True)
            rest = islice(texts(name == "held"), index.documents, None)
            writer = _Writer(host.model, host.tokenizer, index, lambda _tokens: None)
            found, _ = writer.next_shard(rest, index, tokens)
            save_file({"x": found["x"]}, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)


class Hollow(nn.Module):
    """As many layers as SmolLM2, at none of which anything happens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Identity() for _ in range(30))
        self.empty = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(model_type="llama")

    def forward(self, input_ids: Tensor, **_rest: Any) -> Tensor:
        x = torch.ones(*input_ids.shape, 1)
        for layer in self.model.layers:
            x = layer(x)
        return x


def join(out: Path, name: str, tokens: int, limit: float | None) -> float:
    """One file of all shards. limit: the largest norm that is kept; None: measured here. Returns
    it.
    """
    parts = sorted(out.glob(f"{name}-*.safetensors"))
    x = torch.cat([load_file(part)["x"] for part in parts])
    norm = x.float().norm(dim=-1)
    limit = limit or 3 * float(norm.median())
    x = x[norm <= limit][:tokens].contiguous()
    save_file({"x": x}, out / f"{name}.safetensors")
    digest = hashlib.sha256(x.numpy().tobytes()).hexdigest()
    print(f"{name}: {len(x):,} activations, norms up to {limit:.2f}, sha256 {digest}")
    for part in parts:
        part.unlink()
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
