"""The ways of looking at gradients that are compared: ours and what others do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.measure import blocks
from gradwatch.measure.plan import Backend, Meter, plan
from gradwatch.table import ROW
from gradwatch.transfer import Transfer

ONE_READ = "one read"
EVERY_STEP = "gradwatch, every step"
NUMPY = "the same without Numba, every step"
DETAIL = "gradwatch, detail step"
WATCH = "gradwatch, all of it, mean of ten steps"
FOREACH = "the same in pure torch, every step"
CLIP = "clip_grad_norm_"
ADAMW = "AdamW, fused"
ITEMS = "norm().item() a parameter"
HISTOGRAMS = "64-bin histogram a parameter"

SMALL = 65_536
"""Elements up to which calling a reduction costs as much as reading."""

Route = Callable[[], object]


def routes(params: Sequence[nn.Parameter], model: nn.Module, log_dir: Path) -> dict[str, Route]:
    """Return every route over the gradients that `params` have when it is called."""
    on_cpu = params[0].device.type == "cpu"
    small = sum(param.numel() for param in params if param.numel() <= SMALL)
    buffer = torch.ones(small, dtype=params[0].dtype, device=params[0].device)
    adamw = torch.optim.AdamW(params, lr=0.0, weight_decay=0.0, fused=True)
    chosen = {
        ONE_READ: lambda: _read(params, buffer),
        EVERY_STEP: _measure(params, plan(params), detail=False),
        DETAIL: _measure(params, plan(params), detail=True),
        WATCH: _watched(model, log_dir),
        CLIP: lambda: nn.utils.clip_grad_norm_(params, 1e9),
        ADAMW: adamw.step,
        ITEMS: lambda: [param.grad.norm().item() for param in params if param.grad is not None],
        HISTOGRAMS: lambda: [histogram(param.grad) for param in params if param.grad is not None],
    }
    if on_cpu:
        with mock.patch.object(blocks, "one_read", return_value=None):
            chosen[NUMPY] = _measure(params, plan(params), detail=False)
        chosen[FOREACH] = _measure(params, plan(params, backend="foreach"), detail=False)
    return chosen


def check(params: Sequence[nn.Parameter], backend: Backend | None = None) -> None:
    """Refuse to time a route that is wrong: norms against float64."""
    meter, transfer = plan(params, backend=backend), Transfer[None]()
    transfer.send(meter.measure([param.grad for param in params], detail=False), {}, None)
    seen = transfer.drain()[0].columns["norm"]
    exact = [float(param.grad.double().norm()) for param in params if param.grad is not None]
    np.testing.assert_allclose(seen, exact, rtol=1e-5)
    assert ROW["norm"] == 1  # noqa: S101 - what Transfer unpacks


def _read(params: Sequence[nn.Parameter], buffer: Tensor) -> None:
    """Fetch each gradient and its address, and read it once; small ones as one buffer, where no call costs more."""
    for param in params:
        if param.grad is not None and param.grad.data_ptr() and param.numel() > SMALL:
            param.grad.sum()
    buffer.sum()


def _measure(params: Sequence[nn.Parameter], meter: Meter, *, detail: bool) -> Route:
    def route() -> None:
        with torch.no_grad():
            table = meter.measure([param.grad for param in params], detail=detail)
            if detail:
                meter.sample_before()
                meter.sample_after(table)

    return route


def _watched(model: nn.Module, log_dir: Path) -> Route:
    """Ten steps of all that `watch` does beside the optimizer's own work: judging and writing files too."""
    sinks = [gradwatch.TensorBoardSink(log_dir), gradwatch.JSONLSink(log_dir / "gradwatch.jsonl")]
    standing = [("stalled", "*")]  # the benchmark never moves a weight
    watch = gradwatch.watch(model, None, sinks=sinks, mute=standing, start_step=100)

    def route() -> None:
        for _ in range(10):
            watch.observe()
            watch.step()

    return route


def histogram(grad: Tensor) -> Tensor:
    """What a gradient-histogram hook does: finite elements, their range, 64 bins, to the host."""
    flat = grad.detach().flatten().float()
    finite = flat[torch.isfinite(flat)]
    low, high = finite.min().item(), finite.max().item()
    return torch.histc(finite, bins=64, min=low, max=high).cpu()
