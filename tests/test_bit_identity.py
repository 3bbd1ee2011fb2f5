"""Watching changes nothing: the weights after 200 steps are the same to the last bit."""

from __future__ import annotations

import pytest
import torch
from loops import batch, mlp, watched
from torch import nn

STEPS = 200


def plain(model, optimizer):
    for step in range(STEPS):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(inputs), labels) + nn.functional.dropout(model(inputs)).mean()).backward()
        optimizer.step()


def amp(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=20)
    for step in range(STEPS):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()


def compiled(model, optimizer):
    torch._dynamo.reset()
    plain(torch.compile(model, backend="aot_eager"), optimizer)


def accumulated(model, optimizer):
    for step in range(STEPS):
        inputs, labels = batch(step)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def closure(model, optimizer):
    def evaluate():
        optimizer.zero_grad()
        inputs, labels = batch()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    for _ in range(STEPS // 10):
        optimizer.step(evaluate)


def weights(loop, make, *, watch):
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model.parameters())
    if watch:
        watched(model, optimizer)
    loop(model, optimizer)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("loop", "make"),
    [
        (plain, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (plain, lambda p: torch.optim.Adam(p, lr=1e-2)),
        (plain, lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)),
        (amp, lambda p: torch.optim.SGD(p, lr=0.1)),
        (amp, lambda p: torch.optim.AdamW(p, lr=1e-2)),
        (compiled, lambda p: torch.optim.SGD(p, lr=0.1)),
        (compiled, lambda p: torch.optim.Adam(p, lr=1e-2)),
        (accumulated, lambda p: torch.optim.Adam(p, lr=1e-2)),
        (closure, lambda p: torch.optim.LBFGS(p, max_iter=4)),
        (closure, lambda p: torch.optim.SGD(p, lr=0.1)),
    ],
    ids=[
        "sgd",
        "adam",
        "fused",
        "amp-sgd",
        "amp-adamw",
        "compile-sgd",
        "compile-adam",
        "accumulate",
        "lbfgs",
        "closure",
    ],
)
def test_weights_with_and_without_a_watch_are_bit_identical(loop, make):
    without, with_watch = weights(loop, make, watch=False), weights(loop, make, watch=True)

    assert all(torch.equal(a, b) for a, b in zip(without, with_watch, strict=True))
