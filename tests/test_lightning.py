"""Real Trainers of both packages: each optimizer step once, unscaled, before the Trainer's clipping."""

from __future__ import annotations

import copy
import csv

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from loops import assert_close, norms_of, true_norm, watched
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from gradwatch import GradWatchCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own advice

PACKAGES = [pytorch_lightning, lightning.pytorch]
L = lightning.pytorch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def data(batches: int = 4, size: int = 16) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batches * size, 8, generator=generator)
    labels = torch.randint(0, 3, (batches * size,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=size)


def module(package=L, *, make=lambda p: torch.optim.SGD(p, lr=0.1), factor_at=None, base=None):
    """A LightningModule that notes the norm of the gradients before each optimizer step."""

    class Module(package.LightningModule if base is None else base):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.true: list[float] = []

        def training_step(self, batch, index):
            loss = functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss * (factor_at or {}).get(index, 1.0)

        def validation_step(self, batch, index):
            self.log("val", functional.cross_entropy(self.net(batch[0]), batch[1]))

        def on_before_optimizer_step(self, optimizer):
            self.true.append(true_norm(self.parameters()))

        def configure_optimizers(self):
            return make(self.parameters())

    return Module()


def fit(model, *, package=L, callback=None, batches=4, callbacks=None, ckpt_path=None, **options):
    memory = gradwatch.MemorySink()
    callback = GradWatchCallback(sinks=[memory]) if callback is None else callback
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = package.Trainer(callbacks=[callback, *(callbacks or [])], **(defaults | options))
    trainer.fit(model, data(batches), ckpt_path=ckpt_path)
    return trainer, memory


def amp(scale: float = 1024.0) -> list[MixedPrecision]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 0.01}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}]
)
def test_each_step_is_seen_once_and_before_the_trainers_clipping(package, clip):
    model = module(package)

    _, memory = fit(model, package=package, **clip)

    assert_close(norms_of(memory.snapshots), model.true)
    assert {s.source for s in memory.snapshots} == {"lightning"}
    assert all((s.clipped_norm is not None) == bool(clip) for s in memory.snapshots)


def test_the_clipped_norm_stands_beside_it():
    _, memory = fit(module(), gradient_clip_val=0.01)

    assert_close([s.clipped_norm for s in memory.snapshots], [0.01] * 4, rtol=1e-3)


def test_accumulation_counts_windows_and_shows_the_undivided_loss():
    model = module()

    _, memory = fit(model, batches=5, accumulate_grad_batches=2, max_epochs=2)

    assert [s.step for s in memory.snapshots] == list(range(6))
    assert [s.log_step for s in memory.snapshots] == list(range(6))
    assert_close(norms_of(memory.snapshots), model.true)
    assert all(0.8 < s.loss < 1.5 for s in memory.snapshots)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_every_precision_gives_one_record_a_step(precision):
    reference = module()
    fit(reference)

    _, memory = fit(module(), precision=precision)

    assert_close(norms_of(memory.snapshots), reference.true, rtol=0.1)


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_scaler_norms_are_unscaled_and_an_overflow_is_a_skipped_step(fused):
    reference = module(make=lambda p: torch.optim.Adam(p, lr=1e-3))
    fit(reference)
    model = module(make=lambda p: torch.optim.Adam(p, lr=1e-3, fused=fused), factor_at={1: float("inf")})

    _, memory = fit(model, plugins=amp())

    assert [s.skipped for s in memory.snapshots] == [False, True, False, False]
    assert [s.log_step for s in memory.snapshots] == [0, 1, 2, 3]
    assert_close([memory.snapshots[0].global_norm], [reference.true[0]], rtol=2e-2)
    assert memory.snapshots[0].loss_scale == 1024.0
    assert memory.snapshots[2].loss_scale == 512.0
    assert 0.8 < memory.snapshots[0].loss < 1.5
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_lbfgs_is_one_record_a_step_with_its_first_evaluation():
    model = module(make=lambda p: torch.optim.LBFGS(p, max_iter=3))

    _, memory = fit(model, batches=2)

    assert len(memory.snapshots) == 2
    assert_close([memory.snapshots[0].global_norm], [model.true[0]])


