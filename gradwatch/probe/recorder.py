"""Reads one forward pass as it runs, and the gradients that come back through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradwatch.probe.operations import (
    CUTS,
    LOOPED,
    OPERATIONS,
    PRODUCTS,
    READINGS,
    Function,
    attention_logits,
    head_logits,
    rms,
    shares,
)
from gradwatch.probe.recurrence import Sequences, read_sequence

MAX_ROWS = 2_000
"""Operations of one forward pass that are read; a loop over time steps may have any number."""


@dataclass(slots=True, eq=False)
class Row:
    """One operation: where it ran, and its readings where they were computed."""

    module: str
    operation: str
    elements: int = 0
    dtype: str = ""
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Probed:
    """What the host knows about a probed forward pass while its numbers are still on the device."""

    modules: tuple[str, ...]
    operations: tuple[str, ...]
    elements: tuple[int, ...]
    dtypes: tuple[str, ...]
    ran: frozenset[str]
    cuts: tuple[str, ...]
    frozen_statistics: tuple[str, ...]
    sequences: tuple[tuple[str, str, int], ...]
    """Module, cell and number of time steps of each recurrence."""


class Recorder(TorchFunctionMode):
    """Sees the torch functions that a forward pass calls, those of modules and those written out alike.

    Everything it computes is detached, on the device, and leaves autograd's saved tensors as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.path: list[str] = [""]
        self.ran: dict[str, None] = {}
        self.cuts: dict[str, None] = {}
        self.frozen_statistics: dict[str, None] = {}
        self.sequences: list[Sequences] = []

    def __torch_function__(
        self,
        function: Function,
        _types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        """Call the function, reading what goes in and what comes out if it is one of ours."""
        keywords = keywords or {}
        operation = OPERATIONS.get(function) or _multiplication(function, arguments)
        if operation is None or len(self.rows) >= MAX_ROWS:
            if function in CUTS and torch.is_grad_enabled() and _needs_grad(arguments):
                self.cuts[f"{self.path[-1]}: {CUTS[function]}"] = None
            return function(*arguments, **keywords)
        row = Row(self.path[-1], "attention" if operation == "heads" else operation)
        with torch.no_grad():
            self._read_before(row, operation, arguments, keywords)
        result = function(*arguments, **keywords)
        self._read_after(row, result[0] if isinstance(result, tuple) else result)
        return result

    def read_recurrent(self, name: str, module: nn.RNNBase, arguments: tuple[Any, ...], output: object) -> None:
        """Read a recurrent module of torch's, whose time steps no function call shows."""
        found = read_sequence(name, module, arguments, output)
        if found is not None:
            self.sequences.append(found)

    def finish(self) -> tuple[Tensor | None, Probed]:
        """Return the numbers, shape [rows, readings], sequences behind the operations, and what they belong to."""
        loops = loops_in(self.rows)
        tables = [_vector(row.values) for row in self.rows]
        tables += [sequence.vector(len(READINGS)) for sequence in self.sequences]
        device = tables[0].device if tables else None
        numbers = torch.stack([vector.to(device, non_blocking=True) for vector in tables]) if tables else None
        return numbers, Probed(
            modules=tuple(row.module for row in self.rows),
            operations=tuple(row.operation for row in self.rows),
            elements=tuple(row.elements for row in self.rows),
            dtypes=tuple(row.dtype for row in self.rows),
            ran=frozenset(self.ran),
            cuts=tuple(self.cuts),
            frozen_statistics=tuple(self.frozen_statistics),
            sequences=tuple((s.module, s.cell, s.steps) for s in self.sequences) + loops,
        )

    def _read_before(self, row: Row, operation: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        first = arguments[0] if arguments else keywords.get("input")
        if isinstance(first, Tensor) and first.is_floating_point():
            row.values["input_rms"] = rms(first)  # before: the function may write over its input
        if operation == "attention" and len(arguments) > 1:
            row.values["logits"] = attention_logits(arguments[0], arguments[1], keywords.get("scale"))
        if operation == "heads":
            logits = head_logits(arguments, keywords)
            row.values |= {} if logits is None else {"logits": logits}
        running = arguments[1] if len(arguments) > 1 else keywords.get("running_mean")
        trains = arguments[5] if len(arguments) > 5 else keywords.get("training", True)
        if operation == "norm" and isinstance(running, Tensor) and trains is False:
            self.frozen_statistics[row.module] = None

    def _read_after(self, row: Row, output: object) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
            return
        row.elements, row.dtype = output.numel(), str(output.dtype).removeprefix("torch.")
        self.rows.append(row)
        with torch.no_grad():
            row.values["output_rms"] = rms(output)
            row.values |= shares(row.operation, output)
        if output.requires_grad:
            output.register_hook(_GradientReader(row))


class _GradientReader:
    """A tensor hook; a class, so that the graph holds a row and nothing else."""

    __slots__ = ("_row",)

    def __init__(self, row: Row) -> None:
        self._row = row

    def __call__(self, gradient: Tensor) -> None:
        """Read the first gradient; a graph that is run backwards again belongs to another step."""
        if "gradient_rms" not in self._row.values:
            self._row.values["gradient_rms"] = rms(gradient)


def loops_in(rows: Sequence[Row]) -> tuple[tuple[str, str, int], ...]:
    """Find modules that the forward pass called again and again: a recurrence written as a loop."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        counts[row.module, row.operation] = counts.get((row.module, row.operation), 0) + 1
    return tuple((module, "loop", count) for (module, operation), count in counts.items() if _repeats(operation, count))


def _repeats(operation: str, count: int) -> bool:
    return operation in LOOPED and count >= 8


def _multiplication(function: Function, arguments: tuple[Any, ...]) -> str | None:
    """A product with a parameter is a linear layer, however it is written."""
    if function in PRODUCTS and any(isinstance(argument, nn.Parameter) for argument in arguments[:3]):
        return "linear"
    return None


def _needs_grad(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments) and isinstance(arguments[0], Tensor) and arguments[0].requires_grad


def _vector(values: Mapping[str, Tensor]) -> Tensor:
    some = next(iter(values.values()))
    nothing = torch.full_like(some, float("nan"), dtype=torch.float32)
    return torch.stack([values[name].to(torch.float32) if name in values else nothing for name in READINGS])
