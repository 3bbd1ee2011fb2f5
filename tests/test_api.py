"""Bad input gets a sentence that says what was wrong and what to write instead."""

from __future__ import annotations

import pytest
import torch
from loops import mlp, train, watched
from torch import nn

import gradwatch


def test_everything_public_can_be_imported_and_is_listed():
    for name in gradwatch.__all__:
        assert getattr(gradwatch, name) is not None
    assert dir(gradwatch) == sorted(gradwatch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gradwatch.nothing


MODEL = mlp()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((nn.Tanh(), torch.optim.SGD(MODEL.parameters())), "the model has no parameters"),
        (
            (mlp().requires_grad_(requires_grad=False), torch.optim.SGD(MODEL.parameters())),
            "no watched parameter is trainable",
        ),
        ((mlp(), torch.optim.SGD(MODEL.parameters())), "the optimizer holds 6 others"),
        ((MODEL.parameters(), torch.optim.SGD(MODEL.parameters())), "needs a torch.nn.Module or a mapping"),
        (({}, torch.optim.SGD(MODEL.parameters())), "needs a torch.nn.Module or a mapping"),
        ((MODEL, MODEL), "needs a torch.optim.Optimizer, or a mapping"),
        ((MODEL, {}), "empty mapping of optimizers"),
        ((MODEL, {"a": "b"}), "needs a torch.optim.Optimizer, or a mapping"),
    ],
)
def test_models_and_optimizers_that_cannot_be_watched(arguments, sentence):
    with pytest.raises(gradwatch.ConfigurationError, match=sentence):
        gradwatch.watch(*arguments)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"log_every": 0}, "log_every must be a whole number of at least 1, got 0"),
        ({"log_every": 2.5}, "log_every must be a whole number of at least 1, got 2.5"),
        ({"start_step": -1}, "start_step must be a whole number of at least 0, got -1"),
        ({"scaler": object()}, "scaler must be a torch.amp.GradScaler"),
        ({"include": "nothing.*"}, "include and exclude leave no parameter to watch; the model has 0.weight"),
        ({"mute": [("sick", "*")]}, "'sick' is no kind of alert; mute one of vanishing"),
        ({"mute": ["dead"]}, "mute takes pairs"),
        ({"detectors": [3]}, "3"),
        ({"backend": "gpu"}, "backend"),
        ({"sinks": [], "log_dir": "x"}, "got log_dir and sinks"),
        ({"log_dir": 3}, "log_dir"),
    ],
)
def test_options_that_cannot_work(options, sentence):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(gradwatch.ConfigurationError, match=sentence):
        gradwatch.watch(model, optimizer, **options)


def test_a_refused_watch_leaves_nothing_attached():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(gradwatch.ConfigurationError):
        gradwatch.watch(model, optimizer, detectors=[3])

    assert not optimizer._optimizer_step_pre_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_log_directory_that_cannot_be_written_is_refused(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (tmp_path / "file").write_text("x")

    with pytest.raises(gradwatch.ConfigurationError, match="file"):
        gradwatch.watch(model, optimizer, log_dir=tmp_path / "file")


def test_a_loss_of_several_elements_is_refused():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, _ = watched(model, optimizer)

    with pytest.raises(gradwatch.ConfigurationError, match=r"shape \(3,\).*loss.mean"):
        watch.log_loss(torch.zeros(3))
    with pytest.raises(gradwatch.ConfigurationError, match="takes one number"):
        watch.log_loss("1")


def test_an_unknown_optimizer_is_refused_by_name():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, _ = watched(model, optimizer)

    with pytest.raises(gradwatch.ConfigurationError, match="no watched optimizer is called 'g'"):
        watch.step("g")


def test_a_detector_of_ones_own_is_three_lines():
    def large(snapshot, history):
        if snapshot.global_norm is not None:
            value = 1.0 if snapshot.global_norm > 1e-6 else -1.0
            yield gradwatch.Evidence("large", kind="spike", value=value, reading=snapshot.global_norm, threshold=1e-6)

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, _ = watched(model, optimizer, detectors=[*gradwatch.DEFAULT_DETECTORS, large])

    train(model, optimizer, 10)

    (alert,) = watch.alerts
    assert (alert.kind, alert.symptom, alert.opened, alert.first_step) == ("spike", "large", 5, 0)


def test_the_first_step_can_be_numbered():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer, start_step=100)

    train(model, optimizer, 2)

    assert [s.step for s in memory.snapshots] == [100, 101]


def test_an_accelerated_optimizer_is_unwrapped():
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, Wrapper(optimizer))

    train(model, optimizer, 2)

    assert len(memory.snapshots) == 2
