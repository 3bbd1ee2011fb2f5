"""One look at the autograd graph of the first training output, for the order of the layers in depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradwatch.attach.weak import WeakHook
from gradwatch.depth import walk
from gradwatch.errors import Part, contain
from gradwatch.pipeline import GradWatch
from gradwatch.targets import Target


class FirstOutput:
    """Waits for the first output of one model that has a gradient graph, walks it, and goes."""

    def __init__(self, watch: GradWatch, target: Target, key: str) -> None:
        self._watch = watch
        self._target = target
        self._key = key
        self._part = Part("reading the order of the layers")

    def attach(self) -> None:
        """Hook the root module; a compiled one has no graph to walk."""
        model = self._target.models[self._key]
        if is_compiled(model):
            return
        self._handle = model.register_forward_hook(cast("Any", WeakHook(self.seen)))
        self._watch.on_detach(self.remove)

    def remove(self) -> None:
        """Stop waiting."""
        self._handle.remove()

    def seen(self, _model: nn.Module, _inputs: object, output: object) -> None:
        """Walk the graph behind a training output and take the hook off."""
        if torch.compiler.is_compiling() or self._part.failed or not self._watch.active:
            return
        with contain(self._part):
            outputs = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
            if not outputs:
                return
            self.remove()
            layers = {id(entry.parameter): entry.layer for entry in self._target.scan() if entry.model == self._key}
            depth = walk(outputs, layers)
            if depth is not None:
                self._target.set_depth(self._key, depth)


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model runs through `torch.compile`."""
    return any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None  # noqa: SLF001
        for module in model.modules()
    )


def tensors_in(output: object) -> Iterator[Tensor]:
    """Yield the tensors of a model's output: a tensor, or mappings, sequences and dataclasses of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
    elif hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            yield from tensors_in(getattr(output, name))
