"""Small real training runs, healthy ones with something odd about them and sick ones, as plain functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

_DIGITS = load_digits()
IMAGES = torch.tensor((_DIGITS.data - _DIGITS.data.mean()) / _DIGITS.data.std(), dtype=torch.float32)
LABELS = torch.tensor(_DIGITS.target)


@dataclass
class Run:
    """A run as its parts; `step(t)` makes the whole t-th step and returns its losses by optimizer."""

    models: nn.Module | Mapping[str, nn.Module]
    optimizers: Optimizer | Mapping[str, Optimizer]
    step: Callable[[int, Callable[..., None]], None]
    steps: int = 150


def chosen(step: int, size: int = 64) -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, len(IMAGES), (size,), generator=torch.Generator().manual_seed(1000 + step))
    return IMAGES[rows], LABELS[rows]


def layers(*widths: int, activation: type[nn.Module] = nn.ReLU, init: Callable[[nn.Linear], object] | None = None):
    made: list[nn.Module] = []
    for before, after in pairwise(widths):
        linear = nn.Linear(before, after)
        if init is not None:
            init(linear)
        made += [linear, activation()]
    return nn.Sequential(*made[:-1])


def he(linear: nn.Linear) -> None:
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)


def supervised(model: nn.Module, optimizer: Optimizer, *, steps: int = 150, after=None, loss_of=None, at=None) -> Run:
    def step(index, log):
        optimizer.zero_grad()
        if at is not None:
            at(index)
        inputs, labels = chosen(index)
        compute = loss_of or functional.cross_entropy
        loss = compute(model(inputs), labels)
        log(loss)
        loss.backward()
        optimizer.step()
        if after is not None:
            after()

    return Run(model, optimizer, step, steps)


# -- healthy, with a trap ----------------------------------------------------------------------------------------


def zero_initialised_head() -> Run:
    model = layers(64, 64, 64, 64, 64, 10, init=he)
    nn.init.zeros_(model[-1].weight)
    return supervised(model, SGD(model.parameters(), lr=0.05))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.gate * self.second(functional.relu(self.first(inputs)))


def rezero() -> Run:
    model = nn.Sequential(nn.Linear(64, 48), *(Residual(48) for _ in range(12)), nn.Linear(48, 10))
    return supervised(model, AdamW(model.parameters(), lr=1e-3))


class LoRA(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.frozen = linear.requires_grad_(requires_grad=False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.frozen(inputs) + self.up(self.down(inputs))


def lora() -> Run:
    model = nn.Sequential(
        *(part for _ in range(4) for part in (LoRA(nn.Linear(64, 64)), nn.GELU())), LoRA(nn.Linear(64, 10))
    )
    return supervised(model, AdamW(model.parameters(), lr=2e-3))


def gan() -> Run:
    generator = layers(8, 64, 64, 2)
    critic = layers(2, 64, 64, 1)
    opt_g, opt_d = Adam(generator.parameters(), lr=1e-3), Adam(critic.parameters(), lr=1e-3)

    def real_and_noise(index: int) -> tuple[Tensor, Tensor]:
        seeded = torch.Generator().manual_seed(index)
        angle = torch.rand(64, generator=seeded) * 6.28
        return torch.stack([angle.cos(), angle.sin()], dim=1), torch.randn(64, 8, generator=seeded)

    def step(index, log):
        real, noise = real_and_noise(index)
        opt_d.zero_grad()
        loss = functional.softplus(-critic(real)).mean() + functional.softplus(critic(generator(noise).detach())).mean()
        log(loss, optimizer="d")
        loss.backward()
        opt_d.step()
        if index % 2:
            opt_g.zero_grad()
            loss = functional.softplus(-critic(generator(noise))).mean()
            log(loss, optimizer="g")
            loss.backward()
            opt_g.step()

    return Run({"g": generator, "d": critic}, {"g": opt_g, "d": opt_d}, step, 200)


def accumulation_with_a_partial_last_window() -> Run:
    model = layers(64, 64, 64, 64, 64, 10, init=he)
    optimizer = SGD(model.parameters(), lr=0.1)

    def step(index, log):
        window = 1 if index % 5 == 4 else 4
        optimizer.zero_grad()
        for micro in range(window):
            inputs, labels = chosen(4 * index + micro, 16)
            loss = functional.cross_entropy(model(inputs), labels)
            log(loss)
            (loss / 4).backward()
        optimizer.step()

    return Run(model, optimizer, step)


def converged() -> Run:
    model = layers(64, 64, 64, 10)
    inputs, labels = chosen(0)

    def loss_of(_logits: Tensor, _labels: Tensor) -> Tensor:
        return functional.cross_entropy(model(inputs), labels)

    return supervised(model, Adam(model.parameters(), lr=3e-3), steps=400, loss_of=loss_of)


def frozen_backbone() -> Run:
    model = layers(64, 64, 64, 64, 10)
    model[:4].requires_grad_(requires_grad=False)
    return supervised(model, Adam(model.parameters(), lr=1e-3))


def fine_tuning_at_1e_5() -> Run:
    model = layers(64, 64, 64, 64, 64, 10, init=he)
    before = Adam(model.parameters(), lr=2e-3)
    for index in range(60):
        before.zero_grad()
        inputs, labels = chosen(index)
        functional.cross_entropy(model(inputs), labels).backward()
        before.step()
    return supervised(model, AdamW(model.parameters(), lr=1e-5))


def hinge_loss_that_is_done() -> Run:
    model = layers(64, 64, 64, 10)
    inputs, labels = chosen(0, 32)

    def loss_of(_logits: Tensor, _labels: Tensor) -> Tensor:
        return functional.multi_margin_loss(model(inputs), labels)

    return supervised(model, SGD(model.parameters(), lr=0.5), steps=250, loss_of=loss_of)


class Experts(nn.Module):
    """Six experts of which the router uses two."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(layers(64, 32, 32, init=he) for _ in range(6))
        self.head = nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        weights = torch.tensor([0.5, 0.0, 0.0, 0.5, 0.0, 0.0])
        return self.head(sum(weight * expert(inputs) for weight, expert in zip(weights, self.experts, strict=True)))


