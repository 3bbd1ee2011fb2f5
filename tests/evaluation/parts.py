"""Data, networks and optimizers that the runs are put together from."""

from __future__ import annotations

import inspect
import json
import string
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine, make_moons
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from evaluation.training import Training

Init = Callable[[Tensor], object]
Build = Callable[[Any], Optimizer]


# -- data ------------------------------------------------------------------------------------------------------------


def _table(loader: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    inputs, targets = loader(return_X_y=True)
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets)


RAW_DIGITS, DIGIT_LABELS = _table(load_digits)
DIGITS = (RAW_DIGITS - RAW_DIGITS.mean()) / RAW_DIGITS.std()
IMAGES = DIGITS.reshape(-1, 1, 8, 8)


def standardised(inputs: Tensor) -> Tensor:
    return (inputs - inputs.mean(0)) / (inputs.std(0) + 1e-8)


RAW_CANCER, CANCER_LABELS = _table(load_breast_cancer)
RAW_WINE, WINE_LABELS = _table(load_wine)
RAW_DIABETES, DIABETES_TARGETS = _table(load_diabetes)
CANCER, WINE, DIABETES = standardised(RAW_CANCER), standardised(RAW_WINE), standardised(RAW_DIABETES)
DIABETES_TARGETS = DIABETES_TARGETS.float()


@cache
def moons() -> tuple[Tensor, Tensor]:
    inputs, targets = make_moons(1000, noise=0.15, random_state=0)
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets)


@cache
def text() -> Tensor:
    """Docstrings of the standard library as character numbers below 64."""
    raw = " ".join(inspect.getdoc(module) or "" for module in (json, string, inspect, functional))
    raw += " ".join(inspect.getdoc(getattr(functional, name)) or "" for name in sorted(dir(functional)))
    return torch.tensor([ord(character) % 64 for character in raw])


def rows_of(count: int, size: int) -> Tensor:
    return torch.randint(0, count, (size,))


def characters(size: int = 16, length: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs and the characters that follow, shape [size, length]."""
    starts = rows_of(len(text()) - length - 1, size)
    chunk = torch.stack([text()[start : start + length + 1] for start in starts.tolist()])
    return chunk[:, :-1], chunk[:, 1:]


def adding(size: int, length: int) -> tuple[Tensor, Tensor]:
    """The adding problem of Hochreiter and Schmidhuber (1997): sum the two marked values; shape [size, length, 2]."""
    values, marks = torch.rand(size, length), torch.zeros(size, length)
    marks[torch.arange(size), torch.randint(0, length // 2, (size,))] = 1
    marks[torch.arange(size), torch.randint(length // 2, length, (size,))] = 1
    return torch.stack([values, marks], -1), (values * marks).sum(1, keepdim=True)


def first_sign(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Remember the sign of the first value through noise; shape [size, length, 1]."""
    inputs = 0.3 * torch.randn(size, length, 1)
    signs = torch.randint(0, 2, (size,))
    inputs[:, 0, 0] = 2.0 * signs - 1
    return inputs, signs


def shuffled(share: float = 1.0) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what replaces a share of a batch's labels by random ones."""

    def spoil(_step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if share == 1:
            return inputs, torch.randint(0, 10, labels.shape)
        chosen = torch.rand(len(labels)) < share
        return inputs, torch.where(chosen, torch.randint(0, 10, labels.shape), labels)

    return spoil


# -- optimizers ------------------------------------------------------------------------------------------------------


def sgd(rate: float, **options: Any) -> Build:
    return partial(SGD, lr=rate, **options)


def adam(rate: float = 1e-3, **options: Any) -> Build:
    return partial(Adam, lr=rate, **options)


def adamw(rate: float = 1e-3, **options: Any) -> Build:
    return partial(AdamW, lr=rate, **options)


# -- initialisations -------------------------------------------------------------------------------------------------

he: Init = partial(nn.init.kaiming_normal_, nonlinearity="relu")
xavier: Init = nn.init.xavier_normal_
orthogonal: Init = nn.init.orthogonal_


def normal(std: float) -> Init:
    return partial(nn.init.normal_, std=std)


def times(init: Init, factor: float) -> Init:
    """The same initialisation, scaled."""

    def scaled(weight: Tensor) -> None:
        init(weight)
        with torch.no_grad():
            weight.mul_(factor)

    return scaled


def constant(value: float) -> Init:
    return partial(nn.init.constant_, val=value)


def initialise(model: nn.Module, init: Init | None) -> nn.Module:
    for module in model.modules():
        if init is not None and isinstance(module, nn.Linear | nn.Conv2d):
            init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


# -- networks --------------------------------------------------------------------------------------------------------


def mlp(
    depth: int,
    width: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    init: Init | None = None,
    *,
    inputs: int = 64,
    outputs: int = 10,
    norm: Callable[[int], nn.Module] | None = None,
    last: nn.Module | None = None,
) -> nn.Sequential:
    """Plain chain of `depth` hidden layers."""
    made: list[nn.Module] = []
    for before, after in pairwise([inputs, *[width] * depth]):
        made.append(nn.Linear(before, after))
        if norm is not None:
            made.append(norm(after))
        made.append(activation())
    made.append(nn.Linear(width if depth else inputs, outputs))
    if last is not None:
        made.append(last)
    model = nn.Sequential(*made)
    initialise(model, init)
    return model


class Written(nn.Module):
    """The same chain with its activation written out as a function, which no module shows."""

    def __init__(self, depth: int, width: int, function: Callable[[Tensor], Tensor], init: Init | None = None) -> None:
        super().__init__()
        widths = [64, *[width] * depth, 10]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.function = function
        initialise(self, init)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            inputs = self.function(layer(inputs))
        return self.layers[-1](inputs)


class Residual(nn.Module):
    """Residual blocks over an MLP: pre-norm, post-norm or none, with an optional gain on the branch."""

    def __init__(
        self, depth: int, width: int, *, norm: str = "pre", branch: float | None = None, init: Init | None = None
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth)) if norm != "none" else None
        self.gains = None if branch is None else nn.Parameter(torch.full((depth,), branch))
        self.norm = norm
        initialise(self, init)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for index, block in enumerate(self.blocks):
            norm = self.norms[index] if self.norms is not None else nn.Identity()
            branch = block(norm(hidden) if self.norm == "pre" else hidden)
            hidden = hidden + (branch if self.gains is None else self.gains[index] * branch)
            hidden = norm(hidden) if self.norm == "post" else hidden
        return self.last(hidden)


def cnn(
    depth: int,
    channels: int = 12,
    activation: Callable[[], nn.Module] = nn.ReLU,
    init: Init | None = None,
    *,
    norm: bool = False,
) -> nn.Sequential:
    """Plain chain of convolutions over 8x8 images."""
    made: list[nn.Module] = []
    for before, after in pairwise([1, *[channels] * depth]):
        made.append(nn.Conv2d(before, after, 3, padding=1))
        if norm:
            made.append(nn.BatchNorm2d(after))
        made.append(activation())
    model = nn.Sequential(*made, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))
    initialise(model, init)
    return model


