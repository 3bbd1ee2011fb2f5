"""Faults in other networks, under other optimizers and losses: written when all criteria stood, to try them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam, NAdam, RMSprop

from evaluation.parts import (
    CANCER,
    CANCER_LABELS,
    DIABETES_TARGETS,
    DIGIT_LABELS,
    DIGITS,
    IMAGES,
    RAW_WINE,
    WINE_LABELS,
    Along,
    Characters,
    Gated,
    Loop,
    Mixer,
    Recurrent,
    Residual,
    Rows,
    Written,
    adam,
    adamw,
    cnn,
    constant,
    digits,
    he,
    images,
    initialise,
    jump,
    language,
    mlp,
    normal,
    orthogonal,
    regression,
    rows_of,
    scaled_cell,
    scheduled,
    sequence,
    sgd,
    standardised,
    table,
    times,
    xavier,
)
from evaluation.training import Training, sick

# -- networks that the other files do not have -----------------------------------------------------------------------


class Between(nn.Module):
    """Two parts, with a function of the hidden state between them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.below = nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 40))
        self.above = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.above(self.function(self.below(inputs)))


# -- lost over depth -------------------------------------------------------------------------------------------------

FLAT, SMALL = "activation depth", "initialization depth"
sick("sigmoid_8_wide_adamw", "vanishing", FLAT, lambda: digits(mlp(8, 160, nn.Sigmoid), adamw(3e-4)))
sick("hardsigmoid_10", "vanishing", FLAT, lambda: digits(mlp(10, 48, nn.Hardsigmoid), sgd(0.1, momentum=0.9)))
sick("sigmoid_along_pixels", "vanishing", FLAT, lambda: digits(Along(9, xavier, torch.sigmoid), sgd(0.05)))
sick(
    "sigmoid_regression",
    "vanishing",
    FLAT,
    lambda: regression(mlp(9, 24, nn.Sigmoid, inputs=10, outputs=1), adam(), DIABETES_TARGETS / 100),
)
sick(
    "tanhshrink_8",
    "vanishing stalled",
    "activation initialization depth",
    lambda: digits(mlp(8, 48, nn.Tanhshrink), sgd(0.1)),
)
sick("gated_16_default", "vanishing", "initialization activation depth", lambda: digits(Gated(16), sgd(0.05)))
sick("relu6_22_momentum", "vanishing", SMALL, lambda: digits(mlp(22, 56, nn.ReLU6), sgd(0.02, momentum=0.9)))
sick("along_pixels_18_default", "vanishing", SMALL, lambda: digits(Along(18), sgd(0.05)))
sick("mixer_10_without_residuals", "vanishing", SMALL, lambda: digits(Mixer(10), sgd(0.05)))
sick("mish_20_rmsprop", "vanishing", SMALL, lambda: digits(mlp(20, 48, nn.Mish), lambda p: RMSprop(p, lr=1e-5)))
sick("elu_26_adam", "vanishing stalled", SMALL, lambda: digits(mlp(26, 40, nn.ELU, times(xavier, 0.6)), adam(1e-5)))
sick(
    "relu_12_third_he_nesterov",
    "vanishing",
    SMALL,
    lambda: digits(mlp(12, 64, nn.ReLU, times(he, 0.35)), sgd(0.02, momentum=0.9, nesterov=True)),
)
sick(
    "tanh_30_xavier_06",
    "vanishing stalled",
    "initialization activation depth",
    lambda: digits(mlp(30, 48, nn.Tanh, times(xavier, 0.6)), sgd(0.05)),
)
sick(
    "cnn_6_std_0005_adagrad",
    "vanishing stalled",
    SMALL,
    lambda: images(cnn(6, 12, nn.ReLU, normal(0.005)), lambda p: Adagrad(p, lr=1e-3)),
)
sick(
    "linear_autoencoder_18",
    "vanishing stalled",
    SMALL,
    lambda: table(mlp(18, 40, nn.Identity, outputs=64), sgd(0.1), DIGITS, DIGITS, loss=functional.mse_loss),
)
sick("silu_written_out_22", "vanishing", SMALL, lambda: digits(Written(22, 48, functional.silu), sgd(0.05)))

# -- saturated, exploding or equal at the start ----------------------------------------------------------------------

