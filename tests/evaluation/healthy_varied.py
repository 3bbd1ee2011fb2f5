"""Healthy training of the same ideas at other depths, widths, rates and under other optimizers."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, ExponentialLR, OneCycleLR

from evaluation.healthy_more import Quantised, UNet, imbalanced, itself, only, trainable
from evaluation.healthy_plain import Cast
from evaluation.healthy_traps import (
    Experts,
    GatedBranch,
    Gumbel,
    Highway,
    SwiGLU,
    adapted,
    heavy,
    momentum_encoder,
    new_head,
    scaled_layer,
    sparse_reward,
    trained,
    triplet,
    variational,
    with_scheduler,
    zero_gamma,
    zero_head,
)
from evaluation.parts import (
    DIABETES,
    DIABETES_TARGETS,
    DIGIT_LABELS,
    DIGITS,
    IMAGES,
    RAW_DIGITS,
    Attention,
    Build,
    Characters,
    Loop,
    Recurrent,
    Residual,
    adam,
    adamw,
    adding,
    cnn,
    digits,
    he,
    images,
    language,
    mlp,
    orthogonal,
    regression,
    scaled_cell,
    scheduled,
    sequence,
    sgd,
    shuffled,
    speller,
    table,
    times,
    warmup,
    xavier,
)
from evaluation.public import convnext, gpt2, llama, pictures, resnet, text
from evaluation.training import Log, Training, healthy

# -- branches that begin at nothing ----------------------------------------------------------------------------------

for depth, gain in ((6, 1e-7), (10, 1e-5), (16, 1e-3)):
    healthy(f"layer_scale_{depth}_{gain:g}_sgd", lambda d=depth, g=gain: digits(Residual(d, 40, branch=g), sgd(0.05)))
    healthy(
        f"layer_scale_{depth}_{gain:g}_momentum",
        lambda d=depth, g=gain: digits(Residual(d, 48, branch=g), sgd(0.02, momentum=0.9)),
    )
    healthy(
        f"layer_scale_{depth}_{gain:g}_adamw", lambda d=depth, g=gain: digits(Residual(d, 32, branch=g), adamw(5e-4))
    )
healthy("rezero_18_sgd", lambda: digits(Residual(18, 48, norm="none", branch=0.0), sgd(0.05)), steps=120)
healthy("rezero_10_adamw", lambda: digits(Residual(10, 64, norm="none", branch=0.0), adamw(2e-3)))
healthy("highway_14_sgd", lambda: digits(Highway(14, -3.0), sgd(0.1)))
healthy("highway_20_adam", lambda: digits(Highway(20, -1.0), adam()), steps=120)
healthy("highway_6_momentum", lambda: digits(Highway(6, -2.0), sgd(0.05, momentum=0.9)))
healthy("zero_head_momentum", lambda: digits(zero_head(), sgd(0.02, momentum=0.9)))
healthy("zero_head_adamw_hot", lambda: digits(zero_head(), adamw(5e-3)))
healthy("head_x0001_adam", lambda: digits(zero_head(0.001), adam()))
healthy(
    "lora_sgd", lambda: digits(adapted(), sgd(0.1), parameters=lambda m: [p for p in m.parameters() if p.requires_grad])
)
healthy("experts_routed_sgd", lambda: digits(Experts(dense=False), sgd(0.1)))
healthy("experts_routed_adamw", lambda: digits(Experts(dense=False), adamw(3e-3)))
healthy("gumbel_softmax_sgd", lambda: digits(Gumbel(), sgd(0.1, momentum=0.9)))
healthy("swiglu_sgd", lambda: digits(SwiGLU(), sgd(0.05)))
healthy("swiglu_small_rate", lambda: digits(SwiGLU(), adamw(1e-4)))

# -- schedules -------------------------------------------------------------------------------------------------------

healthy("one_cycle_adam", lambda: with_scheduler(mlp(3, 64), adam(), lambda o: OneCycleLR(o, 1e-2, total_steps=150)))
healthy("warm_restarts_sgd", lambda: with_scheduler(mlp(2, 64), sgd(0.2), lambda o: CosineAnnealingWarmRestarts(o, 30)))
healthy("exponential_decay", lambda: with_scheduler(mlp(2, 64), sgd(0.2), lambda o: ExponentialLR(o, 0.95)))
healthy(
    "rate_1e6_to_03", lambda: digits(mlp(2, 64), sgd(0.1), before=scheduled(lambda t: 1e-6 * (300_000 ** (t / 150))))
)
healthy(
    "rate_in_steps_of_three",
    lambda: digits(mlp(3, 64), adam(), before=scheduled(lambda t: min(3e-3, 1e-6 * 3 ** (t // 10)))),
)
healthy(
    "triangular_rate",
    lambda: digits(mlp(2, 64), sgd(0.1), before=scheduled(lambda t: 0.02 + 0.18 * abs((t % 40) / 20 - 1))),
)
healthy("warmup_transformer_100", lambda: language(Characters(2), adamw(3e-3), before=warmup(3e-3, 100)), steps=100)

# -- fine-tuning, little to learn, noise -----------------------------------------------------------------------------

healthy("fine_tuning_3e6_adam", lambda: digits(trained(mlp(3, 64), 200), adam(3e-6)))
healthy("fine_tuning_cnn", lambda: images(trained(cnn(3, 12), 80, inputs=IMAGES), adam(1e-4)))
healthy("new_head_sgd", lambda: digits(new_head(), sgd(0.05)))
healthy("memorises_four_sgd", lambda: table(mlp(2, 64), sgd(0.1), DIGITS[:4], DIGIT_LABELS[:4], size=8), steps=300)
healthy(
    "memorises_tanh", lambda: table(mlp(3, 48, nn.Tanh), adam(3e-3), DIGITS[:6], DIGIT_LABELS[:6], size=6), steps=300
)
healthy("random_labels_adam", lambda: digits(mlp(3, 64), adam(), spoil=shuffled()))
healthy(
    "random_labels_tanh",
    lambda: digits(mlp(3, 64, nn.Tanh, xavier), sgd(0.05), spoil=shuffled()),
)
healthy("random_labels_cnn", lambda: images(cnn(3, 12), adam(), spoil=shuffled()))
healthy(
    "random_tokens_gru",
    lambda: tokens(speller(nn.GRU, 32), adam()),
    steps=80,
)
healthy("random_tokens_transformer", lambda: tokens(Characters(2), adamw(1e-3)), steps=80)
healthy(
    "noise_regression",
    lambda: table(mlp(2, 48, inputs=10, outputs=1), adam(), DIABETES, torch.randn(442, 1), loss=functional.mse_loss),
)
healthy(
    "label_noise_sgd",
    lambda: digits(
        mlp(2, 64),
        sgd(0.1),
        spoil=shuffled(0.7),
    ),
)
healthy("sparse_reward_momentum", lambda: sparse_reward(sgd(0.1, momentum=0.9)), steps=250)
healthy("triplet_margin_longer", triplet, steps=300)
healthy("variational_autoencoder_weak", lambda: variational(0.001))
healthy("imbalanced_rmsprop", lambda: imbalanced(partial(RMSprop, lr=1e-3)), steps=250)
healthy("quantised_code_sgd", lambda: itself(Quantised(), sgd(0.1)))
healthy(
    "tiny_targets_sgd",
    lambda: table(
        mlp(2, 32, outputs=1), sgd(0.05), DIGITS, 1e-3 * DIGIT_LABELS.float()[:, None], loss=functional.mse_loss
    ),
)
healthy(
    "tiny_targets_1e6_adam",
    lambda: table(
        mlp(2, 32, outputs=1), adam(), DIGITS, 1e-6 * DIGIT_LABELS.float()[:, None], loss=functional.mse_loss
    ),
)
healthy("far_targets_adam", lambda: regression(mlp(2, 32, inputs=10, outputs=1), adam(3e-2), 100 + DIABETES_TARGETS))
healthy(
    "half_of_the_inputs_missing",
    lambda: digits(mlp(2, 64), adam(), spoil=lambda t, x, y: (x * (torch.rand_like(x) < 0.5), y)),
)
healthy(
    "task_changes_sgd",
    lambda: digits(mlp(2, 64), sgd(0.1), spoil=lambda t, x, y: (x, y) if t < 70 else (x.flip(1), (y + 5) % 10)),
    steps=160,
)
healthy(
    "task_changes_cnn",
    lambda: images(cnn(3, 12), adam(2e-3), spoil=lambda t, x, y: (x, y) if t < 80 else (x.flip(-1), (y + 1) % 10)),
    steps=160,
)
healthy("single_samples", lambda: digits(mlp(2, 64), sgd(0.01), size=1))
healthy("four_samples_momentum", lambda: digits(mlp(3, 64), sgd(0.01, momentum=0.9), size=4))
healthy("clipped_hard_adam", lambda: digits(mlp(3, 64), adam(), clip=0.01))
healthy("clipped_hard_transformer", lambda: language(Characters(2), adamw(1e-3), clip=0.02), steps=80)

# -- plain networks --------------------------------------------------------------------------------------------------

healthy("deep_linear_12_adam", lambda: digits(mlp(12, 48, nn.Identity, orthogonal), adam(3e-4)))
healthy("tanh_orthogonal_20", lambda: digits(mlp(20, 48, nn.Tanh, orthogonal), adam(3e-4)))
healthy("tanh_orthogonal_8_sgd", lambda: digits(mlp(8, 64, nn.Tanh, orthogonal), sgd(0.05)))
healthy("hardswish_sgd", lambda: digits(mlp(4, 64, nn.Hardswish, he), sgd(0.05)))
healthy("mish_3", lambda: digits(mlp(3, 64, nn.Mish), adam()))
healthy("softplus_3_sgd", lambda: digits(mlp(3, 64, nn.Softplus, xavier), sgd(0.05)))
healthy("group_norm_sgd", lambda: images(group_normed(4), sgd(0.1)))
healthy("batch_norm_12_adamw", lambda: digits(mlp(12, 48, nn.ReLU, norm=nn.BatchNorm1d), adamw(1e-3)))
healthy("layer_norm_16_sgd", lambda: digits(mlp(16, 48, nn.ReLU, he, norm=nn.LayerNorm), sgd(0.02)))
healthy("cnn_10_he_sgd", lambda: images(cnn(10, 12, nn.ReLU, he), sgd(0.02)))
healthy("cnn_tanh_sgd", lambda: images(cnn(4, 12, nn.Tanh, xavier), sgd(0.1)))
healthy("raw_pixels_cnn_adam", lambda: images(cnn(3, 12), adam(), inputs=RAW_DIGITS.reshape(-1, 1, 8, 8)))
healthy("raw_pixels_small_rate", lambda: digits(mlp(2, 64), sgd(1e-3), inputs=RAW_DIGITS))
healthy("autocast_cnn", lambda: images(Cast(cnn(3, 12)), adam()))
healthy(
    "autoencoder_6_adamw", lambda: table(mlp(6, 40, outputs=64), adamw(1e-3), DIGITS, DIGITS, loss=functional.mse_loss)
)
healthy(
    "autoencoder_narrow",
    lambda: table(mlp(3, 4, nn.Tanh, outputs=64), adam(3e-3), DIGITS, DIGITS, loss=functional.mse_loss),
)
healthy("nadam_residual", lambda: digits(Residual(6, 48), partial(NAdam, lr=1e-3)))
healthy("rmsprop_residual", lambda: digits(Residual(6, 48), partial(RMSprop, lr=3e-4)))
healthy("post_norm_3_sgd", lambda: digits(Residual(3, 48, norm="post"), sgd(0.05)))

# -- sequences -------------------------------------------------------------------------------------------------------

healthy(
    "gru_language_model_sgd",
    lambda: language(speller(nn.GRU, 48), sgd(2.0), clip=0.5),
    steps=100,
)
healthy(
    "lstm_language_model_small_rate",
    lambda: language(speller(nn.LSTM, 48), adam(1e-3)),
    steps=80,
)
healthy(
    "rnn_language_model_2_layers",
    lambda: language(speller(nn.RNN, 32, num_layers=2), adamw(2e-3)),
    steps=80,
)
healthy(
    "rare_words_lstm",
    lambda: language(Recurrent(nn.LSTM(8, 24, batch_first=True), 64, every=True, embed=8), adamw(2e-3), size=1),
)
healthy(
    "lstm_first_sign_15", lambda: sequence(Recurrent(nn.LSTM(1, 32, batch_first=True), 2), adam(5e-3), 15, task="sign")
)
healthy(
    "orthogonal_rnn_first_sign_20",
    lambda: sequence(
        Recurrent(scaled_cell(nn.RNN(1, 32, batch_first=True), orthogonal), 2), adam(2e-3), 20, task="sign"
    ),
)
healthy(
    "bidirectional_gru_30",
    lambda: sequence(Recurrent(nn.GRU(2, 24, batch_first=True, bidirectional=True), 1), adam(3e-3), 30),
)
healthy("loop_of_lstm_like_cells", lambda: sequence(Loop(nn.GRUCell(2, 48), 48, 1), adamw(2e-3), 30))
healthy(
    "last_value_gru_60", lambda: sequence(Recurrent(nn.GRU(1, 24, batch_first=True), 2), adam(5e-3), 60, task="last")
)
healthy(
    "rnn_relu_09",
    lambda: sequence(
        Recurrent(scaled_cell(nn.RNN(2, 32, nonlinearity="relu", batch_first=True), times(orthogonal, 0.9)), 1),
        sgd(0.01),
        20,
        clip=1.0,
    ),
)
healthy("transformer_3_sgd", lambda: language(Characters(3), sgd(0.3)), steps=80)
healthy("transformer_sgd_small_rate", lambda: language(Characters(2), sgd(0.03, momentum=0.9)), steps=80)
healthy("transformer_post_norm_2_adam", lambda: language(Characters(2, pre=False), adam(5e-4)), steps=80)
healthy("transformer_adam_3e4", lambda: language(Characters(4), adam(3e-4)), steps=60)
healthy("attention_softmax_sgd", lambda: digits(Attention(2, fused=False), sgd(0.1)))
healthy("attention_scale_2", lambda: digits(Attention(3, fused=False, scale=2.0), adam(1e-3)))
healthy("attention_scale_001", lambda: digits(Attention(2, fused=True, scale=0.01), sgd(0.1)))


# -- converged, noisy, idle ------------------------------------------------------------------------------------------

healthy("memorises_eight_adam", lambda: table(mlp(3, 64), adam(3e-3), DIGITS[:8], DIGIT_LABELS[:8], size=8), steps=300)
healthy("memorises_five_cnn", lambda: table(cnn(3, 12), adam(3e-3), IMAGES[:5], DIGIT_LABELS[:5], size=5), steps=250)
healthy(
    "memorises_twelve_gelu",
    lambda: table(mlp(3, 64, nn.GELU), adamw(3e-3), DIGITS[:12], DIGIT_LABELS[:12], size=12),
    steps=300,
)
healthy(
    "learns_five_by_heart_sgd", lambda: table(mlp(2, 64), sgd(0.2), DIGITS[:5], DIGIT_LABELS[:5], size=5), steps=300
)
healthy(
    "learns_five_by_heart_mse",
    lambda: table(
        mlp(2, 64, outputs=1),
        adam(3e-3),
        DIGITS[:5],
        DIGIT_LABELS[:5].float()[:, None],
        size=5,
        loss=functional.mse_loss,
    ),
    steps=300,
)
healthy(
    "random_labels_adamw_wide",
    lambda: digits(mlp(2, 192), adamw(2e-3), spoil=shuffled()),
)
healthy(
    "random_labels_deep_relu",
    lambda: digits(mlp(6, 64, nn.ReLU, he), adam(), spoil=shuffled()),
)
healthy("tokens_without_order", lambda: tokens(Characters(2), adamw(1e-3)), steps=80)
healthy(
    "tokens_without_order_lstm",
    lambda: tokens(speller(nn.LSTM, 32), adam(3e-3)),
    steps=80,
)
healthy(
    "noise_regression_tanh",
    lambda: table(
        mlp(2, 48, nn.Tanh, inputs=10, outputs=1), adam(), DIABETES, torch.randn(442, 1), loss=functional.mse_loss
    ),
)
healthy(
    "noise_regression_sgd",
    lambda: table(mlp(2, 48, inputs=10, outputs=1), sgd(0.02), DIABETES, torch.randn(442, 1), loss=functional.mse_loss),
)
healthy("sparse_reward_wide", lambda: sparse_reward(width=128), steps=200)
healthy("rewards_are_rare", lambda: sparse_reward(chance=0.15), steps=300)
healthy("imbalanced_momentum", lambda: imbalanced(sgd(0.05, momentum=0.9)), steps=250)
healthy("imbalanced_adamw_hot", lambda: imbalanced(adamw(5e-3)), steps=250)
healthy("quantised_code_momentum", lambda: itself(Quantised(), sgd(0.05, momentum=0.9)))
healthy("quantised_code_slow", lambda: itself(Quantised(), adam(3e-4)))
healthy(
    "targets_of_1e4_momentum",
    lambda: table(
        mlp(2, 32, outputs=1),
        sgd(0.02, momentum=0.9),
        DIGITS,
        1e-4 * DIGIT_LABELS.float()[:, None],
        loss=functional.mse_loss,
    ),
)
healthy(
    "targets_of_1e5_adamw",
    lambda: table(
        mlp(2, 32, outputs=1), adamw(1e-3), DIGITS, 1e-5 * DIGIT_LABELS.float()[:, None], loss=functional.mse_loss
    ),
)
healthy(
    "another_task_sgd",
    lambda: digits(mlp(3, 64), sgd(0.1), spoil=lambda t, x, y: (x, y) if t < 90 else (x.flip(1), (y + 3) % 10)),
    steps=200,
)
healthy(
    "another_task_momentum",
    lambda: digits(
        mlp(2, 64), sgd(0.05, momentum=0.9), spoil=lambda t, x, y: (x, y) if t < 60 else (x.roll(9, 1), (y + 2) % 10)
    ),
    steps=160,
)
healthy(
    "outliers_mse", lambda: table(mlp(2, 32, inputs=10, outputs=1), adam(), DIABETES, heavy(), loss=functional.mse_loss)
)
healthy(
    "outliers_huber_sgd",
    lambda: table(mlp(2, 32, inputs=10, outputs=1), sgd(0.05), DIABETES, heavy(), loss=functional.huber_loss),
)
healthy("mixup_sgd", lambda: digits(mlp(2, 64), sgd(0.1), spoil=lambda t, x, y: (0.6 * x + 0.4 * x.roll(1, 0), y)))
healthy("noisy_inputs_sgd", lambda: digits(mlp(2, 64), sgd(0.1), spoil=lambda t, x, y: (x + torch.randn_like(x), y)))
healthy(
    "noisy_gradient_momentum",
    lambda: digits(mlp(2, 64), sgd(0.02, momentum=0.9), spoil=lambda t, x, y: (x + 2 * torch.randn_like(x), y)),
)
healthy(
    "warm_restarts_adamw_25",
    lambda: with_scheduler(mlp(3, 64), adamw(3e-3), lambda o: CosineAnnealingWarmRestarts(o, 25)),
)
healthy(
    "warm_restarts_cnn",
    lambda: with_scheduler(
        nn.Sequential(nn.Unflatten(1, (1, 8, 8)), cnn(3, 12)), adam(3e-3), lambda o: CosineAnnealingWarmRestarts(o, 50)
    ),
)
healthy(
    "warm_restarts_momentum",
    lambda: with_scheduler(mlp(2, 64), sgd(0.1, momentum=0.9), lambda o: CosineAnnealingWarmRestarts(o, 30, 2)),
)
healthy(
    "one_cycle_cnn",
    lambda: with_scheduler(
        nn.Sequential(nn.Unflatten(1, (1, 8, 8)), cnn(3, 12, norm=True)),
        sgd(0.1, momentum=0.9),
        lambda o: OneCycleLR(o, 0.5, total_steps=150),
    ),
)
healthy(
    "one_cycle_deep",
    lambda: with_scheduler(mlp(4, 64), sgd(0.1, momentum=0.9), lambda o: OneCycleLR(o, 0.2, total_steps=150)),
)
healthy("growing_by_ten_gru", lambda: longer(adam(3e-3)))
healthy("growing_by_ten_sgd", lambda: longer(sgd(0.1)))

# -- more of the same networks ---------------------------------------------------------------------------------------

healthy("tanh_orthogonal_6_adam", lambda: digits(mlp(6, 64, nn.Tanh, orthogonal), adam()))
healthy("orthogonal_tanh_14", lambda: digits(mlp(14, 48, nn.Tanh, orthogonal), adam(5e-4)))
healthy("orthogonal_tanh_10_momentum", lambda: digits(mlp(10, 64, nn.Tanh, orthogonal), sgd(0.02, momentum=0.9)))
healthy("deep_linear_10_momentum", lambda: digits(mlp(10, 64, nn.Identity, xavier), sgd(0.005, momentum=0.9)))
healthy("layer_norm_10_momentum", lambda: digits(mlp(10, 64, nn.ReLU, he, norm=nn.LayerNorm), sgd(0.02, momentum=0.9)))
healthy("groups_of_units_6_sgd", lambda: digits(mlp(6, 64, nn.ReLU, norm=partial(nn.GroupNorm, 8)), sgd(0.05)))
healthy("groups_of_units_10_adam", lambda: digits(mlp(10, 48, nn.ReLU, norm=partial(nn.GroupNorm, 4)), adam()))
healthy("batch_norm_24_adam", lambda: digits(mlp(24, 48, nn.ReLU, norm=nn.BatchNorm1d), adam()), steps=100)
healthy("batch_norm_16_sgd", lambda: digits(mlp(16, 48, nn.ReLU, norm=nn.BatchNorm1d), sgd(0.05)), steps=100)
healthy("adagrad_hot", lambda: digits(mlp(2, 64), partial(Adagrad, lr=0.05)))
healthy("zero_gamma_adam", lambda: digits(zero_gamma(), adam()))
healthy("gates_open_sgd", lambda: digits(GatedBranch(4.0), sgd(0.1)))
healthy("gates_open_wide_adamw", lambda: digits(GatedBranch(6.0), adamw(3e-3)))
healthy("first_layer_x5_sgd", lambda: digits(scaled_layer(0, 5.0), sgd(0.02)))
healthy("third_layer_x3_tanh", lambda: digits(scaled_layer(4, 3.0, nn.Tanh), adam()))
healthy("pretrained_new_head_sgd", lambda: digits(new_head(), sgd(0.01, momentum=0.9)))
healthy("momentum_encoder_sgd", lambda: momentum_encoder(sgd(0.05, momentum=0.9)))
healthy("momentum_encoder_adamw", lambda: momentum_encoder(adamw(3e-3)))
healthy("lora_adamw", lambda: digits(adapted(), adamw(1e-2), parameters=trainable))
healthy("lora_momentum", lambda: digits(adapted(), sgd(0.02, momentum=0.9), parameters=trainable))
healthy(
    "biases_only_cnn",
    lambda: images(only("bias", trained(cnn(3, 12), 80, inputs=IMAGES)), adam(3e-3), parameters=trainable),
)
healthy(
    "biases_only_momentum",
    lambda: digits(only("bias", trained(mlp(3, 64))), sgd(0.02, momentum=0.9), parameters=trainable),
)
healthy("two_rates_adamw", lambda: grouped(partial(AdamW), 1e-5, 1e-3))
healthy("two_rates_sgd_apart", lambda: grouped(partial(SGD), 1e-4, 0.05))
healthy("unet_adamw", lambda: table(UNet(), adamw(2e-3), IMAGES, IMAGES, loss=functional.mse_loss))
healthy("unet_momentum", lambda: table(UNet(), sgd(0.1, momentum=0.9), IMAGES, IMAGES, loss=functional.mse_loss))
healthy(
    "bidirectional_rnn_20",
    lambda: sequence(Recurrent(nn.RNN(2, 24, batch_first=True, bidirectional=True), 1), adam(2e-3), 20),
)
healthy(
    "bidirectional_lstm_language",
    lambda: language(speller(nn.LSTM, 32, bidirectional=True), adam(3e-3)),
    steps=80,
)
healthy(
    "bidirectional_gru_15_sgd",
    lambda: sequence(Recurrent(nn.GRU(2, 24, batch_first=True, bidirectional=True), 1), sgd(0.1), 15),
)
healthy("loop_of_gru_cells_40", lambda: sequence(Loop(nn.GRUCell(2, 32), 32, 1), adam(3e-3), 40))
healthy("loop_of_rnn_cells_12", lambda: sequence(Loop(nn.RNNCell(2, 32), 32, 1), adam(2e-3), 12))
healthy(
    "post_norm_transformer_4_warmup",
    lambda: language(Characters(4, pre=False), adam(1e-3), before=warmup(1e-3, 40)),
    steps=80,
)
healthy(
    "post_norm_transformer_adamw",
    lambda: language(Characters(2, pre=False), adamw(1e-3), before=warmup(1e-3, 20)),
    steps=80,
)
healthy(
    "post_norm_residual_6_warmup", lambda: digits(Residual(6, 48, norm="post"), adam(1e-3), before=warmup(1e-3, 50))
)
healthy("fused_attention_3", lambda: digits(Attention(3, fused=True), adam(2e-3)))
healthy("fused_attention_momentum", lambda: digits(Attention(2, fused=True), sgd(0.05, momentum=0.9)))


def tokens(model: nn.Module, build: Build) -> Training:
    """Predict tokens that nobody can."""

    def loss(_step: int) -> Tensor:
        drawn = torch.randint(0, 64, (16, 33))
        return functional.cross_entropy(model(drawn[:, :-1]).flatten(0, 1), drawn[:, 1:].flatten())

    return Training(model=model, optimizer=build(model.parameters()), loss=loss)


def group_normed(depth: int) -> nn.Module:
    made: list[nn.Module] = [nn.Conv2d(1, 12, 3, padding=1)]
    for _ in range(depth):
        made += [nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)]
    return nn.Sequential(*made, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10))


def longer(build: Build) -> Training:
    """Sequences that grow by ten steps at a time."""
    model = Recurrent(nn.GRU(2, 32, batch_first=True), 1)

    def loss(step: int) -> Tensor:
        inputs, targets = adding(32, 10 + 10 * (step // 40))
        return functional.mse_loss(model(inputs), targets)

    return Training(model=model, optimizer=build(model.parameters()), loss=loss)


def grouped(build: Build, slow: float, fast: float) -> Training:
    """A pretrained body at a small rate and its head at a larger one."""
    model = trained(mlp(3, 64))
    groups = [{"params": model[:-1].parameters(), "lr": slow}, {"params": model[-1].parameters(), "lr": fast}]
    optimizer = build(groups)
    return digits(model, lambda _parameters: optimizer)


if find_spec("transformers") is not None:
    healthy("gpt2_momentum", lambda: text(gpt2(), sgd(0.05, momentum=0.9)), steps=50)
    healthy("gpt2_rmsprop", lambda: text(gpt2(), partial(RMSprop, lr=3e-4)), steps=50)
    healthy("small_llama_nesterov", lambda: text(llama(), sgd(0.05, momentum=0.9, nesterov=True)), steps=50)
    healthy("small_llama_slow", lambda: text(llama(), adamw(1e-4)), steps=50)
    healthy("convnext_rmsprop", lambda: pictures(convnext(), partial(RMSprop, lr=1e-3)), steps=60)
    healthy("small_convnext_plain_sgd", lambda: pictures(convnext(), sgd(0.02)), steps=60)
    healthy("small_convnext_adamw", lambda: pictures(convnext(), adamw(4e-3), before=warmup(4e-3, 20)), steps=60)
    healthy("gpt2_6_layers", lambda: text(gpt2(6), adamw(3e-4)), steps=40)
    healthy("gpt2_sgd", lambda: text(gpt2(), sgd(0.1, momentum=0.9)), steps=50)
    healthy("llama_4_layers_clipped", lambda: text(llama(4), adamw(1e-3), before=warmup(1e-3, 30), clip=0.5), steps=50)
    healthy("llama_sgd", lambda: text(llama(), sgd(0.1, momentum=0.9)), steps=50)
    healthy("convnext_sgd", lambda: pictures(convnext(), sgd(0.05, momentum=0.9)), steps=60)
    healthy("convnext_adam_hot", lambda: pictures(convnext(), adam(4e-3)), steps=60)
    healthy("resnet_adamw_warmup", lambda: pictures(resnet(), adamw(3e-3), before=warmup(3e-3, 30)), steps=60)

# -- ideas that the other files do not have --------------------------------------------------------------------------


class Pooled(nn.Module):
    """Attention pooling over a set of rows (Ilse, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.score, self.head = nn.Linear(8, 32), nn.Linear(32, 1), nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.lift(inputs.reshape(-1, 8, 8)))
        weights = functional.softmax(self.score(hidden), 1)
        return self.head((weights * hidden).sum(1))