class Recurrent(nn.Module):
    """A recurrent module of torch's and a head on its last output, or on all of them."""

    def __init__(self, cell: nn.RNNBase, outputs: int, *, every: bool = False, embed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, embed) if embed else None
        self.cell = cell
        self.head = nn.Linear(cell.hidden_size * (2 if cell.bidirectional else 1), outputs)
        self.every = every

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.cell(inputs if self.embed is None else self.embed(inputs))[0]
        return self.head(states if self.every else states[:, -1])


def speller(kind: type[nn.RNNBase], width: int, **options: Any) -> Recurrent:
    """Read characters one by one and say the next."""
    return Recurrent(kind(16, width, batch_first=True, **options), 64, every=True, embed=16)


def scaled_cell(cell: nn.RNNBase, recurrent: Init) -> nn.RNNBase:
    """Initialise the recurrent weights of every layer."""
    for name, parameter in cell.named_parameters():
        if name.startswith("weight_hh"):
            recurrent(parameter.data)
    return cell


class Loop(nn.Module):
    """A recurrence written as a loop over a cell."""

    def __init__(self, cell: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.cell, self.head, self.width = cell, nn.Linear(width, outputs), width

    def forward(self, inputs: Tensor) -> Tensor:
        state = inputs.new_zeros(inputs.shape[0], self.width)
        for step in inputs.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class Characters(nn.Module):
    """A causal language model over torch's own transformer layers."""

    def __init__(
        self, depth: int, width: int = 32, *, pre: bool = True, tied: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.position = nn.Parameter(0.02 * torch.randn(32, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=pre) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width) if pre else nn.Identity()
        self.head = nn.Linear(width, 64, bias=False)
        if tied:
            nn.init.normal_(self.embed.weight, std=0.02)
            self.head.weight = self.embed.weight
        with torch.no_grad():
            for layer in self.layers:
                layer.self_attn.in_proj_weight.mul_(scale)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.embed(tokens) + self.position[:length]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))


class Attention(nn.Module):
    """Self-attention over the rows of an image, with its softmax written out or fused."""

    def __init__(self, depth: int, width: int = 24, *, fused: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.projections = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)
        self.fused = fused
        with torch.no_grad():
            for projection in self.projections:
                projection.weight[: 2 * width].mul_(scale)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.reshape(-1, 8, 8))
        for norm, projection, output in zip(self.norms, self.projections, self.outputs, strict=True):
            query, key, value = projection(norm(hidden)).chunk(3, -1)
            if self.fused:
                mixed = functional.scaled_dot_product_attention(query, key, value)
            else:
                mixed = functional.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1) @ value
            hidden = hidden + output(mixed)
        return self.head(hidden.mean(1))


