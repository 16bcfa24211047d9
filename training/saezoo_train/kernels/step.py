"""A whole update through the kernels: from a batch to changed weights, moments and counters.

What it changes are the tensors of the model and of its Adam themselves, so that a checkpoint, or a
step through torch ops, goes on from them. Shapes depend on a `Plan` alone, which is chosen on the
host every so many steps; on a GPU the update is then one captured graph. Nothing in it waits for
the device.
"""

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saezoo_train.architectures.base import StepOutput
from saezoo_train.architectures.dictionary import warm_up
from saezoo_train.kernels import LONGEST
from saezoo_train.kernels.entries import FORMULAS, Batch, Entries
from saezoo_train.kernels.rows import Extra, Rows, adam_rates

# B tokens, D d_in, M d_sae, K slots of a token

ROOM = 1.5
"""Slots, as a multiple of what the fullest token of a batch needed when it was looked at."""
AHEAD = 100
"""Steps from one look at the device to the next, at most."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What decides the shapes of a step."""

    k: int
    """Latents of a token, exactly or on average; 0 where the architecture has no such number."""
    capacity: int
    """Slots of a token, where their number depends on data."""
    dead: int
    """Room for dead latents: at least as many as there are. 0: none are, and AuxK is left out."""


class KernelStep:
    """Updates of one model. `takes` says whether the next one can be made here."""

    def __init__(
        self,
        model: Any,
        adam: torch.optim.Adam,
        *,
        kit: ModuleType,
        compute: torch.dtype = torch.bfloat16,
    ) -> None:
        """kit: `saezoo_train.kernels.kit`, or `reference`. compute: the dtype of products."""
        self.model, self.adam, self.kit, self.compute = model, adam, kit, compute
        self.formula = FORMULAS[type(model).__name__]
        self.subtracts = getattr(model.options, "subtract_b_dec", True)
        self.vectors = {name: value for name, value in model.named_parameters() if value.dim() == 1}
        for parameter in model.parameters():
            _begin_adam(adam, parameter)
        self.rows = _rows(model, adam, compute)
        device = self.rows.W_enc.device
        self.rates_2 = torch.zeros(2, device=device)
        self.sparsity = torch.zeros((), device=device)
        self.lacking = torch.zeros((), dtype=torch.int32, device=device)
        self.plan = Plan(0, 0, 0)
        self.look_at, self.fits, self.stale, self.room = 0, True, True, ROOM
        self.captured: tuple[Plan, Any, Tensor, StepOutput] | None = None
        self.made: Plan | None = None

    def takes(self, x_BD: Tensor, step: int) -> bool:
        """Whether lists can hold what this batch and those up to the next look have on. x as for
        `__call__`. Where not, the step is torch's to make.
        """
        if step >= self.look_at:
            self._look(x_BD, step)
        self.stale |= not self.fits
        return self.fits

    def __call__(self, x_BD: Tensor, step: int, lr: float) -> StepOutput:
        """One update from scaled activations (B, D) float32, step counted from 0. What is returned
        is overwritten by the next.
        """
        options, settings = self.model.options, self.adam.param_groups[0]
        if self.stale:
            self.rows.W_enc_c.copy_(self.rows.W_enc)
            self.rows.W_dec_c.copy_(self.rows.W_dec)
            for parameter in self.model.parameters():
                parameter.grad = None
            self.stale = False
        for place, rate in enumerate(adam_rates(lr, settings["betas"], step + 1)):
            self.rates_2[place].fill_(rate)
        share = getattr(options, "sparsity_warmup", 0.0)
        self.sparsity.fill_(warm_up(step, self.model.setting.steps, share))
        k = options.k_at(step) if hasattr(options, "k_at") else 0
        plan = Plan(k, self.plan.capacity, self.plan.dead)
        if x_BD.device.type == "cuda":
            return self._replay(plan, x_BD)
        return self.update(plan, x_BD)

    def _replay(self, plan: Plan, x_BD: Tensor) -> StepOutput:
        """The first step of a plan runs as it is, which compiles the kernels; the second is
        captured, and then replayed as long as the plan stays.
        """
        if plan != self.made:
            self.made, self.captured = plan, None
            return self.update(plan, x_BD)
        if self.captured is None or self.captured[2].shape != x_BD.shape:
            graph, room = torch.cuda.CUDAGraph(), x_BD.clone()
            with torch.cuda.graph(graph):
                out = self.update(plan, room)
            self.captured = plan, graph, room, out
        _, graph, room, out = self.captured
        room.copy_(x_BD)
        graph.replay()
        return out

    @torch.no_grad()
    def update(self, plan: Plan, x_BD: Tensor) -> StepOutput:
        """The update itself: no shape in it depends on data, and nothing waits for the device."""
        kit, model, rows = self.kit, self.model, self.rows
        at = self._batch(plan, x_BD)
        kept = self.formula.keep(at)
        entries = self.formula.entries(at, kept)
        self._count_silence(entries, len(x_BD))
        extra = self._auxk(plan, at, entries)
        order_N, starts_M1 = kit.csc(entries.idx_BK, len(rows.W_enc))
        found = {
            name: None if part is None else kit.latent_sums(part, order_N, starts_M1)
            for name, part in entries.vectors.items()
        }
        group = self.adam.param_groups[0]
        adam = {"betas": group["betas"], "eps": group["eps"]}
        gb_M, enc_part_D = kit.update_rows(
            rows, at.x_BD, entries.grad_BD, entries.values_BK, entries.dpre_BK, entries.idx_BK,
            order_N, starts_M1, self.rates_2, **adam, unit_rows=model.unit_rows, extra=extra,
        )  # fmt: skip
        grad_D = entries.grad_BD.sum(0, dtype=torch.float32)
        found["b_dec"] = grad_D - enc_part_D if self.subtracts else grad_D
        for name, parameter in self.vectors.items():
            state, grad = self.adam.state[parameter], found[name]
            kit.update_vector(
                parameter.data, state["exp_avg"], state["exp_avg_sq"],
                gb_M if grad is None else grad, self.rates_2, **adam,
                least=0.0 if name == "threshold" else None,
            )  # fmt: skip
        torch._foreach_add_([self.adam.state[p]["step"] for p in model.parameters()], 1)
        if kept.lacking is not None:
            self.lacking.copy_(torch.maximum(self.lacking, kept.lacking))
        l0 = entries.fired_BK.sum() / len(x_BD)
        dead = model.dead.float().mean()
        return StepOutput(entries.loss, entries.fvu, l0, dead, entries.logs)

    def _batch(self, plan: Plan, x_BD: Tensor) -> Batch:
        b_dec_D = self.model.b_dec.data if self.subtracts else None
        centred_BD = self.kit.centre(x_BD, b_dec_D, self.compute)
        variance = self.model.setting.variance
        return Batch(
            self.kit, self.model, self.rows, centred_BD, variance, self.sparsity, plan.k,
            plan.capacity,
        )  # fmt: skip

    def _count_silence(self, entries: Entries, tokens: int) -> None:
        """As `Dictionary.count_silence`, without a list whose length depends on data."""
        silent_M = self.model.silent
        # what did not fire all goes to one place past the end
        latent_N = entries.idx_BK.where(entries.fired_BK, len(silent_M)).long().view(-1)
        fired_M = torch.zeros(len(silent_M) + 1, dtype=torch.bool, device=silent_M.device)
        fired_M.scatter_(0, latent_N, True)
        silent_M.add_(tokens).masked_fill_(fired_M[:-1], 0)

    def _auxk(self, plan: Plan, at: Batch, entries: Entries) -> Extra | None:
        """Adds AuxK to the loss where something is dead: its gradients of the dead rows."""
        options = self.model.options
        if not hasattr(options, "auxk_coefficient"):
            return None
        if not plan.dead:
            entries.logs = {"auxk": torch.zeros_like(entries.fvu)} | entries.logs
            return None
        k = options.auxk or -(-at.x_BD.shape[1] // 2)
        dead_A = self.kit.dead_rows(self.model.silent, options.dead_after_tokens, plan.dead)
        loss, extra = self.kit.auxk(
            at.x_BD, entries.grad_BD, at.scale, self.rows.W_enc_c, self.model.b_enc.data,
            self.rows.W_dec_c, dead_A, k, options.auxk_coefficient,
        )  # fmt: skip
        entries.loss = entries.loss + options.auxk_coefficient * loss
        entries.logs = {"auxk": loss} | entries.logs
        return extra

    def _look(self, x_BD: Tensor, step: int) -> None:
        """Choose the shapes of the next steps. The only place where the host waits."""
        options, ahead = self.model.options, AHEAD
        dead = capacity = 0
        if getattr(options, "auxk_coefficient", 0):
            # nothing can be dead before the next look that is not as silent as this now
            after = options.dead_after_tokens
            ahead = max(1, min(ahead, after // (4 * len(x_BD))))
            possible = int((self.model.silent > after - ahead * len(x_BD)).sum())
            dead = min(max(64, _next_power(possible)), len(self.model.silent)) if possible else 0
        if self.formula is not FORMULAS["TopK"]:
            if missing := int(self.lacking):
                self.room *= 2
                self.lacking.zero_()
                logger.warning(
                    "before step %d some tokens had more latents on than a list held, by up to %d; "
                    "the last of these were left out. Lists are longer from now on",
                    step, missing,
                )  # fmt: skip
            wanted = int(self._fullest(x_BD, step) * self.room)
            self.fits = wanted <= LONGEST
            capacity = min(max(16, _next_power(wanted)), LONGEST)
        self.plan, self.look_at = Plan(0, capacity, dead), step + ahead

    @torch.no_grad()
    def _fullest(self, x_BD: Tensor, step: int) -> int:
        """Latents that the fullest token of a batch has on; over 512 where it has more."""
        k = self.model.options.k_at(step) if hasattr(self.model.options, "k_at") else 0
        if self.stale:
            self.rows.W_enc_c.copy_(self.rows.W_enc)
            self.rows.W_dec_c.copy_(self.rows.W_dec)
        kept = self.formula.keep(self._batch(Plan(k, LONGEST, 0), x_BD))
        assert kept.lacking is not None
        used = (kept.idx_BK < len(self.rows.W_enc)).sum(-1).amax()
        return int(used + kept.lacking)


def _next_power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _begin_adam(adam: torch.optim.Adam, parameter: torch.nn.Parameter) -> None:
    """What torch's Adam would set up at its first step."""
    state = adam.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter.data)
        state["exp_avg_sq"] = torch.zeros_like(parameter.data)


def _rows(model: Any, adam: torch.optim.Adam, compute: torch.dtype) -> Rows:
    W_enc, W_dec = model.W_enc, model.W_dec
    enc, dec = adam.state[W_enc], adam.state[W_dec]
    return Rows(
        W_enc.data, W_dec.data, enc["exp_avg"], enc["exp_avg_sq"], dec["exp_avg"],
        dec["exp_avg_sq"], W_enc.data.to(compute), W_dec.data.to(compute),
    )  # fmt: skip
