"""Initialisations for a model before training: by the activation that follows, or by what a batch shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.errors import ConfigurationError
from gradwatch.probe.operations import OPERATIONS
from gradwatch.probe.recorder import Recorder
from gradwatch.targets import canonical_modules

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PASSES = 10
"""Corrections of one layer at most,"""
TOLERANCE = 0.05
"""which end when the standard deviation of its output is this near to one (Mishkin and Matas use 0.1)."""


def init_(model: nn.Module, batch: object, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Initialise every linear and convolutional layer for the activation that follows it; biases become zero.

    ReLU and its kin: ``kaiming_normal_``, std √(2 / fan_in) (He et al., 2015, equation 10). Tanh: ``orthogonal_`` (Saxe
    et al., 2014). Sigmoid, softmax and the last layer: ``xavier_normal_``, std √(2 / (fan_in + fan_out)) (Glorot and
    Bengio, 2010, equation 16). The forward pass on `batch` (a tensor, or a tuple of arguments) tells what follows what.
    Layers that are all zero are left alone: they are meant to be. Changes the model in place and returns it.

    Raises:
        ConfigurationError: `optimizer` has state, so that training has begun; or the model has no such layer.
    """
    _check_untrained(optimizer)
    order = _layers_in_order(model, batch)
    with torch.no_grad():
        for layer, following in order:
            if layer.weight.any():
                _initialise(layer, following)
    return model


def lsuv_(model: nn.Module, batch: object, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Scale every layer until its output on `batch` has unit variance, layer by layer (LSUV).

    Mishkin, Matas, "All you need is a good init" (2016), algorithm 1: orthogonal weights, then ``W ← W / std(output)``
    until it is within 5 % of one. Biases become zero; tied weights are scaled once; layers that are all zero are left
    alone. It does not help deep sigmoid networks, whose activations are flat at any scale. In place; returns the model.

    Raises:
        ConfigurationError: `optimizer` has state, so that training has begun; or the model has no such layer.
    """
    _check_untrained(optimizer)
    order = _layers_in_order(model, batch)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            for layer, _ in order:
                if layer.weight.any():
                    nn.init.orthogonal_(layer.weight)
                    _zero_bias(layer)
                    _scale_to_unit_variance(model, layer, batch)
    finally:
        for module in training:
            module.training = True
    return model


def _scale_to_unit_variance(model: nn.Module, layer: nn.Module, batch: object) -> None:
    weight = layer.weight
    for _ in range(PASSES):
        deviation = _output_deviation(model, layer, batch)
        if not deviation > 0 or abs(deviation - 1) < TOLERANCE:
            return
        weight.div_(deviation)  # type: ignore[operator]


def _output_deviation(model: nn.Module, layer: nn.Module, batch: object) -> float:
    seen: list[float] = []

    def read(_module: nn.Module, _arguments: object, output: Tensor) -> None:
        seen.append(float(output.detach().float().std()))  # before training, by the user's call: it may wait

    handle = layer.register_forward_hook(read)
    try:
        _call(model, batch)
    finally:
        handle.remove()
    return seen[0] if seen else 0.0


def _initialise(layer: nn.Module, following: str) -> None:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        return
    if following in ("relu", "leaky", "gelu", "elu"):
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    elif following == "selu":
        nn.init.kaiming_normal_(weight, nonlinearity="linear")
    elif following in ("tanh", "hardtanh"):
        nn.init.orthogonal_(weight)
    else:
        nn.init.xavier_normal_(weight)
    _zero_bias(layer)


def _zero_bias(layer: nn.Module) -> None:
    if isinstance(layer.bias, Tensor):
        nn.init.zeros_(layer.bias)


def _layers_in_order(model: nn.Module, batch: object) -> list[tuple[Any, str]]:
    """Return each layer once, in order of execution, with the activation that follows it."""
    layers = {name: module for name, module in canonical_modules(model) if isinstance(module, WEIGHTED)}
    recorder = Recorder()
    handles = []
    for name, module in layers.items():
        handles.append(module.register_forward_pre_hook(_entering(recorder, name)))
        handles.append(module.register_forward_hook(_leaving(recorder), always_call=True))
    try:
        with recorder:
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = dict(_with_following([(row.module, row.operation) for row in recorder.rows], layers))
    if not found:
        raise ConfigurationError("the model runs no linear or convolutional layer on this batch; nothing to initialise")
    unique: dict[int, tuple[nn.Module, str]] = {}
    for name, following in found.items():
        unique.setdefault(id(layers[name].weight), (layers[name], following))
    return list(unique.values())


def _with_following(rows: list[tuple[str, str]], layers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name for each layer the first activation after it, before the next layer; a norm in between does not matter."""
    activations = set(OPERATIONS.values()) - {"linear", "conv", "norm", "cell", "attention", "heads"}
    for place, (module, operation) in enumerate(rows):
        if module not in layers or operation not in ("linear", "conv"):
            continue
        following = ""
        for _, later in rows[place + 1 :]:
            if later in activations:
                following = later
            if later in activations or later in ("linear", "conv"):
                break
        yield module, following


def _entering(recorder: Recorder, name: str) -> Callable[..., None]:
    return lambda *_: recorder.path.append(name)


def _leaving(recorder: Recorder) -> Callable[..., None]:
    def leave(*_: object) -> None:
        recorder.path.pop()

    return leave


def _call(model: nn.Module, batch: object) -> object:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _check_untrained(optimizer: Optimizer | None) -> None:
    if optimizer is not None and len(optimizer.state):
        raise ConfigurationError(
            "the optimizer has state already: this model is being trained, and a new initialisation would destroy it; "
            "call this before the first step, or build the model afresh"
        )