class Squeezed(nn.Module):
    """Convolutions with squeeze and excitation (Hu, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)])
        self.squeeze = nn.ModuleList(nn.Linear(16, 4) for _ in range(2))
        self.excite = nn.ModuleList(nn.Linear(4, 16) for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer, down, up in zip(self.convolutions, self.squeeze, self.excite, strict=True):
            inputs = functional.relu(layer(inputs))
            gate = torch.sigmoid(up(functional.relu(down(inputs.mean((2, 3))))))
            inputs = inputs * gate[:, :, None, None]
        return self.head(inputs.mean((2, 3)))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions by turns."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 10)
        self.deep = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, groups=16) for _ in range(depth))
        self.point = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(depth))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.first(inputs))
        for deep, point, norm in zip(self.deep, self.point, self.norms, strict=True):
            hidden = functional.relu(norm(point(deep(hidden))))
        return self.head(hidden.mean((2, 3)))


class ZeroGamma(nn.Module):
    """Residual convolutions whose last scale begins at zero (Goyal, 2017)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 12, 3, padding=1), nn.Linear(12, 10)
        self.layers = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(2 * depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(2 * depth))
        for norm in self.norms[1::2]:
            nn.init.zeros_(norm.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.first(inputs))
        for index in range(0, len(self.layers), 2):
            branch = functional.relu(self.norms[index](self.layers[index](hidden)))
            hidden = functional.relu(hidden + self.norms[index + 1](self.layers[index + 1](branch)))
        return self.head(hidden.mean((2, 3)))


