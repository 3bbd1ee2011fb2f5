"""Four models that differ in what measuring them costs: many tiny tensors, one size, a CNN, a transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Workload:
    """A model and a loss on random data."""

    model: nn.Module
    loss: Callable[[], Tensor]


def tiny(device: torch.device) -> Workload:
    """Return 2,000 tensors of 0.27 million elements in all."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(1000))).to(device)
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(16) + 0.01 * torch.randn(16, 16))
    return Workload(model, lambda: model(torch.randn(64, 16, device=device)).square().mean())


def mlp(device: torch.device) -> Workload:
    """Return 40 tensors of 5.25 million elements."""
    layers = [part for _ in range(20) for part in (nn.Linear(512, 512), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    model = nn.Sequential(*layers).to(device)
    return Workload(model, lambda: model(torch.randn(256, 512, device=device)).square().mean())


class Bottleneck(nn.Module):
    """The residual block of ResNet-50 (He et al. 2015, figure 5)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        projection = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*([] if same else projection))

    def forward(self, inputs: Tensor) -> Tensor:
        """Add the branch to its input."""
        return functional.relu(self.branch(inputs) + self.shortcut(inputs))


def cnn(device: torch.device) -> Workload:
    """Return ResNet-50: 161 tensors of 25.6 million elements."""
    blocks: list[nn.Module] = []
    inputs = 64
    for width, number, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(number):
            blocks.append(Bottleneck(inputs, width, first_stride if index == 0 else 1))
            inputs = 4 * width
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)]
    model = nn.Sequential(*stem, *blocks, *head).to(device)

    def loss() -> Tensor:
        images, labels = torch.randn(4, 3, 96, 96), torch.randint(0, 1000, (4,))
        return functional.cross_entropy(model(images.to(device)), labels.to(device))

    return Workload(model, loss)


class Transformer(nn.Module):
    """The size of GPT-2 small, input and output embedding tied."""

    def __init__(self, words: int = 50257, width: int = 768, depth: int = 12, length: int = 1024) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, 12, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits over the words."""
        places = self.places.weight[: tokens.shape[1]]
        return functional.linear(self.body(self.words(tokens) + places), self.words.weight)


def transformer(device: torch.device) -> Workload:
    """Return 148 tensors of 124.4 million elements."""
    model = Transformer().to(device)

    def loss() -> Tensor:
        tokens = torch.randint(0, 50257, (1, 32), device=device)
        return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    return Workload(model, loss)


def convolutions(device: torch.device) -> Workload:
    """Return a small CNN with batch normalisation, on images of 32 x 32."""
    widths = [3, 32, 64, 128, 128]
    layers = [
        part
        for before, after in pairwise(widths)
        for part in (nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)).to(device)

    def loss() -> Tensor:
        images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
        return functional.cross_entropy(model(images.to(device)), labels.to(device))

    return Workload(model, loss)


def encoder(device: torch.device) -> Workload:
    """Return a small transformer on sequences of 64 tokens."""
    model = Transformer(words=1000, width=192, depth=4, length=64).to(device)

    def loss() -> Tensor:
        tokens = torch.randint(0, 1000, (8, 64), device=device)
        return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())

    return Workload(model, loss)


MODELS = {"tiny": tiny, "mlp": mlp, "cnn": cnn, "transformer": transformer}
