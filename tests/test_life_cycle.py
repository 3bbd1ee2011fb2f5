"""Attach, detach, copy, forget, fork, fail: a watch leaves no trace and never hurts the run."""

from __future__ import annotations

import copy
import gc
import io
import logging
import os
import pickle
import weakref

import pytest
import torch
from loops import backward, mlp, train, watched
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from gradwatch.errors import Part, contain


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    gc.collect()  # watches of earlier tests take their hooks with them
    return [
        *(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()),
        *(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()),
        len(optimizer._optimizer_step_pre_hooks),
        len(optimizer._optimizer_step_post_hooks),
        len(_global_optimizer_post_hooks),
    ]


@pytest.mark.parametrize("steps", [0, 3])
def test_detaching_leaves_no_hook_behind(steps):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = hooks_of(model, optimizer)
    watch, memory = watched(model, optimizer)
    assert hooks_of(model, optimizer) != before

    train(model, optimizer, steps)
    watch.detach()
    watch.detach()
    train(model, optimizer, 2)

    assert hooks_of(model, optimizer) == before
    assert len(memory.snapshots) == steps


def test_watching_again_after_detach_works():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, _ = watched(model, optimizer)
    first.close()

    _, memory = watched(model, optimizer)
    train(model, optimizer, 2)

    assert len(memory.snapshots) == 2


def test_watching_twice_is_refused_with_what_to_do():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched(model, optimizer)

    with pytest.raises(gradwatch.ConfigurationError, match="watched already; call close"):
        watched(model, optimizer)


@pytest.mark.parametrize("steps", [0, 2])
def test_copies_and_pickles_of_a_watched_model_work_and_do_not_feed_the_watch(steps):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    train(model, optimizer, steps)

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        torch.optim.swa_utils.AveragedModel(model),
    ]
    for twin in twins:
        train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 2)

    assert len(memory.snapshots) == steps


def test_copies_and_pickles_of_a_watched_optimizer_work():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    copied, pickled = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    for twin in (copied, pickled):
        twin.step()

    assert len(memory.snapshots) == 0


def test_model_optimizer_and_watch_are_collected_together():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer)
    train(model, optimizer, 2)
    dead = [weakref.ref(x) for x in (model, optimizer, watch, model[0].weight, memory)]

    del model, optimizer, watch, memory
    gc.collect()

    assert [reference() for reference in dead] == [None] * len(dead)


def test_a_watch_nobody_keeps_lives_with_the_optimizer():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = gradwatch.MemorySink()

    gradwatch.watch(model, optimizer, sinks=[memory])
    gc.collect()
    train(model, optimizer, 2)

    assert len(memory.snapshots) == 2


def test_a_forgotten_watch_closes_its_sinks():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    closed = []

    class Sink(gradwatch.MemorySink):
        def close(self):
            closed.append(True)

    gradwatch.watch(model, optimizer, sinks=[Sink()])
    del model, optimizer
    gc.collect()

    assert closed == [True]


def test_detaching_inside_a_step_breaks_nothing():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    box = []

    class Detaches(gradwatch.MemorySink):
        def write(self, snapshot, alerts, interventions):
            super().write(snapshot, alerts, interventions)
            box[0].detach()

    sink = Detaches()
    box.append(gradwatch.watch(model, optimizer, sinks=[sink]))
    optimizer.register_step_post_hook(lambda *_: None)

    train(model, optimizer, 3)

    assert len(sink.snapshots) == 1


def test_with_closes_also_on_an_exception():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = hooks_of(model, optimizer)

    def interrupted() -> None:
        with watched(model, optimizer)[0]:
            train(model, optimizer, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert hooks_of(model, optimizer) == before


def test_a_sink_that_fails_is_reported_once_and_the_others_go_on(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = gradwatch.MemorySink()

    class Full(gradwatch.MemorySink):
        def write(self, *_records):
            raise OSError(28, "No space left on device")

    gradwatch.watch(model, optimizer, sinks=[Full(), memory])
    with caplog.at_level(logging.WARNING, logger="gradwatch"):
        train(model, optimizer, 5)

    assert len(memory.snapshots) == 5
    assert [record.getMessage().split(" and ")[0] for record in caplog.records] == ["the sink Full failed"]


def test_a_detector_that_fails_is_reported_once_and_the_others_go_on(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def broken(snapshot, history):
        yield gradwatch.Evidence("x", kind="spike", value=2.0)
        raise ZeroDivisionError

    def loud(snapshot, history):
        yield gradwatch.Evidence("loud", kind="spike", value=2.0, message="loud")

    watch, _ = watched(model, optimizer, detectors=[broken, loud])
    with caplog.at_level(logging.WARNING, logger="gradwatch"):
        train(model, optimizer, 5)

    assert [alert.symptom for alert in watch.alerts] == ["loud"]
    assert len(caplog.records) == 1
    assert "the detector broken failed" in caplog.records[0].getMessage()


def test_a_failure_while_measuring_switches_measuring_off_and_training_goes_on(caplog, monkeypatch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer)
    train(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]

    def fails(*_arguments, **_keywords):
        raise MemoryError

    monkeypatch.setattr(watch.lanes[""]._meter, "measure", fails)
    with caplog.at_level(logging.WARNING, logger="gradwatch"):
        train(model, optimizer, 3, start=1)

    assert len(memory.snapshots) == 1
    assert len(caplog.records) == 1
    assert any((p != q).any() for p, q in zip(model.parameters(), before, strict=True))


def test_contain_lets_requests_of_the_user_through():
    for request in (gradwatch.ConfigurationError, gradwatch.errors.TrainingStopped):
        with pytest.raises(request), contain(Part("x")):
            raise request


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers_do_not_disturb_the_watch(context, tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = gradwatch.MemorySink()
    watch = gradwatch.watch(
        model, optimizer, sinks=[memory, gradwatch.TensorBoardSink(tmp_path), gradwatch.JSONLSink(tmp_path / "a.jsonl")]
    )
    data = TensorDataset(torch.randn(32, 8), torch.zeros(32, dtype=torch.long))

    for inputs, labels in DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context=context):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    watch.close()

    assert len(memory.snapshots) == 4
    assert len(list(tmp_path.glob("events*"))) == 1


def test_a_forked_child_that_trains_writes_nothing():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer)
    train(model, optimizer, 1)

    child = os.fork()
    if child == 0:
        optimizer.step()
        watch.close()
        os._exit(len(memory.snapshots))
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 1


def test_loading_weights_with_assign_is_noticed():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    train(model, optimizer, 1)

    model.load_state_dict(copy.deepcopy(model).state_dict(), assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, 2)

    assert all(s.global_norm is not None for s in memory.snapshots)


def test_an_optimizer_that_loads_its_state_stays_watched():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    train(model, optimizer, 1)

    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2)

    assert len(memory.snapshots) == 3


def test_a_backward_outside_the_loop_counts_for_nothing():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    backward(model)
    optimizer.zero_grad()
    train(model, optimizer, 2)

    assert len(memory.snapshots) == 2
