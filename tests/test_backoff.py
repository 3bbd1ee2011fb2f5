"""Learning-rate backoff lies over the scheduler's rate for the length of a step, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import snapshot
from loops import backward, mlp, watched
from torch import optim
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import gradwatch
from gradwatch.records import Alert
from gradwatch.trouble import Trouble

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def halve_at(*steps):
    """A reaction that halves the rate at these steps."""

    def reaction(seen, _alerts, run):
        if seen.step in steps:
            yield run.multiply_lr(0.5, reason="as planned")

    return reaction


class Used(optim.SGD):
    """Notes the rate that each update uses."""

    def __init__(self, *arguments, **keywords):
        self.used, self.fails = [], False
        super().__init__(*arguments, **keywords)

    @torch.no_grad()
    def _init_group(self, group, *lists):
        self.used.append(float(group["lr"]))
        if self.fails:
            raise RuntimeError("as planned")
        return super()._init_group(group, *lists)


def run(schedule, reactions=(), *, steps=16, rate=0.1, groups=1):
    torch.manual_seed(0)
    model = mlp()
    parameters = list(model.parameters())
    split = [{"params": parameters[i::groups]} for i in range(groups)]
    optimizer = Used(split, lr=rate)
    scheduler = None if schedule is None else schedule(optimizer)
    watch, memory = watched(model, optimizer, reactions=reactions, detectors=[])
    between = []
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
        between.append(float(optimizer.param_groups[0]["lr"]))
    watch.close()
    return optimizer, between, watch, memory


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:.*epoch parameter.*", "ignore:.*deprecation.*")
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_backoff_is_exact_under_every_scheduler_of_torchs(name):
    plain, expected, _, _ = run(SCHEDULERS[name])
    backed, between, _, _ = run(SCHEDULERS[name], [halve_at(4, 9)])

    factors = np.array([1.0] * 5 + [0.5] * 5 + [0.25] * 6)
    np.testing.assert_allclose(between, expected, rtol=1e-12)
    np.testing.assert_allclose(backed.used, np.array(plain.used) * factors, rtol=1e-12)


def test_a_tensor_rate_that_groups_share_is_multiplied_once_and_stays_the_same_object():
    rate = torch.tensor(0.1)
    optimizer, between, _, memory = run(None, [halve_at(2)], rate=rate, groups=2, steps=5)

    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    assert between == pytest.approx([0.1] * 5)
    assert optimizer.used == pytest.approx([0.1] * 6 + [0.05] * 4)
    assert [s.rate_factor for s in memory.snapshots] == [1, 1, 1, 0.5, 0.5]
    assert memory.snapshots[-1].learning_rates == pytest.approx((0.05, 0.05))


def test_one_group_alone_can_be_slowed():
    def reaction(seen, _alerts, run):
        if seen.step == 1:
            yield run.multiply_lr(0.1, reason="the second group", group=1)

    optimizer, _, _, _ = run(None, [reaction], groups=2, steps=4)

    assert optimizer.used == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.1, 0.01])


def test_a_step_that_raises_leaves_the_rate_as_it_was_from_the_next_one_on():
    model = mlp()
    optimizer = Used(model.parameters(), lr=0.1)
    watch, _ = watched(model, optimizer, reactions=[halve_at(0)], detectors=[])
    backward(model)
    optimizer.step()
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="as planned"):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    watch.detach()

    assert optimizer.param_groups[0]["lr"] == 0.1


def test_detaching_after_a_step_that_raised_restores_the_rate():
    model = mlp()
    optimizer = Used(model.parameters(), lr=0.1)
    watch, _ = watched(model, optimizer, reactions=[halve_at(0)], detectors=[])
    backward(model)
    optimizer.step()
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="as planned"):
        optimizer.step()
    watch.detach()

    assert optimizer.param_groups[0]["lr"] == 0.1


def test_the_rate_in_a_checkpoint_is_the_schedulers_and_the_factor_goes_with_the_watch():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watch, _ = watched(model, optimizer, reactions=[halve_at(1)], detectors=[])
    for step in range(3):
        backward(model, step)
        optimizer.step()
    saved, rate = watch.state_dict(), optimizer.state_dict()["param_groups"][0]["lr"]
    watch.close()
    again, memory = watched(model, optimizer, detectors=[])
    again.load_state_dict(saved)
    backward(model, 3)
    optimizer.step()
    again.close()

    assert rate == 0.1
    assert memory.snapshots[0].rate_factor == 0.5


# -- the policy ------------------------------------------------------------------------------------------------------


class Tape:
    """A run that only writes down what it is asked for."""

    def __init__(self):
        self.factor, self.events, self.stopped = 1.0, [], None

    def multiply_lr(self, factor, *, reason, group=None):
        self.factor *= factor
        self.events.append((round(self.factor, 6), reason))
        return gradwatch.Intervention(step=0, optimizer="", kind="learning_rate", reason=reason, before=1, after=1)

    def stop(self, reason):
        self.stopped = reason
        return gradwatch.Intervention(step=0, optimizer="", kind="stop", reason=reason, before=0, after=1)


def steps_of(losses, norms=None):
    for step, loss in enumerate(losses):
        norm = 1.0 if norms is None else norms[step]
        yield replace(snapshot(step), loss=loss, global_norm=norm)


def judged(policy, losses, norms=None):
    tape = Tape()
    for each in steps_of(losses, norms):
        list(policy(each, (), tape))
    return tape


def noisy(count, level=1.0):
    return (level * np.random.default_rng(0).normal(1, 0.05, count)).tolist()


def test_a_healthy_loss_is_never_backed_off():
    falling = (np.geomspace(5, 0.1, 400) * np.random.default_rng(1).lognormal(0, 0.1, 400)).tolist()

    assert judged(gradwatch.BackOffLR(), falling).events == []


@pytest.mark.parametrize("level", [1.0, -3.0])
def test_a_loss_that_doubles_halves_the_rate_also_where_losses_are_negative(level):
    losses = [*(level + 0.02 * np.sin(np.arange(90))).tolist(), level + 2 * abs(level)]

    tape = judged(gradwatch.BackOffLR(), losses)

    assert [factor for factor, _ in tape.events] == [0.5]


def test_a_slow_rise_and_a_large_norm_are_trouble_too():
    rising = judged(gradwatch.BackOffLR(), [*noisy(90), *[1.5] * 8])
    large = judged(gradwatch.BackOffLR(), [*noisy(90), *[1.2] * 10], [*[1.0] * 90, *[20.0] * 10])

    assert "has risen" in rising.events[0][1]
    assert "times its usual size" in large.events[0][1]


def test_gradients_that_grow_while_the_loss_falls_are_no_trouble():
    falling = np.linspace(2.0, 1.0, 100).tolist()

    assert judged(gradwatch.BackOffLR(), falling, [*[1.0] * 60, *[20.0] * 40]).events == []


def test_one_bad_step_is_forgiven_and_two_in_ten_are_not():
    def run(bad):
        return judged(gradwatch.BackOffLR(), [math.nan if i in bad else 1.0 for i in range(60)])

    assert run({20}).events == []
    assert run({20, 40}).events == []
    assert [factor for factor, _ in run({20, 25}).events] == [0.5]


def test_nothing_is_judged_in_the_cooldown_and_the_rate_grows_to_its_ceiling_only():
    losses = [*noisy(90), 9.0, *noisy(400)]

    tape = judged(gradwatch.BackOffLR(recover_after=50), losses)

    factors = [factor for factor, _ in tape.events]
    assert factors[0] == 0.5
    assert factors[-1] == pytest.approx(0.7)
    assert max(factors) <= 0.7 + 1e-9


def test_at_the_floor_training_is_asked_to_stop():
    tape = judged(
        gradwatch.BackOffLR(floor=0.25, cooldown=1, grace=10), [*noisy(30), *np.geomspace(3, 1e30, 120).tolist()]
    )

    assert tape.events[-1][0] == 0.25
    assert "still in trouble" in tape.stopped


def test_an_alert_is_trouble_at_once():
    alert = Alert(
        kind="exploding",
        symptom="update_large",
        severity="critical",
        optimizer="",
        step=3,
        first_step=1,
        opened=3,
        change="opened",
        layers=(),
        tensors=(),
        value=1.0,
        threshold=0.3,
        message="It explodes.",
    )
    tape = Tape()

    list(gradwatch.BackOffLR()(replace(snapshot(3), loss=1.0), (alert,), tape))

    assert tape.events == [(0.5, "It explodes.")]


def test_a_restored_policy_goes_on():
    losses = [*noisy(90), 9.0, *noisy(200)]
    whole = judged(gradwatch.BackOffLR(), losses)
    first, second, tape = gradwatch.BackOffLR(), gradwatch.BackOffLR(), Tape()
    seen = list(steps_of(losses))
    for each in seen[:95]:
        list(first(each, (), tape))

    second.restore(first.state())
    for each in seen[95:]:
        list(second(each, (), tape))

    assert tape.events == whole.events


def test_an_overflow_that_the_scaler_handles_is_no_trouble():
    trouble = Trouble(grace=0)
    overflow = replace(snapshot(0), skipped=True, loss_scale=1024.0, nonfinite=np.array([1.0, 0, 0, 0]), loss=1.0)

    assert [trouble.update(overflow, ()) for _ in range(5)] == [None] * 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gradwatch.BackOffLR(factor=2.0), "factor must lie between 0 and 1"),
        (lambda: gradwatch.BackOffLR(cooldown=0), "cooldown must be a whole number"),
        (lambda: gradwatch.BackOffLR(growth=0.5), "growth must be larger than 1"),
        (lambda: gradwatch.Rollback(every=0), "every must be a whole number"),
    ],
)
def test_options_that_cannot_work_are_refused(make, says):
    with pytest.raises(gradwatch.ConfigurationError, match=says):
        make()