class Copier(nn.Module):
    """An encoder and a decoder with attention between them (Bahdanau, 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 24)
        self.encoder, self.decoder = nn.GRU(24, 24, batch_first=True), nn.GRU(24, 24, batch_first=True)
        self.head = nn.Linear(48, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        states, last = self.encoder(self.embed(tokens))
        shifted = functional.pad(tokens, (1, -1))
        answers = self.decoder(self.embed(shifted), last)[0]
        weights = functional.softmax(answers @ states.mT / 24**0.5, -1)
        return self.head(torch.cat([answers, weights @ states], -1))


class Hyper(nn.Module):
    """A small network writes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.writer = nn.Parameter(torch.randn(10, 8)), nn.Linear(8, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.writer(self.codes).T / 8


class Shared(nn.Module):
    """An autoencoder whose decoder is its transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 64) / 8), nn.Parameter(torch.zeros(64))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ self.weight.T) @ self.weight + self.bias


def copying(build: Build) -> Training:
    model = Copier()

    def loss(_step: int) -> Tensor:
        drawn = torch.randint(1, 16, (32, 10))
        return functional.cross_entropy(model(drawn).flatten(0, 1), drawn.flatten())

    return Training(model=model, optimizer=build(model.parameters()), loss=loss)


def two_losses() -> Training:
    """A class and a parity, of which one is weighted a hundredth."""
    model = mlp(2, 64, outputs=12)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        small = functional.cross_entropy(logits[:, 10:], labels % 2)
        return functional.cross_entropy(logits[:, :10], labels) + 0.01 * small

    return digits(model, adam(), loss=loss)


def attacked() -> Training:
    """Adversarial training by one signed step (Goodfellow, 2015)."""
    model = mlp(2, 64)
    optimizer = Adam(model.parameters(), lr=1e-3)

    def loss(_step: int) -> Tensor:
        rows = torch.randint(0, len(DIGITS), (64,))
        inputs = DIGITS[rows].clone().requires_grad_()
        (slope,) = torch.autograd.grad(functional.cross_entropy(model(inputs), DIGIT_LABELS[rows]), inputs)
        return functional.cross_entropy(model(inputs.detach() + 0.1 * slope.sign()), DIGIT_LABELS[rows])

    return Training(model=model, optimizer=optimizer, loss=loss)


def against(kind: str) -> Training:
    """A generator and a discriminator in one optimizer each, with a least-squares or a hinge loss."""
    models = {"g": mlp(2, 48, inputs=8, outputs=64), "d": mlp(2, 48, nn.LeakyReLU, outputs=1)}
    optimizers = {name: Adam(model.parameters(), lr=5e-4, betas=(0.5, 0.9)) for name, model in models.items()}

    def step(_index: int, log: Log) -> None:
        real, fake = DIGITS[torch.randint(0, len(DIGITS), (64,))], models["g"](torch.randn(64, 8))
        optimizers["d"].zero_grad()
        seen, made = models["d"](real), models["d"](fake.detach())
        if kind == "hinge":
            loss = functional.relu(1 - seen).mean() + functional.relu(1 + made).mean()
        else:
            loss = (seen - 1).square().mean() + made.square().mean()
        log(loss, optimizer="d")
        loss.backward()
        optimizers["d"].step()
        optimizers["g"].zero_grad()
        made = models["d"](fake)
        loss = -made.mean() if kind == "hinge" else (made - 1).square().mean()
        log(loss, optimizer="g")
        loss.backward()
        optimizers["g"].step()

    return Training(model=models, optimizer=optimizers, step=step)


def sharpness_aware() -> Training:
    """Two passes a step: the update is made with the gradient of a neighbour (Foret, 2021)."""
    model = mlp(2, 64)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(_index: int, log: Log) -> None:
        rows = torch.randint(0, len(DIGITS), (64,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(DIGITS[rows]), DIGIT_LABELS[rows])
        log(loss)
        loss.backward()
        with torch.no_grad():
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            moves = [0.05 * p.grad / norm for p in model.parameters() if p.grad is not None]
            for parameter, move in zip(model.parameters(), moves, strict=True):
                parameter.add_(move)
        optimizer.zero_grad()
        functional.cross_entropy(model(DIGITS[rows]), DIGIT_LABELS[rows]).backward()
        with torch.no_grad():
            for parameter, move in zip(model.parameters(), moves, strict=True):
                parameter.sub_(move)
        optimizer.step()

    return Training(model=model, optimizer=optimizer, step=step)


def zero_output() -> nn.Module:
    model = Characters(2)
    nn.init.zeros_(model.head.weight)
    return model


def zero_branches() -> nn.Module:
    model = Residual(8, 48)
    for block in model.blocks:
        nn.init.zeros_(block[-1].weight)
    return model


def zero_cnn() -> nn.Module:
    model = cnn(4, 12)
    nn.init.zeros_(model[-1].weight)
    return model


healthy("zero_head_cnn_sgd", lambda: images(zero_cnn(), sgd(0.05)))
healthy("zero_head_cnn_adamw", lambda: images(zero_cnn(), adamw(1e-3)))
healthy("zero_head_wide_momentum", lambda: digits(zero_head(), sgd(0.05, momentum=0.9)))
healthy("zero_last_layer_of_branches", lambda: digits(zero_branches(), sgd(0.05)))
healthy("zero_last_layers_adam", lambda: digits(zero_branches(), adam()))
healthy("zero_output_transformer", lambda: language(zero_output(), adamw(1e-3)), steps=80)
healthy("zero_output_transformer_sgd", lambda: language(zero_output(), sgd(0.1, momentum=0.9)), steps=80)
healthy("zero_gamma_residual_cnn", lambda: images(ZeroGamma(4), sgd(0.1, momentum=0.9)), steps=100)
healthy("zero_gamma_residual_cnn_adam", lambda: images(ZeroGamma(3), adam(2e-3)), steps=100)
healthy("attention_pooling", lambda: digits(Pooled(), adam(3e-3)))
healthy("attention_pooling_momentum", lambda: digits(Pooled(), sgd(0.05, momentum=0.9)))
healthy("squeeze_excite", lambda: images(Squeezed(), adam(3e-3)))
healthy("squeeze_excite_sgd", lambda: images(Squeezed(), sgd(0.1, momentum=0.9)))
healthy("depthwise_cnn", lambda: images(Separable(4), adam(2e-3)))
healthy("depthwise_cnn_momentum", lambda: images(Separable(3), sgd(0.05, momentum=0.9)))
healthy("copy_task", lambda: copying(adam(3e-3)), steps=100)
healthy("copy_task_sgd", lambda: copying(sgd(0.5)), steps=100)
healthy("hypernetwork", lambda: digits(Hyper(), adam(3e-3)))
healthy("hypernetwork_sgd", lambda: digits(Hyper(), sgd(0.1)))
healthy("weight_tied_autoencoder", lambda: table(Shared(), adam(2e-3), DIGITS, DIGITS, loss=functional.mse_loss))
healthy(
    "tied_autoencoder_momentum",
    lambda: table(Shared(), sgd(0.1, momentum=0.9), DIGITS, DIGITS, loss=functional.mse_loss),
)
healthy("multi_task_losses", two_losses)
healthy("adversarial_training_fgsm", attacked)
healthy("hinge_gan", lambda: against("hinge"))
healthy("lsgan", lambda: against("squares"))
healthy("sam_like_double_step", sharpness_aware)
healthy("small_first_rate", lambda: digits(mlp(3, 64), sgd(0.1), before=scheduled(lambda t: 1e-8 if t < 20 else 0.1)))
healthy("tiny_batch_cnn", lambda: images(cnn(3, 12), sgd(0.01, momentum=0.9), size=2))
healthy("accumulate_8_adamw", lambda: digits(mlp(3, 64), adamw(2e-3), size=8, accumulate=8), steps=80)
healthy(
    "label_smoothing_cnn",
    lambda: images(cnn(3, 12), adamw(2e-3), loss=lambda x, y: functional.cross_entropy(x, y, label_smoothing=0.3)),
)
healthy(
    "images_by_tanh",
    lambda: table(
        mlp(3, 48, nn.Tanh, outputs=64, last=nn.Tanh()),
        adam(3e-3),
        DIGITS,
        torch.tanh(DIGITS),
        loss=functional.mse_loss,
    ),
)
healthy(
    "embedding_sgd",
    lambda: language(speller(nn.GRU, 32), sgd(1.0)),
    steps=100,
)
healthy(
    "gru_with_dropout",
    lambda: language(speller(nn.GRU, 32, num_layers=2, dropout=0.3), adam(3e-3)),
    steps=80,
)
