"""Evidence adds up to alerts: one for one problem, first things first, none for a lone spike."""

from __future__ import annotations

import numpy as np
import pytest
from builders import snapshot, tensors
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.episodes import CEILING, HOLD, QUIET, Episodes, EvidenceSum
from gradwatch.records import Evidence

values = st.floats(-10, 10, allow_nan=False)


def said(symptom="growth", value=2.0, *, kind="exploding", **more):
    return Evidence(symptom, kind=kind, value=value, **more)


def judged(episodes, steps, *, start=0):
    """Judge one list of evidence a step; return the changes as (step, change, symptom)."""
    changes = []
    for step, evidence in enumerate(steps, start):
        changes += [(step, a.change, a.symptom) for a in episodes.judge(snapshot(step), evidence)]
    return changes


@given(st.lists(values, max_size=60))
def test_a_sum_stays_between_zero_and_its_ceiling(numbers):
    found = EvidenceSum()

    for step, number in enumerate(numbers):
        found.add(said(value=number), snapshot(step))

        assert 0 <= found.highest <= CEILING


@given(st.lists(st.floats(-2, 2, allow_nan=False), max_size=40))
def test_a_sum_is_the_running_sum_with_its_floor_and_ceiling(numbers):
    found, expected = EvidenceSum(), 0.0

    for step, number in enumerate(numbers):
        found.add(said(value=number), snapshot(step))
        expected = min(CEILING, max(0.0, expected + number))

    assert found.highest == pytest.approx(expected)


def test_one_quiet_step_takes_back_what_one_loud_step_gave():
    steps = [[said(value=value)] for value in (2.0, 2.0, -2.0, 2.0, 2.0)]

    assert judged(Episodes(), steps) == [(4, "opened", "growth")]


@given(before=st.lists(st.floats(-2, 0), max_size=20), spike=st.floats(0, 1e9))
def test_a_lone_spike_never_opens_an_alert(before, spike):
    steps = [[said(value=value)] for value in (*before, spike, *before)]

    assert judged(Episodes(), steps) == []


def test_an_alert_knows_when_the_symptom_began():
    episodes = Episodes()

    judged(episodes, [[said(value=-1.0)], [said(value=-1.0)], *[[said(value=1.5)]] * 4])

    (alert,) = episodes.open
    assert (alert.first_step, alert.opened) == (2, 5)


def test_the_alert_is_not_repeated_and_ends_when_it_was_quiet_for_long_enough():
    loud, quiet = [said(value=2.0)], [said(value=-2.0)]

    changes = judged(Episodes(), [*[loud] * 10, *[quiet] * 30, *[loud] * 3])

    over = 10 + int(CEILING / 2) + QUIET - 2
    assert changes == [(2, "opened", "growth"), (over, "resolved", "growth"), (42, "opened", "growth")]


def test_what_is_immediate_opens_at_once():
    changes = judged(Episodes(), [[said("nonfinite", kind="nonfinite", immediate=True)]])

    assert changes == [(0, "opened", "nonfinite")]


def test_an_open_explosion_explains_everything_later():
    explosion, later = said("update_large"), said("zero", kind="dead")

    changes = judged(Episodes(), [*[[explosion]] * 4, *[[explosion, later]] * 10])

    assert changes == [(2, "opened", "update_large")]


def test_starved_kinds_explain_one_another():
    first, second = said("profile_down", kind="vanishing"), said("mine", kind="stalled")

    assert judged(Episodes(), [*[[first]] * 4, *[[first, second]] * 10]) == [(2, "opened", "profile_down")]


def test_independent_problems_are_two_alerts():
    first, second = said("unoptimized", kind="unoptimized"), said("growth", kind="exploding")

    changes = judged(Episodes(), [[first, second]] * 5)

    assert [symptom for _, _, symptom in changes] == ["unoptimized", "growth"]


def test_a_finding_waits_for_one_of_higher_order_that_gathers_evidence():
    early = said("decay", kind="vanishing", value=2.0)
    slow = said("profile_down", kind="vanishing", value=1.2)

    changes = judged(Episodes(), [[early, slow]] * 8)

    assert changes == [(4, "opened", "profile_down")]