def test_a_training_step_that_returns_nothing_is_a_step_without_a_gradient():
    class Skips(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return None if index == 1 else functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    _, memory = fit(Skips())

    assert [s.global_norm is None for s in memory.snapshots] == [False, True, False, False]
    assert memory.snapshots[1].skipped
    assert memory.alerts == ()


class GAN(L.LightningModule):
    automatic_optimization = False

    def __init__(self, *, toggle=True, closure=False, raw=False, clip=False, overflow=False):
        super().__init__()
        self.g, self.d = nn.Linear(4, 8), network()
        self.how = {"toggle": toggle, "closure": closure, "raw": raw, "clip": clip, "overflow": overflow}
        self.true = []

    def training_step(self, batch, index):
        optimizers = self.optimizers(use_pl_optimizer=not self.how["raw"])
        for which, optimizer in zip("gd", optimizers, strict=True):
            net = self.g if which == "g" else self.d
            noise = torch.randn(16, 4)

            def compute(which=which, net=net, noise=noise, optimizer=optimizer):
                fake = self.g(noise)
                loss = self.d(fake if which == "g" else fake.detach()).square().mean()
                factor = float("inf") if self.how["overflow"] and which == "g" and index == 1 else 1.0
                optimizer.zero_grad()
                self.manual_backward(loss * factor)
                self.true.append(("opt0" if which == "g" else "opt1", true_norm(net.parameters())))
                if self.how["clip"]:
                    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
                return loss

            if self.how["toggle"]:
                self.toggle_optimizer(optimizer)
            if self.how["closure"]:
                optimizer.step(closure=compute)
            else:
                compute()
                optimizer.step()
            if self.how["toggle"]:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return torch.optim.SGD(self.g.parameters(), lr=0.1), torch.optim.Adam(self.d.parameters(), lr=1e-3)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"toggle": False},
        {"closure": True},
        {"raw": True, "toggle": False},
        {"clip": True},
        {"clip": True, "closure": True},
    ],
    ids=str,
)
def test_each_optimizer_of_a_gan_has_its_own_steps_and_parameters(how):
    model = GAN(**how)

    trainer, memory = fit(model)

    assert [s.optimizer for s in memory.snapshots] == [name for name, _ in model.true]
    latest = {f"gradwatch/{s.optimizer}/global_norm": s.global_norm for s in memory.snapshots}
    assert {name: float(trainer.callback_metrics[name]) for name in latest} == pytest.approx(latest, rel=1e-6)
    assert_close(norms_of(memory.snapshots), [norm for _, norm in model.true])
    assert all((s.clipped_norm is not None) == how.get("clip", False) for s in memory.snapshots)


def test_an_overflow_of_one_optimizer_leaves_the_other_alone():
    _, memory = fit(GAN(overflow=True), plugins=amp())

    steps = {name: [s.skipped for s in memory.snapshots if s.optimizer == name] for name in ("opt0", "opt1")}
    assert steps == {"opt0": [False, True, False, False], "opt1": [False] * 4}


