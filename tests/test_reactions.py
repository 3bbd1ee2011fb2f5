"""Reactions change training only as they were asked to, and every change is on record."""

from __future__ import annotations

import json

import pytest
import torch
from loops import backward, mlp, true_norm, watched
from torch import nn, optim

import gradwatch


def exploding(model, optimizer, watch, *, steps=40, at=10):
    """Train, with a learning rate that becomes far too high."""
    for step in range(steps):
        if watch.should_stop:
            return step
        optimizer.zero_grad()
        if step == at:
            optimizer.param_groups[0]["lr"] = 300.0
        watch.log_loss(backward(model, step))
        optimizer.step()
    return steps


def setting(reactions, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    watch, memory = watched(model, optimizer, reactions=reactions, **options)
    return model, optimizer, watch, memory


def test_watching_without_transforms_and_reactions_changes_nothing():
    _, _, watch, memory = setting([])
    exploding(*setting([])[:2], watch)

    assert watch.interventions == ()
    assert memory.interventions == []


def test_an_alert_can_end_the_loop():
    model, optimizer, watch, _ = setting([gradwatch.on("exploding", gradwatch.StopTraining())])

    ended = exploding(model, optimizer, watch)
    watch.close()

    assert 10 < ended < 30
    assert watch.should_stop
    assert [i.kind for i in watch.interventions] == ["stop"]


def test_a_hard_stop_raises_and_its_reason_is_written(tmp_path):
    torch.manual_seed(0)
    reactions = [gradwatch.on("exploding", gradwatch.StopTraining(hard=True, any_severity=True))]
    model, optimizer, watch, memory = setting(reactions)

    with pytest.raises(gradwatch.TrainingStopped, match="exploding at step"):
        exploding(model, optimizer, watch)
    watch.close()

    assert [i.kind for i in memory.interventions] == ["stop"]
    assert [alert.kind for alert in memory.alerts] == ["exploding"]


def test_a_checkpoint_is_saved_when_an_alert_opens(tmp_path):
    path = tmp_path / "{kind}_{step}.pt"
    model, optimizer, watch, _ = setting([gradwatch.on("exploding", gradwatch.SaveCheckpoint(path))])

    exploding(model, optimizer, watch)
    watch.close()

    saved = list(tmp_path.glob("exploding_*.pt"))
    assert len(saved) == 1
    loaded = torch.load(saved[0], weights_only=True)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert [i.kind for i in watch.interventions] == ["save"]


def test_a_plain_function_of_an_alert_is_called_when_it_opens():
    called = []
    model, optimizer, watch, _ = setting([gradwatch.on("exploding", lambda alert, run: called.append(alert.kind))])

    exploding(model, optimizer, watch)
    watch.close()

    assert called[0] == "exploding"
    assert len(called) <= 2


def test_backoff_in_a_real_loop_halves_the_rate_of_the_update():
    model, optimizer, watch, memory = setting([gradwatch.on("exploding", gradwatch.BackOffLR())])

    exploding(model, optimizer, watch)
    watch.close()

    factors = {s.rate_factor for s in memory.snapshots}
    assert 0.5 in factors
    assert optimizer.param_groups[0]["lr"] == 300.0
    assert watch.interventions[0].kind == "learning_rate"
    assert watch.interventions[0].after == 0.5 * watch.interventions[0].before


def test_a_rollback_puts_back_weights_and_moments_of_before_and_leaves_the_rate():
    torch.manual_seed(0)
    model = mlp()
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    captured = {}

    def reaction(seen, _alerts, run):
        if seen.step == 4:
            captured["state"] = run.capture()
            captured["weights"] = [p.detach().clone() for p in model.parameters()]
            captured["moments"] = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
            captured["steps"] = float(optimizer.state[model[0].weight]["step"])
        if seen.step == 9:
            yield run.restore(captured["state"], reason="as planned")

    watch, _ = watched(model, optimizer, reactions=[reaction], detectors=[])
    identities = [id(p) for p in model.parameters()]
    for step in range(10):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
        optimizer.step()

    assert all(map(torch.equal, captured["weights"], [p.detach() for p in model.parameters()]))
    assert all(map(torch.equal, captured["moments"], [optimizer.state[p]["exp_avg"] for p in model.parameters()]))
    assert float(optimizer.state[model[0].weight]["step"]) == captured["steps"] == 5
    assert [id(p) for p in model.parameters()] == identities
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert [(i.kind, i.before, i.after) for i in watch.interventions] == [("rollback", 10.0, 5.0)]


def test_rollback_uses_a_state_from_before_the_trouble_and_a_bounded_number_of_times():
    reactions = [gradwatch.Rollback(every=5, age=5, max_restores=2, grace=20)]
    model, optimizer, watch, _ = setting(reactions)

    exploding(model, optimizer, watch, steps=120, at=50)
    watch.close()

    back = [i for i in watch.interventions if i.kind == "rollback"]
    assert 1 <= len(back) <= 2
    assert back[0].after <= 51
    assert all(made.before - made.after >= 5 for made in back)


def test_a_failing_reaction_is_switched_off_alone(caplog):
    def fails(seen, alerts, run):
        raise RuntimeError("as planned")

    calls = []

    def works(seen, alerts, run):
        calls.append(seen.step)
        return ()

    model, optimizer, watch, _ = setting([fails, works])

    exploding(model, optimizer, watch, steps=5)
    watch.close()

    assert calls == [0, 1, 2, 3, 4]
    assert caplog.text.count("the reaction function failed") == 1


def test_a_failing_transform_stops_the_run_unless_told_otherwise(caplog):
    class Fails(gradwatch.ClipByGlobalNorm):
        def __call__(self, gradients):
            raise RuntimeError("as planned")

    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer, transforms=[Fails(1.0, on_failure="disable")], detectors=[])
    for step in range(3):
        backward(model, step)
        optimizer.step()
    watch.close()

    assert len(memory.snapshots) == 3
    assert caplog.text.count("the transform Fails failed") == 1

    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watch, _ = watched(model, optimizer, transforms=[Fails(1.0)], detectors=[])
    backward(model)
    with pytest.raises(gradwatch.TrainingStopped, match="the transform Fails failed"):
        optimizer.step()
    watch.close()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rate", [1e-4, 1.0])