class Along(nn.Module):
    """Plain convolutions along the pixels of a digit."""

    def __init__(self, depth: int, init: Any = None, activation: Any = functional.relu) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 12, 5, padding=2)
        self.body = nn.ModuleList(nn.Conv1d(12, 12, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(12, 10)
        self.activation = activation
        for module in [self.first, *self.body] if init is not None else []:
            init(module.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.activation(self.first(inputs[:, None]))
        for layer in self.body:
            hidden = self.activation(layer(hidden))
        return self.head(hidden.mean(-1))


class Gated(nn.Module):
    """Gated linear units in a row, without a way around."""

    def __init__(self, depth: int, width: int = 48) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.layers = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for layer in self.layers:
            hidden = functional.glu(layer(hidden))
        return self.head(hidden)


class Mixer(nn.Module):
    """Mixes rows and columns of the image by turns, without residual connections."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.rows = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.columns = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.reshape(-1, 8, 8)
        for rows, columns in zip(self.rows, self.columns, strict=True):
            hidden = functional.relu(columns(functional.relu(rows(hidden)).mT)).mT
        return self.head(hidden.flatten(1))


class Rows(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.cell(inputs.reshape(-1, 8, 8))[0][:, -1])


# -- tasks -----------------------------------------------------------------------------------------------------------


def supervised(
    model: nn.Module,
    build: Build,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    *,
    parameters: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> Training:
    """Train `model` on the batches that `batch` gives for each step."""
    optimizer = build(model.parameters() if parameters is None else parameters(model))

    def compute(step: int) -> Tensor:
        inputs, targets = batch(step)
        return loss(model(inputs), targets)

    before = options.pop("before", None)
    bound = None if before is None else partial(before, model, optimizer)
    return Training(model=model, optimizer=optimizer, loss=compute, before=bound, **options)


def digits(
    model: nn.Module,
    build: Build,
    *,
    size: int = 64,
    inputs: Tensor | None = None,
    spoil: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    **options: Any,
) -> Training:
    """Classify the digits; `spoil` may change a batch."""
    source = DIGITS if inputs is None else inputs

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = rows_of(len(source), size)
        chosen = source[rows], DIGIT_LABELS[rows]
        return chosen if spoil is None else spoil(step, *chosen)

    return supervised(model, build, batch, **options)


def images(model: nn.Module, build: Build, **options: Any) -> Training:
    """Classify the digits as 8x8 images."""
    return digits(model, build, inputs=options.pop("inputs", IMAGES), **options)


def table(
    model: nn.Module, build: Build, inputs: Tensor, targets: Tensor, *, size: int = 64, **options: Any
) -> Training:
    """Learn from rows of a table."""

    def batch(_step: int) -> tuple[Tensor, Tensor]:
        rows = rows_of(len(inputs), size)
        return inputs[rows], targets[rows]

    return supervised(model, build, batch, **options)


def regression(model: nn.Module, build: Build, targets: Tensor, **options: Any) -> Training:
    """Predict diabetes, with a loss of any scale."""
    scale = options.pop("scale", 1.0)

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        return scale * functional.mse_loss(outputs, wanted)

    return table(model, build, DIABETES, targets.reshape(-1, 1), loss=loss, **options)


def language(model: nn.Module, build: Build, *, size: int = 16, length: int = 32, **options: Any) -> Training:
    """Predict the next character."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return supervised(model, build, lambda _step: characters(size, length), loss, **options)


def sequence(
    model: nn.Module, build: Build, length: int, *, task: str = "adding", size: int = 32, **options: Any
) -> Training:
    """Learn the adding problem, to remember the first sign, or the sign of the last value."""
    if task == "adding":
        return supervised(model, build, lambda _step: adding(size, length), functional.mse_loss, **options)
    if task == "last":

        def reversed_sign(_step: int) -> tuple[Tensor, Tensor]:
            inputs, signs = first_sign(size, length)
            return inputs.flip(1), signs

        return supervised(model, build, reversed_sign, **options)
    return supervised(model, build, lambda _step: first_sign(size, length), **options)


# -- schedules -------------------------------------------------------------------------------------------------------


def scheduled(rate: Callable[[int], float]) -> Callable[[nn.Module, Optimizer, int], None]:
    """Set the learning rate by hand before each step."""

    def before(_model: nn.Module, optimizer: Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)

    return before


def warmup(peak: float, steps: int) -> Callable[[nn.Module, Optimizer, int], None]:
    return scheduled(lambda step: peak * min(1.0, step / steps))


def jump(rate: float, factor: float, at: int, until: int = 10**9) -> Callable[[nn.Module, Optimizer, int], None]:
    return scheduled(lambda step: rate * factor if at <= step < until else rate)
