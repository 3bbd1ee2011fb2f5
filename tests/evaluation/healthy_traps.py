"""Healthy training that looks sick to a simple rule."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, OneCycleLR, StepLR

from evaluation.parts import (
    DIABETES,
    DIABETES_TARGETS,
    DIGIT_LABELS,
    DIGITS,
    Attention,
    Build,
    Characters,
    Recurrent,
    Residual,
    adam,
    adamw,
    adding,
    cnn,
    digits,
    images,
    jump,
    language,
    mlp,
    moons,
    regression,
    rows_of,
    scheduled,
    sequence,
    sgd,
    shuffled,
    table,
    warmup,
)
from evaluation.sick_training import adversarial
from evaluation.training import Training, healthy

# -- initialisations that begin at zero ------------------------------------------------------------------------------


def zero_head(factor: float = 0.0) -> nn.Module:
    model = mlp(4, 64)
    with torch.no_grad():
        model[-1].weight.mul_(factor)
        model[-1].bias.zero_()
    return model


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank update that begins at zero (LoRA; Hu, 2021)."""

    def __init__(self, inner: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)  # noqa: FBT003
        self.down = nn.Parameter(torch.randn(rank, inner.in_features) / inner.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs) + inputs @ self.down.T @ self.up.T


def adapted() -> nn.Module:
    model = trained(mlp(3, 64))
    return nn.Sequential(*(Adapted(module) if isinstance(module, nn.Linear) else module for module in model))


def trained(model: nn.Module, steps: int = 60, rate: float = 2e-3, *, inputs: Tensor = DIGITS) -> nn.Module:
    """Train before the run begins: fine-tuning starts from something."""
    optimizer = Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        rows = rows_of(len(inputs), 64)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[rows]), DIGIT_LABELS[rows]).backward()
        optimizer.step()
    return model


healthy("zero_head", lambda: digits(zero_head(), sgd(0.1)))
healthy("zero_head_adam_warmup", lambda: digits(zero_head(), adam(), before=warmup(1e-3, 60)))
healthy("head_x001", lambda: digits(zero_head(0.01), sgd(0.1)))
healthy(
    "lora", lambda: digits(adapted(), adam(3e-3), parameters=lambda m: [p for p in m.parameters() if p.requires_grad])
)
healthy(
    "lora_warmup",
    lambda: digits(
        adapted(),
        adamw(3e-3),
        parameters=lambda m: [p for p in m.parameters() if p.requires_grad],
        before=warmup(3e-3, 50),
    ),
)
healthy("rezero_24", lambda: digits(Residual(24, 32, norm="none", branch=0.0), adam()), steps=120)
healthy("zero_gamma_batch_norm", lambda: digits(zero_gamma(), sgd(0.1)))
healthy("gates_shut", lambda: digits(GatedBranch(-6.0), adam()))
healthy("gates_open", lambda: digits(GatedBranch(4.0), adam()))
healthy("highway", lambda: digits(Highway(10, -2.0), adam()))
healthy("siren", lambda: table(Siren(), adam(1e-4), moons()[0], moons()[1].float()[:, None], loss=functional.mse_loss))
healthy("first_layer_x10", lambda: digits(scaled_layer(0, 10.0), adam()))


def zero_gamma() -> nn.Module:
    model = mlp(4, 48, nn.ReLU, norm=nn.BatchNorm1d)
    nn.init.constant_(model[-3].weight, 0.1)
    return model


