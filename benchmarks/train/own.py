"""This project's trainer behind the same interface: an architecture, fused Adam, and the native SAE
that comes out. Steps are made by torch ops or by the Triton kernels.
"""

import dataclasses
from typing import Any

import torch
from saezoo_train.architectures import ARCHITECTURES
from saezoo_train.architectures.base import Setting
from torch import Tensor

from benchmarks.train.peers import Reconstruct, Task
from saezoo.sae import build_sae

BETA1 = {"gated": 0.0}


class Own:
    """Inputs of mean norm 1; the scale is folded away in `result`, which runs the exported SAE.

    The option `raw_inputs` leaves the scale out, to show what it is for; `optimiser.beta2` is
    Adam's.
    """

    def __init__(
        self,
        task: Task,
        architecture: str,
        *,
        kernels: bool = False,
        compute: torch.dtype = torch.bfloat16,
    ) -> None:
        """compute: of the kernels' products."""
        sample = task.sample
        given = dict(task.options)
        scale = 1.0 if given.pop("raw_inputs", False) else float(1 / sample.norm(dim=-1).mean())
        mean = sample.mean(0) * scale
        betas = (BETA1.get(architecture, 0.9), given.pop("optimiser.beta2", 0.999))
        kind = ARCHITECTURES[architecture]
        options: dict[str, Any] = {"d_sae": task.d_sae} | given
        if "k" in kind.Options.model_fields:
            options["k"] = task.k
        if "target_l0" in kind.Options.model_fields:
            options.setdefault("target_l0", task.k)
        setting = Setting(
            mean_D=mean,
            variance=float((sample * scale - mean).pow(2).sum(-1).mean()),
            scale=scale,
            sample_SD=sample * scale,
            steps=task.steps,
            batch=task.batch,
            seed=task.seed,
        )
        self.task, self.scale = task, scale
        # it is made where its initial numbers are drawn, and then moved
        on_cpu = dataclasses.replace(
            setting, mean_D=setting.mean_D.cpu(), sample_SD=setting.sample_SD.cpu()
        )
        self.model = kind(kind.Options(**options), on_cpu).to(task.device)
        self.lr = task.lr or 1e-3 * (5120 / task.d_sae) ** 0.5
        self.adam = torch.optim.Adam(self.model.parameters(), lr=self.lr, betas=betas, fused=True)
        self.kernel_step = None
        if kernels:
            from saezoo_train.kernels import kit
            from saezoo_train.kernels.step import KernelStep

            self.kernel_step = KernelStep(self.model, self.adam, kit=kit, compute=compute)

    def step(self, number: int, x: Tensor) -> None:
        task = self.task
        decay = max(1, round(task.steps * task.decay_share))
        share = min(1.0, (number + 1) / max(task.warmup, 1), (task.steps - number) / decay)
        self.adam.param_groups[0]["lr"] = self.lr * share
        x = x.float() * self.scale
        if self.kernel_step is not None and self.kernel_step.takes(x, number):
            self.kernel_step(x, number, self.lr * share)
            return
        loss = self.model.training_step(x, number).loss
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.model.before_update()
        self.adam.step()
        self.model.after_update()

    def result(self) -> Reconstruct:
        sae = build_sae(*self.model.to_native({}))

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            features = sae.encode(x)
            return sae.decode(features, x), features != 0

        return reconstruct
