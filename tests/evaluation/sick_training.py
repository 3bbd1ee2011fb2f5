"""Faults of the training loop: rates, schedules, precision, data, structure, time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam

from evaluation.parts import (
    CANCER,
    CANCER_LABELS,
    DIABETES_TARGETS,
    DIGIT_LABELS,
    DIGITS,
    IMAGES,
    RAW_CANCER,
    RAW_DIGITS,
    RAW_WINE,
    WINE_LABELS,
    Characters,
    Loop,
    Recurrent,
    adam,
    adamw,
    cnn,
    digits,
    he,
    images,
    jump,
    language,
    mlp,
    moons,
    normal,
    regression,
    rows_of,
    scaled_cell,
    scheduled,
    sequence,
    sgd,
    table,
    times,
    xavier,
)
from evaluation.training import Training, sick

# -- rates -----------------------------------------------------------------------------------------------------------

HOT = "exploding nonfinite dead spike"
sick("sgd_rate_1_5_layers", HOT, "learning_rate", lambda: digits(mlp(5, 64, nn.ReLU, he), sgd(1.0)), steps=80)
sick("sgd_rate_20_tanh", HOT + " saturated", "learning_rate", lambda: digits(mlp(3, 64, nn.Tanh), sgd(20.0)))
sick("adam_rate_1", HOT, "learning_rate", lambda: digits(mlp(3, 64), adam(1.0)))
sick("adam_rate_half_gelu", HOT, "learning_rate", lambda: digits(mlp(4, 64, nn.GELU), adam(0.5)))
sick(
    "adamw_rate_03_transformer",
    HOT + " vanishing saturated",
    "learning_rate",
    lambda: language(Characters(3), adamw(0.3)),
)
sick("momentum_095_rate_1", HOT, "learning_rate", lambda: digits(mlp(3, 64), sgd(1.5, momentum=0.95)), steps=80)
sick(
    "lstm_sgd_50", HOT, "learning_rate", lambda: sequence(Recurrent(nn.LSTM(2, 32, batch_first=True), 1), sgd(50.0), 20)
)
sick("cnn_adam_half", HOT, "learning_rate", lambda: images(cnn(3, 16), adam(0.5)))
sick(
    "loss_summed",
    HOT,
    "learning_rate",
    lambda: digits(mlp(3, 64), sgd(0.1), size=256, loss=lambda x, y: functional.cross_entropy(x, y, reduction="sum")),
)
sick(
    "loss_negated",
    HOT,
    "learning_rate unknown",
    lambda: digits(mlp(3, 64), sgd(0.3), loss=lambda x, y: -functional.cross_entropy(x, y)),
    steps=100,
)
sick(
    "rate_x300_at_60",
    HOT,
    "learning_rate",
    lambda: digits(mlp(3, 64), sgd(0.05), before=jump(0.05, 300, 60)),
    steps=100,
    onset=60,
)
sick(
    "rate_x1000_adam_at_50",
    HOT,
    "learning_rate",
    lambda: digits(mlp(3, 64), adam(1e-3), before=jump(1e-3, 1000, 50)),
    steps=90,
    onset=50,
)
sick(
    "rate_x200_for_one_step",
    HOT,
    "learning_rate",
    lambda: digits(mlp(3, 64), sgd(0.05), before=jump(0.05, 400, 50, 51)),
    steps=90,
    onset=50,
)
sick(
    "rate_grows_by_half_a_step",
    HOT,
    "learning_rate",
    lambda: digits(mlp(3, 64), sgd(0.05), before=scheduled(lambda t: 0.05 * 1.5 ** max(0, t - 40))),
    steps=80,
    onset=48,
)
sick(
    "wgan_like_critic_hot",
    HOT,
    "learning_rate depth",
    lambda: table(
        mlp(3, 64, nn.LeakyReLU, he),
        sgd(3.0),
        DIGITS,
        DIGIT_LABELS,
        loss=lambda x, y: (x * (2.0 * (y % 2) - 1)[:, None]).mean(),
    ),
)

IDLE = "learning_rate"
sick("sgd_rate_1e7", "stalled", IDLE, lambda: digits(mlp(3, 64), sgd(1e-7)))
sick("adam_rate_1e9", "stalled", IDLE, lambda: digits(mlp(3, 64), adam(1e-9)))
sick("cnn_sgd_1e7", "stalled", IDLE, lambda: images(cnn(3, 12, norm=True), sgd(1e-7)))
sick("transformer_adamw_1e9", "stalled", IDLE, lambda: language(Characters(2), adamw(1e-9)))
sick(
    "rate_x1e6_lower_at_30",
    "stalled",
    IDLE,
    lambda: digits(mlp(3, 64), sgd(0.1), before=jump(0.1, 1e-7, 30)),
    steps=80,
    onset=30,
)
sick(
    "adam_eps_1",
    "stalled",
    "learning_rate precision",
    lambda: regression(mlp(2, 32, inputs=10, outputs=1), adam(1e-4, eps=1.0), DIABETES_TARGETS / 100, scale=1e-6),
)
sick(
    "schedule_over",
    "stalled",
    IDLE,
    lambda: digits(mlp(3, 64), sgd(0.1), before=scheduled(lambda t: 0.1 if t < 40 else 1e-9)),
    steps=120,
    onset=40,
)
sick("weight_decay_1", "vanishing", IDLE, lambda: digits(mlp(3, 64), sgd(0.1, weight_decay=1.0)))
sick("adam_l2_of_5", "vanishing", IDLE, lambda: digits(mlp(3, 64), adam(1e-2, weight_decay=5.0)))

# -- gradients that are not cleared ----------------------------------------------------------------------------------

KEPT = "exploding spike"
sick("no_zero_grad_sgd", KEPT, "accumulation", lambda: digits(mlp(3, 64), sgd(0.05), clears=False))
sick("no_zero_grad_adam", KEPT, "accumulation", lambda: digits(mlp(3, 64), adam(1e-3), clears=False))
sick("no_zero_grad_clipped", KEPT, "accumulation", lambda: digits(mlp(3, 64), sgd(0.05), clears=False, clip=1.0))
sick("no_zero_grad_cnn", KEPT, "accumulation", lambda: images(cnn(3, 12), sgd(0.02, momentum=0.9), clears=False))
sick(
    "no_zero_grad_lstm",
    KEPT,
    "accumulation",
    lambda: sequence(Recurrent(nn.LSTM(2, 32, batch_first=True), 1), adam(), 20, clears=False),
)

# -- precision -------------------------------------------------------------------------------------------------------

ROUND = "precision learning_rate"
sick("bfloat16_adam_1e5", "stalled", ROUND, lambda: digits(mlp(3, 64).bfloat16(), adam(1e-5), inputs=DIGITS.bfloat16()))
sick("bfloat16_sgd_2e4", "stalled", ROUND, lambda: digits(mlp(3, 64).bfloat16(), sgd(2e-4), inputs=DIGITS.bfloat16()))
sick("bfloat16_transformer_1e5", "stalled", ROUND, lambda: language(Characters(2).bfloat16(), adamw(1e-5)), steps=40)
sick(
    "float16_adam_1e6", "stalled", ROUND, lambda: digits(mlp(3, 64).half(), adam(1e-6, eps=1e-4), inputs=DIGITS.half())
)
sick(
    "float16_tiny_loss",
    "dead vanishing",
    "precision",
    lambda: digits(
        mlp(3, 64).half(), sgd(0.1), inputs=DIGITS.half(), loss=lambda x, y: functional.cross_entropy(x, y) * 1e-6
    ),
)
sick(
    "float16_overflow",
    "nonfinite",
    "precision data",
    lambda: digits(mlp(3, 64).half(), sgd(0.1), inputs=(DIGITS * 5000).half()),
)


def autocast_loss(model: nn.Module, factor: float) -> Training:
    optimizer = SGD(model.parameters(), lr=0.1)

    def loss(_step: int) -> Tensor:
        rows = rows_of(len(DIGITS), 64)
        with torch.autocast("cpu", torch.float16):
            logits = model(DIGITS[rows])
        return functional.cross_entropy(logits.float(), DIGIT_LABELS[rows]) * factor

    return Training(model=model, optimizer=optimizer, loss=loss)


sick("autocast_float16_underflow", "dead vanishing stalled", "precision", lambda: autocast_loss(mlp(3, 64), 1e-6))
sick(
    "log_of_zero",
    "nonfinite",
    "precision",
    lambda: digits(
        mlp(2, 64, last=nn.ReLU()),
        sgd(0.1),
        loss=lambda x, y: -(x / (x.sum(1, keepdim=True) + 1e-9)).gather(1, y[:, None]).log().mean(),
    ),
)
sick(
    "sqrt_of_zero_at_40",
    "nonfinite",
    "precision",
    lambda: digits(mlp(2, 64), sgd(0.1), spoil=numbered, loss=root_loss),
    steps=60,
    onset=40,
)
sick(
    "norm_of_zero",
    "nonfinite",
    "precision",
    lambda: digits(
        mlp(2, 64), sgd(0.1), loss=lambda x, y: functional.cross_entropy(x, y) + (x - x).square().sum().sqrt()
    ),
)
sick(
    "exp_activation",
    "nonfinite exploding",
    "activation initialization",
    lambda: digits(mlp(8, 32, Exponential, xavier), sgd(0.05)),
)


class Exponential(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.exp(inputs)


_STEP = [0]


def numbered(step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _STEP[0] = step
    return inputs, labels


def root_loss(logits: Tensor, labels: Tensor) -> Tensor:
    loss = functional.cross_entropy(logits, labels)
    return loss + (logits - logits.detach()).abs().sum().sqrt() if _STEP[0] >= 40 else loss


# -- data ------------------------------------------------------------------------------------------------------------


def spoiled(at: int, factor: float, *, shuffle: bool = True) -> Any:
    def spoil(step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if step != at:
            return inputs, labels
        return inputs * factor, labels.roll(1) if shuffle else labels

    return spoil


def holding(at: int, value: float) -> Any:
    def spoil(step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if step == at:
            inputs = inputs.clone()
            inputs[0].view(-1)[3] = value
        return inputs, labels

    return spoil


BATCH = "spike exploding nonfinite"
sick("batch_x50_sgd", BATCH, "data", lambda: digits(mlp(3, 64), sgd(0.1), spoil=spoiled(100, 50)), steps=130, onset=100)
sick(
    "batch_x300_adam",
    BATCH,
    "data",
    lambda: digits(mlp(3, 64), adam(2e-3), spoil=spoiled(120, 300)),
    steps=150,
    onset=120,
)
sick("batch_x60_cnn", BATCH, "data", lambda: images(cnn(3, 12), sgd(0.1), spoil=spoiled(110, 60)), steps=140, onset=110)
sick(
    "batch_x40_small_batches",
    BATCH,
    "data",
    lambda: digits(mlp(2, 64), sgd(0.05), size=16, spoil=spoiled(90, 40)),
    steps=120,
    onset=90,
)
sick(
    "nan_in_the_batch",
    "nonfinite",
    "data",
    lambda: digits(mlp(3, 64), sgd(0.1), spoil=holding(50, float("nan"))),
    steps=60,
    onset=50,
)
sick(
    "inf_in_the_batch",
    "nonfinite",
    "data",
    lambda: images(cnn(3, 12), adam(), spoil=holding(40, float("inf"))),
    steps=50,
    onset=40,
)
sick(
    "nan_in_the_targets",
    "nonfinite",
    "data",
    lambda: regression(mlp(2, 32, inputs=10, outputs=1), sgd(0.01), nan_targets()),
)


def nan_targets() -> Tensor:
    targets = DIABETES_TARGETS / 100
    targets[::40] = float("nan")
    return targets


RAW = "exploding nonfinite dead saturated vanishing"
sick("raw_pixels_sgd", RAW, "data learning_rate", lambda: digits(mlp(3, 64), sgd(0.1), inputs=RAW_DIGITS * 16))
sick(
    "raw_cancer_table",
    RAW,
    "data learning_rate",
    lambda: table(mlp(2, 32, inputs=30, outputs=2), sgd(0.05), RAW_CANCER, CANCER_LABELS),
)
sick(
    "raw_wine_tanh",
    "saturated vanishing",
    "data initialization",
    lambda: table(mlp(2, 32, nn.Tanh, xavier, inputs=13, outputs=3), sgd(0.05), RAW_WINE, WINE_LABELS),
)
sick(
    "inputs_x1000_tanh",
    "saturated",
    "data initialization",
    lambda: digits(mlp(2, 64, nn.Tanh), sgd(0.1), inputs=DIGITS * 1000),
)
sick("raw_pixels_cnn", RAW, "data learning_rate", lambda: images(cnn(3, 12), sgd(0.1), inputs=IMAGES * 200))
sick(
    "targets_x1000",
    "exploding nonfinite",
    "data learning_rate",
    lambda: regression(mlp(2, 64, inputs=10, outputs=1), sgd(0.05), DIABETES_TARGETS * 100),
)
sick(
    "raw_diabetes_targets",
    "exploding nonfinite",
    "data learning_rate",
    lambda: regression(mlp(3, 64, inputs=10, outputs=1), sgd(0.1), DIABETES_TARGETS * 3),
)

# -- structure -------------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """An encoder and a head, with something between them."""

    def __init__(self, between: Any, *, from_step: int = 0) -> None:
        super().__init__()
        self.encoder, self.head = mlp(2, 48, outputs=48), nn.Linear(48, 10)
        self.between, self.left = between, from_step

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.encoder(inputs)
        self.left -= 1
        return self.head(hidden if self.left >= 0 else self.between(hidden))


class Quiet(nn.Module):
    """Runs its first part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = mlp(2, 48, outputs=48), nn.Linear(48, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.encoder(inputs)
        return self.head(hidden)


class Branch(nn.Module):
    """Two branches, one of which passes through NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(64, 48), nn.Linear(64, 48), nn.Linear(48, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        scale = torch.from_numpy(torch.sigmoid(self.right(inputs)).detach().numpy())
        return self.head(functional.relu(self.left(inputs)) * scale)


CUT = "graph"
sick("encoder_detached", "dead", CUT, lambda: digits(Halves(Tensor.detach), sgd(0.1)))
sick("encoder_under_no_grad", "dead", CUT, lambda: digits(Quiet(), adam()))
sick("branch_through_numpy", "dead", CUT, lambda: digits(Branch(), sgd(0.1)))
sick(
    "argmax_routing",
    "dead",
    CUT,
    lambda: digits(Halves(lambda h: functional.one_hot(h.argmax(-1), 48).float()), sgd(0.1)),
)
sick("rounded_code", "dead", CUT, lambda: digits(Halves(torch.round), sgd(0.1)))
sick("detached_from_40", "dead", CUT, lambda: digits(Halves(Tensor.detach, from_step=40), sgd(0.1)), steps=80, onset=40)
sick(
    "only_the_head_is_optimized",
    "unoptimized",
    CUT,
    lambda: digits(mlp(3, 64), adam(), parameters=lambda m: m[-1].parameters()),
)
sick(
    "head_forgotten", "unoptimized", CUT, lambda: digits(mlp(3, 64), sgd(0.1), parameters=lambda m: m[:-1].parameters())
)
sick(
    "embedding_forgotten",
    "unoptimized",
    CUT,
    lambda: language(
        Characters(2), adamw(), parameters=lambda m: [p for n, p in m.named_parameters() if "embed" not in n]
    ),
)
sick(
    "softmax_over_one_unit",
    "dead",
    "activation",
    lambda: table(
        mlp(2, 16, inputs=2, outputs=1, last=nn.Softmax(-1)),
        sgd(0.5),
        moons()[0],
        moons()[1].float()[:, None],
        loss=functional.binary_cross_entropy,
    ),
)
sick(
    "relu_on_negative_targets",
    "dead",
    "activation initialization",
    lambda: table(
        mlp(2, 32, outputs=1, last=nn.ReLU()),
        sgd(0.05),
        DIGITS,
        -1 - DIGIT_LABELS.float()[:, None],
        loss=functional.mse_loss,
    ),
)
sick(
    "clamped_output",
    "dead saturated",
    "graph activation",
    lambda: table(
        mlp(2, 32, outputs=1, last=Clamped()),
        sgd(0.05),
        CANCER.repeat(1, 3)[:, :64],
        5.0 + CANCER_LABELS.float()[:, None],
        loss=functional.mse_loss,
    ),
)


class Clamped(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs + 30).clamp(0, 1)


# -- time ------------------------------------------------------------------------------------------------------------

UP, DOWN = "exploding nonfinite", "vanishing"
sick(
    "relu_rnn_gain_2",
    UP,
    "recurrence initialization learning_rate",
    lambda: sequence(rnn("relu", times(nn.init.orthogonal_, 2.0)), sgd(0.01), 60),
    steps=40,
)
sick(
    "relu_rnn_identity_13",
    UP,
    "recurrence initialization learning_rate",
    lambda: sequence(rnn("relu", times(nn.init.eye_, 1.3)), sgd(0.01), 100),
    steps=40,
)
sick(
    "relu_rnn_gain_18_adam",
    UP,
    "recurrence initialization learning_rate",
    lambda: sequence(rnn("relu", times(nn.init.orthogonal_, 1.6)), adam(), 60, clip=1.0),
    steps=60,
)
sick(
    "gru_sgd_recurrent_x20",
    UP + " saturated",
    "recurrence initialization learning_rate",
    lambda: sequence(Recurrent(scaled_cell(nn.GRU(2, 32, batch_first=True), normal(4.0)), 1), sgd(0.05), 40),
    steps=60,
)
sick(
    "tanh_rnn_150_steps",
    DOWN,
    "recurrence depth",
    lambda: sequence(rnn("tanh", None, 1, 2), adam(), 150, task="sign"),
    steps=60,
)
sick("lstm_closed_gates", DOWN, "recurrence depth", lambda: sequence(closed_lstm(), adam(), 60, task="sign"), steps=60)
sick(
    "gru_closed_gates",
    DOWN,
    "recurrence depth",
    lambda: sequence(Recurrent(scaled_cell(nn.GRU(1, 24, batch_first=True), normal(0.01)), 2), adam(), 80, task="sign"),
    steps=60,
)
sick(
    "stacked_rnn_100_steps",
    DOWN,
    "recurrence depth",
    lambda: sequence(
        Recurrent(scaled_cell(nn.RNN(1, 24, 2, batch_first=True), normal(0.05)), 2), adam(), 100, task="sign"
    ),
    steps=60,
)
sick(
    "loop_of_cells_90_steps",
    DOWN,
    "recurrence depth",
    lambda: sequence(Loop(scaled_loop(), 24, 2), adam(), 90, task="sign"),
    steps=60,
)


def rnn(nonlinearity: str, recurrent: Any, inputs: int = 2, outputs: int = 1) -> nn.Module:
    cell = nn.RNN(inputs, 48, nonlinearity=nonlinearity, batch_first=True)
    return Recurrent(cell if recurrent is None else scaled_cell(cell, recurrent), outputs)


def closed_lstm() -> nn.Module:
    model = Recurrent(nn.LSTM(1, 24, batch_first=True), 2)
    nn.init.constant_(model.cell.bias_ih_l0[24:48], -4.0)
    return model


def scaled_loop() -> nn.Module:
    cell = nn.RNNCell(1, 24)
    nn.init.normal_(cell.weight_hh, std=0.1)
    return cell


# -- several optimizers ------------------------------------------------------------------------------------------------


def adversarial(rate: float, *, detached: bool = False) -> Training:
    """A generator against a discriminator, each with an optimizer of its own."""
    models = {"g": mlp(2, 48, inputs=8, outputs=64), "d": mlp(2, 48, nn.LeakyReLU, outputs=1)}
    optimizers = {name: Adam(model.parameters(), lr=rate, betas=(0.5, 0.9)) for name, model in models.items()}

    def step(_index: int, log: Any) -> None:
        ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
        bce = functional.binary_cross_entropy_with_logits
        optimizers["d"].zero_grad()
        fake = models["g"](torch.randn(64, 8))
        loss = bce(models["d"](DIGITS[rows_of(len(DIGITS), 64)]), ones) + bce(models["d"](fake.detach()), zeros)
        log(loss, optimizer="d")
        loss.backward()
        optimizers["d"].step()
        optimizers["g"].zero_grad()
        fake = models["g"](torch.randn(64, 8))
        loss = bce(models["d"](fake.detach().requires_grad_() if detached else fake), ones)
        log(loss, optimizer="g")
        loss.backward()
        optimizers["g"].step()

    return Training(model=models, optimizer=optimizers, step=step)


sick("gan_rate_half", HOT, "learning_rate", lambda: adversarial(0.5))
sick("gan_generator_detached", "dead", CUT, lambda: adversarial(1e-3, detached=True))
