"""A checkout of github.com/openai/sparse_autoencoder, whose kernels are behind its FastAutoencoder:
that class and its helpers, in a loop like that of its train.py, which has no data of its own and
never sets gradients back to zero.
"""

import importlib.util
import sys
import types

import torch
from torch import Tensor

from benchmarks.train.peers import Reconstruct, Task

AUXK = 256
"""Its Config's."""
AUXK_COEFFICIENT = 1 / 32
DEAD_TOKENS = 10_000_000


class OpenAI:
    """fp16 autocast with a GradScaler and fused Adam, as there. Inputs of mean norm 1."""

    def __init__(self, task: Task) -> None:
        if importlib.util.find_spec("wandb") is None:
            # its train.py imports it at the top; nothing here calls it
            sys.modules["wandb"] = types.ModuleType("wandb")
        from sparse_autoencoder import kernels, train

        self.kernels, self.train, self.task = kernels, train, task
        torch.manual_seed(task.seed)
        self.scale = float(1 / task.sample.norm(dim=-1).mean())
        sample = task.sample * self.scale
        dead = DEAD_TOKENS // task.batch
        self.ae = train.FastAutoencoder(task.d_sae, task.d_in, task.k, AUXK, dead).to(task.device)
        self.ae.pre_bias.data = sample.mean(0)
        with torch.no_grad(), torch.autocast("cuda", torch.float16):
            out = self.ae(sample[:256])[0] - self.ae.pre_bias
            length = (sample[:256] - self.ae.pre_bias).norm(dim=-1).mean()
            self.ae.encoder.weight.data *= length / out.norm(dim=-1).mean()
        self.mse_scale = float(1 / (sample - sample.mean(0)).pow(2).mean())
        self.scaler = torch.amp.GradScaler("cuda")
        self.adam = torch.optim.Adam(self.ae.parameters(), lr=task.lr, eps=6.25e-10, fused=True)

    def step(self, number: int, x: Tensor) -> None:
        task, ae, kernels = self.task, self.ae, self.kernels
        decay = max(1, round(task.steps * task.decay_share))
        share = min(1.0, (number + 1) / max(task.warmup, 1), (task.steps - number) / decay)
        self.adam.param_groups[0]["lr"] = (task.lr or 1e-4) * share
        x = x * self.scale
        with torch.autocast("cuda", torch.float16):
            out, info = ae(x)
            loss = self.mse_scale * kernels.mse(out, x)
            revived = ae.decode_sparse(info["auxk_inds"], info["auxk_vals"])
            left = x - out.detach() + ae.pre_bias.detach()
            auxk = kernels.normalized_mse(revived, left).nan_to_num(0)
            loss = loss + AUXK_COEFFICIENT * auxk
        self.adam.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.train.unit_norm_decoder_(ae)
        self.train.unit_norm_decoder_grad_adjustment_(ae)
        self.scaler.unscale_(self.adam)
        self.scaler.step(self.adam)
        self.scaler.update()

    def result(self) -> Reconstruct:
        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            centred = x * self.scale - self.ae.pre_bias
            pre = centred @ self.ae.encoder.weight.T + self.ae.latent_bias
            values, index = pre.topk(self.task.k, dim=-1)
            acts = torch.zeros_like(pre).scatter(-1, index, values.relu())
            weight = self.ae.decoder.weight
            out = acts @ (weight / weight.norm(dim=0)).T + self.ae.pre_bias
            return out / self.scale, acts > 0

        return reconstruct
