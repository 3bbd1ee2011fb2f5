"""A vetoed step changes nothing: weights, moments, counters and decay stay as they are, to the last bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from loops import backward, mlp, watched
from torch import nn, optim
from torch.amp import GradScaler

import gradwatch

PLAIN = [
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adamax,
    optim.ASGD,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
    optim.Adafactor,
]
FUSED = [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad]
MODES = [
    *((kind, {}) for kind in PLAIN),
    *((kind, {"foreach": True}) for kind in PLAIN),
    *((kind, {"fused": True}) for kind in FUSED),
]


def everything(model, optimizer):
    """All numbers that a step may change."""
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return [p.detach().clone() for p in model.parameters()], state


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return all(equal(a, b) for a, b in zip(left, right, strict=True))
    return left == right


@pytest.mark.parametrize(("kind", "mode"), MODES, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_vetoed_step_is_exact_for_every_optimizer(kind, mode, bad):
    torch.manual_seed(0)
    model = mlp()
    options = {} if kind is optim.Rprop else {"weight_decay": 0.1}
    optimizer = kind(model.parameters(), lr=1e-2, **mode, **options)
    watch, memory = watched(model, optimizer, transforms=[gradwatch.SkipNonfinite()], detectors=[])
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    before = everything(model, optimizer)

    optimizer.zero_grad()
    backward(model, 3)
    model[0].weight.grad[0, 0] = bad
    optimizer.step()
    after, gradient = everything(model, optimizer), model[2].weight.grad
    optimizer.zero_grad()
    backward(model, 4)
    optimizer.step()
    watch.close()

    assert equal(before, after)
    assert gradient is not None
    assert [s.skipped for s in memory.snapshots] == [False, False, False, True, False]
    assert [i.kind for i in watch.interventions] == ["skip"]
    assert not equal(after[0], everything(model, optimizer)[0])
    assert "found_inf" not in optimizer.__dict__
    assert "grad_scale" not in optimizer.__dict__


@pytest.mark.parametrize("fused", [False, True])
def test_the_scaler_stays_legal_when_a_step_is_vetoed(fused):
    model = mlp()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = GradScaler("cpu", init_scale=64.0)
    spike = gradwatch.SkipSpike(warmup=5)
    watch, memory = watched(model, optimizer, scaler=scaler, transforms=[spike], detectors=[])
    weights = []
    for step in range(12):
        optimizer.zero_grad()
        loss = backward_of(model, step, factor=1e4 if step == 9 else 1.0)
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        weights.append(equal(before, [p.detach() for p in model.parameters()]))
    watch.close()

    assert weights == [step == 9 for step in range(12)]
    assert [s.vetoed for s in memory.snapshots] == weights
    assert scaler.get_scale() == 64.0


def backward_of(model, step, *, factor):
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    return model(inputs).square().mean() * factor


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_that_is_skipped_again_and_again_stops_and_names_the_tensors(fused):
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=1e-2, fused=fused)
    watch, memory = watched(model, optimizer, transforms=[gradwatch.SkipNonfinite(max_consecutive=3)], detectors=[])

    with pytest.raises(gradwatch.TrainingStopped, match=r"4 in a row: the gradients of 0\.weight are not finite"):
        for step in range(20):
            optimizer.zero_grad()
            backward(model, step)
            model[0].weight.grad[0, 0] = math.nan
            watch.observe()
            optimizer.step()
    watch.close()

    assert len(memory.snapshots) == 4
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_skips_within_a_window_count_too():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    watch, _ = watched(model, optimizer, transforms=[gradwatch.SkipNonfinite(max_in_window=5)], detectors=[])

    with pytest.raises(gradwatch.TrainingStopped, match="6 of the last 11 steps"):
        for step in range(30):
            optimizer.zero_grad()
            backward(model, step)
            if step % 2 == 0:
                model[0].weight.grad[0, 0] = math.nan
            optimizer.step()
    watch.close()


def test_what_a_fused_optimizer_held_before_is_put_back():
    model = mlp()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scale, flag = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.grad_scale, optimizer.found_inf = scale, flag
    transforms = [gradwatch.SkipNonfinite(), gradwatch.ClipByGlobalNorm(1e-3)]
    watch, memory = watched(model, optimizer, transforms=transforms, detectors=[])
    inputs = torch.randn(16, 8)
    (model(inputs).square().mean() * 4).backward()
    optimizer.step()
    watch.close()

    assert optimizer.grad_scale is scale
    assert optimizer.found_inf is flag
    assert memory.snapshots[0].clipped_norm == pytest.approx(1e-3, rel=1e-4)


def test_l_bfgs_cannot_skip_and_says_so():
    model = mlp()
    optimizer = optim.LBFGS(model.parameters())

    with pytest.raises(gradwatch.ConfigurationError, match="a step of L-BFGS cannot be skipped"):
        gradwatch.watch(model, optimizer, transforms=[gradwatch.SkipNonfinite()])


def test_l_bfgs_is_clipped_at_every_evaluation():
    model = nn.Linear(4, 1)
    optimizer = optim.LBFGS(model.parameters(), max_iter=4)
    norms = []

    class Spy(gradwatch.ClipByGlobalNorm):
        def __call__(self, gradients):
            norms.append(float(gradients.global_norm))
            return super().__call__(gradients)

    watch, memory = watched(model, optimizer, transforms=[Spy(1e-3)], detectors=[])
    inputs = torch.randn(20, 4)

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - 3).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    watch.close()

    assert len(norms) > 1
    assert len(memory.snapshots) == 1
    assert memory.snapshots[0].clipped_norm == pytest.approx(1e-3, rel=1e-4)
