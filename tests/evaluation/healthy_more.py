"""More healthy training with something unusual about it: parts that hardly train, odd shapes, odd losses."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, RMSprop, Rprop
from torch.utils.checkpoint import checkpoint

from evaluation.healthy_traps import trained
from evaluation.parts import (
    DIGIT_LABELS,
    DIGITS,
    IMAGES,
    RAW_DIGITS,
    Along,
    Build,
    Characters,
    Gated,
    Mixer,
    Residual,
    Rows,
    adam,
    adamw,
    cnn,
    digits,
    he,
    images,
    language,
    mlp,
    rows_of,
    scheduled,
    sequence,
    sgd,
    speller,
    table,
    times,
    xavier,
)
from evaluation.training import Training, healthy


class UNet(nn.Module):
    """Down, up, and a way around."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ConvTranspose2d(16, 1, 2, stride=2)

    def forward(self, inputs: Tensor) -> Tensor:
        down = functional.relu(self.down(inputs))
        up = functional.relu(self.up(functional.relu(self.middle(down))))
        return self.last(torch.cat([down, up], 1))


class Dilated(nn.Module):
    """A temporal convolutional network (Bai, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 16, 1)
        self.layers = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=2**i, dilation=2**i) for i in range(4))
        self.head = nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.mT)
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        return self.head(hidden.mean(-1))


class Coupling(nn.Module):
    """A normalising flow of affine couplings whose last layers begin at zero (Dinh, 2017)."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(1, 32, nn.Tanh, inputs=32, outputs=64) for _ in range(steps))
        for net in self.nets:
            nn.init.zeros_(net[-1].weight)

    def forward(self, inputs: Tensor) -> Tensor:
        logdet: Tensor | float = 0.0
        for net in self.nets:
            left, right = inputs.chunk(2, -1)
            shift, scale = net(left).chunk(2, -1)
            scale = torch.tanh(scale)
            inputs = torch.cat([right * torch.exp(scale) + shift, left], -1)
            logdet = logdet + scale.sum(-1)
        return (0.5 * inputs.square().sum(-1) - logdet).mean() / 64


class Quantised(nn.Module):
    """A code book with straight-through gradients (VQ-VAE; van den Oord, 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(1, 48, outputs=8), mlp(1, 48, inputs=8, outputs=64)
        self.codes = nn.Parameter(torch.randn(32, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        latent = self.encoder(inputs)
        code = self.codes[torch.cdist(latent, self.codes).argmin(-1)]
        loss = functional.mse_loss(code, latent.detach()) + 0.25 * functional.mse_loss(latent, code.detach())
        through = latent + (code - latent).detach()
        return loss + functional.mse_loss(self.decoder(through), inputs)


class ActorCritic(nn.Module):
    """A body with a small policy head and a value head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = (
            mlp(1, 48, nn.Tanh, inputs=4, outputs=48),
            nn.Linear(48, 3),
            nn.Linear(48, 1),
        )
        with torch.no_grad():
            self.policy.weight.mul_(0.01)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(states))
        return self.policy(hidden), self.value(hidden)[:, 0]


def actor_critic() -> Training:
    model = ActorCritic()
    optimizer = Adam(model.parameters(), lr=3e-3)

    def loss(_step: int) -> Tensor:
        states = torch.randn(32, 4)
        logits, values = model(states)
        policy = torch.distributions.Categorical(logits=logits)
        actions = policy.sample()
        reward = (actions == (states[:, 0] > 0).long()).float() + 0.1 * torch.randn(32)
        advantage = (reward - values).detach()
        return (
            -(policy.log_prob(actions) * advantage).mean()
            + functional.mse_loss(values, reward)
            - 0.01 * policy.entropy().mean()
        )

    return Training(model=model, optimizer=optimizer, loss=loss)


def scaled() -> Training:
    """Mixed precision in float16 with a scaler that begins far too high."""
    model = mlp(3, 64)
    optimizer = Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    def step(_index: int, log: object) -> None:
        rows = rows_of(len(DIGITS), 64)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            logits = model(DIGITS[rows])
        loss = functional.cross_entropy(logits.float(), DIGIT_LABELS[rows])
        log(loss)  # type: ignore[operator]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return Training(model=model, optimizer=optimizer, step=step)


