"""The Lightning callback: every optimizer step of a Trainer, unscaled and before the Trainer's own clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.api import prepare
from gradwatch.attach import optimizer as optimizer_hooks
from gradwatch.attach.cleared import ClearedCheck
from gradwatch.attach.forward import ForwardHooks
from gradwatch.depth import walk
from gradwatch.detectors import DEFAULT_DETECTORS
from gradwatch.errors import ConfigurationError, Part, contain, logger
from gradwatch.integrations.loggers import Borrowed, LoggerSink
from gradwatch.lane import Lane
from gradwatch.pipeline import GradWatch
from gradwatch.reactions import Reaction
from gradwatch.records import Alert, Sink
from gradwatch.sinks import ConsoleSink
from gradwatch.targets import Pattern, Target
from gradwatch.transforms import Transform


class _Core:
    """What the callback does, whichever package its Trainer comes from."""

    def __init__(  # noqa: PLR0913 - the keywords of `gradwatch.watch`
        self,
        *,
        name: str = "gradwatch",
        include: Pattern = "*",
        exclude: Pattern = (),
        detectors: Iterable[object] = DEFAULT_DETECTORS,
        mute: Iterable[tuple[str, str]] = (),
        transforms: Iterable[Transform] = (),
        reactions: Iterable[Reaction] = (),
        sinks: Iterable[Sink] | None = None,
        probe: bool | None = None,
    ) -> None:
        self.name = name
        self.watch: GradWatch | None = None
        self._options: dict[str, Any] = {
            "include": include,
            "exclude": exclude,
            "detectors": tuple(detectors),
            "mute": tuple(mute),
            "transforms": tuple(transforms),
            "reactions": tuple(reactions),
        }
        self._probe = probe
        self._sinks = None if sinks is None else tuple(sinks)
        self._saved: Mapping[str, Any] | None = None
        self._target: Target | None = None
        self._ordered = False
        self._part = Part("reading the order of the layers")
        self._loud = -1

    @property
    def state_key(self) -> str:
        """Name of the callback's state in a checkpoint: two callbacks need two names."""
        return f"GradWatchCallback/{self.name}"

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """All alerts of this fit, resolved ones too, in order of opening."""
        return () if self.watch is None else self.watch.alerts

    # -- life cycle: everything that replaces parameters or runs trial steps has happened before `on_train_start` -----

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers that the strategy made."""
        self._end()
        if self._options["transforms"]:
            _refuse_strategies(trainer)
        raw = [optimizer_hooks.unwrap(optimizer) for optimizer in trainer.optimizers]
        several = len(raw) > 1
        optimizers = {f"opt{index}" if several else "": optimizer for index, optimizer in enumerate(raw)}
        if not optimizers:
            return
        self.watch, self._target = prepare(
            pl_module, optimizers, sinks=self._default_sinks(trainer), shared=True, **self._options
        )
        self._ordered, self._loud = False, -1
        for lane in self.watch.lanes.values():
            lane.next_log_step = lambda: _log_step(trainer)
            lane.log_every = max(int(trainer.log_every_n_steps), 1)
            lane.log_first = lane.log_every - 1
        # A training step may call the module's parts and not the module.
        ForwardHooks(self.watch, self._target, "", probe=self._probe, parts=True).attach()
        for lane in self.watch.lanes.values():
            ClearedCheck(self.watch, lane).attach()
        # Under manual optimization the gradients exist before the step, also where Lightning wraps it in a closure.
        optimizer_hooks.attach_all(self.watch, keeps_pending=not pl_module.automatic_optimization)
        if self._saved is not None:
            self._restore(self._saved)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take every hook off and bring everything to the disk."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Do the same for runs that ended early."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Do the same after an exception or Ctrl-C, when nothing else is called."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {} if self.watch is None else self.watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts: the optimizers do not exist yet."""
        self._saved = state_dict

    # -- every step --------------------------------------------------------------------------------------------------

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: object) -> None:
        """Take the loss, undivided and unscaled; the first one shows the order of the layers."""
        if self.watch is None or not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        if not self._ordered and not self._part.failed:
            self._ordered = True
            with contain(self._part):
                self._order_by(loss)
        windows = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        scale = _scale(trainer)
        undivided = loss.detach() * windows
        self.watch.log_loss(undivided if scale is None else undivided / scale)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Observe before the user's own clipping; with automatic optimization a later hook does."""
        if self.watch is None or pl_module.automatic_optimization or _scale(trainer) is not None:
            return
        for lane in self.watch.lanes.values():
            if not (lane.pending and lane.pending.sealed):
                self.watch.act(lane, lambda lane: lane.observe("backward"))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Observe: complete, unscaled (a fused optimizer's are divided) and before the Trainer's clipping."""
        lane = self._lane_of(optimizer)
        if self.watch is None or lane is None:
            return
        pending = lane.pending
        if pending is not None and (pending.sealed or pending.source == "backward"):
            return  # a later evaluation of L-BFGS; or seen earlier, before the user clipped
        scale = _scale(trainer)
        fused = bool(getattr(lane.optimizer, "_step_supports_amp_scaling", False))
        self.watch.act(
            lane,
            lambda lane: lane.observe("lightning", divisor=scale if fused else None, loss_scale=scale),
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_batch: Any) -> None:
        """Count a step that the scaler skipped, and offer what EarlyStopping and ModelCheckpoint can monitor."""
        if self.watch is None:
            return
        for lane in self.watch.lanes.values():
            if lane.pending is not None and lane.pending.source == "lightning":
                self.watch.act(lane, lambda lane: lane.skip())
        if self.watch.should_stop:
            trainer.should_stop = True
        loud = sum(alert.resolved is None and alert.severity != "info" for alert in self.watch.alerts)
        if loud == self._loud and not (trainer.is_last_batch or _is_logged(trainer)):
            return  # what Lightning does for a logged value costs more than measuring a small network
        self._loud = loud
        values = {"gradwatch/open_alerts": float(loud)}
        for name in self.watch.lanes:
            snapshot = self.watch.latest_of(name)
            if snapshot is not None and snapshot.global_norm is not None:
                values[f"gradwatch/{name}/global_norm" if name else "gradwatch/global_norm"] = snapshot.global_norm
        pl_module.log_dict(values, logger=False, batch_size=1)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _default_sinks(self, trainer: Any) -> list[Sink]:
        if self._sinks is not None:
            return [Borrowed(sink) for sink in self._sinks]
        console: list[Sink] = [ConsoleSink()] if trainer.is_global_zero else []
        return [*console, LoggerSink(trainer.loggers, trainer.log_every_n_steps)]

    def _order_by(self, loss: Tensor) -> None:
        if self._target is None:
            return
        layers = {id(entry.parameter): entry.layer for entry in self._target.scan()}
        depth = walk([loss], layers)
        if depth is not None:
            self._target.set_depth("", depth)

    def _lane_of(self, optimizer: object) -> Lane | None:
        lanes = () if self.watch is None else self.watch.lanes.values()
        raw = optimizer_hooks.unwrap(optimizer)
        return next((lane for lane in lanes if lane.optimizer is raw), None)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one of other optimizers is no reason to stop the run."""
        self._saved = None
        try:
            if state and self.watch is not None:
                self.watch.load_state_dict(state)
        except ConfigurationError as error:
            logger.warning("gradwatch begins afresh: %s", error)

    def _end(self) -> None:
        if self.watch is not None:
            self.watch.close()


def _scale(trainer: Any) -> Tensor | None:
    """Return a copy of the loss scale, without waiting for it; None without a scaler that is at work."""
    scaler = getattr(trainer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    scale = scaler._get_scale_async()  # noqa: SLF001 - `get_scale` waits for the device
    return scale.clone() if isinstance(scale, Tensor) else None


def _refuse_strategies(trainer: Any) -> None:
    """Raise where a change of the gradients would silently be none.

    Raises:
        ConfigurationError: the strategy shards parameters or steps by itself.
    """
    strategy = type(trainer.strategy).__name__
    if strategy in ("DeepSpeedStrategy", "FSDPStrategy"):
        instead = {
            "DeepSpeedStrategy": "set gradient_clipping in the DeepSpeed configuration",
            "FSDPStrategy": "use FSDP2 (ModelParallelStrategy), or clip with gradient_clip_algorithm='value'",
        }[strategy]
        raise ConfigurationError(
            f"{strategy} keeps the whole gradients to itself: transforms would clip by a part of the norm, or not at "
            f"all; {instead}, and watch without transforms"
        )


def _is_logged(trainer: Any) -> bool:
    """Whether Lightning's own logging writes this step."""
    return bool((_log_step(trainer) + 1) % max(int(trainer.log_every_n_steps), 1) == 0)


def _log_step(trainer: Any) -> int:
    """Return the step axis of Lightning's own logging, under which the user's losses lie."""
    loop = trainer.fit_loop.epoch_loop
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def _bases() -> tuple[type, ...]:
    """Return the Callback class of each of the two Lightning packages that is installed."""
    found = []
    for package in ("pytorch_lightning", "lightning.pytorch"):
        try:
            found.append(import_module(package).Callback)
        except ImportError:
            continue
    if not found:
        raise ConfigurationError("GradWatchCallback needs Lightning; install gradwatch[lightning]")
    return tuple(found)


class GradWatchCallback(_Core, *_bases()):  # type: ignore[misc]  # known when it is imported
    """Watches every optimizer step of a Lightning Trainer: ``Trainer(callbacks=[GradWatchCallback()])``.

    Works with `pytorch_lightning` and `lightning.pytorch`, whichever the Trainer comes from. Put it first in the list.

    Args:
        name: tells two callbacks of one Trainer apart in a checkpoint.
        include: which tensors to watch, as in `gradwatch.watch`.
        exclude: which of those not to watch.
        detectors: as in `gradwatch.watch`.
        mute: as in `gradwatch.watch`.
        transforms: as in `gradwatch.watch`; they come after the Trainer's own clipping, so that the smaller norm wins.
        reactions: as in `gradwatch.watch`.
        sinks: where to write, in place of the console and the Trainer's loggers.
        probe: as in `gradwatch.watch`.
    """
