"""GradScaler: unscaled norms, steps that it skips, fused optimizers, and the scaler left as it was."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from loops import assert_close, backward, batch, mlp, norms_of, true_norm, watched
from torch import nn
from torch.amp import GradScaler

SCALE = 1024.0


def run(model, optimizer, scaler, *, unscale, clip, overflow_at=None, steps=3):
    """Train under a scaler; return the true norms, NaN where the step overflowed."""
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        factor = float("inf") if step == overflow_at else 1.0
        reference = copy.deepcopy(model)
        backward(reference, step)
        norms.append(float("nan") if step == overflow_at else true_norm(reference.parameters()))
        inputs, labels = batch(step)
        loss = nn.functional.cross_entropy(model(inputs), labels) * factor
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
    return norms


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("unscale", "clip"), [(False, False), (True, False), (True, True)])
def test_norms_are_unscaled_and_before_clipping(fused, unscale, clip):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    scaler = GradScaler("cpu", init_scale=SCALE)
    _, memory = watched(model, optimizer, scaler=scaler)

    expected = run(model, optimizer, scaler, unscale=unscale, clip=clip)

    assert_close(norms_of(memory.snapshots), expected, rtol=1e-4)
    assert [s.skipped for s in memory.snapshots] == [False] * 3
    assert [s.loss_scale for s in memory.snapshots] == [SCALE] * 3
    assert all((s.clipped_norm is not None) == clip for s in memory.snapshots)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_overflows_is_seen_as_skipped(fused, unscale):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    scaler = GradScaler("cpu", init_scale=SCALE)
    watch, memory = watched(model, optimizer, scaler=scaler)

    run(model, optimizer, scaler, unscale=unscale, clip=False, overflow_at=1)

    assert [s.step for s in memory.snapshots] == [0, 1, 2]
    assert [s.skipped for s in memory.snapshots] == [False, True, False]
    assert memory.snapshots[1].bad.any()
    assert not memory.snapshots[2].bad.any()
    assert [alert for alert in watch.alerts if alert.severity != "info"] == []


def test_two_optimizers_under_one_scaler_are_told_apart():
    g, d = mlp(), mlp()
    opt_g = torch.optim.SGD(g.parameters(), lr=0.1)
    opt_d = torch.optim.SGD(d.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=SCALE)
    _, memory = watched({"g": g, "d": d}, {"g": opt_g, "d": opt_d}, scaler=scaler)

    for step in range(2):
        for model, optimizer in ((d, opt_d), (g, opt_g)):
            optimizer.zero_grad()
            factor = float("inf") if (step == 1 and model is g) else 1.0
            scaler.scale(model(torch.randn(4, 8)).sum() * factor).backward()
            scaler.step(optimizer)
        scaler.update()

    assert [(s.optimizer, s.skipped) for s in memory.snapshots] == [
        ("d", False),
        ("g", False),
        ("d", False),
        ("g", True),
    ]


def test_a_disabled_scaler_is_no_scaler():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", enabled=False)
    _, memory = watched(model, optimizer, scaler=scaler)

    expected = run(model, optimizer, scaler, unscale=True, clip=True)

    assert_close(norms_of(memory.snapshots), expected, rtol=1e-4)
    assert {s.source for s in memory.snapshots} == {"backward"}


@pytest.mark.parametrize("fused", [False, True])
def test_a_forgotten_scaler_is_found_and_said_once(fused, caplog):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    scaler = GradScaler("cpu", init_scale=SCALE)
    _, memory = watched(model, optimizer)

    with caplog.at_level(logging.WARNING, logger="gradwatch"):
        expected = run(model, optimizer, scaler, unscale=False, clip=False)

    assert_close(norms_of(memory.snapshots), expected, rtol=1e-4)
    assert [record.getMessage().count("scaler=scaler") for record in caplog.records] == [1]


def test_the_scaler_pickles_and_copies_while_watched_and_is_itself_again_after_detach():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=SCALE)
    before = dict(scaler.__dict__)
    watch, memory = watched(model, optimizer, scaler=scaler)

    pickled, copied = pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)
    watch.detach()

    assert scaler.__dict__ == before
    for twin in (pickled, copied):
        run(model, optimizer, twin, unscale=True, clip=False)
    assert len(memory.snapshots) == 0
