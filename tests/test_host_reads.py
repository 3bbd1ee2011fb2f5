"""Nothing waits for the device: the table leaves it in one copy a step, however many tensors there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from host_reads import HostReads
from loops import backward, mlp, watched
from torch import nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch.measure.foreach import ForeachMeter
from gradwatch.measure.plan import plan
from gradwatch.table import StatTable
from gradwatch.transfer import Transfer


def reads_of(depth, *, clip=False, steps=25):
    """Train for some steps, dense and thin ones, with the pure-torch backend forced onto the CPU."""
    model = mlp(depth=depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer, backend="foreach", detectors=[])
    with HostReads() as reads:
        for step in range(steps):
            optimizer.zero_grad()
            loss = backward(model, step)
            watch.log_loss(loss)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert len(memory.snapshots) == steps
    return reads


@pytest.mark.parametrize("clip", [False, True])
def test_no_step_reads_a_number_outside_the_transfer(clip):
    reads = reads_of(4, clip=clip)

    assert reads.outside("transfer.py") == []


def test_reads_inside_the_transfer_do_not_depend_on_the_number_of_tensors():
    few, many = reads_of(2), reads_of(30)

    assert len(few.inside("transfer.py")) == len(many.inside("transfer.py"))


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_scaler_nothing_is_read_either(fused):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scaler = GradScaler("cpu", init_scale=1024.0)
    watched(model, optimizer, backend="foreach", scaler=scaler, detectors=[])
    with HostReads() as reads:
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 8)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

    assert reads.outside("transfer.py") == []


def test_a_planted_read_is_caught(monkeypatch):
    whole = ForeachMeter.measure

    def measure(self, grads, **options):
        grads[0].sum().item()
        return whole(self, grads, **options)

    measure.__code__ = measure.__code__.replace(co_filename=ForeachMeter.measure.__code__.co_filename)
    monkeypatch.setattr(ForeachMeter, "measure", measure)

    assert len(reads_of(2, steps=3).outside("transfer.py")) == 3


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("copy_", "_to_copy")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tensors", [3, 300])
def test_one_copy_takes_table_and_scalars_to_the_host(tensors):
    transfer = Transfer()
    table = StatTable(torch.rand(4, tensors, dtype=torch.float64), ())
    scalars = {"loss": torch.tensor(1.5, dtype=torch.float64), "scale": 2.0}

    with Copies() as copies:
        transfer.send(table, scalars, "note")

    (delivery,) = transfer.arrived()
    assert copies.count == 1
    np.testing.assert_array_equal(delivery.columns["norm"], table.values[1].numpy())
    assert delivery.scalars == {"loss": 1.5, "scale": 2.0}
    assert delivery.note == "note"


def test_deliveries_come_in_the_order_of_sending_and_do_not_share_memory():
    transfer = Transfer()
    for index in range(20):
        rows = 77 if index % 3 == 0 else 4
        table = StatTable(torch.full((rows, 5), float(index), dtype=torch.float64), (1,) if index == 7 else ())
        transfer.send(table, {}, index)
        if index % 4 == 0:
            assert transfer.arrived()[-1].note == index

    deliveries = transfer.drain()

    assert [d.note for d in deliveries] == [17, 18, 19]
    assert [float(d.columns["norm"][0]) for d in deliveries] == [17.0, 18.0, 19.0]
    assert [d.histogram is not None for d in deliveries] == [False, True, False]
    assert transfer.drain() == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("clip", [False, True])
def test_on_cuda_no_step_waits(clip):
    model = mlp(depth=4).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    watch, memory = watched(model, optimizer, detectors=[])
    inputs = torch.randn(16, 8, device="cuda")
    model(inputs).sum().backward()  # plans and warms up
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(inputs).pow(2).mean()
            watch.log_loss(loss)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    watch.close()

    assert len(memory.snapshots) == 31


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_statistics_are_those_of_the_cpu():
    torch.manual_seed(0)
    grads = [torch.randn(64, 32), torch.randn(100_000) * 1e-25, torch.zeros(7), torch.randn(9).bfloat16()]
    params = [torch.ones_like(grad) for grad in grads]
    results = []
    for device, backend in (("cpu", "cpu"), ("cuda", "foreach")):
        moved = [p.to(device) for p in params]
        meter, transfer = plan(moved, backend=backend), Transfer()
        table = meter.measure([g.to(device) for g in grads], detail=True)
        meter.sample_before()
        moved[0].mul_(0.5)
        meter.sample_after(table)
        transfer.send(table, {"loss": torch.tensor(2.0, device=device)}, None)
        results.append(transfer.drain()[0])

    for name, values in results[0].columns.items():
        np.testing.assert_allclose(results[1].columns[name], values, rtol=1e-4, atol=1e-12, err_msg=name)
    assert results[1].scalars == {"loss": 2.0}


CLIPPERS = [
    lambda: [gradwatch.ClipByGlobalNorm(0.1), gradwatch.ClipByTensorNorm(0.05), gradwatch.ClipByValue(0.01)],
    lambda: [gradwatch.AdaptiveGradientClip(), gradwatch.ClipByGlobalNorm(0.1, "0.*")],
    lambda: [gradwatch.AutoClip(), gradwatch.ZClip(), gradwatch.AdaGC(warmup=5)],
    lambda: [gradwatch.DryRun(gradwatch.ZClip()), gradwatch.SkipNonfinite(), gradwatch.SkipSpike(warmup=5)],
]


@pytest.mark.parametrize("make", CLIPPERS)
def test_no_transform_reads_a_number_before_a_fused_optimizer(make):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    watch, memory = watched(model, optimizer, backend="foreach", detectors=[], transforms=make())
    with HostReads() as reads:
        for step in range(12):
            optimizer.zero_grad()
            watch.log_loss(backward(model, step))
            optimizer.step()
    watch.close()

    assert len(memory.snapshots) == 12
    assert reads.outside("transfer.py") == []


def test_a_skip_before_an_optimizer_that_is_not_fused_waits_for_one_flag_a_step():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch, _ = watched(model, optimizer, backend="foreach", detectors=[], transforms=[gradwatch.SkipNonfinite()])
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        with HostReads() as reads:
            optimizer.step()
        assert len([name for name in reads.inside("transfer.py") if name == "_local_scalar_dense"]) >= 1
        assert [caller for _, caller in reads.outside("transfer.py")] == []
    watch.close()