@pytest.mark.parametrize("how", ["closure_then_step", "step_with_closure", "every_other", "raw"])
def test_overridden_optimizer_steps_are_counted_as_they_happen(how):
    class Own(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.updates = network(), 0

        def training_step(self, batch, index):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def optimizer_step(self, epoch, index, optimizer, closure):
            if how == "every_other" and index % 2:
                closure()
                return
            self.updates += 1
            if how == "closure_then_step":
                closure()
                optimizer.step()
            elif how == "raw":
                optimizer.optimizer.step(closure=closure)
            else:
                optimizer.step(closure=closure)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Own()

    _, memory = fit(model)

    assert len(memory.snapshots) == model.updates
    assert all(s.global_norm > 0 for s in memory.snapshots)


def test_statistics_are_those_of_a_plain_loop():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, plain = watched(model, optimizer)
    for inputs, labels in data():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        watch.log_loss(loss)
        loss.backward()
        optimizer.step()

    _, memory = fit(module())

    for ours, theirs in zip(memory.snapshots, plain.snapshots, strict=True):
        assert [name.removeprefix("net.") for name in ours.names] == list(theirs.names)
        assert ours.tensors.order_source == "autograd"
        for column in ("norm", "max_abs", "mean", "std", "weight_norm", "update_ratio", "lost"):
            np.testing.assert_allclose(getattr(ours, column), getattr(theirs, column), rtol=1e-5, err_msg=column)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)


