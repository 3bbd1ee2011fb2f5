"""torch.compile: one graph, no recompilation, the same numbers."""

from __future__ import annotations

import pytest
import torch
from loops import assert_close, batch, mlp, norms_of, train, true_norm, watched
from torch import nn
from torch._dynamo.testing import CompileCounter

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_watched_model_compiles_in_one_graph_and_once():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    expected = []
    for step in range(4):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(inputs), labels).backward()
        expected.append(true_norm(model.parameters()))
        optimizer.step()

    assert counter.frame_count == 1
    assert_close(norms_of(memory.snapshots), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_before_is_watched_under_its_own_names(in_place):
    model = Wrapped()  # dynamo leaves a bare nn.Sequential alone
    names = {name for name, _ in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if in_place:
        model.compile(fullgraph=True, backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _, memory = watched(compiled, optimizer)

    expected = train(compiled, optimizer, 3)

    assert_close(norms_of(memory.snapshots), expected)
    assert set(memory.snapshots[0].names) == names
    assert memory.snapshots[0].tensors.order_source == "registration"


def test_a_compiled_optimizer_step_is_seen():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    expected = []

    for index in range(4):
        inputs, labels = batch(index)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        expected.append(true_norm(model.parameters()))
        step()
        if index == 1:
            frames = counter.frame_count

    assert counter.frame_count == frames
    assert_close(norms_of(memory.snapshots), expected)


def test_under_compiled_autograd_the_step_hooks_see_it():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    expected = []

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        for step in range(3):
            inputs, labels = batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            expected.append(true_norm(model.parameters()))
            optimizer.step()

    assert_close(norms_of(memory.snapshots), expected)
