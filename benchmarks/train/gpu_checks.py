"""Whether the kernels compute what they should, on the device that is measured: each against the
reference, and a whole training against one on the CPU.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.train.gpu_settings import Size, batches, synthetic
from benchmarks.train.peers import Task
from saezoo.numerics import TOLERANCE, largest_difference

# B tokens, D d_in, M d_sae, K slots of a token

CHECKED = {
    "tiny": Size(40, 97, 5, 19, 0, 0),
    "odd": Size(750, 5001, 31, 1000, 0, 0),
    "A": Size(768, 32_768, 32, 2048, 0, 0),
    "C, fewer latents": Size(4096, 16_384, 64, 512, 0, 0),
}
TRAINED = Size(128, 1024, 16, 1024, 300, 16)
TRAINED_TINY = Size(12, 48, 4, 32, 12, 4)
ALIKE = 0.01
"""How far the FVU of two trainings may be apart, as a share."""
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
SCALE = 1e-3


class Inputs:
    """What the kernels of a step are given, each from that before it; kit: whose."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str, kit: Any) -> None:
        from saezoo_train.kernels.rows import adam_rates, make_rows

        self.size = size
        generator = torch.Generator(device).manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.x = synthetic(size.batch, size.d_in, device).to(dtype)
        W_dec = normal(size.d_sae, size.d_in)
        W_dec /= W_dec.norm(dim=-1, keepdim=True)
        self.rows = make_rows(W_dec + 0, W_dec, dtype)
        # as in the middle of a run: no step decides the moments
        for moment in (self.rows.enc_m, self.rows.dec_m):
            moment.copy_(normal(*moment.shape) * SCALE)
        for moment in (self.rows.enc_v, self.rows.dec_v):
            moment.copy_(normal(*moment.shape).square() * SCALE**2 + SCALE**2)
        self.bias = normal(size.d_sae) * 0.01
        self.rates = torch.tensor(adam_rates(1e-3, ADAM["betas"], 100), device=device)
        self.pre, self.maxima = kit.encode(self.x, self.rows.W_enc_c, self.bias)
        # what about four times as many exceed as are kept
        share = 1 - 4 * size.k / size.d_sae
        self.bound = self.pre[0].float().quantile(max(share, 0.5)).expand(size.d_sae).contiguous()
        self.maxima_above = kit.encode(self.x, self.rows.W_enc_c, self.bias, offset_M=self.bound)[1]
        self.values, self.idx = kit.select_top_k(self.pre, self.maxima, size.k)
        self.order, self.starts = kit.csc(self.idx, size.d_sae)
        self.grad, _, self.dpre = kit.decode_loss(
            self.values, self.idx, self.rows.W_dec_c, self.x, SCALE, relu=True,
        )  # fmt: skip
        dead = max(1, size.d_sae // 10)
        silent = (torch.arange(size.d_sae, device=device) % 10 == 3).long() * 1000
        self.dead = kit.dead_rows(silent, 10, dead)

    def calls(self, kit: Any) -> dict[str, Any]:
        """Each kernel's call, by name. That of update_rows changes rows."""
        s, W_enc, W_dec = self.size, self.rows.W_enc_c, self.rows.W_dec_c
        lists = self.order, self.starts
        return {
            "encode": lambda: kit.encode(self.x, W_enc, self.bias),
            "select_top_k": lambda: kit.select_top_k(self.pre, self.maxima, s.k),
            "select_batch_top_k": lambda: kit.select_batch_top_k(
                self.pre, self.maxima, s.k * s.batch, 4 * s.k
            ),
            "select_above": lambda: kit.select_above(
                self.pre, self.maxima_above, self.bound, 8 * s.k
            ),
            "csc": lambda: kit.csc(self.idx, s.d_sae),
            "decode_loss": lambda: kit.decode_loss(
                self.values, self.idx, W_dec, self.x, SCALE, relu=True
            ),
            "decode": lambda: kit.decode(self.values, self.idx, W_dec),
            "latent_sums": lambda: kit.latent_sums(self.dpre, *lists),
            "update_rows": lambda: kit.update_rows(
                self.rows, self.x, self.grad, self.values, self.dpre, self.idx, *lists,
                self.rates, **ADAM,
            ),
            "auxk": lambda: kit.auxk(
                self.x, self.grad, SCALE, W_enc, self.bias, W_dec, self.dead, s.d_in // 2, 1 / 32
            ),
        }  # fmt: skip


EXACT = ("select_top_k", "select_batch_top_k", "select_above", "csc")


def check_kernels(size: Size, dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """A row for each result of each kernel: its largest difference, and what is allowed."""
    from saezoo_train.kernels import kit, reference

    rows: list[dict[str, Any]] = []
    inputs = Inputs(size, dtype, device, reference)
    calls = {"kernel": inputs.calls(kit), "reference": inputs.calls(reference)}
    for name in calls["kernel"]:
        got, expected = (_run(inputs, calls[kind][name], name) for kind in calls)
        for part, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            exact = name in EXACT or not theirs.is_floating_point()
            # gradients are made of numbers that were rounded to dtype
            rounded = name in ("auxk", "decode_loss") or theirs.dtype == dtype
            allowed = 0.0 if exact else TOLERANCE[dtype if rounded else torch.float32]
            off = largest_difference(ours, theirs)
            rows.append(
                {
                    "kernel": name,
                    "result": part,
                    "shape": list(theirs.shape),
                    "off_by": off,
                    "allowed": allowed,
                    "right": off <= allowed,
                }
            )
    return rows


def _run(inputs: Inputs, call: Any, name: str) -> list[Tensor]:
    """A call's results as a flat list; of an update, all that it changed, and changed back."""
    if name != "update_rows":
        return list(_flat(call()))
    kept = {key: value.clone() for key, value in vars(inputs.rows).items()}
    results = [*call(), *(value.clone() for value in vars(inputs.rows).values())]
    for key, value in vars(inputs.rows).items():
        value.copy_(kept[key])
    return results


def _flat(result: Any) -> Any:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from _flat(part)
    else:
        yield from vars(result).values()


def check_repeats(size: Size, dtype: torch.dtype, device: str) -> bool:
    """Whether an update gives the same bits twice."""
    from saezoo_train.kernels import kit

    inputs = Inputs(size, dtype, device, kit)
    call = inputs.calls(kit)["update_rows"]
    first, second = (_run(inputs, call, "update_rows") for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_training(size: Size, device: str, lr: float) -> dict[str, Any]:
    """FVU after the same training through the kernels here, with products in bfloat16, and through
    torch ops on the CPU, in float32. The interpreter cuts numbers to bfloat16 instead of rounding
    them: there the kernels compute in float32 too.
    """
    from benchmarks.train.gpu_run import fvu
    from benchmarks.train.own import Own

    x_ND = synthetic((size.batches + 1) * size.batch, size.d_in, "cpu")
    found = {}
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    for kernels, place in ((True, device), (False, "cpu")):
        there = x_ND.to(place)
        task = Task(
            size.d_in, size.d_sae, size.k, size.batch, size.steps, 0, lr,
            max(2, size.steps // 10), 0.2, None, {}, there[:4096].float(), place,
        )  # fmt: skip
        run = Own(task, "topk", kernels=kernels, compute=compute)
        for number, batch in enumerate(batches(there, size)):
            run.step(number, batch.float())
        found[kernels] = fvu(run.result(), there[-size.batch :].float())
    apart = abs(found[True] / found[False] - 1)
    return {
        "products": str(compute),
        "fvu_kernels": found[True],
        "fvu_torch_on_cpu": found[False],
        "apart": apart,
        "allowed": ALIKE,
        "right": apart <= ALIKE,
    }