SATURATING = "initialization activation"
sick(
    "tanh_4_uniform_2_adam",
    "saturated",
    SATURATING,
    lambda: digits(mlp(4, 64, nn.Tanh, lambda w: nn.init.uniform_(w, -2, 2)), adam(1e-4)),
)
sick(
    "characters_logits_x40", "saturated exploding", SATURATING, lambda: language(Characters(3, scale=8.0), adamw(1e-4))
)
sick(
    "hardsigmoid_3_std_4",
    "saturated dead vanishing",
    SATURATING,
    lambda: digits(mlp(3, 96, nn.Hardsigmoid, normal(4.0)), sgd(0.05)),
)
ANY = "exploding nonfinite"
sick(
    "gelu_12_large_he",
    ANY,
    "initialization learning_rate",
    lambda: digits(mlp(12, 64, nn.GELU, times(he, 2.5)), sgd(0.01)),
)
sick("along_pixels_10_large", ANY, "initialization learning_rate", lambda: digits(Along(10, times(he, 2.5)), sgd(0.01)))
sick(
    "residual_30_without_norm_he",
    ANY,
    "initialization learning_rate depth",
    lambda: digits(Residual(30, 48, norm="none", init=he), sgd(0.05)),
)
sick(
    "linear_14_orthogonal_2",
    ANY,
    "initialization learning_rate",
    lambda: digits(mlp(14, 64, nn.Identity, times(orthogonal, 2.0)), sgd(0.01)),
)
EQUAL = "initialization"
sick("cnn_constant_initialisation", "dead", EQUAL, lambda: images(cnn(3, 12, nn.ReLU, constant(0.1)), sgd(0.05)))
sick(
    "lstm_of_zeros", "dead", EQUAL, lambda: sequence(zeroed(Recurrent(nn.LSTM(2, 24, batch_first=True), 1)), adam(), 20)
)
sick(
    "bias_minus_30_wide_rmsprop",
    "dead",
    "initialization activation",
    lambda: digits(biased(mlp(4, 80, nn.ReLU, he), 2, -30.0), lambda p: RMSprop(p, lr=1e-4)),
)