def only(pattern: str, model: nn.Module) -> nn.Module:
    """Freeze everything whose name does not hold the pattern."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern in name)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Prompted(nn.Module):
    """A frozen network and a trained vector in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = trained(mlp(2, 64)).requires_grad_(False)  # noqa: FBT003
        self.prompt = nn.Parameter(torch.zeros(64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs + self.prompt)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(mlp(1, 48, inputs=64, outputs=64) for _ in range(3)), nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + checkpoint(block, inputs, use_reentrant=False)
        return self.head(inputs)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = mlp(2, 48, outputs=16)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return functional.cosine_similarity(self.tower(left), self.tower(right))


def siamese() -> Training:
    model = Siamese()
    optimizer = Adam(model.parameters(), lr=1e-3)

    def loss(_step: int) -> Tensor:
        left, right = rows_of(len(DIGITS), 64), rows_of(len(DIGITS), 64)
        same = (DIGIT_LABELS[left] == DIGIT_LABELS[right]).float()
        return functional.mse_loss(model(DIGITS[left], DIGITS[right]), same)

    return Training(model=model, optimizer=optimizer, loss=loss)


def two_rates() -> Training:
    """A body at a hundredth of the head's rate, and one group at rate 0."""
    model = trained(mlp(3, 64))
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 1e-5},
        {"params": model[6].parameters(), "lr": 1e-3},
    ]
    optimizer = Adam(groups)
    return digits(model, lambda _parameters: optimizer)


def sparse_coder() -> Training:
    """Most units are silent for most samples, by an L1 penalty."""
    encoder, decoder = nn.Linear(64, 256), nn.Linear(256, 64)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    optimizer = Adam(model.parameters(), lr=2e-3)

    def loss(_step: int) -> Tensor:
        inputs = DIGITS[rows_of(len(DIGITS), 64)]
        code = functional.relu(encoder(inputs))
        return functional.mse_loss(decoder(code), inputs) + 0.01 * code.mean()

    return Training(model=model, optimizer=optimizer, loss=loss)


def imbalanced(build: Build = adam()) -> Training:  # noqa: B008 - a factory
    rows = torch.cat([torch.nonzero(DIGIT_LABELS == 0)[:, 0], torch.nonzero(DIGIT_LABELS == 1)[:3, 0]])
    return table(mlp(2, 48), build, DIGITS[rows], DIGIT_LABELS[rows])


def images_to_images(model: nn.Module) -> Training:
    return table(model, adam(3e-3), IMAGES, IMAGES, loss=functional.mse_loss)


def itself(model: nn.Module, build: Build = adam(2e-3)) -> Training:  # noqa: B008 - a factory
    """Train a model that returns its own loss."""
    optimizer = build(model.parameters())
    return Training(model=model, optimizer=optimizer, loss=lambda _step: model(DIGITS[rows_of(len(DIGITS), 64)]))