def test_it_waits_no_longer_than_the_hold():
    found = said("decay", kind="vanishing", value=2.0)
    never = said("profile_down", kind="vanishing", value=0.1)

    changes = judged(Episodes(), [[never]] * 11 + [[found, never]] * 10)

    assert changes == [(11 + 2 + HOLD, "opened", "decay")]


def test_the_debris_of_an_explosion_waits_for_it():
    zero, growth = said("zero", kind="dead", value=2.0), said("growth", value=1.5)

    assert judged(Episodes(), [[zero, growth]] * 6) == [(3, "opened", "growth")]


def test_evidence_by_tensor_names_the_tensors_worst_first():
    episodes = Episodes()
    value = np.array([1.5, -2.0, 2.0, np.nan])

    judged(episodes, [[said("unoptimized", value, kind="unoptimized", reading=np.arange(4.0))]] * 5)

    (alert,) = episodes.open
    assert alert.tensors == ("block1.layer2.weight", "block0.layer0.weight")
    assert alert.layers == ("block1.layer2", "block0.layer0")
    assert alert.value == 2.0
    assert alert.opened == 2


def test_sums_by_tensor_follow_the_names_when_the_order_changes():
    episodes = Episodes()
    value = np.array([2.0, -2.0, -2.0, -2.0])
    episodes.judge(snapshot(0), [said("unoptimized", value, kind="unoptimized")])
    turned = tensors(names=tuple(reversed(tensors().names)))

    for step in (1, 2):
        changed = episodes.judge(snapshot(step, of=turned), [said("unoptimized", value[::-1], kind="unoptimized")])

    assert changed[0].tensors == ("block0.layer0.weight",)


def test_stronger_evidence_escalates_the_open_alert_once():
    mild, severe = said(value=2.0), said(value=2.0, severity="critical")

    changes = judged(Episodes(), [*[[mild]] * 4, *[[severe]] * 4, *[[mild]] * 2])

    assert changes == [(2, "opened", "growth"), (4, "escalated", "growth")]


def test_what_is_only_information_blocks_nothing():
    quiet = said("idle", kind="dead", severity="info")
    loud = said("zero", kind="dead")

    changes = judged(Episodes(), [*[[quiet]] * 5, *[[quiet, loud]] * 5])

    assert [symptom for _, _, symptom in changes] == ["idle", "zero"]


def test_a_muted_alert_stays_on_record_as_information():
    episodes = Episodes(mute=(("exploding", "block0.*"),))
    concerned = ("block0.layer0.weight",)

    for step in range(4):
        episodes.judge(snapshot(step), [said(tensors=concerned)])

    assert [alert.severity for alert in episodes.open] == ["info"]


def test_muting_some_of_the_tensors_mutes_nothing():
    episodes = Episodes(mute=(("exploding", "block0.*"),))

    for step in range(4):
        episodes.judge(snapshot(step), [said(tensors=("block0.layer0.weight", "block1.layer2.weight"))])

    assert [alert.severity for alert in episodes.open] == ["warning"]


def test_detail_is_wanted_from_the_first_evidence_until_five_steps_without():
    episodes = Episodes()

    wanted = []
    for step in range(10):
        episodes.judge(snapshot(step), [said(value=1.0 if step == 2 else -1.0)])
        wanted.append(episodes.wants_detail)

    assert wanted == [False, False, True, True, True, True, True, False, False, False]


def test_an_alert_that_stays_open_does_not_keep_the_detail_tier_dense():
    episodes = Episodes()

    wanted = []
    for step in range(100):
        episodes.judge(snapshot(step), [said(value=2.0)])
        wanted.append(episodes.wants_detail)

    assert all(wanted[:50])
    assert not any(wanted[60:])
    assert len(episodes.open) == 1


@given(st.lists(st.tuples(st.sampled_from(["growth", "zero", "mine"]), values), min_size=1, max_size=40), st.data())
def test_a_restart_anywhere_changes_nothing(stream, data):
    cut = data.draw(st.integers(0, len(stream)))
    steps = [[said(symptom, value)] for symptom, value in stream]
    whole, first, second = Episodes(), Episodes(), Episodes()

    before = judged(first, steps[:cut])
    second.restore(first.state())

    assert before + judged(second, steps[cut:], start=cut) == judged(whole, steps)
