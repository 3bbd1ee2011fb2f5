"""Names, patterns, order: which tensors are watched, and how they are called."""

from __future__ import annotations

import pytest
import torch
from loops import assert_close, backward, mlp, norms_of, train, true_norm, watched
from torch import nn
from torch.nn import functional

import gradwatch
from gradwatch.targets import Target, canonical_modules


def names(model: nn.Module, **options: object) -> list[str]:
    return [entry.name for entry in Target({"": model}, **options).scan()]


def order(model: nn.Module, output: torch.Tensor) -> list[str]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    model(output).sum().backward()
    optimizer.step()
    tensors = memory.snapshots[0].tensors
    assert tensors.order_source == "autograd"
    return list(tensors.names)


class Residual(nn.Module):
    """Registered in an order that is not the order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.second = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.stem = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(inputs)
        hidden = hidden + self.second(functional.relu(self.first(hidden)))
        return self.head(hidden)


def test_layers_come_in_depth_order_whatever_the_order_of_registration():
    layers = [name.split(".")[0] for name in order(Residual(), torch.randn(2, 4)) if name.endswith("weight")]

    assert layers == ["stem", "first", "second", "head"]


def test_a_residual_branch_is_not_in_series_and_the_stem_and_head_are():
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()

    tensors = memory.snapshots[0].tensors
    series = {name.split(".")[0]: bool(s) for name, s in zip(tensors.names, tensors.series, strict=True)}

    assert series == {"stem": True, "first": False, "second": False, "head": True}


def test_idle_experts_are_not_in_series():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.head = nn.Linear(4, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(sum(expert(inputs).tanh() for expert in self.experts))

    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()

    tensors = memory.snapshots[0].tensors
    in_series = {layer for layer, series in zip(tensors.layers, tensors.series, strict=True) if series}
    assert in_series == {"head"}


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.tensor([[1, 2]])),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)),
            torch.randn(2, 1, 4, 4),
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)),
            torch.randn(2, 4),
        ),
    ],
    ids=["embedding", "convolution", "weight_norm"],
)
def test_a_chain_is_in_series_from_end_to_end(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    model(inputs).sum().backward()
    optimizer.step()

    tensors = memory.snapshots[0].tensors
    assert tensors.series.all()
    assert [layer.split(".")[0] for layer in tensors.layers] == sorted(layer.split(".")[0] for layer in tensors.layers)


def test_outputs_in_mappings_and_dataclasses_are_walked():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, inputs: torch.Tensor) -> dict[str, object]:
            return {"logits": [self.inner(inputs)], "name": "x"}

    model = Wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    model(torch.randn(4, 8))["logits"][0].sum().backward()
    optimizer.step()

    assert memory.snapshots[0].tensors.order_source == "autograd"


def test_an_evaluation_first_does_not_spoil_the_order():
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    with torch.no_grad():
        model(torch.randn(2, 4))
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()

    assert memory.snapshots[0].tensors.order_source == "autograd"


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_names_lose_what_wrappers_add_and_keep_what_users_chose():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert names(nn.DataParallel(Named())) == ["module.weight", "module.bias"]
    assert names(torch.compile(nn.DataParallel(mlp(depth=1))))[0] == "0.weight"
    assert names(torch.optim.swa_utils.AveragedModel(mlp(depth=1)))[0] == "0.weight"


def test_several_models_put_their_names_in_front():
    target = Target({"g": mlp(depth=1), "d": mlp(depth=1)})

    assert [entry.name for entry in target.scan()][::4] == ["g.0.weight", "d.0.weight"]


def test_patterns_are_globs_lists_of_globs_or_functions():
    model = mlp(depth=1)

    assert names(model, include="*.bias") == ["0.bias", "2.bias"]
    assert names(model, exclude=["0.*", "nothing"]) == ["2.weight", "2.bias"]
    assert names(model, include=lambda _name, parameter: parameter.dim() == 2) == ["0.weight", "2.weight"]


def test_modules_are_listed_once_each():
    shared = nn.Linear(2, 2)

    listed = [name for name, _ in canonical_modules(nn.Sequential(shared, nn.Tanh(), shared))]

    assert listed == ["", "0", "1"]


def test_a_tied_parameter_is_measured_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    model(torch.tensor([1, 2])).logsumexp(-1).sum().backward()
    expected = true_norm(model.parameters())
    optimizer.step()

    assert memory.snapshots[0].names == ("0.weight",)
    assert_close(norms_of(memory.snapshots), [expected])


def test_frozen_parameters_are_left_out_and_noticed_at_the_step_that_unfreezes_them():
    model = mlp()
    model[0].requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    first = train(model, optimizer, 23)
    model[0].requires_grad_(requires_grad=True)
    then = train(model, optimizer, 2)

    assert "0.weight" not in memory.snapshots[22].names
    assert "0.weight" in memory.snapshots[23].names
    assert_close(norms_of(memory.snapshots), first + then)


def test_a_lazy_layer_is_picked_up_when_it_exists():
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    expected = train(model, optimizer, 2)

    assert memory.snapshots[0].names[0] == "0.weight"
    assert_close(norms_of(memory.snapshots), expected)


def test_a_group_added_later_is_picked_up_at_once():
    model = mlp()
    optimizer = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    train(model, optimizer, 25)
    optimizer.add_param_group({"params": list(model[2:].parameters()), "lr": 0.01})
    train(model, optimizer, 1)

    assert memory.snapshots[24].tensors.groups.max() == 0
    assert memory.snapshots[25].tensors.groups.max() == 1
    assert memory.snapshots[25].learning_rates == (0.1, 0.01)


def test_sparse_complex_empty_and_scalar_tensors_stand_beside_each_other():
    class Zoo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse = nn.Embedding(10, 4, sparse=True)
            self.complex = nn.Parameter(torch.randn(4, dtype=torch.complex64))
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.short = nn.Parameter(torch.randn(4).bfloat16())
            self.unused = nn.Parameter(torch.randn(3))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = self.sparse(inputs).sum(0) * self.scalar + self.short.float()
            return (hidden * self.complex.abs()).sum() + self.empty.sum()

    model = Zoo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer)

    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([1, 1, 2])).backward()
        expected = {
            name: float(
                p.grad.coalesce().values().norm()
                if p.grad.is_sparse
                else torch.view_as_real(p.grad).norm()
                if p.grad.is_complex()
                else p.grad.float().norm()
            )
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        optimizer.step()

    snapshot = memory.snapshots[-1]
    seen = dict(zip(snapshot.names, snapshot.norm, strict=True))
    assert_close([seen[name] for name in expected], expected.values(), rtol=1e-3)
    assert snapshot.state[snapshot.tensors.index["unused"]] == 0
    assert not watch.lanes[""].part.failed


def test_a_tensor_in_no_optimizer_is_shown_and_does_not_enter_the_global_norm():
    model = mlp()
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    backward(model)
    expected = true_norm(model[2:].parameters())
    optimizer.step()

    (snapshot,) = memory.snapshots
    assert_close([snapshot.global_norm], [expected])
    assert snapshot.tensors.groups[snapshot.tensors.index["0.weight"]] == -1


def test_a_tensor_of_an_optimizer_that_nobody_watches_is_no_orphan():
    model = mlp()
    mine = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    others = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    watch, memory = watched(model, mine)

    for step in range(30):
        mine.zero_grad()
        others.zero_grad()
        backward(model, step)
        others.step()
        mine.step()

    assert "0.weight" not in memory.snapshots[-1].names
    assert watch.alerts == ()


def test_watch_is_a_function_and_no_submodule_hides_it():
    assert callable(gradwatch.watch)