def idle_experts() -> Run:
    model = Experts()
    return supervised(model, Adam(model.parameters(), lr=1e-3))


def change_of_task() -> Run:
    model = layers(64, 64, 64, 10)
    now = {"step": 0}

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels if now["step"] < 150 else (labels + 1) % 10)

    return supervised(
        model, Adam(model.parameters(), lr=2e-3), steps=250, loss_of=loss_of, at=lambda step: now.update(step=step)
    )


def cosine_to_zero() -> Run:
    model = layers(64, 64, 64, 10)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = CosineAnnealingLR(optimizer, T_max=200)
    return supervised(model, optimizer, steps=200, after=schedule.step)


def batch_normalised_cnn() -> Run:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 10),
    )
    return supervised(model, SGD(model.parameters(), lr=0.1, momentum=0.9))


def pre_norm_transformer() -> Run:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Linear(8, 32), body, nn.Flatten(), nn.Linear(256, 10))
    return supervised(model, AdamW(model.parameters(), lr=1e-3), steps=80)


def tiny_loss_scale() -> Run:
    model = layers(64, 64, 64, 64, 64, 10, init=he)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return 1e-5 * functional.cross_entropy(logits, labels)

    return supervised(model, Adam(model.parameters(), lr=1e-3, eps=1e-16), loss_of=loss_of)


TRAPS = [
    zero_initialised_head,
    rezero,
    lora,
    gan,
    accumulation_with_a_partial_last_window,
    converged,
    frozen_backbone,
    fine_tuning_at_1e_5,
    hinge_loss_that_is_done,
    idle_experts,
    change_of_task,
    cosine_to_zero,
]
ORDINARY = [batch_normalised_cnn, pre_norm_transformer, tiny_loss_scale]


# -- sick --------------------------------------------------------------------------------------------------------


def deep_sigmoid() -> Run:
    model = layers(64, *[32] * 12, 10, activation=nn.Sigmoid)
    return supervised(model, SGD(model.parameters(), lr=0.1), steps=40)


def small_initialisation() -> Run:
    model = layers(64, *[64] * 8, 10, activation=nn.Tanh, init=lambda linear: nn.init.normal_(linear.weight, std=0.02))
    return supervised(model, SGD(model.parameters(), lr=0.1), steps=40)


def decay_outweighs_gradient() -> Run:
    model = layers(64, 64, 64, 10)
    return supervised(model, SGD(model.parameters(), lr=0.1, weight_decay=1.0), steps=80)


def large_rate() -> Run:
    model = layers(64, 64, 64, 10)
    return supervised(model, Adam(model.parameters(), lr=1.0), steps=15)


def large_rate_of_sgd() -> Run:
    model = layers(64, 128, 128, 10, activation=nn.Tanh)
    return supervised(model, SGD(model.parameters(), lr=20.0), steps=15)


def negated_loss() -> Run:
    model = layers(64, 64, 64, 10)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return -functional.cross_entropy(logits, labels)

    return supervised(model, SGD(model.parameters(), lr=0.1), steps=80, loss_of=loss_of)


def square_root_of_zero() -> Run:
    model = layers(64, 64, 10)
    now = {"step": 0}

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits, labels)
        return loss if now["step"] < 20 else loss + (logits - logits).pow(2).sum().sqrt()

    return supervised(
        model, SGD(model.parameters(), lr=0.1), steps=40, loss_of=loss_of, at=lambda step: now.update(step=step)
    )


def zero_initialisation() -> Run:
    def zero(linear: nn.Linear) -> None:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)

    model = layers(64, 64, 64, 10, init=zero)
    return supervised(model, SGD(model.parameters(), lr=0.1), steps=40)


def constant_initialisation() -> Run:
    def constant(linear: nn.Linear) -> None:
        nn.init.constant_(linear.weight, 0.01)
        nn.init.zeros_(linear.bias)

    model = layers(64, 64, 64, 10, init=constant)
    return supervised(model, SGD(model.parameters(), lr=0.1), steps=40)


def dead_units() -> Run:
    model = layers(64, 64, 64, 64, 10, init=he)
    nn.init.constant_(model[2].bias, -50.0)
    return supervised(model, Adam(model.parameters(), lr=1e-3), steps=40)


def backbone_not_in_the_optimizer() -> Run:
    model = layers(64, 64, 64, 10)
    return supervised(model, Adam(model[-1].parameters(), lr=1e-3), steps=40)


SICK = {
    deep_sigmoid: "vanishing",
    small_initialisation: "vanishing",
    decay_outweighs_gradient: "vanishing",
    large_rate: "exploding",
    large_rate_of_sgd: "exploding",
    negated_loss: "exploding",
    square_root_of_zero: "nonfinite",
    zero_initialisation: "dead",
    constant_initialisation: "dead",
    dead_units: "dead",
    backbone_not_in_the_optimizer: "unoptimized",
}
