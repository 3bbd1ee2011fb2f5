"""Causes come from measurements, each with evidence and something to write."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import snapshot, tensors
from torch import nn

import gradwatch
from gradwatch.diagnosis import diagnose
from gradwatch.diagnosis.decomposition import IDEAL_SLOPE, decompose
from gradwatch.diagnosis.remedies import _REMEDIES
from gradwatch.diagnosis.rules import MAX_CAUSES, RULES
from gradwatch.episodes import ORDER
from gradwatch.history import History
from gradwatch.records import CAUSES, Alert, InputReading, ModuleReadings


def readings(operations, gradients, **changes):
    number = len(operations)
    nothing = np.full(number, np.nan)
    made = ModuleReadings(
        modules=tuple(map(str, range(number))),
        operations=tuple(operations),
        elements=np.full(number, 640),
        dtypes=("float32",) * number,
        input_rms=np.ones(number),
        output_rms=np.ones(number),
        gradient_rms=np.array(gradients, dtype=float),
        low=nothing,
        high=nothing,
        inactive=nothing,
        between=nothing,
        logits=nothing,
    )
    return replace(made, **changes)


def alert(symptom="profile_down", kind="vanishing", **changes):
    made = Alert(
        kind=kind,
        symptom=symptom,
        severity="warning",
        optimizer="",
        step=4,
        first_step=2,
        opened=4,
        change="opened",
        layers=("block0.layer0",),
        tensors=("block0.layer0.weight",),
        value=1.0,
        threshold=0.5,
        message="As it was read.",
    )
    return replace(made, **changes)


def history(*snapshots):
    past = History()
    for each in snapshots:
        past.update(each)
    return past


def test_every_symptom_of_our_own_has_rules_and_every_cause_a_remedy():
    assert set(RULES) == set(ORDER)
    assert set(_REMEDIES) == set(CAUSES) - {"unknown"}


@pytest.mark.parametrize("symptom", ORDER)
def test_every_symptom_gets_causes_with_evidence_and_remedy_from_a_bare_history(symptom):
    now = snapshot(4)

    causes = diagnose(alert(symptom), now, history(*(snapshot(i) for i in range(4)), now))

    assert 1 <= len(causes) <= MAX_CAUSES
    assert all(cause.name in CAUSES and cause.evidence and cause.remedy for cause in causes)
    assert [cause.confidence for cause in causes] == sorted((c.confidence for c in causes), reverse=True)


def test_a_users_own_symptom_has_no_cause():
    assert diagnose(alert("mine"), snapshot(0), history(snapshot(0))) == ()
    assert alert("mine").cause == "unknown"


def test_decomposition_adds_up_to_the_whole_change_of_the_gradient():
    gradients = [1e-6, 3e-6, 2e-4, 5e-4, 1e-2]

    parts = decompose(readings(["linear", "tanh", "linear", "tanh", "linear"], gradients))

    assert parts.layers == 2
    assert parts.activations == pytest.approx(np.log10(1e-6 / 3e-6) + np.log10(2e-4 / 5e-4))
    assert parts.activations + parts.weights == pytest.approx(np.log10(1e-6 / 1e-2))


@pytest.mark.parametrize("activation", ["relu", "gelu", "elu"])
def test_an_ideal_activation_and_weights_that_make_up_for_it_lose_nothing(activation):
    slope = IDEAL_SLOPE[activation]
    gradients = [slope, 1.0, slope, 1.0]  # the activation takes its slope, the weights give it back

    parts = decompose(readings(["linear", activation, "linear", activation], gradients))

    assert parts.activations == pytest.approx(0.0, abs=1e-9)
    assert parts.weights == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("activation", "init", "cause"),
    [
        (nn.Sigmoid, nn.init.xavier_normal_, "activation"),
        (nn.Tanh, lambda w: nn.init.normal_(w, std=0.02), "initialization"),
    ],
)
def test_flat_activations_and_small_weights_are_told_apart(activation, init, cause):
    torch.manual_seed(0)
    layers = [module for _ in range(10) for module in (nn.Linear(32, 32), activation())]
    for layer in layers[::2]:
        init(layer.weight)
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = gradwatch.watch(model, optimizer, sinks=[])
    for _ in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(0, 4, (16,))).backward()
        optimizer.step()
    watch.close()

    assert [a.cause for a in watch.alerts if a.severity != "info"] == [cause]


def test_a_bad_batch_is_remembered_until_the_loss_shows_it():
    def now(step, largest=1.0):
        return replace(snapshot(step), input=InputReading(rms=1.0, max_abs=largest))

    past = history(*(now(step, 60.0 if step == 12 else 1.0) for step in range(20)))

    near = diagnose(alert("growth", "exploding", first_step=15), now(20), past)
    far = diagnose(alert("growth", "exploding", first_step=30), now(34), past)

    assert near[0].name == "data"
    assert "step 12" in near[0].evidence
    assert far[0].name == "learning_rate"


def test_a_loss_that_leaps_after_an_ordinary_step_is_the_batchs_fault():
    steps = [replace(snapshot(step), loss=1e4 if step == 20 else 1.0) for step in range(23)]

    found = diagnose(alert("update_large", "exploding", first_step=21), steps[-1], history(*steps))

    assert found[0].name == "data"
    assert "step 20 is 1e+04 times any before" in found[0].evidence


def test_the_remedy_follows_the_optimizer():
    facts = snapshot(0).optimizer_facts
    adam = replace(snapshot(4), optimizer_facts=replace(facts, name="AdamW"))
    sgd = snapshot(4)

    said = [diagnose(alert("update_large", "exploding", first_step=20), s, history(s))[0].remedy for s in (adam, sgd)]

    assert "clipping does not" in said[0]
    assert "clip_grad_norm_" in said[1]


def test_float16_comes_first_where_numbers_end():
    half = tensors(dtypes=("float16",) * 4)
    now = replace(snapshot(4, of=half), loss=1.0)

    assert diagnose(alert("nonfinite", "nonfinite"), now, history(now))[0].name == "precision"


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ([1.0, 2.0, np.nan], [2.0, np.nan, np.nan], True),  # in the second operation
        ([1.0, np.nan, np.nan], [2.0, np.nan, np.nan], True),  # between the first two
        ([1.0, 1e9, np.inf], [1e9, np.inf, np.nan], False),  # it grew until it overflowed
        ([np.nan, np.nan, np.nan], [np.nan, np.nan, np.nan], False),  # the batch was bad
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], False),  # after the forward pass
    ],
)
def test_an_undefined_operation_is_told_from_an_overflow(inputs, outputs, expected):
    read = readings(("linear",) * 3, [np.nan] * 3, input_rms=np.array(inputs), output_rms=np.array(outputs))
    now = replace(snapshot(0), loss=float("nan"), modules=read)

    causes = diagnose(alert("nonfinite", "nonfinite", first_step=0), now, history(now))

    named = [cause for cause in causes if "The forward pass is not finite from 1 on" in cause.evidence]
    assert bool(named) == expected
    assert not named or (named[0].name == "precision" and causes[0] is named[0])


def test_a_failing_diagnosis_costs_the_cause_and_not_the_alert(monkeypatch, caplog):
    monkeypatch.setattr("gradwatch.judge.diagnose", lambda *_: 1 / 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    watch = gradwatch.watch(model, optimizer, sinks=[])
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    watch.close()

    assert [a.kind for a in watch.alerts] == ["stalled"]
    assert watch.alerts[0].cause == "unknown"
    assert caplog.text.count("naming causes failed") == 1


def first_alert(*, factor=1.0, limit=None, inputs=None):
    """Train a small classifier by SGD; return what is found first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch = gradwatch.watch(model, optimizer, sinks=[])
    for _ in range(40):
        optimizer.zero_grad()
        batch = torch.randn(32, 16) if inputs is None else inputs
        loss = factor * nn.functional.cross_entropy(model(batch), torch.randint(0, 4, (32,)))
        watch.log_loss(loss)
        loss.backward()
        if limit is not None:
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
    watch.close()
    return watch.alerts[0]


def test_inputs_of_zero_are_the_datas_fault():
    found = first_alert(inputs=torch.zeros(32, 16))

    assert (found.kind, found.causes[0].name) == ("dead", "data")
    assert "zero" in found.causes[0].evidence
    assert "inputs.abs().max() > 0" in found.causes[0].remedy


def test_a_clipping_limit_far_below_the_norm_is_named():
    found = first_alert(limit=1e-8)

    assert (found.symptom, found.causes[0].name) == ("update_small", "learning_rate")
    assert "Clipping leaves" in found.causes[0].evidence
    assert "Raise the clipping limit" in found.causes[0].remedy


def test_a_loss_that_is_scaled_down_is_not_the_initialisations_fault():
    found = first_alert(factor=1e-7)

    assert (found.symptom, found.causes[0].name) == ("update_small", "learning_rate")
    assert "small from the loss on" in found.causes[0].evidence
