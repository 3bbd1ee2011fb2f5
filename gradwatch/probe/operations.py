"""Which torch functions the probe reads, and what it reads off one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Function: TypeAlias = Callable[..., Any]

SAMPLE = 65_536
"""Elements of an output that are read at most, whole samples of the batch, but"""
SAMPLES = 32
"""never fewer samples than this."""
FLAT = {"tanh": (-0.975, 0.975), "sigmoid": (0.0127, 0.9873), "hardtanh": (-0.999, 0.999)}
"""Outputs beyond these have a slope below a twentieth of the largest."""
CONFIDENT = 0.99
"""A softmax row with an entry above this lets almost no gradient through."""
ONE_SIDED = frozenset({"relu"})
WEIGHTED = frozenset({"linear", "conv"})
LOOPED = WEIGHTED | {"cell"}
"""Operations whose repetition in one module is a recurrence."""

READINGS: tuple[str, ...] = (
    "input_rms",
    "output_rms",
    "gradient_rms",
    "low",
    "high",
    "inactive",
    "between",
    "logits",
)
"""What one row of the probe's table holds."""


def _table() -> Mapping[Function, str]:
    """Name each function by what it does; every spelling that torch has for it."""
    names = {
        "relu": "relu relu_ relu6 threshold leaky_relu leaky_relu_ rrelu prelu",
        "gelu": "gelu silu mish softplus hardswish",
        "elu": "elu elu_ celu selu selu_",
        "tanh": "tanh tanh_",
        "hardtanh": "hardtanh hardtanh_",
        "sigmoid": "sigmoid sigmoid_ hardsigmoid",
        "softmax": "softmax",
        "linear": "linear",
        "conv": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        "norm": "layer_norm batch_norm group_norm instance_norm rms_norm",
        "attention": "scaled_dot_product_attention",
        "exp": "exp exp_",
        "cell": "rnn_tanh_cell rnn_relu_cell lstm_cell gru_cell",
        "heads": "multi_head_attention_forward",
    }
    leaky = {"leaky_relu", "leaky_relu_", "rrelu", "prelu", "threshold"}
    found: dict[Function, str] = {}
    for operation, spellings in names.items():
        for spelling in spellings.split():
            name = "leaky" if spelling in leaky else "selu" if spelling.startswith("selu") else operation
            for home in (torch, functional, Tensor):
                function = getattr(home, spelling, None)
                if callable(function):
                    found[function] = name
    return found


OPERATIONS: Mapping[Function, str] = _table()
CUTS: Mapping[Function, str] = {
    Tensor.detach: "detach",
    Tensor.argmax: "argmax",
    torch.argmax: "argmax",
    Tensor.numpy: "numpy",
    Tensor.item: "item",
    Tensor.round: "round",
    torch.round: "round",
    Tensor.sign: "sign",
    torch.sign: "sign",
}
"""Functions through which no gradient comes back."""


PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm, torch.einsum})


def sampled(values: Tensor) -> Tensor:
    """Return the first samples of a batch, so many that reading them costs little."""
    if values.dim() < 2 or values.numel() <= SAMPLE:
        return values
    wanted = max(SAMPLES, SAMPLE // max(values[0].numel(), 1))
    return values[:wanted]


def rms(values: Tensor) -> Tensor:
    """Root mean square in at least float32, of samples of the batch."""
    part = sampled(values.detach())
    size: Tensor = torch.linalg.vector_norm(part, dtype=wide(part)) / max(part.numel(), 1) ** 0.5
    return size


def wide(values: Tensor) -> torch.dtype:
    """Return the dtype to add up in: float32 overflows at squares of 1e19, half precision at once."""
    return torch.promote_types(values.dtype, torch.float32)


def shares(operation: str, output: Tensor) -> dict[str, Tensor]:
    """Return what this kind of operation tells beyond its size."""
    part = sampled(output.detach())
    if operation in FLAT:
        low, high = FLAT[operation]
        return {"low": _share(part < low), "high": _share(part > high)}
    if operation == "softmax" and part.dim() > 0 and part.shape[-1] >= 3:
        return {"low": _share(part < -1), "high": _share(part.amax(-1) > CONFIDENT)}
    if operation in ONE_SIDED and part.dim() > 1:
        unit = 1 if part.dim() > 3 else part.dim() - 1
        others = [axis for axis in range(part.dim()) if axis != unit]
        return {"inactive": _share((part > 0).sum(others) == 0)}
    if operation in WEIGHTED and part.dim() > 1 and part.shape[0] > 1:
        centred = part.to(torch.float32)
        return {"between": centred.var(0, unbiased=False).mean() / (centred.square().mean() + 1e-37)}
    return {}


def attention_logits(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Root mean square of the logits ``q·k·scale`` of the first sample and head; shapes [..., T, d]."""
    width = query.shape[-1]
    flat_query = query.detach().reshape(-1, *query.shape[-2:])[:1, :64]
    flat_key = key.detach().reshape(-1, *key.shape[-2:])[:1, :64]
    return rms(flat_query @ flat_key.transpose(-1, -2)) * (width**-0.5 if scale is None else scale)


def head_logits(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor | None:
    """Root mean square of the logits of `functional.multi_head_attention_forward`, before its softmax."""
    query, key, _, _, heads, weight, bias = (*arguments, *([None] * 7))[:7]
    if weight is None or not isinstance(query, Tensor) or query.dim() != 3 or keywords.get("use_separate_proj_weight"):
        return None
    width = query.shape[-1]
    projections = weight.detach().split(width)
    offsets = (None, None) if bias is None else bias.detach().split(width)[:2]
    split = []
    for tokens, projection, offset in zip((query, key), projections, offsets, strict=False):
        projected = functional.linear(tokens.detach()[:64, :1], projection, offset)
        split.append(projected.reshape(projected.shape[0], heads, width // heads).transpose(0, 1))
    return attention_logits(split[0], split[1])


def _share(condition: Tensor) -> Tensor:
    return condition.to(torch.float32).mean()
