"""What statistics and clipping cost together, against torch's clipping alone: two threads, process time."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import gradwatch
from benchmarks.models import MODELS, Workload
from benchmarks.timing import quartiles, timed
from gradwatch.attach.overlay import Overlay
from gradwatch.lane import Lane

NEVER = 1e30
SHRINK = 0.9


@dataclass
class Limit:
    """A limit that is always a tenth below the norm there is: each call clips."""

    value: float = NEVER

    def next(self) -> float:
        """Return the next one."""
        self.value *= SHRINK
        return self.value


def huge(device: torch.device) -> Workload:
    """Return one tensor of eight million elements."""
    model = nn.Linear(4096, 2048, bias=False).to(device)
    return Workload(model, lambda: model(torch.randn(16, 4096, device=device)).square().mean())


CHOSEN = {"tiny": MODELS["tiny"], "huge": huge, "cnn": MODELS["cnn"], "transformer": MODELS["transformer"]}


def lane_of(model: nn.Module, optimizer: torch.optim.Optimizer, clip: gradwatch.ClipByGlobalNorm) -> Lane:
    """Return a lane with a clipper, its hooks taken off: the benchmark calls the acts itself."""
    watch = gradwatch.watch(
        model, optimizer, sinks=[], detectors=[], transforms=[clip], probe=False, start_step=101, log_every=1000
    )
    watch.detach()
    (lane,) = watch.lanes.values()
    return lane


def act(lane: Lane, clip: gradwatch.ClipByGlobalNorm, limit: Limit | None) -> None:
    """Measure and clip, as before an update."""
    clip.max_norm = NEVER if limit is None else limit.next()
    lane.observe("step")
    lane.before_update()


def routes(workload: Workload, limit: Limit) -> dict[str, Callable[[], object]]:
    """Return each way to clip, never and always, before a plain and a fused optimizer."""
    model, params = workload.model, list(workload.model.parameters())
    plain, fused = torch.optim.SGD(params, lr=0.0), torch.optim.AdamW(params, lr=0.0, weight_decay=0.0, fused=True)
    clip = gradwatch.ClipByGlobalNorm(NEVER)
    plain_lane, fused_lane, overlay = lane_of(model, plain, clip), lane_of(model, fused, clip), Overlay()

    def fused_step(limits: Limit | None) -> None:
        act(fused_lane, clip, limits)
        if fused_lane.pending is not None:
            overlay.put_handover(fused, fused_lane.pending.handover)
        fused.step()
        overlay.restore(fused)

    return {
        "clip_grad_norm_, never": lambda: nn.utils.clip_grad_norm_(params, NEVER),
        "clip_grad_norm_, always": lambda: nn.utils.clip_grad_norm_(params, limit.next()),
        "gradwatch, never": lambda: act(plain_lane, clip, None),
        "gradwatch, always": lambda: act(plain_lane, clip, limit),
        "AdamW alone": fused.step,
        "AdamW with gradwatch, never": lambda: fused_step(None),
        "AdamW with gradwatch, always": lambda: fused_step(limit),
    }


def table(name: str, rounds: int, device: torch.device) -> None:
    """Print one model's ratios."""
    torch.manual_seed(0)
    workload, limit = CHOSEN[name](device), Limit()
    chosen = routes(workload, limit)
    seconds: dict[str, list[float]] = defaultdict(list)
    wall: dict[str, list[float]] = defaultdict(list)
    for index in range(rounds + 1):
        workload.model.zero_grad()
        workload.loss().backward()
        limit.value = float(
            nn.utils.get_total_norm([p.grad for p in workload.model.parameters() if p.grad is not None])
        )
        for route in random.sample(list(chosen), len(chosen)):
            began = time.perf_counter()
            reading = timed(chosen[route], device)
            if index:
                seconds[route].append(reading)
                wall[route].append(time.perf_counter() - began)
    number = len(list(workload.model.parameters()))
    print(f"\n{name}: {number} tensors, {device.type}, two threads; median (quartiles) of {rounds} rounds")
    print("\n| statistics and clipping / clip_grad_norm_ alone | nothing clipped | every step clipped |\n|---|---|---|")
    read = {route: np.array(values) for route, values in seconds.items()}
    torchs = {when: read[f"clip_grad_norm_, {when}"] for when in ("never", "always")}
    ours = {when: read[f"gradwatch, {when}"] for when in torchs}
    added = {when: read[f"AdamW with gradwatch, {when}"] - read["AdamW alone"] for when in torchs}
    for label, costs in (("before an optimizer that is not fused", ours), ("added to a fused AdamW", added)):
        cells = [quartiles(costs[when] / torchs[when]) for when in torchs]
        print(f"| {label} | {' | '.join(cells)} |")
    medians = [np.median(np.array(wall[f"gradwatch, {w}"]) / np.array(wall[f"clip_grad_norm_, {w}"])) for w in torchs]
    print(f"| wall time, not fused | {medians[0]:.2g} | {medians[1]:.2g} |")


def tables(rounds: int, device: torch.device) -> None:
    """Print every model's table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for name in CHOSEN:
        table(name, rounds, device)
    torch.set_num_threads(threads)
