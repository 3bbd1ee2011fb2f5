"""Hooks on the forward pass: one reading of the batch at every step, and the probe where it is due."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradwatch.attach.graph import is_compiled, tensors_in
from gradwatch.attach.weak import WeakHook
from gradwatch.errors import Part, contain
from gradwatch.lane import Lane, Taken
from gradwatch.pipeline import GradWatch
from gradwatch.probe.operations import wide
from gradwatch.probe.recorder import Recorder
from gradwatch.targets import Target, canonical_modules


class ForwardHooks:
    """Reads the training forward passes of one model: the first of a step with the probe, all of them for the batch.

    Two hooks on the root module stay; those on every module are there while a probed pass runs and not otherwise.
    A model whose parts are called one by one, without its root, gets the two on each of its children as well: `parts`
    says so from the start.
    """

    def __init__(self, watch: GradWatch, target: Target, key: str, *, probe: bool | None, parts: bool = False) -> None:
        self._watch = watch
        self._target = target
        self._model = target.models[key]
        self._compiled = is_compiled(self._model)
        self._probe = (not self._compiled) if probe is None else probe
        self._lanes = _lanes_of(watch, key)
        self._part = Part("reading the forward pass")
        several = len(target.models) > 1 or "" not in target.models
        self._prefix = (key,) if several else ()
        self._name_of_root = ".".join(self._prefix)
        self._read: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._inner: list[RemovableHandle] = []
        self._outermost: nn.Module | None = None
        self._ever_entered = False
        self._ever_trained = False
        self._parts = parts
        self._recorder: Recorder | None = None
        self._recording = False
        self._stance: AbstractContextManager[None] | None = None
        self._input: dict[str, Tensor] = {}

    def attach(self) -> None:
        """Hook the root module and offer the readings to the lane of this model."""
        for lane in self._lanes:
            lane.readers.append(self)
        self._hang([self._model, *(self._model.children() if self._parts else ())])
        self._watch.on_detach(self.remove)

    def remove(self) -> None:
        """Take everything off."""
        self._stop_recording()
        for lane in self._lanes:
            if self in lane.readers:
                lane.readers.remove(self)
        while self._handles:
            self._handles.pop().remove()

    def take(self, lane: Lane) -> Taken | None:
        """Hand over what was read since the step before."""
        if lane is not self._lanes[0]:
            return None
        if not self._ever_entered and not self._parts:
            self._parts = True
            self._hang(list(self._model.children()))
        recorder, self._recorder = self._recorder, None
        numbers, probed = (None, None) if recorder is None else recorder.finish()
        taken, self._input = self._input, {}
        return Taken(taken, numbers, probed)

    # -- the life of one forward pass ----------------------------------------------------------------------------

    def entered(self, module: nn.Module, arguments: tuple[object, ...], keywords: Mapping[str, object]) -> None:
        """The outermost watched module begins."""
        if torch.compiler.is_compiling() or self._outermost is not None or self._part.failed:
            return
        if _is_no_ordinary_pass() or any(lane.is_capturing() for lane in self._lanes):
            return
        if not self._watch.active or not torch.is_grad_enabled() or (self._ever_trained and not module.training):
            return  # validation, or a look without gradients; a model left in evaluation mode is seen all the same
        self._ever_trained |= module.training
        with contain(self._part):
            self.begin(module, (arguments, keywords))

    def left(self, module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        """The outermost watched module has ended, also by an exception."""
        if torch.compiler.is_compiling() or module is not self._outermost:
            return
        if self._recording and module is self._model:  # no inner hook is on the root
            self._read_recurrent(self._name_of_root, module, arguments, output)
        self.end()

    def begin(self, module: nn.Module, inputs: object) -> None:
        """Read the batch, and start the probe if it is due."""
        self._outermost, self._ever_entered = module, True
        self._read_input(inputs)
        if self._probe and self._lanes[0].probe_due() and self._is_new(module):
            self._start_recording(module)

    def end(self) -> None:
        """Stop the probe; its gradients are still to come."""
        self._outermost = None
        self._stop_recording()

    def _read_input(self, inputs: object) -> None:
        first = next((tensor for tensor in tensors_in(inputs) if tensor.is_floating_point()), None)
        if first is None or not first.numel() or type(first) not in (Tensor, nn.Parameter):
            return  # a subclass, such as a sharded or a fake tensor, has rules of its own
        with torch.no_grad():
            flat = first.detach()
            read = {
                "input_max": torch.linalg.vector_norm(flat, float("inf"), dtype=wide(flat)).float(),
                "input_rms": torch.linalg.vector_norm(flat, dtype=wide(flat)).float() / flat.numel() ** 0.5,
            }
            for name, value in read.items():
                before = self._input.get(name)
                self._input[name] = value if before is None else torch.maximum(before, value.to(before.device))

    # -- the probe -------------------------------------------------------------------------------------------------

    def _is_new(self, module: nn.Module) -> bool:
        """Only the first pass of a step is read; where parts are called one by one, the first pass of each."""
        return self._recorder is None or (module is not self._model and module not in self._read)

    def _start_recording(self, module: nn.Module) -> None:
        if self._compiled:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        if self._recorder is None:
            self._recorder, self._read = Recorder(), []
        self._read.append(module)
        self._recording = True
        for name, inner in canonical_modules(self._model, self._prefix):
            if inner is module:  # its own begin is over
                self._recorder.path = [name]
                self._recorder.ran[name] = None
            if inner is self._model:
                continue
            self._inner.append(inner.register_forward_pre_hook(cast("Any", WeakHook(self.module_begins, name))))
            ends = cast("Any", WeakHook(self.module_ends, name))
            self._inner.append(inner.register_forward_hook(ends, always_call=True))
        cast("AbstractContextManager[Recorder]", self._recorder).__enter__()

    def _stop_recording(self) -> None:
        while self._inner:
            self._inner.pop().remove()
        if self._recording and self._recorder is not None:
            self._recording = False
            cast("AbstractContextManager[Recorder]", self._recorder).__exit__(None, None, None)
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def module_begins(self, name: str, _module: nn.Module, _arguments: object) -> None:
        """Operations from here on belong to this module."""
        if self._recorder is not None and self._recording:
            self._recorder.path.append(name)
            self._recorder.ran[name] = None

    def module_ends(self, name: str, module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        """They belong to the module around it again."""
        recorder = self._recorder
        if recorder is None or not self._recording:
            return
        if len(recorder.path) > 1:
            recorder.path.pop()
        self._read_recurrent(name, module, arguments, output)

    def _read_recurrent(self, name: str, module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        recorder = self._recorder
        if isinstance(module, nn.RNNBase) and output is not None and recorder is not None and not self._part.failed:
            with contain(self._part), torch._C.DisableTorchFunction():  # noqa: SLF001 - our own calls are not the model's
                recorder.read_recurrent(name, module, arguments, output)

    def _hang(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            enters = cast("Any", WeakHook(self.entered))
            self._handles.append(module.register_forward_pre_hook(enters, with_kwargs=True, prepend=True))
            leaves = cast("Any", WeakHook(self.left))
            self._handles.append(module.register_forward_hook(leaves, always_call=True))


def _is_no_ordinary_pass() -> bool:
    """Whether the tensors stand for something else: tracing, or a transform of `torch.func`."""
    internals: Any = torch._C  # noqa: SLF001 - both questions have no public form that is cheap enough for every step
    tracing, functorch = internals._get_tracing_state, internals._functorch  # noqa: SLF001
    return tracing() is not None or functorch.peek_interpreter_stack() is not None


def _lanes_of(watch: GradWatch, key: str) -> list[Lane]:
    """Return the lanes that may take the readings of a model: the one that owns most of it, else all."""
    lanes = list(watch.lanes.values())
    return [lane for lane in lanes if key in lane.orphans_of] or lanes
