"""Ordinary training that learns: nothing is to be said about it."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Adadelta, Adagrad, Adamax, NAdam, RAdam, RMSprop

from evaluation.parts import (
    CANCER,
    CANCER_LABELS,
    DIABETES_TARGETS,
    DIGITS,
    RAW_DIGITS,
    WINE,
    WINE_LABELS,
    Attention,
    Characters,
    Loop,
    Recurrent,
    Residual,
    Written,
    adam,
    adamw,
    cnn,
    digits,
    he,
    images,
    language,
    mlp,
    moons,
    orthogonal,
    regression,
    scaled_cell,
    sequence,
    sgd,
    speller,
    table,
    times,
    warmup,
    xavier,
)
from evaluation.training import healthy

# -- multilayer perceptrons ------------------------------------------------------------------------------------------

healthy("logistic_regression", lambda: digits(mlp(0, 0), sgd(0.1)))
healthy("logistic_regression_adam", lambda: table(nn.Linear(13, 3), adam(1e-2), WINE, WINE_LABELS))
for depth in (1, 2, 3, 4):
    healthy(f"mlp_{depth}_sgd", lambda depth=depth: digits(mlp(depth, 64), sgd(0.1)))
    healthy(f"mlp_{depth}_adam", lambda depth=depth: digits(mlp(depth, 64), adam()))
healthy("mlp_wide_momentum", lambda: digits(mlp(2, 256), sgd(0.05, momentum=0.9)))
healthy("mlp_nesterov", lambda: digits(mlp(3, 64, nn.ReLU, he), sgd(0.03, momentum=0.9, nesterov=True)))
healthy("mlp_rmsprop", lambda: digits(mlp(2, 64), partial(RMSprop, lr=1e-3)))
healthy("mlp_adagrad", lambda: digits(mlp(2, 64), partial(Adagrad, lr=0.02)))
healthy("mlp_adadelta", lambda: digits(mlp(2, 64), partial(Adadelta, lr=1.0)))
healthy("mlp_nadam", lambda: digits(mlp(2, 64), partial(NAdam, lr=2e-3)))
healthy("mlp_radam", lambda: digits(mlp(2, 64), partial(RAdam, lr=1e-3)))
healthy("mlp_adamax", lambda: digits(mlp(2, 64), partial(Adamax, lr=2e-3)))
healthy("mlp_gelu", lambda: digits(mlp(3, 64, nn.GELU), adam()))
healthy("mlp_silu_he", lambda: digits(mlp(6, 64, nn.SiLU, he), adam()))
healthy("mlp_leaky", lambda: digits(mlp(4, 64, nn.LeakyReLU), adam()))
healthy("mlp_elu", lambda: digits(mlp(4, 64, nn.ELU), sgd(0.05)))
healthy(
    "mlp_selu_lecun",
    lambda: digits(mlp(12, 48, nn.SELU, partial(nn.init.kaiming_normal_, nonlinearity="linear")), sgd(0.02)),
)
healthy("mlp_tanh_xavier", lambda: digits(mlp(4, 64, nn.Tanh, xavier), sgd(0.1)))
healthy("mlp_tanh_orthogonal_10", lambda: digits(mlp(10, 64, nn.Tanh, orthogonal), adam()))
healthy("mlp_sigmoid_1", lambda: digits(mlp(1, 64, nn.Sigmoid), adam(1e-2)))
healthy("mlp_sigmoid_2", lambda: digits(mlp(2, 64, nn.Sigmoid, xavier), adam(3e-3)))
healthy("mlp_softplus", lambda: digits(mlp(2, 64, nn.Softplus), adam()))
healthy("mlp_written_out", lambda: digits(Written(3, 64, functional.relu), adam()))
healthy("mlp_written_out_tanh", lambda: digits(Written(3, 64, torch.tanh, xavier), sgd(0.1)))
healthy("mlp_written_out_gelu", lambda: digits(Written(4, 64, functional.gelu), adam()))
healthy("mlp_relu_20_he_adam", lambda: digits(mlp(20, 64, nn.ReLU, he), adam(3e-4)))
healthy("mlp_relu_12_he_sgd", lambda: digits(mlp(12, 64, nn.ReLU, he), sgd(0.01)))
healthy("mlp_batch_norm", lambda: digits(mlp(6, 64, nn.ReLU, norm=nn.BatchNorm1d), sgd(0.1)))
healthy("mlp_batch_norm_20", lambda: digits(mlp(20, 48, nn.ReLU, norm=nn.BatchNorm1d), adam()))
healthy("mlp_layer_norm", lambda: digits(mlp(8, 64, nn.ReLU, he, norm=nn.LayerNorm), adam()))
healthy("mlp_sigmoid_batch_norm", lambda: digits(mlp(3, 64, nn.Sigmoid, xavier, norm=nn.BatchNorm1d), adam(3e-3)))
healthy("mlp_dropout", lambda: digits(mlp(2, 128, lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5))), adam()))
healthy("mlp_dropout_08", lambda: digits(mlp(1, 256, lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.8))), adam()))
healthy("mlp_small_batches", lambda: digits(mlp(2, 64), adam(), size=2))
healthy("mlp_large_batches", lambda: digits(mlp(2, 64), adam(3e-3), size=512), steps=80)
healthy("mlp_raw_pixels_adam", lambda: digits(mlp(2, 64), adam(), inputs=RAW_DIGITS))
healthy("mlp_pixels_below_one", lambda: digits(mlp(2, 64), adam(), inputs=RAW_DIGITS / 16))
healthy("deep_linear_8", lambda: digits(mlp(8, 64, nn.Identity, xavier), sgd(0.02)))
healthy("mlp_bfloat16_autocast", lambda: digits(Cast(mlp(3, 64)), adam()))
healthy("mlp_float64", lambda: digits(mlp(3, 64).double(), sgd(0.1), inputs=DIGITS.double()))
healthy("weight_norm", lambda: digits(weight_normed(), adam()))
healthy("spectral_norm", lambda: digits(spectrally_normed(), adam()))
healthy("moons", lambda: table(mlp(3, 16, nn.Tanh, inputs=2, outputs=2), adam(1e-2), *moons()))
healthy("cancer", lambda: table(mlp(2, 32, inputs=30, outputs=2), adam(), CANCER, CANCER_LABELS))
healthy("wine", lambda: table(mlp(1, 16, inputs=13, outputs=3), sgd(0.1), WINE, WINE_LABELS))
healthy("diabetes", lambda: regression(mlp(2, 32, inputs=10, outputs=1), adam(), (DIABETES_TARGETS - 150) / 77))
healthy("diabetes_unscaled_adam", lambda: regression(mlp(2, 32, inputs=10, outputs=1), adam(1e-2), DIABETES_TARGETS))
healthy(
    "diabetes_huber",
    lambda: table(
        mlp(2, 32, inputs=10, outputs=1),
        adam(),
        CANCER[:442, :10],
        DIABETES_TARGETS[:442, None] / 77,
        loss=functional.huber_loss,
    ),
)
healthy("autoencoder", lambda: table(mlp(4, 32, outputs=64), adam(), DIGITS, DIGITS, loss=functional.mse_loss))
healthy(
    "tanh_autoencoder",
    lambda: table(mlp(3, 16, nn.Tanh, outputs=64), adam(3e-3), DIGITS, DIGITS, loss=functional.mse_loss),
)
healthy(
    "multilabel_sigmoid",
    lambda: digits(
        mlp(2, 64),
        adam(),
        loss=lambda x, y: functional.binary_cross_entropy_with_logits(x, functional.one_hot(y, 10).float()),
    ),
)
healthy(
    "label_smoothing",
    lambda: digits(mlp(2, 64), adam(), loss=lambda x, y: functional.cross_entropy(x, y, label_smoothing=0.2)),
)


class Cast(nn.Module):
    """Computes in bfloat16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(inputs).float()