def scaled_layer(index: int, factor: float, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    model = mlp(3, 64, activation)
    with torch.no_grad():
        model[index].weight.mul_(factor)
    return model


class GatedBranch(nn.Module):
    """A residual branch behind a sigmoid gate."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.first, self.branch, self.gate, self.head = (
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 10),
        )
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs))
        return self.head(hidden + torch.sigmoid(self.gate(hidden)) * torch.relu(self.branch(hidden)))


class Highway(nn.Module):
    """Srivastava (2015)."""

    def __init__(self, depth: int, bias: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 40), nn.Linear(40, 10)
        self.carry = nn.ModuleList(nn.Linear(40, 40) for _ in range(depth))
        self.transform = nn.ModuleList(nn.Linear(40, 40) for _ in range(depth))
        for gate in self.carry:
            nn.init.constant_(gate.bias, bias)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for carry, transform in zip(self.carry, self.transform, strict=True):
            gate = torch.sigmoid(carry(hidden))
            hidden = gate * torch.relu(transform(hidden)) + (1 - gate) * hidden
        return self.last(hidden)


class Siren(nn.Module):
    """Sitzmann (2020): sines with a frequency of 30."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1)])
        with torch.no_grad():
            self.layers[0].weight.uniform_(-0.5, 0.5)
            for layer in self.layers[1:]:
                layer.weight.uniform_(-((6 / 64) ** 0.5) / 30, (6 / 64) ** 0.5 / 30)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            inputs = torch.sin(30 * layer(inputs))
        return self.layers[-1](inputs)


# -- schedules -------------------------------------------------------------------------------------------------------


def with_scheduler(model: nn.Module, build: Any, make: Any, **options: Any) -> Training:
    training = digits(model, build, **options)
    scheduler = make(training.optimizer)
    training.before = lambda step: scheduler.step() if step else None
    return training


healthy("cosine_to_zero", lambda: with_scheduler(mlp(2, 64), sgd(0.1), lambda o: CosineAnnealingLR(o, 150)))
healthy(
    "one_cycle",
    lambda: with_scheduler(mlp(2, 64), sgd(0.1, momentum=0.9), lambda o: OneCycleLR(o, 0.3, total_steps=150)),
)
healthy("warm_restarts", lambda: with_scheduler(mlp(2, 64), adam(3e-3), lambda o: CosineAnnealingWarmRestarts(o, 40)))
healthy("step_decay", lambda: with_scheduler(mlp(2, 64), sgd(0.1), lambda o: StepLR(o, 30, 0.1)))
healthy("warmup_from_zero", lambda: digits(mlp(3, 64), adam(), before=warmup(2e-3, 100)))
healthy("rate_1e5_to_005", lambda: digits(mlp(2, 64), sgd(0.1), before=scheduled(lambda t: 1e-5 * (5000 ** (t / 150)))))
healthy(
    "cosine_to_zero_long",
    lambda: digits(mlp(2, 48), adamw(2e-3), before=scheduled(lambda t: 1e-3 * (1 + math.cos(math.pi * t / 400)))),
    steps=400,
)
healthy(
    "staircase_warmup",
    lambda: digits(mlp(2, 64), adam(), before=scheduled(lambda t: min(1e-3, 1e-7 * 10 ** (t // 15)))),
)
healthy("rate_halved_at_80", lambda: digits(mlp(2, 64), sgd(0.2), before=jump(0.2, 0.5, 80)))

# -- fine-tuning, converged runs -------------------------------------------------------------------------------------

healthy("fine_tuning_1e5_adam", lambda: digits(trained(mlp(3, 64)), adam(1e-5)))
healthy("fine_tuning_2e5_adamw", lambda: digits(trained(mlp(3, 64)), adamw(2e-5), before=warmup(2e-5, 30)))
healthy("fine_tuning_sgd_1e3", lambda: digits(trained(mlp(3, 64)), sgd(1e-3)))
healthy("pretrained_body_new_head", lambda: digits(new_head(), adam(1e-4)))
healthy(
    "frozen_backbone",
    lambda: digits(
        frozen(trained(mlp(3, 64)), 3), adam(), parameters=lambda m: [p for p in m.parameters() if p.requires_grad]
    ),
)
healthy("converged", lambda: digits(trained(mlp(2, 96), 400), adam(1e-4), inputs=DIGITS), steps=200)
healthy(
    "converged_hinge",
    lambda: table(
        mlp(2, 48, inputs=2, outputs=1),
        adam(1e-2),
        moons()[0],
        2.0 * moons()[1].float()[:, None] - 1,
        loss=lambda x, y: (1 - x * y).clamp(min=0).mean(),
    ),
    steps=250,
)
healthy(
    "full_batch", lambda: table(mlp(2, 48, nn.Tanh), adam(3e-3), DIGITS[:300], DIGIT_LABELS[:300], size=300), steps=200
)
healthy("unfreezing_at_60", lambda: unfreezing())
healthy("memorises_ten_samples", lambda: table(mlp(2, 64), adam(), DIGITS[:10], DIGIT_LABELS[:10], size=10), steps=300)
healthy(
    "label_noise",
    lambda: digits(
        mlp(2, 64),
        adam(),
        spoil=shuffled(0.5),
    ),
)
healthy("random_labels", lambda: digits(mlp(2, 64), sgd(0.05), spoil=shuffled()))


def frozen(model: nn.Module, count: int) -> nn.Module:
    for module in list(model)[: 2 * count]:
        module.requires_grad_(False)  # noqa: FBT003
    return model


def new_head() -> nn.Module:
    model = trained(mlp(3, 64))
    nn.init.zeros_(model[-1].weight)
    return model


def unfreezing() -> Training:
    model = frozen(trained(mlp(3, 64), 30), 2)
    optimizer = Adam(model.parameters(), lr=5e-4)

    def before(_model: nn.Module, _optimizer: Any, step: int) -> None:
        if step == 60:
            model.requires_grad_(True)  # noqa: FBT003

    return digits(model, lambda _parameters: optimizer, before=before)


# -- losses of every scale -------------------------------------------------------------------------------------------

healthy("loss_x6400_adam", lambda: digits(mlp(2, 64), adam(), loss=lambda x, y: 6400 * functional.cross_entropy(x, y)))
healthy(
    "loss_x1e5_small_adam", lambda: digits(mlp(2, 64), adam(), loss=lambda x, y: 1e-5 * functional.cross_entropy(x, y))
)
healthy("loss_negative", lambda: digits(mlp(2, 64), adam(), loss=lambda x, y: functional.cross_entropy(x, y) - 10))
healthy("focal_loss", lambda: digits(mlp(2, 64), adam(), loss=focal))
healthy("loss_x5_at_100", lambda: digits(mlp(2, 64), adam(), spoil=None, loss=Rising(100, 5.0)))
healthy(
    "summed_loss_small_rate",
    lambda: digits(mlp(2, 64), sgd(1e-3), loss=lambda x, y: functional.cross_entropy(x, y, reduction="sum")),
)
healthy(
    "poisson_counts",
    lambda: table(
        mlp(2, 32, inputs=10, outputs=1),
        adam(),
        DIABETES,
        (DIABETES_TARGETS / 20).round()[:, None],
        loss=functional.poisson_nll_loss,
    ),
)
healthy("quantile_loss", lambda: regression(mlp(2, 32, inputs=10, outputs=1), adam(), DIABETES_TARGETS / 77))
healthy(
    "outliers_huber",
    lambda: table(mlp(2, 32, inputs=10, outputs=1), adam(), DIABETES, heavy(), loss=functional.huber_loss),
)


class Rising:
    """Cross-entropy that is weighted more from some call on."""

    def __init__(self, at: int, factor: float) -> None:
        self.calls, self.at, self.factor = 0, at, factor

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return functional.cross_entropy(logits, labels) * (self.factor if self.calls > self.at else 1.0)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    loss = functional.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


def heavy() -> Tensor:
    targets = (DIABETES_TARGETS - 150) / 77
    targets = targets.clone()
    targets[::50] *= 50
    return targets[:, None]


# -- parts that rest -------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Four experts, of which a fixed route uses two."""

    def __init__(self, *, dense: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, 48)
        self.experts = nn.ModuleList(nn.Linear(48, 48) for _ in range(4))
        self.gate, self.head, self.dense = nn.Linear(48, 4), nn.Linear(48, 10), dense
        nn.init.constant_(self.gate.bias, 0.0)
        with torch.no_grad():
            self.gate.bias[0] = 3.0

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs))
        weights = functional.softmax(self.gate(hidden), -1)
        if not self.dense:
            keep = weights.topk(2, -1).indices
            weights = weights * torch.zeros_like(weights).scatter(-1, keep, 1.0)
        outputs = torch.stack([torch.relu(expert(hidden)) for expert in self.experts], -1)
        return self.head(hidden + (outputs * weights[:, None, :]).sum(-1))


class Heads(nn.Module):
    """Two heads, used in turn or one of them never."""

    def __init__(self, used: Any) -> None:
        super().__init__()
        self.body, self.heads, self.used, self.step = (
            mlp(2, 48, outputs=48),
            nn.ModuleList([nn.Linear(48, 10), nn.Linear(48, 10)]),
            used,
            0,
        )

    def forward(self, inputs: Tensor) -> Tensor:
        self.step += 1
        return self.heads[self.used(self.step)](torch.relu(self.body(inputs)))


class Stochastic(nn.Module):
    """Residual blocks that are left out at random (Huang, 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 48), nn.Linear(48, 10)
        self.blocks = nn.ModuleList(nn.Linear(48, 48) for _ in range(6))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            if torch.rand(()) > 0.3:
                hidden = hidden + torch.relu(block(hidden))
        return self.last(hidden)


class Teacher(nn.Module):
    """A student beside a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = trained(mlp(2, 64)).requires_grad_(False)  # noqa: FBT003
        self.student = mlp(2, 32)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.answer = functional.softmax(self.teacher(inputs), -1)
        return self.student(inputs)


def distillation() -> Training:
    model = Teacher()
    return digits(
        model,
        adam(),
        loss=lambda x, _y: functional.kl_div(functional.log_softmax(x, -1), model.answer, reduction="batchmean"),
        parameters=lambda m: m.student.parameters(),
    )


def momentum_encoder(build: Build = adam(1e-3)) -> Training:  # noqa: B008 - a factory
    """Bootstrapping from a moving average of itself (BYOL; Grill, 2020)."""
    online, predictor = mlp(2, 48, outputs=16), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    target = deepcopy(online).requires_grad_(False)  # noqa: FBT003
    model = nn.ModuleDict({"online": online, "predictor": predictor, "target": target})
    optimizer = build([*online.parameters(), *predictor.parameters()])

    def loss(_step: int) -> Tensor:
        inputs = DIGITS[rows_of(len(DIGITS), 64)]
        views = [inputs + 0.3 * torch.randn_like(inputs) for _ in range(2)]
        with torch.no_grad():
            for mine, other in zip(target.parameters(), online.parameters(), strict=True):
                mine.lerp_(other, 0.02)
            wanted = target(views[1])
        return 2 - 2 * functional.cosine_similarity(predictor(online(views[0])), wanted).mean()

    return Training(model=model, optimizer=optimizer, loss=loss)


healthy("experts_routed", lambda: digits(Experts(dense=False), adam()))
healthy("experts_dense", lambda: digits(Experts(dense=True), adam()))
healthy("alternating_heads", lambda: digits(Heads(lambda t: t % 2), adam()))
healthy("unused_head", lambda: digits(Heads(lambda _t: 0), adam()))
healthy("head_changes_at_80", lambda: digits(Heads(lambda t: int(t > 80)), adam()))
healthy("stochastic_depth", lambda: digits(Stochastic(), adam()))
healthy("distillation", distillation)
healthy("momentum_encoder", momentum_encoder)
healthy("gan", lambda: adversarial(2e-4))
healthy("gan_hotter", lambda: adversarial(1e-3))
healthy("pruned_90_percent", lambda: pruned())
healthy(
    "embedding_of_rare_words",
    lambda: language(Recurrent(nn.GRU(8, 32, batch_first=True), 64, every=True, embed=8), adam(), size=2),
)
healthy("embedding_bag_large", lambda: bag())


def pruned() -> Training:
    model = mlp(3, 96)
    masks = [(p, (torch.rand_like(p) < 0.1).float()) for p in model.parameters() if p.dim() > 1]
    for parameter, mask in masks:
        with torch.no_grad():
            parameter.mul_(mask * 3)
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    return digits(model, adam())


def bag() -> Training:
    model = nn.Sequential(nn.EmbeddingBag(5000, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    words = torch.randint(0, 5000, (600, 12))
    labels = (words.float().mean(1) > 2500).long()
    return table(model, adam(1e-2), words, labels)


# -- accumulation, clipping, batches ---------------------------------------------------------------------------------

healthy("accumulation_4", lambda: digits(mlp(2, 64), sgd(0.1), accumulate=4), steps=100)
healthy("accumulation_clipped", lambda: digits(mlp(2, 64), adam(), accumulate=3, clip=0.5), steps=100)
healthy("clipped_hard", lambda: digits(mlp(2, 64), sgd(0.5), clip=0.05))
healthy(
    "heavy_tailed_batches",
    lambda: digits(mlp(2, 64), adam(), spoil=lambda t, x, y: (x * torch.empty(()).log_normal_(0, 0.8), y)),
)
healthy("growing_sequences", lambda: growing())
healthy(
    "change_of_task",
    lambda: digits(mlp(2, 64), adam(), spoil=lambda t, x, y: (x, y) if t < 90 else (x.flip(1), (y + 3) % 10)),
    steps=200,
)
healthy("noisy_inputs", lambda: digits(mlp(2, 64), adam(), spoil=lambda t, x, y: (x + torch.randn_like(x), y)))
healthy("mixup", lambda: digits(mlp(2, 64), adam(), spoil=lambda t, x, y: (0.7 * x + 0.3 * x.roll(1, 0), y)))
healthy("adamw_decay_03", lambda: digits(mlp(2, 64), adamw(weight_decay=0.3)))
healthy("adam_decay_5e4", lambda: digits(mlp(3, 64), adam(5e-3, weight_decay=5e-4)))
healthy("strong_decay_grokking", lambda: digits(mlp(2, 96), adamw(weight_decay=1.0)), steps=200)


def growing() -> Training:
    model = Recurrent(nn.LSTM(2, 32, batch_first=True), 1)
    optimizer = Adam(model.parameters(), lr=3e-3)

    def loss(step: int) -> Tensor:
        inputs, targets = adding(32, 6 + step // 6)
        return functional.mse_loss(model(inputs), targets)

    return Training(model=model, optimizer=optimizer, loss=loss)


# -- other ways to learn ---------------------------------------------------------------------------------------------


def sparse_reward(build: Build = adam(1e-2), width: int = 32, chance: float = 0.4) -> Training:  # noqa: B008 - a factory
    """REINFORCE with a reward that most batches do not have."""
    model = mlp(1, width, inputs=4, outputs=3)
    optimizer = build(model.parameters())

    def loss(_step: int) -> Tensor:
        states = torch.randn(16, 4)
        policy = torch.distributions.Categorical(logits=model(states))
        actions = policy.sample()
        reward = ((states[:, 0] > 1.2) & (actions == 0)).float() * (torch.rand(()) < chance)
        return -(policy.log_prob(actions) * reward).mean()

    return Training(model=model, optimizer=optimizer, loss=loss)


def triplet() -> Training:
    model = mlp(2, 48, outputs=16)
    optimizer = Adam(model.parameters(), lr=2e-3)

    def loss(_step: int) -> Tensor:
        label = int(torch.randint(0, 10, ()))
        same, other = DIGITS[label == DIGIT_LABELS], DIGITS[label != DIGIT_LABELS]
        return functional.triplet_margin_loss(
            model(same[rows_of(len(same), 32)]),
            model(same[rows_of(len(same), 32)]),
            model(other[rows_of(len(other), 32)]),
        )

    return Training(model=model, optimizer=optimizer, loss=loss)


def variational(weight: float) -> Training:
    encoder, decoder = mlp(1, 64, outputs=16), mlp(1, 64, inputs=8, outputs=64)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    optimizer = Adam(model.parameters(), lr=2e-3)

    def loss(step: int) -> Tensor:
        inputs = DIGITS[rows_of(len(DIGITS), 64)]
        mean, spread = encoder(inputs).chunk(2, -1)
        latent = mean + torch.randn_like(mean) * torch.exp(0.5 * spread)
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(-1).mean()
        return functional.mse_loss(decoder(latent), inputs) + weight * min(1.0, step / 100) * divergence

    return Training(model=model, optimizer=optimizer, loss=loss)


def contrastive() -> Training:
    model = mlp(2, 64, outputs=16)
    optimizer = AdamW(model.parameters(), lr=2e-3)

    def loss(_step: int) -> Tensor:
        inputs = DIGITS[rows_of(len(DIGITS), 48)]
        left, right = (functional.normalize(model(inputs + 0.4 * torch.randn_like(inputs)), dim=-1) for _ in range(2))
        return functional.cross_entropy(left @ right.T / 0.1, torch.arange(48))

    return Training(model=model, optimizer=optimizer, loss=loss)


def penalised_critic() -> Training:
    """A critic with a gradient penalty, whose backward goes through a backward (Gulrajani, 2017)."""
    model = mlp(2, 48, nn.LeakyReLU, outputs=1)
    optimizer = Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.9))

    def loss(_step: int) -> Tensor:
        real, fake = DIGITS[rows_of(len(DIGITS), 32)], torch.randn(32, 64)
        mixed = torch.lerp(real, fake, torch.rand(32, 1)).requires_grad_()
        slope = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)[0]
        return model(fake).mean() - model(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    return Training(model=model, optimizer=optimizer, loss=loss)


def bootstrapped() -> Training:
    """Temporal differences towards a target network."""
    model, target = mlp(2, 48, inputs=4, outputs=3), mlp(2, 48, inputs=4, outputs=3)
    optimizer = Adam(model.parameters(), lr=1e-3)

    def loss(step: int) -> Tensor:
        if step % 40 == 0:
            target.load_state_dict(model.state_dict())
        states = torch.randn(64, 4)
        with torch.no_grad():
            wanted = states[:, 0] + 0.9 * target(states + 0.1 * torch.randn(64, 4)).amax(-1)
        return functional.smooth_l1_loss(model(states).gather(1, torch.randint(0, 3, (64, 1)))[:, 0], wanted)

    return Training(model=model, optimizer=optimizer, loss=loss)


def mixture_density() -> Training:
    model = mlp(2, 48, nn.Tanh, inputs=10, outputs=9)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        weight, mean, spread = outputs.chunk(3, -1)
        density = torch.distributions.Normal(mean, functional.softplus(spread) + 1e-3).log_prob(targets)
        return -torch.logsumexp(density + functional.log_softmax(weight, -1), -1).mean()

    return table(model, adam(), DIABETES, (DIABETES_TARGETS[:, None] - 150) / 77, loss=loss)


class Gumbel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(1, 48, outputs=32), mlp(1, 48, inputs=32, outputs=10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(functional.gumbel_softmax(self.encoder(inputs), 1.0))


class Euler(nn.Module):
    """One block, applied again and again: an ordinary differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = (
            nn.Linear(64, 48),
            nn.Sequential(nn.Linear(48, 48), nn.Tanh()),
            nn.Linear(48, 10),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(12):
            hidden = hidden + 0.1 * self.block(hidden)
        return self.last(hidden)


class SwiGLU(nn.Module):
    """Shazeer (2020), with RMS normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 48), nn.Linear(48, 10)
        self.up, self.gate, self.down = (
            nn.ModuleList(nn.Linear(48, 48, bias=False) for _ in range(4)) for _ in range(3)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(48) for _ in range(4))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for up, gate, down, norm in zip(self.up, self.gate, self.down, self.norms, strict=True):
            normed = norm(hidden)
            hidden = hidden + down(functional.silu(gate(normed)) * up(normed))
        return self.last(hidden)


class Graph(nn.Module):
    """Graph convolutions over a ring of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)])

    def forward(self, inputs: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            inputs = layer((inputs + inputs.roll(1, 0) * 0.1) / 1.1)
            inputs = torch.relu(inputs) if index < 2 else inputs
        return inputs


healthy("sparse_reward", sparse_reward)
healthy("triplet_margin", triplet)
healthy("variational_autoencoder", lambda: variational(0.01))
healthy("variational_autoencoder_strong", lambda: variational(0.3))
healthy("contrastive", contrastive)
healthy("gradient_penalty", penalised_critic)
healthy("bootstrapped_values", bootstrapped)
healthy("mixture_density", mixture_density)
healthy("gumbel_softmax", lambda: digits(Gumbel(), adam(3e-3)))
healthy("euler_steps", lambda: digits(Euler(), adam()))
healthy("swiglu", lambda: digits(SwiGLU(), adamw()))
healthy("graph_convolutions", lambda: digits(Graph(), adam(1e-2, weight_decay=5e-4)))
healthy("survives_a_hot_rate", lambda: images(cnn(3, 12, norm=True), sgd(0.5, momentum=0.9)))
healthy(
    "lstm_80_steps_answer_at_the_end",
    lambda: sequence(Recurrent(nn.LSTM(1, 32, batch_first=True), 2), adam(5e-3), 40, task="last"),
    steps=150,
)
healthy("attention_small_scale", lambda: digits(Attention(2, fused=True, scale=0.1), adam(3e-3)))
healthy("transformer_fine_tuned", lambda: language(Characters(2), adamw(5e-5), before=warmup(5e-5, 20)), steps=80)
