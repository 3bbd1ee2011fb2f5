"""Runs that diverge or stall by themselves, with and without each mitigation: ``make mitigate``.

Every case is trained over three seeds; beside it the healthy run with the same mitigation, where nothing may change.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import gradwatch

SEEDS = (0, 1, 2)
LAST = 30
"""Losses at the end of a run whose median is its result."""

Mitigation = Callable[[], dict[str, list[Any]]]
NONE: dict[str, Mitigation] = {"nothing": dict}


@dataclass(frozen=True, slots=True)
class Case:
    """One task, sick and healthy, and what is tried."""

    title: str
    train: Callable[[bool, dict[str, list[Any]], int], tuple[list[float], int]]
    mitigations: dict[str, Mitigation]


def follow(
    model: nn.Module,
    optimizer: Optimizer,
    losses: Iterator[Tensor],
    mitigation: dict[str, list[Any]],
    scheduler: LambdaLR | None = None,
) -> tuple[list[float], int]:
    """Train under a watch; return the losses and the number of interventions."""
    found: list[float] = []
    watch = gradwatch.watch(model, optimizer, sinks=[], **mitigation)  # type: ignore[arg-type]
    try:
        for loss in losses:
            optimizer.zero_grad()
            watch.log_loss(loss)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            found.append(float(loss.detach()))
            if watch.should_stop:
                break
    except gradwatch.TrainingStopped:
        found.append(math.nan)
    watch.close()
    return found, len([made for made in watch.interventions if made.kind != "clip_rate"])


# -- a recurrent network on the adding problem -------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A ReLU network with identity weights (Le, Jaitly, Hinton, 2015)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.cell, self.head = nn.RNN(2, width, nonlinearity="relu", batch_first=True), nn.Linear(width, 1)
        nn.init.eye_(self.cell.weight_hh_l0)
        nn.init.normal_(self.cell.weight_ih_l0, std=0.001)

    def forward(self, inputs: Tensor) -> Tensor:
        """Read the answer off the last state."""
        head: Tensor = self.head(self.cell(inputs)[0][:, -1])
        return head


def adding(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Two numbers of each sequence are marked; their sum less its mean is wanted."""
    values, marks = torch.rand(size, length), torch.zeros(size, length)
    rows = torch.arange(size)
    marks[rows, torch.randint(0, length // 2, (size,))] = 1
    marks[rows, torch.randint(length // 2, length, (size,))] = 1
    return torch.stack([values, marks], -1), (values * marks).sum(1, keepdim=True) - 1


def recurrent(sick: bool, mitigation: dict[str, list[Any]], steps: int = 2500) -> tuple[list[float], int]:  # noqa: FBT001
    """Plain SGD; sick at a rate at which the gradient explodes now and then."""
    model = Recurrent()
    optimizer = SGD(model.parameters(), lr=0.05 if sick else 0.005)

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            inputs, targets = adding(32, 10)
            yield functional.mse_loss(model(inputs), targets)

    return follow(model, optimizer, losses(), mitigation)


# -- a transformer with bad batches ------------------------------------------------------------------------------------


def _text() -> Tensor:
    raw = " ".join(inspect.getdoc(getattr(functional, name)) or "" for name in sorted(dir(functional)))
    return torch.tensor([ord(character) % 64 for character in raw])


class Characters(nn.Module):
    """A causal language model over torch's transformer layers."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, width), nn.Linear(width, 64)
        self.position = nn.Parameter(0.02 * torch.randn(32, width))
        make = nn.TransformerEncoderLayer
        self.layers = nn.ModuleList(
            make(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character at every place."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.embed(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def transformer(sick: bool, mitigation: dict[str, list[Any]], steps: int = 500) -> tuple[list[float], int]:  # noqa: FBT001
    """AdamW; sick with six batches whose labels are shuffled and whose loss is a thousand times too large."""
    model, text = Characters(), _text()
    optimizer = AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.999))
    bad = {200, 240, 280, 320, 360, 400} if sick else set()

    def losses() -> Iterator[Tensor]:
        for step in range(steps):
            starts = torch.randint(0, len(text) - 33, (12,)).tolist()
            chunk = torch.stack([text[start : start + 33] for start in starts])
            wanted = chunk[:, 1:].flatten()
            if step in bad:
                wanted = wanted[torch.randperm(len(wanted))]
            loss = functional.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), wanted)
            yield loss * (1000.0 if step in bad else 1.0)

    return follow(model, optimizer, losses(), mitigation)


# -- digits: a rate that becomes too high, and a deep plain net --------------------------------------------------------

_INPUTS, _LABELS = load_digits(return_X_y=True)
INPUTS = torch.tensor((_INPUTS - _INPUTS.mean()) / _INPUTS.std(), dtype=torch.float32)
LABELS = torch.tensor(_LABELS)


def _digits(model: nn.Module, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        rows = torch.randint(0, len(INPUTS), (64,))
        yield functional.cross_entropy(model(INPUTS[rows]), LABELS[rows])


def _plain(depth: int, width: int = 64) -> nn.Sequential:
    widths = [64, *[width] * depth]
    made: list[nn.Module] = []
    for index in range(depth):
        made += [nn.Linear(widths[index], widths[index + 1]), nn.ReLU()]
    return nn.Sequential(*made, nn.Linear(width, 10))


def ramp(sick: bool, mitigation: dict[str, list[Any]], steps: int = 700) -> tuple[list[float], int]:  # noqa: FBT001
    """SGD with momentum whose rate rises over 300 steps; sick to four times what the net can bear."""
    model = _plain(4)
    optimizer = SGD(model.parameters(), lr=1.0 if sick else 0.05, momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 300))
    return follow(model, optimizer, _digits(model, steps), mitigation, scheduler)


def deep(sick: bool, mitigation: dict[str, list[Any]], steps: int = 500) -> tuple[list[float], int]:  # noqa: FBT001
    """Twenty plain layers under torch's default initialisation, or three."""
    model = _plain(20 if sick else 3)
    kept = {name: value for name, value in mitigation.items() if name != "initialise"}
    for initialise in mitigation.get("initialise", []) if sick else []:
        initialise(model, INPUTS[:256])
    optimizer = AdamW(model.parameters(), lr=1e-3)
    return follow(model, optimizer, _digits(model, steps), kept)


CASES = (
    Case(
        "Recurrent network, adding problem of 10 steps, SGD 0.05 (healthy: 0.005)",
        recurrent,
        {
            "ClipByGlobalNorm(10.0)": lambda: {"transforms": [gradwatch.ClipByGlobalNorm(10.0)]},
            "ZClip(z=25)": lambda: {"transforms": [gradwatch.ZClip(z=25)]},
        },
    ),
    Case(
        "Transformer, AdamW 3e-3, six bad batches x 1000 (healthy: none)",
        transformer,
        {
            "ClipByGlobalNorm(10.0)": lambda: {"transforms": [gradwatch.ClipByGlobalNorm(10.0)]},
            "ZClip(z=10)": lambda: {"transforms": [gradwatch.ZClip(z=10)]},
            "SkipSpike()": lambda: {"transforms": [gradwatch.SkipSpike()]},
        },
    ),
    Case(
        "Four layers, SGD momentum 0.9, rate rising to 1.0 (healthy: to 0.05)",
        ramp,
        {
            "BackOffLR()": lambda: {"reactions": [gradwatch.BackOffLR()]},
            "BackOffLR() + Rollback()": lambda: {
                "reactions": [gradwatch.BackOffLR(), gradwatch.Rollback(every=20)],
                "transforms": [gradwatch.SkipNonfinite()],
            },
        },
    ),
    Case(
        "Twenty plain ReLU layers, AdamW 1e-3 (healthy: three layers)",
        deep,
        {
            "init_(model, batch)": lambda: {"initialise": [gradwatch.init_]},
            "lsuv_(model, batch)": lambda: {"initialise": [gradwatch.lsuv_]},
        },
    ),
)


def _train(job: tuple[int, str, bool, int]) -> tuple[float, int]:
    place, name, sick, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    case = CASES[place]
    mitigation = (NONE | case.mitigations)[name]()
    losses, interventions = case.train(sick, mitigation)  # type: ignore[call-arg]
    last = losses[-LAST:]
    return (median(last) if all(map(math.isfinite, last)) else math.nan), interventions


def main() -> None:
    """Print one table a case."""
    jobs = [
        (place, name, sick, seed)
        for place, case in enumerate(CASES)
        for name in (NONE | case.mitigations)
        for sick in (True, False)
        for seed in SEEDS
    ]
    with ProcessPoolExecutor(2) as pool:
        results = dict(zip(jobs, pool.map(_train, jobs), strict=True))
    for place, case in enumerate(CASES):
        print(f"\n{case.title}: median of the last {LAST} losses, seeds 0, 1, 2\n")
        print("| with | sick | interventions | healthy | interventions |\n|---|---|---|---|---|")
        for name in NONE | case.mitigations:
            sick, healthy = ([results[place, name, kind, seed] for seed in SEEDS] for kind in (True, False))
            print(f"| {name} | {_row(sick)} | {_row(healthy)} |")


def _row(found: list[tuple[float, int]]) -> str:
    losses = " ".join("diverged" if math.isnan(loss) else f"{loss:.3g}" for loss, _ in found)
    return f"{losses} | {' '.join(str(count) for _, count in found)}"


if __name__ == "__main__":
    main()
