"""What the Lightning callback costs: whole training steps with it and with others, against none, interleaved."""

from __future__ import annotations

import logging
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import grad_norm
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.models import Workload, convolutions, encoder
from benchmarks.routes import histogram
from benchmarks.timing import quartiles, ratios
from gradwatch import GradWatchCallback
from gradwatch.cadence import DENSE_STEPS

NONE = "no callback"
STEPS = 120


class Module(pl.LightningModule):
    """Steps on a workload's loss."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.net, self.loss = workload.model, workload.loss

    def training_step(self, _batch: Tensor, _index: int) -> Tensor:
        """Ignore the batch: a workload brings its own data."""
        return self.loss()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class GradNorm(pl.Callback):
    """Lightning's own norms of all parameters, logged at each step."""

    def on_before_optimizer_step(
        self, _trainer: pl.Trainer, pl_module: pl.LightningModule, _optimizer: torch.optim.Optimizer
    ) -> None:
        """Log as the documentation shows."""
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class Histograms(pl.Callback):
    """A 64-bin histogram of each gradient, at each step."""

    def on_before_optimizer_step(
        self, _trainer: pl.Trainer, pl_module: pl.LightningModule, _optimizer: torch.optim.Optimizer
    ) -> None:
        """Reduce every gradient."""
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                histogram(parameter.grad)


class Clock(pl.Callback):
    """Process time of all steps but the first few, in which the watch plans and looks densely."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_batch_start(
        self, _trainer: pl.Trainer, _module: pl.LightningModule, _batch: Tensor, index: int
    ) -> None:
        """Start behind the dense steps."""
        if index == DENSE_STEPS:
            self.seconds = -time.process_time()

    def on_train_end(self, _trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Stop."""
        self.seconds += time.process_time()


CALLBACKS: dict[str, Callable[[], list[pl.Callback]]] = {
    NONE: list,
    "GradWatchCallback": lambda: [GradWatchCallback(sinks=[])],
    "Lightning's grad_norm": lambda: [GradNorm()],
    "64-bin histogram a parameter": lambda: [Histograms()],
}


def fitted(workload: Workload, callbacks: list[pl.Callback], device: torch.device) -> float:
    """Return the seconds of the later half of a short fit."""
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, clock],
    )
    trainer.fit(Module(workload), DataLoader([torch.zeros(1)] * STEPS))
    return clock.seconds


def tables(rounds: int, device: torch.device) -> None:
    """Print a table a model."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for name, make in {"CNN": convolutions, "transformer": encoder}.items():
        torch.manual_seed(0)
        workload = make(device)
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for route in random.sample(list(CALLBACKS), len(CALLBACKS)):
                seconds[route].append(fitted(workload, CALLBACKS[route](), device))
        count = len(list(workload.model.parameters()))
        print(f"\nLightning {name}: {count} tensors, {device.type}; median (quartiles) of {rounds} rounds")
        print("\n| callback | x the training step without any |\n|---|---|")
        for route, values in ratios(seconds, NONE).items():
            print(f"| {route} | {quartiles(values)} |")
