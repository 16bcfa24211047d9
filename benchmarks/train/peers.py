"""One training run of each library behind one small interface: `step` on raw activations, then
`result`, which reconstructs raw activations.

Each library gets the activations in the units that its own documentation asks for, and starts
b_dec as its own code does. The learning rate, warm-up and decay are given, because the peers'
defaults warm up for longer than these runs last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Raw activations (tokens, d) -> the reconstruction (tokens, d), and which features are on
(tokens, d_sae).
"""


@dataclass(frozen=True)
class Task:
    """What all libraries are given."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int
    seed: int
    lr: float | None
    warmup: int
    decay_share: float
    penalty: float | None
    """The sparsity coefficient, where L0 follows from one (the peers')."""
    options: dict[str, Any]
    """This project's further options of the architecture."""
    sample: Tensor
    """(tokens, d) raw activations, to take means and scales from."""
    device: str = "cpu"
    autocast: bool = False
    """Products in bfloat16, where a library leaves that to its user."""


class DictionaryLearning:
    """saprmarks/dictionary_learning: its trainers' own `update`. Inputs of mean square norm 1, as
    its trainSAE(normalize_activations=True) makes them.
    """

    def __init__(self, task: Task, architecture: str) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.gdm import GatedSAETrainer
        from dictionary_learning.trainers.jumprelu import JumpReluTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.scale = float(task.sample.pow(2).sum(-1).mean().rsqrt())
        decay = round(task.steps * (1 - task.decay_share))
        common: dict[str, Any] = {
            "steps": task.steps,
            "activation_dim": task.d_in,
            "dict_size": task.d_sae,
            "layer": 0,
            "lm_name": "benchmark",
            "seed": task.seed,
            "warmup_steps": task.warmup,
            "decay_start": decay if task.decay_share else None,
            "device": task.device,
        }
        self.autocast = task.autocast
        if task.lr is not None:
            common["lr"] = task.lr
        sparse = {"sparsity_warmup_steps": task.warmup}
        if architecture == "topk":
            self.trainer = TopKTrainer(k=task.k, **common)
        elif architecture == "batchtopk":
            self.trainer = BatchTopKTrainer(
                k=task.k, threshold_start_step=task.steps // 2, **common
            )
        elif architecture == "gated":
            self.trainer = GatedSAETrainer(l1_penalty=task.penalty or 0.1, **sparse, **common)
        else:
            torch.manual_seed(task.seed)
            self.trainer = JumpReluTrainer(
                target_l0=float(task.k), sparsity_penalty=task.penalty or 1.0, **sparse, **common
            )

    def step(self, number: int, x: Tensor) -> None:
        # as its trainSAE(autocast_dtype=torch.bfloat16) does on a GPU
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            self.trainer.update(number, x * self.scale)

    def result(self) -> Reconstruct:
        ae, scale = self.trainer.ae, self.scale

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            features = ae.encode(x * scale)
            return ae.decode(features) / scale, features != 0

        return reconstruct


class Sparsify:
    """EleutherAI/sparsify: SparseCoder's forward and the lines of its Trainer around it (which
    itself runs inside a language model). Raw inputs; its loss divides by the variance.
    """

    def __init__(self, task: Task, optimiser: str) -> None:
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        torch.manual_seed(task.seed)
        self.coder = SparseCoder(
            task.d_in,
            SparseCoderConfig(num_latents=task.d_sae, k=task.k),
            device=task.device,
            dtype=torch.float32,
        )
        self.schedule = None
        if optimiser == "signum":
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            rate = task.lr or 5e-3 / (task.d_sae / 2**14) ** 0.5
            groups = [{"params": self.coder.parameters(), "lr": rate}]
            self.optimiser = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
            self.optimiser.train()
        else:
            from transformers import get_linear_schedule_with_warmup

            rate = task.lr or 2e-4 / (task.d_sae / 2**14) ** 0.5
            self.optimiser = torch.optim.Adam(self.coder.parameters(), lr=rate)
            self.schedule = get_linear_schedule_with_warmup(self.optimiser, task.warmup, task.steps)
        self.free = optimiser == "signum"

    def step(self, number: int, x: Tensor) -> None:
        coder = self.coder
        if self.free:
            self.optimiser.train()
        if number == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.schedule is not None:
            self.schedule.step()

    def result(self) -> Reconstruct:
        if self.free:
            self.optimiser.eval()
        coder = self.coder
        coder.set_decoder_norm_to_unit_norm()

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            acts, index, _ = coder.encode(x)
            on = torch.zeros(len(x), coder.num_latents, dtype=torch.bool, device=x.device)
            return coder.decode(acts, index), on.scatter(-1, index, acts > 0)

        return reconstruct


class SAELens:
    """decoderesearch/SAELens: its SAETrainer's own `step`. Inputs of mean norm sqrt(d), which it
    calls expected_average_only_in.
    """

    def __init__(self, task: Task, architecture: str) -> None:
        from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(task.seed)
        self.scale = float(task.d_in**0.5 / task.sample.norm(dim=-1).mean())
        common = {"d_in": task.d_in, "d_sae": task.d_sae, "dtype": "float32"}
        common["device"] = task.device
        if architecture == "topk":
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=task.k, **common))
        else:
            sae = JumpReLUTrainingSAE(
                JumpReLUTrainingSAEConfig(
                    l0_coefficient=task.penalty or 1.0, l0_warm_up_steps=task.warmup, **common
                )
            )
        sae.b_dec.data = task.sample.mean(0) * self.scale
        config = SAETrainerConfig(
            total_training_samples=task.steps * task.batch,
            train_batch_size_samples=task.batch,
            lr=task.lr or 3e-4,
            lr_end=(task.lr or 3e-4) / 10,
            lr_warm_up_steps=task.warmup,
            lr_decay_steps=round(task.steps * task.decay_share),
            device=task.device,
            autocast=task.autocast,
        )
        self.trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(self, number: int, x: Tensor) -> None:  # noqa: ARG002 the trainer counts itself
        self.trainer.sae.train()
        self.trainer.step(x * self.scale)
        self.trainer.n_training_steps += 1

    def result(self) -> Reconstruct:
        sae, scale = self.trainer.sae.eval(), self.scale

        def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
            features = sae.encode(x * scale)
            return sae.decode(features) / scale, features != 0

        return reconstruct


LIBRARIES: dict[str, Callable[[Task, str], Any]] = {
    "dictionary_learning": DictionaryLearning,
    "sparsify": lambda task, _: Sparsify(task, "signum"),
    "sparsify, Adam": lambda task, _: Sparsify(task, "adam"),
    "SAELens": SAELens,
}
"""A run of the library for a task and an architecture."""
