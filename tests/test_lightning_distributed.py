"""Two processes under a Lightning Trainer: the same alerts and norms on each rank, files by rank zero alone."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import GradWatchCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own advice


class Ranked:
    """A sink that writes one file a rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, snapshot, alerts, interventions):
        path = self.folder / f"rank{torch.distributed.get_rank()}.jsonl"
        record = {"step": snapshot.step, "norm": snapshot.global_norm, "alerts": [a.kind for a in alerts]}
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def flush(self):
        pass

    def close(self):
        pass


class Deep(pl.LightningModule):
    """A network whose gradient vanishes."""

    def __init__(self) -> None:
        super().__init__()
        layers = [part for _ in range(12) for part in (nn.Linear(8, 8), nn.Sigmoid())]
        self.net = nn.Sequential(*layers, nn.Linear(8, 3))

    def training_step(self, batch, index):
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(160, 8), torch.randint(0, 3, (160,)))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=1,
        logger=pl.loggers.TensorBoardLogger(folder),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GradWatchCallback(name="files", sinks=[Ranked(folder)])],
    )
    trainer.fit(Deep(), DataLoader(data, batch_size=16))
    return folder


def test_both_ranks_see_the_same_norms_and_raise_the_same_alert(folder):
    first, second = (
        [json.loads(line) for line in (folder / f"rank{r}.jsonl").read_text().splitlines()] for r in (0, 1)
    )

    assert [record["step"] for record in first] == list(range(5))
    assert [r["norm"] for r in first] == pytest.approx([r["norm"] for r in second], rel=1e-6)
    assert [r["alerts"] for r in first] == [r["alerts"] for r in second]
    assert ["vanishing"] in [r["alerts"] for r in first]


def test_one_event_file_is_written(folder):
    assert len(list(folder.rglob("events.out.tfevents.*"))) == 1