def zeroed(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def biased(model: nn.Sequential, layer: int, value: float) -> nn.Module:
    nn.init.constant_([module for module in model if isinstance(module, nn.Linear)][layer].bias, value)
    return model


# -- rates -----------------------------------------------------------------------------------------------------------

HOT, IDLE = "exploding nonfinite dead spike", "learning_rate"
sick("rmsprop_half_cnn", HOT, IDLE, lambda: images(cnn(3, 12), lambda p: RMSprop(p, lr=0.5)))
sick("adagrad_10", HOT, IDLE, lambda: digits(mlp(3, 64), lambda p: Adagrad(p, lr=10.0)))
sick(
    "nadam_03_gru",
    HOT + " saturated",
    IDLE,
    lambda: sequence(Recurrent(nn.GRU(2, 32, batch_first=True), 1), lambda p: NAdam(p, lr=0.5), 20),
)
sick(
    "momentum_099_rate_1_regression",
    HOT,
    IDLE,
    lambda: regression(mlp(2, 48, inputs=10, outputs=1), sgd(1.0, momentum=0.99), DIABETES_TARGETS / 100),
)
sick("residual_adamw_1", HOT + " vanishing", IDLE, lambda: digits(Residual(4, 48), adamw(1.0)))
sick(
    "rate_x500_transformer_at_45",
    HOT + " vanishing saturated",
    IDLE,
    lambda: language(Characters(2), adam(1e-3), before=jump(1e-3, 500, 45)),
    steps=80,
    onset=45,
)
sick(
    "rate_x100_momentum_at_70",
    HOT,
    IDLE,
    lambda: images(cnn(3, 12), sgd(0.03, momentum=0.9), before=jump(0.03, 100, 70)),
    steps=110,
    onset=70,
)
sick("hinge_sgd_30", HOT, IDLE, lambda: digits(mlp(2, 64, nn.ReLU, he), sgd(30.0), loss=functional.multi_margin_loss))
sick("gru_sgd_1e8", "stalled", IDLE, lambda: sequence(Recurrent(nn.GRU(2, 24, batch_first=True), 1), sgd(1e-8), 20))
sick("residual_rmsprop_1e10", "stalled", IDLE, lambda: digits(Residual(3, 48), lambda p: RMSprop(p, lr=1e-10)))
sick(
    "rate_halves_every_step",
    "stalled",
    IDLE,
    lambda: digits(mlp(3, 64), sgd(0.1), before=scheduled(lambda t: 0.1 * 0.5 ** max(0, t - 10))),
    steps=100,
    onset=30,
)
sick("cnn_weight_decay_2", "vanishing", IDLE, lambda: images(cnn(3, 12), sgd(0.05, weight_decay=2.0)))

# -- cleared too rarely ----------------------------------------------------------------------------------------------

KEPT = "exploding spike"
sick("no_zero_grad_transformer", KEPT, "accumulation", lambda: language(Characters(2), adamw(1e-3), clears=False))
sick(
    "no_zero_grad_regression",
    KEPT,
    "accumulation",
    lambda: regression(mlp(2, 32, inputs=10, outputs=1), sgd(0.003), DIABETES_TARGETS / 100, clears=False),
)
sick("cleared_once_an_epoch", KEPT, "accumulation", lambda: rarely_cleared(mlp(3, 64), 15))


def rarely_cleared(model: nn.Module, every: int) -> Training:
    optimizer = SGD(model.parameters(), lr=0.05)

    def step(index: int, log: Any) -> None:
        if index % every == 0:
            optimizer.zero_grad()
        rows = rows_of(len(DIGITS), 64)
        loss = functional.cross_entropy(model(DIGITS[rows]), DIGIT_LABELS[rows])
        log(loss)
        loss.backward()
        optimizer.step()

    return Training(model=model, optimizer=optimizer, step=step)


# -- precision -------------------------------------------------------------------------------------------------------

sick(
    "bfloat16_cnn_1e5",
    "stalled",
    "precision learning_rate",
    lambda: images(cnn(3, 12).bfloat16(), sgd(1e-5), inputs=IMAGES.bfloat16()),
)
sick(
    "float16_mean_over_much",
    "dead vanishing",
    "precision",
    lambda: digits(
        mlp(4, 64).half(), sgd(0.5), inputs=DIGITS.half(), loss=lambda x, y: functional.cross_entropy(x, y) / 2**21
    ),
)
sick(
    "float16_squares_overflow",
    "nonfinite",
    "precision data",
    lambda: digits(mlp(2, 64).half(), sgd(0.01), inputs=DIGITS.half(), loss=lambda x, y: (1000 * x).square().mean()),
)
sick("arc_cosine_at_one", "nonfinite", "precision", lambda: digits(mlp(2, 64), sgd(0.05), loss=angle))
sick(
    "standardised_by_zero",
    "nonfinite",
    "precision data",
    lambda: digits(Between(lambda h: (h - h.mean()) / (0 * h).std()), adam()),
)


def angle(logits: Tensor, labels: Tensor) -> Tensor:
    unit = functional.normalize(logits, dim=-1)
    return (
        functional.cross_entropy(logits, labels) + 0.1 * torch.acos((unit * unit.detach()).sum(-1).clamp(-1, 1)).mean()
    )


# -- data ------------------------------------------------------------------------------------------------------------


def at_step(at: int, change: Any) -> Any:
    def spoil(step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return change(inputs, labels) if step == at else (inputs, labels)

    return spoil


BATCH = "spike exploding nonfinite"
sick(
    "one_row_x5000",
    BATCH,
    "data",
    lambda: digits(mlp(3, 64), sgd(0.1), spoil=at_step(90, lambda x, y: (torch.cat([5000 * x[:1], x[1:]]), y.roll(1)))),
    steps=120,
    onset=90,
)
sick("targets_x1000_for_a_step", BATCH, "data", lambda: far_targets(100), steps=130, onset=100)
sick(
    "batch_x100_residual_adamw",
    BATCH,
    "data",
    lambda: digits(Residual(3, 48, norm="none"), adamw(1e-3), spoil=at_step(110, lambda x, y: (100 * x, y.roll(1)))),
    steps=140,
    onset=110,
)
sick(
    "nan_in_the_wine",
    "nonfinite",
    "data",
    lambda: table(mlp(2, 32, inputs=13, outputs=3), adam(), holed(standardised(RAW_WINE)), WINE_LABELS),
)
sick(
    "gru_on_raw_values",
    "saturated exploding vanishing",
    "data initialization",
    lambda: table(Rows(), sgd(0.05), DIGITS * 400, DIGIT_LABELS),
)


def far_targets(at: int) -> Training:
    model = mlp(2, 48, inputs=30, outputs=1)
    optimizer = SGD(model.parameters(), lr=0.02)

    def loss(step: int) -> Tensor:
        rows = rows_of(len(CANCER), 32)
        targets = CANCER_LABELS[rows].float()[:, None] * (1000.0 if step == at else 1.0)
        return functional.mse_loss(model(CANCER[rows]), targets)

    return Training(model=model, optimizer=optimizer, loss=loss)


def holed(inputs: Tensor) -> Tensor:
    holes = inputs.clone()
    holes[::9, 4] = float("nan")
    return holes


# -- structure -------------------------------------------------------------------------------------------------------

CUT = "graph"
sick("through_data", "dead", CUT, lambda: digits(Between(lambda h: h.data), adam()))
sick("through_a_list", "dead", CUT, lambda: digits(Between(lambda h: torch.tensor(h.tolist())), sgd(0.1)))
sick("compared_with_zero", "dead", CUT, lambda: digits(Between(lambda h: (h > 0).float()), sgd(0.1)))
sick("signs_only", "dead", CUT, lambda: digits(Between(torch.sign), adam()))
sick("integer_codes", "dead", CUT, lambda: digits(Between(lambda h: (4 * h).int().float() / 4), sgd(0.1)))
sick("head_made_after_the_optimizer", "unoptimized", CUT, lambda: new_head())
sick("optimizer_of_a_copy", "unoptimized", CUT, lambda: halves_of_two())


def new_head() -> Training:
    model = mlp(3, 64)
    optimizer = Adam(model.parameters(), lr=1e-3)
    model[-1] = nn.Linear(64, 10)

    def loss(_step: int) -> Tensor:
        rows = rows_of(len(DIGITS), 64)
        return functional.cross_entropy(model(DIGITS[rows]), DIGIT_LABELS[rows])

    return Training(model=model, optimizer=optimizer, loss=loss)


def halves_of_two() -> Training:
    model = nn.ModuleDict({"encoder": mlp(2, 48, outputs=48), "decoder": mlp(2, 48, inputs=48, outputs=64)})
    optimizer = SGD(model["decoder"].parameters(), lr=0.1, momentum=0.9)

    def loss(_step: int) -> Tensor:
        inputs = DIGITS[rows_of(len(DIGITS), 64)]
        return functional.mse_loss(model["decoder"](model["encoder"](inputs)), inputs)

    return Training(model=model, optimizer=optimizer, loss=loss)


sick(
    "three_steps_at_adam_3",
    "exploding dead spike",
    "learning_rate",
    lambda: digits(mlp(4, 64), adam(1e-3), before=scheduled(lambda t: 3.0 if 40 <= t < 43 else 1e-3)),
    steps=90,
    onset=40,
)

# -- time ------------------------------------------------------------------------------------------------------------

UP, DOWN = "exploding nonfinite", "vanishing"
sick(
    "gru_150_steps",
    DOWN,
    "recurrence depth",
    lambda: sequence(Recurrent(nn.GRU(1, 24, batch_first=True), 2), adam(), 150, task="sign"),
)
sick("stacked_lstm_closed_gates", DOWN, "recurrence depth", lambda: sequence(closed(), adam(), 80, task="sign"))
sick(
    "relu_loop_gain_16",
    UP,
    "recurrence initialization learning_rate",
    lambda: sequence(Loop(relu_cell(), 32, 1), sgd(0.005), 50),
    steps=40,
)
sick(
    "chaotic_tanh_rnn",
    UP + " saturated",
    "recurrence initialization learning_rate",
    lambda: sequence(Recurrent(scaled_cell(nn.RNN(2, 48, batch_first=True), normal(0.6)), 1), sgd(0.05), 60),
)
sick(
    "small_orthogonal_rnn_120",
    DOWN,
    "recurrence depth initialization",
    lambda: sequence(
        Recurrent(scaled_cell(nn.RNN(1, 32, batch_first=True), times(orthogonal, 0.5)), 2), adamw(), 120, task="sign"
    ),
)


def closed() -> nn.Module:
    model = Recurrent(nn.LSTM(1, 24, 2, batch_first=True), 2)
    for name, parameter in model.cell.named_parameters():
        if name.startswith("bias_ih"):
            nn.init.constant_(parameter[24:48], -3.0)
    return model


def relu_cell() -> nn.Module:
    cell = nn.RNNCell(2, 32, nonlinearity="relu")
    nn.init.orthogonal_(cell.weight_hh, gain=1.6)
    return cell


def initialised_by(model: nn.Module, std: float) -> nn.Module:
    return initialise(model, normal(std))


sick("gated_6_std_0003", "vanishing stalled", SMALL, lambda: digits(initialised_by(Gated(6), 0.003), sgd(0.1)))