def weight_normed() -> nn.Module:
    model = mlp(3, 64)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.utils.parametrizations.weight_norm(module)
    return model


def spectrally_normed() -> nn.Module:
    model = mlp(2, 64)
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


# -- residual networks -----------------------------------------------------------------------------------------------

healthy("residual_pre_norm_12", lambda: digits(Residual(12, 48), adam()))
healthy("residual_pre_norm_30", lambda: digits(Residual(30, 32), adam(5e-4)), steps=80)
healthy(
    "residual_post_norm_4_warmup", lambda: digits(Residual(4, 48, norm="post"), adam(1e-3), before=warmup(1e-3, 50))
)
healthy("residual_zero_branch", lambda: digits(Residual(16, 48, norm="none", branch=0.0), adam()))
healthy("residual_layer_scale", lambda: digits(Residual(12, 48, branch=1e-4), adamw()))
healthy("residual_layer_scale_1e6_sgd", lambda: digits(Residual(8, 48, branch=1e-6), sgd(0.1)))
healthy("residual_no_norm_6", lambda: digits(Residual(6, 48, norm="none"), sgd(0.02)))

# -- convolutions ----------------------------------------------------------------------------------------------------

healthy("cnn_3_adam", lambda: images(cnn(3, 12), adam(2e-3)))
healthy("cnn_3_batch_norm", lambda: images(cnn(3, 12, norm=True), sgd(0.1, momentum=0.9)))
healthy("cnn_8_he", lambda: images(cnn(8, 12, nn.ReLU, he), adam()))
healthy("cnn_12_batch_norm", lambda: images(cnn(12, 8, norm=True), adam()), steps=100)
healthy("cnn_tanh", lambda: images(cnn(3, 12, nn.Tanh, xavier), adam()))
healthy("cnn_gelu_batch_norm", lambda: images(cnn(4, 12, nn.GELU, norm=True), adamw()))
healthy("cnn_batch_norm_hot", lambda: images(cnn(3, 12, norm=True), sgd(0.5)))