@pytest.mark.parametrize("weights_only", [None, True])
def test_a_fit_that_resumes_goes_on_without_a_gap(tmp_path, weights_only):
    checkpoint = L.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(module(), callbacks=[checkpoint], enable_checkpointing=True, max_epochs=2)
    (path,) = tmp_path.glob("*step=3.ckpt")

    stored = torch.load(path, weights_only=True)["callbacks"]["GradWatchCallback/gradwatch"]
    _, memory = fit(module(), ckpt_path=path, max_epochs=2)

    assert stored["lanes"][""]["step"] == 3
    assert [s.step for s in memory.snapshots] == [3, 4, 5, 6, 7]
    assert [s.log_step for s in memory.snapshots] == [3, 4, 5, 6, 7]
    assert memory.alerts == ()
    del weights_only


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_outside_training_nothing_happens(what):
    memory = gradwatch.MemorySink()

    class Evaluates(type(module())):
        def test_step(self, batch, index):
            self.validation_step(batch, index)

        def predict_step(self, batch, index):
            return self.net(batch[0])

    trainer = L.Trainer(
        callbacks=[GradWatchCallback(sinks=[memory])], logger=False, accelerator="cpu", enable_progress_bar=False
    )
    getattr(trainer, what)(Evaluates(), data())

    assert len(memory.snapshots) == 0


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}])
def test_trial_runs_write_no_file(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = options | {"logger": None} if "barebones" in options else options

    trainer = L.Trainer(
        callbacks=[GradWatchCallback()],
        accelerator="cpu",
        max_epochs=1,
        **{name: value for name, value in options.items() if value is not None},
    )
    trainer.fit(module(), data())

    assert list(tmp_path.rglob("events*")) == []


def test_the_learning_rate_finders_steps_are_not_the_runs(tmp_path):
    memory = gradwatch.MemorySink()
    callback = GradWatchCallback(sinks=[memory])
    finder = L.callbacks.LearningRateFinder(num_training_steps=5)
    model = module()
    model.lr = 0.1

    fit(
        model,
        callback=callback,
        callbacks=[finder],
        batches=6,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )

    assert len(memory.snapshots) == 6


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_takes_every_hook_off(error):
    memory = gradwatch.MemorySink()

    class Breaks(type(module())):
        def training_step(self, batch, index):
            if index == 2:
                raise error
            return super().training_step(batch, index)

    model = Breaks()
    with pytest.raises((error, SystemExit)):
        fit(model, callback=GradWatchCallback(sinks=[memory]))

    assert len(memory.snapshots) == 2
    optimizer = model.optimizers().optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_the_same_callback_serves_a_second_fit():
    memory = gradwatch.MemorySink()
    callback = GradWatchCallback(sinks=[memory])
    first = module()

    fit(first, callback=callback)
    fit(module(), callback=callback)

    assert [s.step for s in memory.snapshots] == [0, 1, 2, 3] * 2
    assert not first.optimizers().optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_the_callback_may_be_passed_bare_to_either_trainer(package):
    memory = gradwatch.MemorySink()
    trainer = package.Trainer(
        callbacks=GradWatchCallback(sinks=[memory]),
        max_epochs=1,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
    )

    trainer.fit(module(package), data())

    assert len(memory.snapshots) == 4


def tensorboard_points(folder, tag):
    files = sorted(folder.rglob("events.out.tfevents.*"))
    assert len(files) == 1
    return [
        event.step
        for event in EventFileLoader(str(files[0])).Load()
        for value in event.summary.value
        if value.tag == tag
    ]


def test_tensorboard_and_csv_loggers_get_our_curves_under_the_users(tmp_path):
    loggers = [L.loggers.TensorBoardLogger(tmp_path / "tb"), L.loggers.CSVLogger(tmp_path / "csv")]

    fit(module(), callback=GradWatchCallback(), batches=9, logger=loggers, log_every_n_steps=3)

    assert tensorboard_points(tmp_path / "tb", "gradwatch/global_norm") == [2, 5, 8]
    assert tensorboard_points(tmp_path / "tb", "loss") == [2, 5, 8]
    (path,) = (tmp_path / "csv").rglob("metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["gradwatch/global_norm"]]
    assert [int(row["step"]) for row in rows] == [2, 5, 8]


def test_a_logger_with_log_metrics_alone_is_enough():
    class Plain(L.loggers.logger.Logger):
        name, version = "plain", 0

        def __init__(self):
            super().__init__()
            self.seen = []

        def log_metrics(self, metrics, step=None):
            self.seen.append((step, metrics))

        def log_hyperparams(self, *_arguments):
            pass

    logger = Plain()

    fit(module(), callback=GradWatchCallback(), logger=logger, log_every_n_steps=2)

    ours = [(step, set(metrics)) for step, metrics in logger.seen if "gradwatch/global_norm" in metrics]
    assert [step for step, _ in ours] == [1, 3]
    assert len({frozenset(names) for _, names in ours}) == 1


def test_what_early_stopping_can_monitor_is_in_the_callback_metrics():
    trainer, memory = fit(module())

    assert float(trainer.callback_metrics["gradwatch/global_norm"]) == pytest.approx(
        memory.snapshots[-1].global_norm, rel=1e-6
    )
    assert float(trainer.callback_metrics["gradwatch/open_alerts"]) == 0


def test_without_a_logger_it_still_alerts(capsys):
    callback = GradWatchCallback()

    fit(module(make=lambda p: torch.optim.Adam(p, lr=3.0)), callback=callback, batches=20)

    assert [alert.kind for alert in callback.alerts] == ["exploding"]
    assert "exploding" in capsys.readouterr().err


def test_a_weight_averaging_callback_carries_no_live_hook():
    averaging = L.callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)

    _, memory = fit(module(), callbacks=[averaging], max_epochs=3)

    assert len(memory.snapshots) == 12
    copy.deepcopy(averaging._average_model)


def test_compiled_modules_are_seen_like_eager_ones():
    class Quiet(L.LightningModule):  # Lightning's own `log` does not compile
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    reference = module()
    fit(reference)
    torch._dynamo.reset()

    _, memory = fit(torch.compile(Quiet(), backend="aot_eager"))

    assert_close(norms_of(memory.snapshots), reference.true, rtol=1e-4)


def test_weights_with_and_without_the_callback_are_bit_identical():
    def weights(callbacks):
        model = module(make=lambda p: torch.optim.AdamW(p, lr=1e-2))
        L.Trainer(
            callbacks=callbacks,
            max_epochs=3,
            logger=False,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            gradient_clip_val=0.1,
        ).fit(model, data())
        return list(model.parameters())

    with_it, without = weights([GradWatchCallback(sinks=[])]), weights([])

    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


def test_a_state_of_other_optimizers_begins_afresh(caplog):
    callback = GradWatchCallback(sinks=[])
    callback.load_state_dict({"version": 1, "lanes": {"opt7": {}}})

    fit(module(), callback=callback)

    assert "begins afresh" in caplog.text
    assert callback.watch.lanes[""].step == 4
