"""Gradients that are lost over depth: flat activations, weights of the wrong scale, no way around."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from evaluation.parts import (
    DIGITS,
    Attention,
    Characters,
    Residual,
    Written,
    adam,
    cnn,
    constant,
    digits,
    he,
    images,
    language,
    mlp,
    moons,
    normal,
    orthogonal,
    sgd,
    table,
    times,
    xavier,
)
from evaluation.training import sick

FLAT = "activation depth"

for depth, width in ((12, 32), (9, 96), (20, 24)):
    sick(
        f"sigmoid_{depth}x{width}_sgd",
        "vanishing",
        FLAT,
        lambda depth=depth, width=width: digits(mlp(depth, width, nn.Sigmoid, xavier), sgd(0.1)),
    )
sick("sigmoid_10_adam", "vanishing", FLAT, lambda: digits(mlp(10, 48, nn.Sigmoid), adam(1e-3)))
sick("sigmoid_written_out", "vanishing", FLAT, lambda: digits(Written(12, 40, torch.sigmoid, xavier), sgd(0.1)))
sick(
    "sigmoid_autoencoder",
    "vanishing",
    FLAT,
    lambda: table(mlp(10, 32, nn.Sigmoid, xavier, outputs=64), sgd(0.3), DIGITS, DIGITS, loss=functional.mse_loss),
)
sick("sigmoid_cnn", "vanishing", FLAT, lambda: images(cnn(9, 10, nn.Sigmoid, xavier), sgd(0.1)))
sick(
    "sigmoid_moons", "vanishing", FLAT, lambda: table(mlp(9, 8, nn.Sigmoid, inputs=2, outputs=2), adam(3e-3), *moons())
)
sick(
    "hidden_softmax", "vanishing saturated", FLAT, lambda: digits(mlp(4, 48, lambda: nn.Softmax(-1), xavier), sgd(0.1))
)
sick(
    "hidden_softmax_written_out",
    "vanishing saturated",
    FLAT,
    lambda: digits(Written(4, 48, lambda x: functional.softmax(x, -1)), sgd(0.1)),
)
sick(
    "tanh_cubed",
    "vanishing stalled",
    "activation initialization depth",
    lambda: digits(Written(8, 48, lambda x: torch.tanh(x) ** 3, xavier), sgd(0.1)),
)

SMALL = "initialization depth"
sick("relu_20_default", "vanishing", SMALL, lambda: digits(mlp(20, 64), sgd(0.05)))
sick("relu_16_default_adam", "vanishing", SMALL, lambda: digits(mlp(16, 48), adam(1e-4)))
sick("relu_written_out_default", "vanishing", SMALL, lambda: digits(Written(18, 64, functional.relu), sgd(0.05)))
sick("gelu_24_default", "vanishing", SMALL, lambda: digits(mlp(24, 48, nn.GELU), sgd(0.05)))
sick("silu_20_default", "vanishing", SMALL, lambda: digits(mlp(20, 48, nn.SiLU), sgd(0.05)))
sick("tanh_12_std_002", "vanishing stalled", SMALL, lambda: digits(mlp(12, 64, nn.Tanh, normal(0.02)), sgd(0.1)))
sick(
    "tanh_written_out_std_003",
    "vanishing stalled",
    SMALL,
    lambda: digits(Written(12, 64, torch.tanh, normal(0.03)), sgd(0.1)),
)
sick("relu_6_std_0003", "vanishing stalled", SMALL, lambda: digits(mlp(6, 96, nn.ReLU, normal(0.003)), sgd(0.1)))
sick("relu_10_half_he", "vanishing", SMALL, lambda: digits(mlp(14, 64, nn.ReLU, times(he, 0.5)), sgd(0.05)))
sick("leaky_20_default", "vanishing", SMALL, lambda: digits(mlp(20, 64, nn.LeakyReLU), sgd(0.05)))
sick("cnn_20_default", "vanishing", SMALL, lambda: images(cnn(20, 10), sgd(0.05)))
sick("cnn_12_std_002", "vanishing", SMALL, lambda: images(cnn(12, 10, nn.ReLU, normal(0.02)), sgd(0.05)))
sick(
    "orthogonal_07_tanh_40",
    "vanishing stalled",
    "initialization activation depth",
    lambda: digits(mlp(40, 48, nn.Tanh, times(orthogonal, 0.7)), sgd(0.05)),
)
sick("very_deep_underflow", "vanishing", SMALL, lambda: digits(mlp(60, 32, nn.ReLU, normal(0.01)), sgd(0.05)), steps=40)
sick("linear_16_small", "vanishing", SMALL, lambda: digits(mlp(16, 48, nn.Identity, times(xavier, 0.5)), sgd(0.05)))


def frozen_statistics(depth: int) -> nn.Module:
    model = mlp(depth, 48, nn.ReLU, norm=nn.BatchNorm1d)
    return model.eval()


sick("batch_norm_in_eval_mode", "vanishing", SMALL, lambda: digits(frozen_statistics(18), sgd(0.05)))

STEEP = "learning_rate depth initialization"
sick(
    "post_norm_8_no_warmup",
    "vanishing exploding stalled",
    STEEP,
    lambda: language(Characters(8, pre=False), adam(1e-2)),
    steps=80,
)
sick(
    "post_norm_residual_mlp_hot",
    "vanishing exploding stalled dead",
    STEEP,
    lambda: digits(Residual(24, 48, norm="post"), adam(3e-2)),
    steps=80,
)

SATURATING = "initialization activation"
sick("tanh_5_std_1", "saturated", SATURATING, lambda: digits(mlp(5, 96, nn.Tanh, normal(1.0)), sgd(0.1)))
sick("tanh_3_std_06_wide", "saturated", SATURATING, lambda: digits(mlp(3, 256, nn.Tanh, normal(0.6)), sgd(0.1)))
sick(
    "tanh_written_out_std_1", "saturated", SATURATING, lambda: digits(Written(4, 96, torch.tanh, normal(1.0)), sgd(0.1))
)
sick("sigmoid_3_std_3", "saturated", SATURATING, lambda: digits(mlp(3, 96, nn.Sigmoid, normal(3.0)), sgd(0.1)))
sick("tanh_cnn_std_1", "saturated", SATURATING, lambda: images(cnn(4, 12, nn.Tanh, normal(1.0)), sgd(0.05)))
sick(
    "attention_softmax_x30",
    "saturated exploding",
    SATURATING,
    lambda: digits(Attention(3, fused=False, scale=30.0), sgd(0.05)),
)
sick(
    "hardtanh_std_1",
    "saturated dead vanishing exploding",
    SATURATING + " graph learning_rate",
    lambda: digits(mlp(4, 96, nn.Hardtanh, normal(1.5)), sgd(0.1)),
)

ANY = "exploding nonfinite"
sick(
    "relu_15_twice_he",
    ANY,
    "initialization learning_rate",
    lambda: digits(mlp(15, 64, nn.ReLU, times(he, 2.0)), sgd(0.05)),
)
sick(
    "cnn_8_triple_he",
    ANY,
    "initialization learning_rate",
    lambda: images(cnn(8, 12, nn.ReLU, times(he, 3.0)), sgd(0.05)),
)
sick(
    "written_out_triple_he",
    ANY,
    "initialization learning_rate",
    lambda: digits(Written(10, 64, functional.relu, times(he, 3.0)), sgd(0.02)),
)
sick(
    "residual_without_norm_large",
    ANY,
    "initialization learning_rate depth",
    lambda: digits(Residual(20, 48, norm="none", init=times(he, 1.5)), sgd(0.05)),
)
sick(
    "head_x100",
    "exploding nonfinite spike",
    "initialization learning_rate data",
    lambda: digits(big_head(100.0), sgd(0.1)),
)


def big_head(factor: float) -> nn.Module:
    model = mlp(3, 64, nn.ReLU, he)
    with torch.no_grad():
        model[-1].weight.mul_(factor)
    return model


EQUAL = "initialization"
sick("constant_initialisation", "dead", EQUAL, lambda: digits(mlp(3, 48, nn.ReLU, constant(0.01)), sgd(0.1)))
sick("zero_initialisation", "dead", EQUAL, lambda: digits(mlp(3, 48, nn.ReLU, constant(0.0)), sgd(0.1)))
sick(
    "constant_initialisation_tanh_adam", "dead", EQUAL, lambda: digits(mlp(2, 64, nn.Tanh, constant(0.05)), adam(1e-3))
)


def dead_bias(layer: int, value: float) -> nn.Module:
    model = mlp(3, 48, nn.ReLU, he)
    nn.init.constant_([module for module in model if isinstance(module, nn.Linear)][layer].bias, value)
    return model


sick("bias_minus_20", "dead", "initialization activation", lambda: digits(dead_bias(1, -20.0), sgd(0.1)))
sick("bias_minus_50_adam", "dead", "initialization activation", lambda: digits(dead_bias(2, -50.0), adam(1e-3)))


def dead_convolution() -> nn.Module:
    model = cnn(4, 12, nn.ReLU, he)
    nn.init.constant_(model[2].bias, -10.0)
    return model


sick("convolution_bias_minus_10", "dead", "initialization activation", lambda: images(dead_convolution(), sgd(0.05)))
sick(
    "transformer_small_init",
    "vanishing stalled",
    SMALL,
    lambda: digits(Residual(6, 48, norm="none", branch=None, init=normal(1e-4)), sgd(0.05)),
)
