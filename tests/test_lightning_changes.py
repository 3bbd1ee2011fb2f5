"""Transforms and reactions under a Trainer: the right order with its own clipping, its stop, and its checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from test_lightning import PACKAGES, L, amp, fit, module

import gradwatch
from gradwatch import GradWatchCallback
from gradwatch.integrations.lightning import _refuse_strategies

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own advice


def callback_with(memory, **options):
    return GradWatchCallback(sinks=[memory], **options)


def changed(model, **options):
    memory = gradwatch.MemorySink()
    keywords = {name: options.pop(name) for name in ("transforms", "reactions", "detectors") if name in options}
    callback = callback_with(memory, **keywords)
    trainer, _ = fit(model, callback=callback, **options)
    return memory, callback, trainer


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_our_clipping_is_the_trainers(package, fused, scaled):
    def weights(*, ours):
        model = module(package, make=lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused))
        options = {"plugins": amp()} if scaled and package is L else {}
        transforms = [gradwatch.ClipByGlobalNorm(0.01)] if ours else []
        trainers = {} if ours else {"gradient_clip_val": 0.01}
        if fused and options and not ours:  # Lightning cannot clip there itself: clip by hand, on unscaled gradients
            trainers, transforms = {}, [gradwatch.ClipByGlobalNorm(0.01)]
        memory, _, _ = changed(model, package=package, transforms=transforms, **options, **trainers)
        assert all(s.clipped_norm == pytest.approx(0.01, rel=1e-3) for s in memory.snapshots)
        return [p.detach() for p in model.parameters()]

    for left, right in zip(weights(ours=False), weights(ours=True), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("trainers", "ours"), [(0.01, 1e-3), (1e-3, 0.01)])
def test_of_two_clippers_the_smaller_wins_and_both_are_announced_once(trainers, ours, caplog):
    memory, _, _ = changed(module(), transforms=[gradwatch.ClipByGlobalNorm(ours)], gradient_clip_val=trainers)

    assert [s.clipped_norm for s in memory.snapshots] == pytest.approx([1e-3] * 4, rel=1e-2)
    assert caplog.text.count("the smaller norm wins") == 1


def test_accumulated_gradients_are_clipped_once_a_window():
    memory, _, _ = changed(module(), transforms=[gradwatch.ClipByGlobalNorm(0.01)], accumulate_grad_batches=2)

    assert [s.clipped_norm for s in memory.snapshots] == pytest.approx([0.01] * 2, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_finite_is_skipped_exactly(fused):
    model = module(make=lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused), factor_at={2: float("inf")})

    memory, callback, _ = changed(model, transforms=[gradwatch.SkipNonfinite()])

    assert [s.vetoed for s in memory.snapshots] == [False, False, True, False]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [i.kind for i in callback.watch.interventions] == ["skip"]


def test_an_alert_ends_the_fit():
    def at_once(snapshot, history):
        yield gradwatch.Evidence("mine", kind="exploding", value=2.0, message="As planned.", immediate=True)

    memory, _, trainer = changed(
        module(), detectors=[at_once], reactions=[gradwatch.on("exploding", gradwatch.StopTraining(any_severity=True))]
    )

    assert trainer.should_stop
    assert len(memory.snapshots) == 1


def test_an_alert_saves_a_checkpoint(tmp_path):
    def at_once(snapshot, history):
        yield gradwatch.Evidence("mine", kind="spike", value=2.0, message="As planned.", immediate=True)

    reactions = [gradwatch.on("spike", gradwatch.SaveCheckpoint(tmp_path / "before.pt"))]
    changed(module(), detectors=[at_once], reactions=reactions)

    assert "net.0.weight" in torch.load(tmp_path / "before.pt", weights_only=True)["model"]


def test_backoff_is_used_by_the_update_and_is_in_no_checkpoint(tmp_path):
    def halve(snapshot, _alerts, run):
        if snapshot.step == 0:
            yield run.multiply_lr(0.5, reason="as planned")

    memory, _, trainer = changed(module(), reactions=[halve])

    assert [s.learning_rates[0] for s in memory.snapshots] == pytest.approx([0.1, 0.05, 0.05, 0.05])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_the_state_of_transforms_is_in_the_checkpoint(tmp_path):
    first = callback_with(gradwatch.MemorySink(), transforms=[gradwatch.AutoClip(window=8)])
    trainer, _ = fit(module(), callback=first)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = callback_with(gradwatch.MemorySink(), transforms=[gradwatch.AutoClip(window=8)])
    fit(module(), callback=second, ckpt_path=tmp_path / "a.ckpt", max_epochs=2)

    state = second.watch.state_dict()["lanes"][""]["transforms"][0]
    assert int(state["count"]) == 8


def test_two_callbacks_with_different_settings_see_the_same_run():
    memories = [gradwatch.MemorySink(), gradwatch.MemorySink()]
    first = GradWatchCallback(sinks=[memories[0]], name="all")
    second = GradWatchCallback(sinks=[memories[1]], name="head", include="net.2.*")

    trainer, _ = fit(module(), callback=first, callbacks=[second])

    assert [len(memory.snapshots) for memory in memories] == [4, 4]
    assert memories[1].snapshots[0].names == ("net.2.weight", "net.2.bias")
    assert memories[0].snapshots[0].norm[2:].tolist() == pytest.approx(memories[1].snapshots[0].norm.tolist())
    assert first.state_key != second.state_key
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("strategy", "says"),
    [(FSDPStrategy, "FSDPStrategy keeps the whole"), (DeepSpeedStrategy, "DeepSpeedStrategy keeps")],
)
def test_strategies_that_would_silently_not_clip_are_refused(strategy, says):
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))

    with pytest.raises(gradwatch.ConfigurationError, match=says):
        _refuse_strategies(trainer)


@pytest.mark.parametrize(
    "trainers",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {},
    ],
)
def test_the_norm_that_is_used_is_the_smaller_one_with_any_clipping_of_the_trainer(trainers):
    used = []

    class Noted(torch.optim.SGD):
        @torch.no_grad()
        def _init_group(self, group, params, grads, *lists):
            found = super()._init_group(group, params, grads, *lists)
            used.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
            return found

    changed(module(make=lambda p: Noted(p, lr=0.1)), transforms=[gradwatch.ClipByGlobalNorm(0.05)], **trainers)

    limit = min(0.05, trainers.get("gradient_clip_val", 1.0)) if "gradient_clip_algorithm" not in trainers else 0.05
    assert len(used) == 4
    assert all(norm <= limit * (1 + 1e-4) for norm in used)
    assert "gradient_clip_algorithm" in trainers or used == pytest.approx([limit] * 4, rel=1e-3)


def test_gradients_whose_norm_float32_cannot_hold_are_clipped_and_not_zeroed():
    model = module(factor_at={1: 1e30})

    memory, _, _ = changed(model, transforms=[gradwatch.ClipByGlobalNorm(0.05)])

    assert memory.snapshots[1].global_norm > 1e28
    assert memory.snapshots[1].clipped_norm == pytest.approx(0.05, rel=1e-3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_two_callbacks_of_one_name_are_refused():
    callbacks = [GradWatchCallback(sinks=[]), GradWatchCallback(sinks=[])]

    with pytest.raises(RuntimeError, match=r"state_key|stateful callback"):
        fit(module(), callback=callbacks[0], callbacks=callbacks[1:])


def test_an_exception_leaves_the_configured_rate():
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, *_batch):
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    def halve(snapshot, _alerts, run):
        if snapshot.step == 0:
            yield run.multiply_lr(0.5, reason="as planned")

    rates = []
    model = module(make=lambda p: rates.append(torch.optim.SGD(p, lr=0.1)) or rates[0])
    callback = callback_with(gradwatch.MemorySink(), reactions=[halve])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(model, callback=callback, callbacks=[Fails()])

    assert rates[0].param_groups[0]["lr"] == 0.1
    assert not rates[0]._optimizer_step_pre_hooks
