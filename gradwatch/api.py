"""`watch`: checks the arguments, builds the parts, attaches them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import LBFGS, Optimizer

from gradwatch.attach import optimizer as optimizer_hooks
from gradwatch.attach.backward import EndOfBackward
from gradwatch.attach.cleared import ClearedCheck
from gradwatch.attach.forward import ForwardHooks
from gradwatch.attach.graph import FirstOutput
from gradwatch.attach.scaler import ScalerHooks, find_on_stack
from gradwatch.detectors import DEFAULT_DETECTORS, build
from gradwatch.errors import ConfigurationError, logger
from gradwatch.lane import Lane
from gradwatch.measure.plan import Backend, check
from gradwatch.pipeline import GradWatch
from gradwatch.reactions import Reaction, check_kinds
from gradwatch.records import KINDS, Sink
from gradwatch.sinks import ConsoleSink, JSONLSink, TensorBoardSink
from gradwatch.targets import Entry, Pattern, Target
from gradwatch.transforms import Transform

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def watch(  # noqa: PLR0913 - each is one independent choice
    model: nn.Module | Mapping[str, nn.Module],
    optimizer: Optimizer | Mapping[str, Optimizer] | None,
    *,
    log_dir: str | os.PathLike[str] | SummaryWriter | None = None,
    scaler: GradScaler | None = None,
    include: Pattern = "*",
    exclude: Pattern = (),
    detectors: Iterable[object] = DEFAULT_DETECTORS,
    mute: Iterable[tuple[str, str]] = (),
    transforms: Iterable[Transform] = (),
    reactions: Iterable[Reaction] = (),
    sinks: Iterable[Sink] | None = None,
    probe: bool | None = None,
    log_every: int = 10,
    start_step: int = 0,
    backend: Backend | None = None,
) -> GradWatch:
    """Measure, judge and log every step that `optimizer` makes on the parameters of `model`.

    Nothing else changes in the training loop, and nothing in the training: the gradients are read where they are.

    Args:
        model: the module, or several by name; the names then begin the tensors' names (``g.conv.weight``).
        optimizer: the optimizer, or several by name: each has its own steps, norms and alerts. None for a loop that
            updates the parameters itself and calls `GradWatch.step`.
        log_dir: folder for TensorBoard and ``gradwatch.jsonl``, or a ``SummaryWriter`` of torch or tensorboardX.
            Without it only the console speaks.
        scaler: the ``torch.amp.GradScaler``, if there is one; steps that it skips are then seen.
        include: which tensors to watch: glob patterns over their names, or a function of name and parameter.
        exclude: which of those not to watch.
        detectors: functions ``(snapshot, history)`` that yield `Evidence`, or classes of such, made once an optimizer.
        mute: known alerts, as pairs of kind and glob over tensor names: they stay at severity ``"info"``.
        transforms: what is done to the gradients before each update, in this order, such as `ClipByGlobalNorm`. Only
            watched tensors are changed.
        reactions: what may happen to training after a judged step, such as ``on("exploding", BackOffLR())``.
        sinks: where to write, in place of TensorBoard, JSONL and the console.
        probe: whether to read the forward pass at a few steps (the first three, two in every fifty, and while evidence
            is open), which finds saturated activations and tells causes apart. None: yes, except on compiled models;
            True: there too, those steps then run uncompiled.
        log_every: TensorBoard and JSONL get every n-th step, and each step with news of an alert.
        start_step: number of the first step.
        backend: how to measure: None chooses by device.

    Returns:
        The watch. It lives as long as the optimizer; `GradWatch.close` (or ``with``) ends it.

    Raises:
        ConfigurationError: something that cannot work was passed; says what, and what to write instead.
    """
    _check_numbers(log_every, start_step)
    _check_scaler(scaler)
    built, target = prepare(
        model,
        optimizer,
        sinks=lambda: _sinks(sinks, log_dir, log_every),
        include=include,
        exclude=exclude,
        detectors=detectors,
        mute=mute,
        transforms=transforms,
        reactions=reactions,
        start_step=start_step,
        backend=backend,
    )
    for lane in built.lanes.values():
        lane.log_every = log_every
    _attach(built, target, scaler, probe)
    return built


def prepare(  # noqa: PLR0913 - the arguments of `watch`
    model: object,
    optimizer: object,
    *,
    sinks: Callable[[], Iterable[Sink]] | Iterable[Sink],
    include: Pattern = "*",
    exclude: Pattern = (),
    detectors: Iterable[object] = DEFAULT_DETECTORS,
    mute: Iterable[object] = (),
    transforms: Iterable[object] = (),
    reactions: Iterable[object] = (),
    start_step: int = 0,
    backend: Backend | None = None,
    shared: bool = False,
) -> tuple[GradWatch, Target]:
    """Check the arguments and build a watch with nothing attached; `sinks` may be made last, when all else is right.

    `shared` allows a second watch on an optimizer that has one.

    Raises:
        ConfigurationError: something that cannot work was passed.
    """
    target = Target(_models(model), include, exclude)
    entries = _watched(target)
    check((entry.parameter for entry in entries), backend)
    optimizers = _optimizers(optimizer, shared=shared)
    detectors = tuple(detectors)
    build(detectors)  # refuses what cannot work before any file is made
    kinds = [*KINDS, *(kind for detector in detectors for kind in getattr(detector, "kinds", ()))]
    lanes = _lanes(target, entries, optimizers, start_step, backend)
    checked = _checked_mutes(mute, kinds)
    changes = _checked_transforms(transforms, optimizers.values())
    answers = _checked_reactions(reactions, kinds)
    made = sinks() if callable(sinks) else sinks
    built = GradWatch(lanes, made, detectors=detectors, mute=checked, transforms=changes, reactions=answers)
    return built, target


def _attach(built: GradWatch, target: Target, scaler: GradScaler | None, probe: bool | None) -> None:  # noqa: FBT001
    """Hang every hook; `GradWatch.detach` takes them off in reverse order."""
    for key in target.models:
        FirstOutput(built, target, key).attach()
        ForwardHooks(built, target, key, probe=probe).attach()
    for lane in built.lanes.values():
        ClearedCheck(built, lane).attach()
    backward = EndOfBackward(built)
    scaled = scaler is not None and scaler.is_enabled()
    if scaled and scaler is not None:
        ScalerHooks(built, scaler).attach()
    else:
        backward.attach()

    def adopt_forgotten_scaler() -> None:
        found = None if scaled else find_on_stack()
        if found is None or not backward.enabled:
            return
        backward.remove()
        for lane in built.lanes.values():
            lane.discard()
        ScalerHooks(built, found).attach()
        logger.warning("A GradScaler steps the watched optimizer: it was adopted. Write watch(..., scaler=scaler).")

    optimizer_hooks.attach_all(built, adopt_forgotten_scaler)


def _models(model: object) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleDict):
        return {"": model}
    if isinstance(model, nn.ModuleDict):
        return {"": model}
    if isinstance(model, Mapping) and model and all(isinstance(value, nn.Module) for value in model.values()):
        return {str(key): value for key, value in model.items()}
    raise ConfigurationError(
        f"watch() needs a torch.nn.Module or a mapping of names to modules, got {_describe(model)}"
    )


def _optimizers(optimizer: object, *, shared: bool) -> dict[str, Optimizer | None]:
    if optimizer is None:
        return {"": None}
    given = dict(optimizer) if isinstance(optimizer, Mapping) else {"": optimizer}
    unwrapped: dict[str, Optimizer | None] = {}
    for name, value in given.items():
        inner = optimizer_hooks.unwrap(value)
        if inner is None:
            raise ConfigurationError(
                f"watch() needs a torch.optim.Optimizer, or a mapping of names to optimizers, got {_describe(value)}"
                "; for an optimizer without torch's step hooks pass None and call watch.step() after each update"
            )
        if not shared and optimizer_hooks.watched_by(inner) is not None:
            raise ConfigurationError(
                f"this {type(inner).__name__} is watched already; call close() on the watch it has, or use that one"
            )
        unwrapped[str(name)] = inner
    if not unwrapped:
        raise ConfigurationError("watch() got an empty mapping of optimizers; pass at least one, such as {'g': opt_g}")
    return unwrapped


def _watched(target: Target) -> list[Entry]:
    entries = target.scan()
    lazy = any(isinstance(p, nn.UninitializedParameter) for model in target.models.values() for p in model.parameters())
    if not entries and not lazy:
        names = [entry.name for entry in Target(target.models).scan()]
        if not names:
            raise ConfigurationError("the model has no parameters; watch() needs a model that is trained")
        raise ConfigurationError(
            f"include and exclude leave no parameter to watch; the model has {', '.join(names[:3])}, ..."
        )
    if not lazy and not any(entry.parameter.requires_grad for entry in entries):
        raise ConfigurationError(
            "no watched parameter is trainable (requires_grad is False for all); unfreeze some before watch()"
        )
    for entry in entries:
        if hasattr(entry.parameter, "full_tensor"):
            raise ConfigurationError(
                f"{entry.name} is sharded (a DTensor); sharded parameters cannot be watched yet: watch an unsharded run"
            )
    return entries


def _lanes(
    target: Target,
    entries: Iterable[Entry],
    optimizers: Mapping[str, Optimizer | None],
    start_step: int,
    backend: Backend | None,
) -> list[Lane]:
    """One lane an optimizer; each model's orphans go to the optimizer that has most of its parameters."""
    entries = list(entries)
    owned = {
        name: {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else None
        for name, optimizer in optimizers.items()
    }
    for name, ids in owned.items():
        if ids is not None and entries and not any(id(entry.parameter) in ids for entry in entries):
            label = f"the optimizer {name!r}" if name else "the optimizer"
            raise ConfigurationError(
                f"watch() needs the optimizer that steps these parameters; {label} holds {len(ids)} others. "
                "Was the model replaced, or converted, after the optimizer was made?"
            )
    homes: dict[str, set[str]] = {name: set() for name in optimizers}
    for key in target.models:
        mine = [id(entry.parameter) for entry in entries if entry.model == key]
        shares = {name: sum(i in ids for i in mine) for name, ids in owned.items() if ids is not None}
        if shares:
            homes[max(shares, key=lambda name: shares[name])].add(key)
    return [
        Lane(name, optimizer, target, step=start_step, orphans_of=frozenset(homes[name]), backend=backend)
        for name, optimizer in optimizers.items()
    ]


def _sinks(
    sinks: Iterable[Sink] | None, log_dir: str | os.PathLike[str] | SummaryWriter | None, log_every: int
) -> list[Sink]:
    if sinks is not None:
        if log_dir is not None:
            raise ConfigurationError(
                "watch() got log_dir and sinks; sinks replace the writers that log_dir stands for: "
                "add TensorBoardSink(log_dir) to them, or leave sinks out"
            )
        return list(sinks)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return []  # rank 0 writes for all
    built: list[Sink] = [ConsoleSink()]
    if log_dir is not None:
        built.append(TensorBoardSink(log_dir, log_every=log_every))
        if isinstance(log_dir, str | os.PathLike):
            built.append(JSONLSink(os.path.join(log_dir, "gradwatch.jsonl"), log_every=log_every))  # noqa: PTH118
    return built


def _check_numbers(log_every: object, start_step: object) -> None:
    if not isinstance(log_every, int) or log_every < 1:
        raise ConfigurationError(f"log_every must be a whole number of at least 1, got {log_every!r}")
    if not isinstance(start_step, int) or start_step < 0:
        raise ConfigurationError(f"start_step must be a whole number of at least 0, got {start_step!r}")


def _check_scaler(scaler: object) -> None:
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise ConfigurationError(f"scaler must be a torch.amp.GradScaler or None, got {_describe(scaler)}")


def _checked_mutes(mute: Iterable[object], kinds: Collection[str]) -> list[tuple[str, str]]:
    checked: list[tuple[str, str]] = []
    for entry in mute:
        if not (isinstance(entry, tuple) and len(entry) == 2):
            raise ConfigurationError(f"mute takes pairs such as ('dead', 'head.*'), got {entry!r}")
        if entry[0] not in kinds:
            raise ConfigurationError(f"{entry[0]!r} is no kind of alert; mute one of {', '.join(kinds)}")
        checked.append(entry)
    return checked


def _checked_transforms(transforms: Iterable[object], optimizers: Iterable[Optimizer | None]) -> tuple[Transform, ...]:
    checked = []
    for transform in transforms:
        if isinstance(transform, type) or not callable(transform):
            raise ConfigurationError(f"a transform is an instance, such as ClipByGlobalNorm(1.0), got {transform!r}")
        checked.append(cast("Transform", transform))
    for optimizer in optimizers:
        if checked and optimizer is None:
            raise ConfigurationError("transforms need an optimizer: without one no hook tells when to change gradients")
        skips = any(hasattr(transform, "max_consecutive") for transform in checked)
        if skips and isinstance(optimizer, LBFGS):
            raise ConfigurationError(
                "a step of L-BFGS cannot be skipped: it evaluates its closure many times and remembers each; "
                "use a clipping transform, or another optimizer"
            )
    return tuple(checked)


def _checked_reactions(reactions: Iterable[object], kinds: Collection[str]) -> tuple[Reaction, ...]:
    checked = []
    for reaction in reactions:
        if isinstance(reaction, type) or not callable(reaction):
            raise ConfigurationError(f"a reaction is an instance, such as BackOffLR(), got {reaction!r}")
        checked.append(cast("Reaction", reaction))
    check_kinds(checked, kinds)
    return tuple(checked)


def _describe(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