healthy("unet", lambda: images_to_images(UNet()))
healthy("dilated_convolutions", lambda: sequence(Dilated(), adam(3e-3), 30))
healthy("coupling_flow", lambda: itself(Coupling()))
healthy("quantised_code", lambda: itself(Quantised()))
healthy("actor_critic", actor_critic)
healthy("scaler_begins_too_high", scaled)
healthy("biases_only", lambda: digits(only("bias", trained(mlp(3, 64))), adam(1e-3), parameters=trainable))
healthy("norms_only", lambda: digits(only("norms", trained(Residual(4, 48))), adam(1e-3), parameters=trainable))
healthy("prompt_only", lambda: digits(Prompted(), adam(1e-2), parameters=trainable))
healthy("last_layer_only", lambda: digits(only("6.", trained(mlp(3, 64))), sgd(0.05), parameters=trainable))
healthy("activation_checkpointing", lambda: digits(Checkpointed(), adam()))
healthy("siamese", siamese)
healthy("two_rates_and_none", two_rates)
healthy("sparse_coder", sparse_coder)
healthy("imbalanced_classes", imbalanced, steps=250)
healthy("prelu", lambda: digits(mlp(4, 64, nn.PReLU), adam()))
healthy("hardswish", lambda: images(cnn(4, 12, nn.Hardswish), adam()))
healthy("softsign", lambda: digits(mlp(4, 64, nn.Softsign), adam()))
healthy("group_norm", lambda: digits(mlp(6, 64, nn.ReLU, norm=partial(nn.GroupNorm, 4)), adam()))
healthy(
    "rprop_full_batch",
    lambda: table(mlp(2, 32), partial(Rprop, lr=1e-3), DIGITS[:200], DIGIT_LABELS[:200], size=200),
    steps=60,
)
healthy("rmsprop_centred", lambda: digits(mlp(3, 64), partial(RMSprop, lr=1e-3, centered=True, momentum=0.5)))
healthy("adam_amsgrad", lambda: digits(mlp(3, 64), adam(2e-3, amsgrad=True)))
healthy("adam_large_eps", lambda: digits(mlp(3, 64), adam(1e-2, eps=1e-2)))
healthy("sgd_tiny_momentum_run", lambda: digits(mlp(3, 64), sgd(1e-3, momentum=0.99)))
healthy("adamw_3e3_deep_tanh", lambda: digits(mlp(6, 64, nn.Tanh, nn.init.xavier_uniform_), adamw(3e-3)))
healthy("language_model_small_rate", lambda: language(Characters(2), adamw(1e-5)), steps=80)
healthy("language_model_large_batch", lambda: language(Characters(2), adamw(3e-3), size=64), steps=40)
healthy(
    "gru_language_model",
    lambda: language(speller(nn.GRU, 48, num_layers=2), adam(3e-3)),
    steps=80,
)
healthy(
    "bidirectional_rnn_tagger",
    lambda: language(speller(nn.RNN, 32, bidirectional=True), adam(3e-3)),
)
healthy("gradient_noise", lambda: digits(mlp(2, 64), sgd(0.05), spoil=lambda t, x, y: (x + 2 * torch.randn_like(x), y)))
healthy(
    "inputs_between_zero_and_255_batch_norm",
    lambda: digits(nn.Sequential(nn.BatchNorm1d(64), mlp(2, 64)), adam(), inputs=DIGITS * 80 + 100),
)
healthy(
    "regression_of_tiny_targets",
    lambda: table(
        mlp(2, 32, outputs=1), adam(), DIGITS, 1e-4 * DIGIT_LABELS.float()[:, None], loss=functional.mse_loss
    ),
)
healthy(
    "regression_of_large_targets_adam",
    lambda: table(
        mlp(2, 32, outputs=1), adam(1e-2), DIGITS, 1e4 * DIGIT_LABELS.float()[:, None], loss=functional.mse_loss
    ),
)
healthy("sgd_after_adam", lambda: digits(trained(mlp(3, 64), 150), partial(SGD, lr=1e-2, momentum=0.9)))

# Neighbours of the faults in `sick_more`.
healthy("gru_on_pixels_0_to_16", lambda: table(Rows(), adam(), RAW_DIGITS, DIGIT_LABELS))
healthy("gru_on_pixels_0_to_16_sgd", lambda: table(Rows(), sgd(0.05), RAW_DIGITS, DIGIT_LABELS))
healthy("along_pixels_3_he", lambda: digits(Along(3, he), adam(3e-3)))
healthy("along_pixels_6_sgd", lambda: digits(Along(6, he), sgd(0.05, momentum=0.9)))
healthy("gated_3", lambda: digits(Gated(3), adam(3e-3)))
healthy("mixer_3", lambda: digits(Mixer(3), adam(3e-3)))
healthy("hardsigmoid_1", lambda: digits(mlp(1, 64, nn.Hardsigmoid), adam(3e-3)))
healthy("elu_12_adam", lambda: digits(mlp(12, 48, nn.ELU, times(xavier, 1.2)), adam()))
healthy(
    "linear_autoencoder_3",
    lambda: table(mlp(3, 40, nn.Identity, outputs=64), adam(), DIGITS, DIGITS, loss=functional.mse_loss),
)
healthy(
    "rate_halves_every_ten_steps",
    lambda: digits(mlp(3, 64), sgd(0.1), before=scheduled(lambda t: 0.1 * 0.5 ** (t // 10))),
    steps=90,
)
healthy("rmsprop_1e3_cnn", lambda: images(cnn(3, 12), partial(RMSprop, lr=1e-3)))
healthy("momentum_099_small_rate", lambda: digits(mlp(3, 64), sgd(0.005, momentum=0.99)))
