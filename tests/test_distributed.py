"""Two processes under DistributedDataParallel: the gradients seen at the end of backward are the reduced ones."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from loops import batch, mlp, true_norm, watched
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch

SETTINGS = {
    "default": {},
    "static_graph": {"static_graph": True},
    "find_unused": {"find_unused_parameters": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "tiny_buckets": {"bucket_cap_mb": 1e-4},
}


def worker(rank: int, port: int, queue: multiprocessing.SimpleQueue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for name, options in SETTINGS.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(mlp(), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _, memory = watched(model, optimizer)
        applied = []
        for step in range(4):
            inputs, labels = batch(10 * step + rank)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            applied.append(true_norm(model.parameters()))
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        seen = [snapshot.global_norm for snapshot in memory.snapshots]
        found[name] = (applied, seen, {s.source for s in memory.snapshots}, memory.snapshots[0].names[0])
    found["reactions"] = reacting(rank)
    queue.put((rank, found))
    distributed.destroy_process_group()


def reacting(rank):
    """Rank 1 alone logs a loss that falls, rank 0 one that explodes: both have to do what rank 0 decides."""
    torch.manual_seed(0)
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reactions = [gradwatch.BackOffLR(grace=5), gradwatch.Rollback(every=5, age=5, grace=5)]
    transforms = [gradwatch.SkipNonfinite(), gradwatch.ClipByGlobalNorm(1.0)]
    watch, memory = watched(model, optimizer, reactions=reactions, transforms=transforms)
    for step in range(50):
        inputs, labels = batch(10 * step + rank)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        watch.log_loss(100.0 if rank == 0 and step == 40 else 1.0)
        (loss * (float("nan") if rank == 1 and step == 30 else 1.0)).backward()
        optimizer.step()
    watch.close()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return [(i.step, i.kind) for i in watch.interventions], weights.tolist(), memory.snapshots[-1].rate_factor


@pytest.fixture(scope="module")
def ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    context = multiprocessing.spawn(worker, args=(port, queue), nprocs=2, join=False)
    found = dict(queue.get() for _ in range(2))
    context.join()
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_norm_before_clipping_is_that_of_the_reduced_gradients_on_both_ranks(ranks, setting):
    applied, seen, sources, name = ranks[0][setting]

    assert seen == pytest.approx(applied, rel=1e-5)
    assert ranks[1][setting][1] == pytest.approx(seen, rel=1e-6)
    assert sources == {"backward"}
    assert name == "0.weight"


def test_every_rank_takes_the_same_decision(ranks):
    (interventions, weights, factor), other = ranks[0]["reactions"], ranks[1]["reactions"]

    assert other[0] == interventions
    assert other[1] == weights
    assert other[2] == factor == 0.5
    assert (30, "skip") in interventions
    assert {"learning_rate", "rollback"} <= {kind for _, kind in interventions}
