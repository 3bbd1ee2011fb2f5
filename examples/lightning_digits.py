"""A convolutional network on handwritten digits under a Lightning Trainer: one callback watches it."""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from digits import batches
from torch import nn
from torch.utils.data import DataLoader

from gradwatch import GradWatchCallback


class Digits(pl.LightningModule):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 3 * 3, 10),
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _index: int) -> torch.Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        logits = self.net(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("loss", loss)
        self.log("accuracy", (logits.argmax(dim=1) == labels).float().mean(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    """Train for two epochs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log-dir", help="folder for TensorBoard", default="runs/lightning")
    arguments = parser.parse_args()
    pl.seed_everything(0)
    callback = GradWatchCallback()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="auto",
        log_every_n_steps=2,
        enable_checkpointing=False,
        logger=pl.loggers.TensorBoardLogger(arguments.log_dir, name="", version=""),
        callbacks=[callback],
    )
    trainer.fit(Digits(), DataLoader(batches(size=32), batch_size=None))
    print(f"\ngradwatch found: {', '.join(alert.kind for alert in callback.alerts) or 'nothing to say'}")
    print(f"The whole run: tensorboard --logdir {arguments.log_dir}")


if __name__ == "__main__":
    main()