# -- recurrent networks ----------------------------------------------------------------------------------------------

healthy("lstm_adding_20", lambda: sequence(Recurrent(nn.LSTM(2, 32, batch_first=True), 1), adam(3e-3), 20))
healthy("lstm_adding_50", lambda: sequence(Recurrent(nn.LSTM(2, 32, batch_first=True), 1), adam(3e-3), 50))
healthy("gru_adding_30", lambda: sequence(Recurrent(nn.GRU(2, 32, batch_first=True), 1), adam(3e-3), 30))
healthy(
    "gru_first_sign_40", lambda: sequence(Recurrent(nn.GRU(1, 32, batch_first=True), 2), adam(5e-3), 25, task="sign")
)
healthy(
    "bidirectional_lstm",
    lambda: sequence(Recurrent(nn.LSTM(2, 24, batch_first=True, bidirectional=True), 1), adam(3e-3), 25),
)
healthy("stacked_gru", lambda: sequence(Recurrent(nn.GRU(2, 24, 2, batch_first=True), 1), adam(3e-3), 25))
healthy(
    "tanh_rnn_clipped",
    lambda: sequence(
        Recurrent(scaled_cell(nn.RNN(2, 32, batch_first=True), nn.init.orthogonal_), 1), sgd(0.02), 20, clip=1.0
    ),
)
healthy(
    "relu_rnn_identity",
    lambda: sequence(
        Recurrent(scaled_cell(nn.RNN(2, 48, nonlinearity="relu", batch_first=True), times(nn.init.eye_, 0.9)), 1),
        adam(),
        30,
        clip=1.0,
    ),
)
healthy("loop_of_gru_cells", lambda: sequence(Loop(nn.GRUCell(2, 32), 32, 1), adam(3e-3), 20))
healthy(
    "rnn_language_model",
    lambda: language(speller(nn.RNN, 48), adam(3e-3)),
)
healthy(
    "lstm_language_model",
    lambda: language(speller(nn.LSTM, 48), adam(3e-3), length=64),
    steps=80,
)
healthy(
    "lstm_language_model_sgd",
    lambda: language(speller(nn.LSTM, 48), sgd(5.0), clip=0.25),
)

# -- attention -------------------------------------------------------------------------------------------------------

healthy("transformer_pre_norm", lambda: language(Characters(2), adamw(3e-3), before=warmup(3e-3, 20)), steps=100)
healthy("transformer_pre_norm_6", lambda: language(Characters(6), adamw(1e-3), before=warmup(1e-3, 20)), steps=50)
healthy("transformer_no_warmup", lambda: language(Characters(3), adam(1e-3)), steps=80)
healthy("transformer_tied", lambda: language(Characters(2, tied=True), adamw(1e-3)), steps=100)
healthy(
    "transformer_post_norm_warmup",
    lambda: language(Characters(3, pre=False), adam(1e-3), before=warmup(1e-3, 40)),
    steps=100,
)
healthy("transformer_sgd", lambda: language(Characters(2), sgd(0.1, momentum=0.9)), steps=80)
healthy("attention_softmax", lambda: digits(Attention(2, fused=False), adam(3e-3)))
healthy("attention_fused", lambda: digits(Attention(2, fused=True), adam(3e-3)))
healthy("attention_fused_4_adamw", lambda: digits(Attention(4, fused=True), adamw(1e-3)))
