"""A run that stops and goes on is judged like one that never stopped."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from loops import mlp, train, watched
from torch import nn

import gradwatch
from gradwatch.state import from_portable, to_portable


def saved_and_loaded(state: dict[str, object]) -> dict[str, object]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def deep_sigmoid() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Linear(8, 8), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def test_arrays_and_scalars_survive_the_way_through_a_checkpoint():
    state = {"a": np.arange(3.0), "b": [np.float64(2), {"c": np.array([True])}], "d": None, "e": (1, "x")}

    back = from_portable(saved_and_loaded(to_portable(state)))

    np.testing.assert_array_equal(back["a"], [0.0, 1.0, 2.0])
    assert back["b"][0] == 2.0
    assert back["b"][1]["c"].dtype == bool
    assert (back["d"], back["e"]) == (None, [1, "x"])


@pytest.mark.parametrize("stop", [3, 7, 25])
def test_a_resumed_run_raises_the_same_alerts_at_the_same_steps(stop):
    def alerts(*stops: int) -> list[tuple[str, int, int]]:
        model = deep_sigmoid()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch, _ = watched(model, optimizer)
        found, start = [], 0
        for end in (*stops, 40):
            train(model, optimizer, end - start, start=start)
            found += [alert for alert in watch.alerts if alert.opened >= start]
            state, start = saved_and_loaded(watch.state_dict()), end
            watch.close()
            watch, _ = watched(model, optimizer)
            watch.load_state_dict(state)
        return [(alert.kind, alert.first_step, alert.opened) for alert in found]

    assert alerts(stop) == alerts() != []


def test_the_steps_go_on_where_they_stopped():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, _ = watched(model, optimizer)
    train(model, optimizer, 30)
    state = saved_and_loaded(first.state_dict())
    first.close()

    second, memory = watched(model, optimizer)
    second.load_state_dict(state)
    train(model, optimizer, 2)

    assert [s.step for s in memory.snapshots] == [30, 31]
    assert [s.detail for s in memory.snapshots] == [True, False]


def test_what_was_open_is_still_open_after_a_restart():
    model = deep_sigmoid()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, _ = watched(model, optimizer)
    train(model, optimizer, 10)
    state = saved_and_loaded(first.state_dict())
    first.close()

    second, _ = watched(model, optimizer)
    second.load_state_dict(state)

    assert [(a.kind, a.layers, a.opened) for a in second.alerts] == [(a.kind, a.layers, a.opened) for a in first.alerts]
    assert second.alerts


def test_a_resumed_healthy_run_stays_silent():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    state = None
    for epoch in range(6):
        watch, _ = watched(model, optimizer)
        if state is not None:
            watch.load_state_dict(state)
        train(model, optimizer, 15, start=15 * epoch)
        state = saved_and_loaded(watch.state_dict())
        assert watch.alerts == ()
        watch.close()


@pytest.mark.parametrize(
    ("state", "sentence"),
    [({}, "no state of gradwatch"), ({"version": 1, "lanes": {"g": {}}}, r"of the optimizers \['g'\]")],
)
def test_a_foreign_state_is_refused(state, sentence):
    model = mlp()
    watch, _ = watched(model, torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(gradwatch.ConfigurationError, match=sentence):
        watch.load_state_dict(state)
