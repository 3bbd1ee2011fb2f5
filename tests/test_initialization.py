"""`init_` and `lsuv_` set the scale of a model before training, and touch nothing that is being trained."""

from __future__ import annotations

import math

import pytest
import torch
from loops import backward, mlp
from torch import nn
from torch.nn import functional

from gradwatch import ConfigurationError, init_, lsuv_


def spread(weight):
    return float(weight.detach().double().std())


def inputs(size=512, width=64):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(0))


def chain(*activations, width=256):
    layers = [nn.Linear(64, width)]
    for activation in activations:
        layers += [activation, nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 10))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.ReLU(), math.sqrt(2 / 64)),
        (nn.GELU(), math.sqrt(2 / 64)),
        (nn.SELU(), math.sqrt(1 / 64)),
        (nn.Sigmoid(), math.sqrt(2 / (64 + 256))),
    ],
)
def test_the_scale_follows_the_activation_that_comes_after(activation, expected):
    model = init_(chain(activation), inputs())

    assert spread(model[0].weight) == pytest.approx(expected, rel=0.05)
    assert not model[0].bias.any()


def test_tanh_gets_orthogonal_weights():
    model = init_(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)), inputs())

    product = model[0].weight.detach() @ model[0].weight.detach().T
    torch.testing.assert_close(product, torch.eye(64), atol=1e-4, rtol=0)


def test_activations_written_as_functions_count_and_norms_in_between_do_not_matter():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 10)

        def forward(self, batch):
            return self.last(functional.relu(self.norm(self.first(batch))))

    model = init_(Written(), (inputs(),))

    assert spread(model.first.weight) == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert spread(model.last.weight) == pytest.approx(math.sqrt(2 / 266), rel=0.1)


def test_convolutions_count_their_whole_window():
    model = init_(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)), torch.randn(2, 3, 8, 8))

    assert spread(model[0].weight) == pytest.approx(math.sqrt(2 / 27), rel=0.1)


def test_lsuv_gives_every_layer_unit_variance():
    model = lsuv_(chain(nn.ReLU(), nn.ReLU(), nn.Tanh()), inputs())

    hidden = inputs()
    for layer in model:
        hidden = layer(hidden)
        if isinstance(layer, nn.Linear):
            assert float(hidden.detach().std()) == pytest.approx(1.0, abs=0.06)


def test_lsuv_leaves_modes_and_buffers_as_they_were():
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 3))
    model[1].eval()

    lsuv_(model, inputs())

    assert [module.training for module in model] == [True, False, True, True, True]
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("initialise", [init_, lsuv_])
def test_what_is_zero_by_design_stays_zero(initialise):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    nn.init.zeros_(model[2].weight)

    initialise(model, inputs())

    assert not model[2].weight.any()
    assert model[0].weight.any()


@pytest.mark.parametrize("initialise", [init_, lsuv_])
def test_a_model_in_training_is_refused(initialise):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    initialise(model, inputs(width=8), optimizer=optimizer)
    backward(model)
    optimizer.step()

    with pytest.raises(ConfigurationError, match="this model is being trained"):
        initialise(model, inputs(width=8), optimizer=optimizer)
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("initialise", [init_, lsuv_])
def test_a_model_without_such_layers_is_refused(initialise):
    with pytest.raises(ConfigurationError, match="runs no linear or convolutional layer"):
        initialise(nn.LayerNorm(8), torch.randn(4, 8))


@pytest.mark.parametrize("initialise", [init_, lsuv_])
def test_no_hook_stays_behind(initialise):
    model = mlp()

    initialise(model, inputs(width=8))

    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
