"""What is watched: the parameters of one or several models under canonical names, and their order in depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gradwatch.depth import Depth
from gradwatch.records import Tensors

Pattern: TypeAlias = str | Iterable[str] | Callable[[str, nn.Parameter], bool]

# Names that only wrappers give to the module they wrap.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# Wrappers whose child has a name that anybody could use.
_PARALLEL = frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel"})
_FIRST = 1 << 60  # the rank of what was registered before every layer that the graph reached


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One parameter and its place in the model."""

    name: str
    layer: str
    module: str
    model: str
    parameter: nn.Parameter


@dataclass(eq=False)
class Target:
    """The watched models; `scan` looks at them afresh, because parameters come, go, freeze and thaw."""

    models: Mapping[str, nn.Module]
    include: Pattern = "*"
    exclude: Pattern = ()
    _depth: dict[str, Depth] = field(default_factory=dict, init=False, repr=False)

    def scan(self) -> list[Entry]:
        """List every initialised parameter that the patterns admit, tied ones once, in order of registration."""
        admitted, seen = [], set()
        for entry in self._entries():
            parameter = entry.parameter
            if id(parameter) in seen or isinstance(parameter, UninitializedParameter):
                continue
            seen.add(id(parameter))
            if _matches(self.include, entry) and not _matches(self.exclude, entry):
                admitted.append(entry)
        return admitted

    def set_depth(self, model: str, depth: Depth) -> None:
        """Order the layers of one model by the depth that its autograd graph showed."""
        self._depth[model] = depth

    def in_depth_order(self, entries: Iterable[Entry]) -> list[Entry]:
        """Sort entries from the input to the loss: whole layers, models one after the other."""
        entries = list(entries)
        ranks: dict[str, int] = {}
        for entry in entries:
            distance = self._distance(entry.parameter)
            if distance is not None:
                ranks[entry.layer] = max(distance, ranks.get(entry.layer, 0))
        models = {key: position for position, key in enumerate(self.models)}
        keyed, rank, model = [], _FIRST, -1
        for position, entry in enumerate(entries):
            if models[entry.model] != model:
                model, rank = models[entry.model], _FIRST
            # A layer that the graph did not reach stays behind the one registered before it.
            rank = ranks.get(entry.layer, rank)
            keyed.append(((model, -rank, position), entry))
        return [entry for _, entry in sorted(keyed, key=lambda pair: pair[0])]

    def tensors(self, entries: Iterable[Entry], groups: Mapping[int, int]) -> Tensors:
        """Describe entries for the judging side; `groups` maps ``id(parameter)`` to its parameter group."""
        entries = list(entries)
        return Tensors(
            names=tuple(entry.name for entry in entries),
            layers=tuple(entry.layer for entry in entries),
            modules=tuple(entry.module for entry in entries),
            shapes=tuple(tuple(entry.parameter.shape) for entry in entries),
            dtypes=tuple(str(entry.parameter.dtype).removeprefix("torch.") for entry in entries),
            groups=np.array([groups.get(id(entry.parameter), -1) for entry in entries], dtype=np.int64),
            series=np.array([self._in_series(entry) for entry in entries], dtype=bool),
            depths=self._depths(entries),
            order_source=self._order_source(),
        )

    def _entries(self) -> Iterator[Entry]:
        several = len(self.models) > 1 or "" not in self.models
        for key, model in self.models.items():
            prefix = (key,) if several else ()
            for layer, module in canonical_modules(model, prefix):
                for name, parameter in module.named_parameters(recurse=False):
                    yield Entry(f"{layer}.{name}" if layer else name, layer, type(module).__name__, key, parameter)

    def _distance(self, parameter: Tensor) -> int | None:
        for depth in self._depth.values():
            if id(parameter) in depth.distance:
                return depth.distance[id(parameter)]
        return None

    def _depths(self, entries: Iterable[Entry]) -> tuple[int, ...]:
        """Depth of each entry; what the graph did not reach gets a negative number of its own."""
        if not self._depth:
            return ()
        known = [self._distance(entry.parameter) for entry in entries]
        return tuple(-1 - row if distance is None else distance for row, distance in enumerate(known))

    def _in_series(self, entry: Entry) -> bool:
        if not self._depth:
            return True
        return any(id(entry.parameter) in depth.series for depth in self._depth.values())

    def _order_source(self) -> Literal["autograd", "registration"]:
        return "autograd" if self._depth else "registration"


def canonical_modules(model: nn.Module, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of `model` once, named without the components that wrappers add.

    ``module`` is stripped below the parallel wrappers only: anybody may call a submodule so.
    """
    stack = [(prefix, model)]
    seen = set()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield ".".join(path), module
        parallel = type(module).__name__ in _PARALLEL
        children = [
            (path if name in _WRAPPED or (parallel and name == "module") else (*path, name), child)
            for name, child in module.named_children()
        ]
        stack.extend(reversed(children))


def _matches(pattern: Pattern, entry: Entry) -> bool:
    if callable(pattern):
        return bool(pattern(entry.name, entry.parameter))
    globs = (pattern,) if isinstance(pattern, str) else pattern
    return any(fnmatchcase(entry.name, glob) for glob in globs)
