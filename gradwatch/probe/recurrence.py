"""How much of a gradient survives the way back over the time steps of torch's own recurrent modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradwatch.probe.operations import FLAT

SEQUENCES = 4
"""Samples of the batch that are followed."""
MAX_STEPS = 400
"""Time steps that are followed: the decades grow in proportion."""

Cell: TypeAlias = Callable[[Tensor, list[Tensor]], list[Tensor]]


@dataclass(slots=True, eq=False)
class Sequences:
    """One recurrent module's reading, on the device."""

    module: str
    cell: str
    steps: int
    decades: Tensor
    saturated: Tensor
    """Share of the candidate states that the inputs alone drive to where tanh is flat; NaN without a tanh."""
    entering: Tensor | None = field(default=None)
    """Share of the loss's gradient at the outputs that enters in the last tenth of the steps."""

    def vector(self, size: int) -> Tensor:
        """Return the readings as a row of the probe's table: decades, what enters last, what is saturated."""
        row = torch.full((size,), float("nan"), device=self.decades.device)
        row[0] = self.decades.to(torch.float32)
        row[1] = 1.0 if self.entering is None else self.entering  # only the last state was used
        row[2] = self.saturated.to(torch.float32)
        return row


def read_sequence(name: str, module: nn.RNNBase, arguments: tuple[Any, ...], output: object) -> Sequences | None:
    """Push a random vector back through the cells of one forward pass, recomputed on a few samples."""
    inputs = arguments[0] if arguments else None
    if not isinstance(inputs, Tensor) or inputs.dim() != 3 or module.proj_size:
        return None
    sequence = inputs.detach() if not module.batch_first else inputs.detach().transpose(0, 1)
    steps = int(sequence.shape[0])
    sequence = sequence[-MAX_STEPS:, :SEQUENCES].to(_widest(inputs.device))
    with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
        decades, saturated = _read_layers(module, sequence)
    found = Sequences(name, type(module).__name__, steps, decades * (steps / sequence.shape[0]), saturated)
    outputs = output[0] if isinstance(output, tuple) else output
    if isinstance(outputs, Tensor) and outputs.requires_grad:
        outputs.register_hook(_Entering(found, time=1 if module.batch_first else 0))
    return found


def _read_layers(module: nn.RNNBase, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Return log10 of what is left of a gradient, and the saturated share: the largest of all layers and directions.

    One living path is enough for a gradient, and one saturated layer to lose it.
    """
    found, flat = [], []
    for layer in range(module.num_layers):
        outputs = []
        for direction in ("", "_reverse")[: 2 if module.bidirectional else 1]:
            suffix = f"_l{layer}{direction}"
            cell = _cell(module, suffix)
            flat.append(_saturated(module, suffix, sequence))
            states, decades = _through_time(module, cell, sequence.flip(0) if direction else sequence)
            outputs.append(states.flip(0) if direction else states)
            found.append(decades)
        sequence = torch.cat(outputs, -1)
    return torch.stack(found).amax(), torch.stack(flat).amax()


def _saturated(module: nn.RNNBase, suffix: str, sequence: Tensor) -> Tensor:
    """Return the share of candidate states that are flat; the gates may be shut or open for good reason."""
    if module.mode == "RNN_RELU":
        return sequence.new_tensor(float("nan"))
    weight, bias = getattr(module, f"weight_ih{suffix}"), getattr(module, f"bias_ih{suffix}", None)
    # Rows of the weights are gates: i, f, g, o of an LSTM, r, z, n of a GRU; g and n pass through tanh.
    first = 0 if module.mode == "RNN_TANH" else 2 * module.hidden_size
    rows = slice(first, first + module.hidden_size)
    driven = sequence @ weight.detach()[rows].to(sequence.dtype).mT
    driven = torch.tanh(driven if bias is None else driven + bias.detach()[rows].to(sequence.dtype))
    low, high = FLAT["tanh"]
    return ((driven < low) | (driven > high)).to(torch.float32).mean()


def _through_time(module: nn.RNNBase, cell: Cell, sequence: Tensor) -> tuple[Tensor, Tensor]:
    shape = (sequence.shape[1], module.hidden_size)
    count = 2 if isinstance(module, nn.LSTM) else 1
    start = [torch.zeros(shape, dtype=sequence.dtype, device=sequence.device, requires_grad=True) for _ in range(count)]
    states, outputs = start, []
    for inputs in sequence.unbind(0):
        states = cell(inputs, states)
        outputs.append(states[0])
    # A generator of our own: the run's random numbers stay as they are.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(shape, generator=generator, dtype=sequence.dtype).to(sequence.device)
    # An LSTM keeps its memory in the cell state: the way back starts and ends there.
    back = torch.autograd.grad(states[-1], start[-1], probe)[0]
    decades = torch.log10(torch.linalg.vector_norm(back) / torch.linalg.vector_norm(probe) + 1e-300)
    return torch.stack([output.detach() for output in outputs]), decades.detach()


def _cell(module: nn.RNNBase, suffix: str) -> Cell:
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    device = next(module.parameters()).device
    weights = [getattr(module, name + suffix).detach().to(_widest(device)) for name in names]
    if isinstance(module, nn.LSTM):
        return lambda inputs, states: list(torch.lstm_cell(inputs, states, *weights))
    functions = {"RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell, "GRU": torch.gru_cell}
    function = functions[module.mode]
    return lambda inputs, states: [function(inputs, states[0], *weights)]


def _widest(device: torch.device) -> torch.dtype:
    """Float64 where there is any: what is left after a hundred steps may be 1e-60."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Entering:
    """A tensor hook on the outputs: where along the sequence the loss's own gradient enters."""

    __slots__ = ("_found", "_time")

    def __init__(self, found: Sequences, time: int) -> None:
        self._found = found
        self._time = time

    def __call__(self, gradient: Tensor) -> None:
        """Read the share of the last tenth of the steps."""
        others = [axis for axis in range(gradient.dim()) if axis != self._time]
        sizes = gradient.detach().to(torch.float32).square().sum(others)
        last = max(1, len(sizes) // 10)
        self._found.entering = sizes[-last:].sum() / (sizes.sum() + 1e-37)