def test_our_clipping_is_torchs_in_a_real_loop(fused, rate):
    def train(*, ours):
        torch.manual_seed(0)
        model = mlp()
        optimizer = optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        transforms = [gradwatch.ClipByGlobalNorm(rate)] if ours else []
        watch, memory = watched(model, optimizer, transforms=transforms, detectors=[])
        for step in range(10):
            optimizer.zero_grad()
            backward(model, step)
            if not ours:
                nn.utils.clip_grad_norm_(model.parameters(), rate)
            optimizer.step()
        watch.close()
        return [p.detach() for p in model.parameters()], memory

    (torchs, _), (ours, memory) = train(ours=False), train(ours=True)

    for left, right in zip(torchs, ours, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert all(s.clipped_norm <= rate * (1 + 1e-5) or rate == 1.0 for s in memory.snapshots)


def test_both_clippers_are_announced_once_and_the_smaller_norm_wins(caplog):
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer, transforms=[gradwatch.ClipByGlobalNorm(1e-3)], detectors=[])
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        before = true_norm(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
        assert memory.snapshots[-1].global_norm == pytest.approx(before, rel=1e-5)
        assert true_norm(model.parameters()) == pytest.approx(1e-3, rel=1e-3)
    watch.close()

    assert caplog.text.count("the smaller norm wins") == 1
    assert memory.snapshots[-1].clipped_norm == pytest.approx(1e-3, rel=1e-3)
    assert memory.snapshots[-1].clip_coefficient == pytest.approx(1e-3 / memory.snapshots[-1].global_norm, rel=1e-2)


def test_a_clipper_that_engages_on_most_steps_says_what_that_means():
    def said(build):
        model = mlp()
        optimizer = build(model.parameters(), lr=1e-3)
        watch, memory = watched(model, optimizer, transforms=[gradwatch.ClipByGlobalNorm(1e-3)], detectors=[])
        for step in range(120):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        watch.close()
        assert memory.snapshots[-1].clip_rate == 1.0
        return [i.reason for i in watch.interventions if i.kind == "clip_rate"]

    (plain,), (adaptive,) = said(optim.SGD), said(optim.Adam)

    assert "your learning rate is effectively" in plain
    assert "are no smaller for it" in adaptive


def test_several_optimizers_have_transforms_of_their_own():
    models = {"a": mlp(), "b": mlp()}
    optimizers = {name: optim.SGD(m.parameters(), lr=0.1) for name, m in models.items()}
    clipper = gradwatch.ZClip(warmup=3)
    watch, _ = watched(models, optimizers, transforms=[clipper], detectors=[])
    for step in range(5):
        for name, factor in (("a", 1.0), ("b", 100.0)):
            optimizers[name].zero_grad()
            backward(models[name], step, factor=factor)
            optimizers[name].step()
    state = watch.state_dict()
    watch.close()

    means = {name: float(lane["transforms"][0]["sums"][3]) for name, lane in state["lanes"].items()}
    assert means["b"] > 5 * means["a"]


def test_interventions_reach_every_file(tmp_path):
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watch = gradwatch.watch(model, optimizer, log_dir=tmp_path, transforms=[gradwatch.ClipByGlobalNorm(1e-3)])
    for step in range(12):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    watch.close()

    lines = [json.loads(line) for line in (tmp_path / "gradwatch.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines if line["type"] == "intervention"] == ["clip"]
    content = b"".join(path.read_bytes() for path in tmp_path.glob("events*"))
    for tag in (b"gradwatch/interventions", b"gradwatch/clip_factor/ClipByGlobalNorm", b"gradwatch/clip_rate"):
        assert tag in content


def test_transforms_survive_a_restart():
    def watch_of(model, optimizer):
        return gradwatch.watch(model, optimizer, sinks=[], transforms=[gradwatch.AutoClip(window=8)], detectors=[])

    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    first = watch_of(model, optimizer)
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    saved = first.state_dict()
    first.close()
    second = watch_of(model, optimizer)
    second.load_state_dict(saved)

    again = second.state_dict()["lanes"][""]["transforms"][0]
    second.close()

    assert int(again["count"]) == 6
    assert torch.equal(again["values"].nan_to_num(), saved["lanes"][""]["transforms"][0]["values"].nan_to_num())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"transforms": [gradwatch.ClipByGlobalNorm]}, "a transform is an instance"),
        ({"transforms": [3]}, "a transform is an instance"),
        ({"reactions": [gradwatch.BackOffLR]}, "a reaction is an instance"),
        ({"reactions": [gradwatch.on("explodes", gradwatch.BackOffLR())]}, "'explodes' is no kind of alert"),
    ],
)
def test_what_cannot_work_is_refused_at_attach_time(options, says):
    model = mlp()

    with pytest.raises(gradwatch.ConfigurationError, match=says):
        gradwatch.watch(model, optim.SGD(model.parameters(), lr=0.1), **options)


def test_transforms_need_an_optimizer():
    with pytest.raises(gradwatch.ConfigurationError, match="transforms need an optimizer"):
        gradwatch.watch(mlp(), None, transforms=[gradwatch.ClipByGlobalNorm(1.0)])


@pytest.mark.parametrize(("kind", "reaction"), [(3, gradwatch.BackOffLR()), ("exploding", 3)])
def test_on_takes_a_kind_and_a_reaction(kind, reaction):
    with pytest.raises(gradwatch.ConfigurationError, match="on\\("):
        gradwatch.on(kind, reaction)
