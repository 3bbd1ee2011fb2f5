"""Whether gradients were cleared between two steps is seen in every kind of loop, also by those who clip."""

from __future__ import annotations

import pytest
import torch
from loops import backward, mlp, watched
from torch import nn


def seen(loop, *, build=torch.optim.SGD, steps=4):
    """Run `loop(model, optimizer, step)`; return what each snapshot says."""
    model = mlp()
    optimizer = build(model.parameters(), lr=1e-3)
    watch, memory = watched(model, optimizer, detectors=[])
    for step in range(steps):
        loop(model, optimizer, step)
    watch.close()
    return [snapshot.cleared for snapshot in memory.snapshots]


def ordinary(model, optimizer, step, *, to_none=True):
    optimizer.zero_grad(set_to_none=to_none)
    backward(model, step)
    optimizer.step()


def forgetful(model, optimizer, step):
    backward(model, step)
    optimizer.step()


def forgetful_and_clipped(model, optimizer, step):
    backward(model, step)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


def accumulating(model, optimizer, step):
    optimizer.zero_grad()
    for micro in range(3):
        backward(model, 3 * step + micro)
    optimizer.step()


def accumulating_and_forgetful(model, optimizer, step):
    for micro in range(3):
        backward(model, 3 * step + micro)
    optimizer.step()


def cleared_after(model, optimizer, step):
    backward(model, step)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("loop", [ordinary, accumulating, cleared_after])
def test_loops_that_clear_are_never_suspected(loop, build):
    assert False not in seen(loop, build=build)


def test_zeros_in_place_clear_too():
    assert seen(lambda *parts: ordinary(*parts, to_none=False))[1:] == [True] * 3


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("loop", [forgetful, forgetful_and_clipped, accumulating_and_forgetful])
def test_loops_that_do_not_clear_are_seen(loop, build):
    assert seen(loop, build=build)[1:] == [False] * 3


def test_a_generators_backward_through_the_discriminator_is_no_uncleared_gradient():
    generator, discriminator = mlp(), mlp()
    optimizers = {
        name: torch.optim.SGD(m.parameters(), lr=1e-3) for name, m in (("g", generator), ("d", discriminator))
    }
    watch, memory = watched({"g": generator, "d": discriminator}, optimizers, detectors=[])
    for step in range(4):
        optimizers["d"].zero_grad()
        backward(discriminator, step)
        optimizers["d"].step()
        optimizers["g"].zero_grad()
        widened = nn.functional.pad(generator(torch.randn(4, 8)), (0, 5))
        discriminator(widened).mean().backward()
        optimizers["g"].step()
    watch.close()

    assert not any(snapshot.cleared is False for snapshot in memory.snapshots)


def test_gradients_that_are_cleared_between_backward_and_step_are_not_taken_for_kept_ones():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, _ = watched(model, optimizer)
    for step in range(12):
        backward(model, step)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    watch.close()

    assert [(found.kind, found.symptom) for found in watch.alerts] == [("dead", "cleared_early")]
    assert watch.alerts[0].causes[0].name == "accumulation"
