"""The probe reads the forward pass as it is, at a few steps, and leaves nothing behind."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from loops import backward, batch, mlp, watched
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def trained(model, inputs, *, steps=1, rate=0.0, target=None, **options):
    """Train with a constant batch; return the snapshots."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    watch, memory = watched(model, optimizer, detectors=[], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(inputs)
        output = output[0] if isinstance(output, tuple) else output
        (output.square().mean() if target is None else functional.cross_entropy(output, target)).backward()
        optimizer.step()
    watch.close()
    return list(memory.snapshots)


def rms(values):
    return float(values.double().square().mean().sqrt())


class Written(nn.Module):
    """Activations as functions and methods, a product with a parameter, and no module but the linear one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, inputs):
        hidden = functional.relu(self.first(inputs))
        return torch.sigmoid((hidden @ self.weight).tanh())


def test_operations_are_found_as_modules_and_as_functions():
    modules, written = (
        trained(m, batch()[0])[0].modules for m in (nn.Sequential(nn.Linear(8, 3), nn.Tanh()), Written())
    )

    assert list(zip(modules.modules, modules.operations, strict=True)) == [("0", "linear"), ("1", "tanh")]
    assert written.operations == ("linear", "relu", "linear", "tanh", "sigmoid")
    assert written.modules == ("first", "", "", "", "")


def test_sizes_of_input_output_and_gradient_are_those_of_float64():
    model, (inputs, _) = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), batch()
    seen = [inputs]
    for layer in model:
        seen.append(layer(seen[-1]))
        seen[-1].retain_grad()
    seen[-1].square().mean().backward()

    modules = trained(model, inputs)[0].modules

    np.testing.assert_allclose(modules.input_rms, [rms(x.detach()) for x in seen[:-1]], rtol=1e-5)
    np.testing.assert_allclose(modules.output_rms, [rms(x.detach()) for x in seen[1:]], rtol=1e-5)
    np.testing.assert_allclose(modules.gradient_rms, [rms(x.grad) for x in seen[1:]], rtol=1e-5)
    assert modules.elements.tolist() == [x.numel() for x in seen[1:]]
    assert modules.dtypes == ("float32",) * 3


@pytest.mark.parametrize(
    ("module", "low", "high"),
    [
        (nn.Tanh(), lambda y: y < -0.975, lambda y: y > 0.975),
        (nn.Sigmoid(), lambda y: y < 0.0127, lambda y: y > 0.9873),
        (nn.Hardtanh(), lambda y: y < -0.999, lambda y: y > 0.999),
    ],
)
def test_saturated_shares_count_both_ends(module, low, high):
    model, (inputs, _) = nn.Sequential(nn.Linear(8, 30), module), batch()
    with torch.no_grad():
        model[0].weight.mul_(6)
        output = model(inputs)

    modules = trained(model, inputs)[0].modules

    assert modules.low[1] == pytest.approx(float(low(output).float().mean()))
    assert modules.high[1] == pytest.approx(float(high(output).float().mean()))


def test_a_softmax_counts_its_rows_that_are_nearly_one_hot():
    model, (inputs, _) = nn.Sequential(nn.Linear(8, 5), nn.Softmax(-1)), batch()
    with torch.no_grad():
        model[0].weight.mul_(30)
        confident = float((model(inputs).amax(-1) > 0.99).float().mean())

    modules = trained(model, inputs)[0].modules

    assert 0 < confident < 1
    assert modules.high[1] == pytest.approx(confident)


@pytest.mark.parametrize("shape", ["features", "pixels"])
def test_inactive_units_are_those_that_no_sample_activates(shape):
    layer = nn.Linear(8, 10) if shape == "features" else nn.Conv2d(1, 10, 3)
    inputs = torch.randn(16, 8) if shape == "features" else torch.randn(16, 1, 6, 6)
    with torch.no_grad():
        layer.bias[:4] = -100.0

    modules = trained(nn.Sequential(layer, nn.ReLU(inplace=True)), inputs)[0].modules

    assert modules.inactive[1] == pytest.approx(0.4)


def test_what_differs_between_samples_is_their_share_of_the_mean_square():
    model, (inputs, _) = nn.Sequential(nn.Linear(8, 6)), batch()
    output = model(inputs).detach().double()

    modules = trained(model, inputs)[0].modules

    expected = output.var(0, unbiased=False).mean() / output.square().mean()
    assert modules.between[0] == pytest.approx(float(expected), rel=1e-5)


def test_attention_logits_are_read_fused_and_in_torchs_own_layers():
    query = torch.randn(2, 4, 5, 8)

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, inputs):
            return functional.scaled_dot_product_attention(inputs * self.scale, inputs, inputs)

    fused = trained(Fused(), query)[0].modules
    own = nn.MultiheadAttention(8, 2, bias=False)
    tokens = torch.randn(5, 3, 8)
    heads = trained(OwnAttention(own), tokens)[0].modules
    width = 4
    q, k = (tokens[:, :1] @ own.in_proj_weight[i * 8 : i * 8 + 8, :].T for i in (0, 1))
    expected = rms((q[:, 0, :width] @ k[:, 0, :width].T).detach()) / width**0.5

    assert fused.logits[0] == pytest.approx(rms(query[0, 0] @ query[0, 0].T) / 8**0.5, rel=1e-5)
    assert heads.operations == ("attention",)
    assert heads.logits[0] == pytest.approx(expected, rel=1e-5)


class OwnAttention(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(inputs, inputs, inputs)[0]


def test_batch_norm_in_evaluation_mode_is_noticed_while_the_rest_trains():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    training = trained(model, batch()[0])[0].modules
    model[1].eval()
    frozen = trained(model, batch()[0])[0].modules
    wholly = trained(model.eval(), batch()[0])[0].modules

    assert training.frozen_statistics == ()
    assert frozen.frozen_statistics == wholly.frozen_statistics == ("1",)


def test_what_ends_a_gradients_way_is_named_with_its_place():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, inputs):
            return self.head(self.encoder(inputs).detach())

    modules = trained(Cut(), batch()[0])[0].modules

    assert modules.cuts == (": detach",)
    assert modules.ran == {"", "encoder", "head"}


def test_evaluation_and_forward_passes_without_gradients_are_not_read():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer, detectors=[])
    backward(model)
    optimizer.step()
    with torch.no_grad():
        model(1e6 * batch()[0])
    model.eval()
    model(1e6 * batch()[0])
    model.train()
    backward(model, 1)
    optimizer.step()
    watch.close()

    assert memory.snapshots[1].input.max_abs == pytest.approx(float(batch(1)[0].abs().max()))


def test_the_batch_is_read_at_every_step_and_the_probe_at_few():
    snapshots = trained(mlp(), batch()[0], steps=110)

    assert all(snapshot.input is not None for snapshot in snapshots)
    assert [s.step for s in snapshots if s.modules is not None] == [0, 1, 2, 50, 51, 100, 101]
    assert snapshots[7].input.rms == pytest.approx(rms(batch()[0]), rel=1e-5)


def test_the_largest_batch_of_an_accumulation_window_counts():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer, detectors=[])
    for factor in (1.0, 50.0, 1.0):
        model(factor * batch()[0]).square().mean().backward()
    optimizer.step()
    watch.close()

    assert memory.snapshots[0].input.max_abs == pytest.approx(50 * float(batch()[0].abs().max()), rel=1e-5)


def test_a_non_finite_input_is_seen():
    inputs = batch()[0].clone()
    inputs[3, 2] = math.nan

    assert not math.isfinite(trained(mlp(), inputs)[0].input.max_abs)


def test_token_numbers_give_no_reading_of_the_batch():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(32, 3))

    assert trained(model, torch.randint(0, 10, (5, 4)))[0].input is None


def test_a_model_whose_parts_are_called_one_by_one_is_read_from_the_second_step_on():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer, detectors=[])
    for step in range(3):
        optimizer.zero_grad()
        model["b"](torch.relu(model["a"](batch(step)[0]))).square().mean().backward()
        optimizer.step()
    watch.close()

    assert memory.snapshots[0].modules is None
    assert memory.snapshots[1].modules.modules == ("a", "b")
    assert memory.snapshots[1].input.rms == pytest.approx(rms(batch(1)[0]), rel=1e-5)


def test_no_hook_of_the_probe_stays_between_its_steps():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, _ = watched(model, optimizer, detectors=[])
    for step in range(5):
        backward(model, step)
        optimizer.step()
    during = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model]
    copy.deepcopy(model)
    pickle.dumps(model)
    watch.detach()

    assert during == [0] * len(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_an_exception_in_the_forward_pass_ends_the_reading_with_it():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fails = nn.Linear(8, 3), True

        def forward(self, inputs):
            hidden = self.inner(inputs)
            if self.fails:
                raise ValueError("as planned")
            return hidden

    model = Fails()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer, detectors=[])
    with pytest.raises(ValueError, match="as planned"):
        model(batch()[0])
    torch.relu(batch()[0])  # outside: nobody reads it
    model.fails = False
    backward(model)
    optimizer.step()
    watch.close()

    assert memory.snapshots[0].modules is not None
    assert "relu" not in memory.snapshots[0].modules.operations
    assert not model.inner._forward_hooks


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_train_as_before(reentrant):
    def gradients(*, watching):
        torch.manual_seed(0)
        model = mlp(depth=3)
        outer = Checkpointed(model, reentrant=reentrant)
        optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
        watch = watched(outer, optimizer, detectors=[])[0] if watching else None
        for step in range(3):
            optimizer.zero_grad()
            outer(batch(step)[0].requires_grad_()).square().mean().backward()
            optimizer.step()
        if watch is not None:
            watch.close()
        return [p.clone() for p in outer.parameters()]

    assert all(map(torch.equal, gradients(watching=False), gradients(watching=True)))


class Checkpointed(nn.Module):
    def __init__(self, inner, *, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, inputs):
        return checkpoint(self.inner, inputs, use_reentrant=self.reentrant)


def jacobian_decades(cell, weights, sequence, width, *, memory=False):
    """The reference: the state's Jacobian over all steps, in float64, applied to many random vectors."""
    states = [
        torch.zeros(sequence.shape[1], width, dtype=torch.float64, requires_grad=True)
        for _ in range(2 if memory else 1)
    ]
    start, last = states[-1], states
    for step in sequence:
        last = list(cell(step, last if memory else last[0], *weights)) if memory else [cell(step, last[0], *weights)]
    vector = torch.randn(sequence.shape[1], width, dtype=torch.float64)
    back = torch.autograd.grad(last[-1], start, vector)[0]
    return float(torch.log10(back.norm() / vector.norm()))


CELLS = {nn.RNN: torch.rnn_tanh_cell, nn.GRU: torch.gru_cell, nn.LSTM: torch.lstm_cell}


@pytest.mark.parametrize("kind", list(CELLS))
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}, {"num_layers": 2}])
def test_decades_over_time_are_those_of_the_jacobian(kind, options):
    torch.manual_seed(1)
    cell, steps = kind(4, 12, **options), 40
    inputs = torch.randn(3, steps, 4) if options.get("batch_first") else torch.randn(steps, 3, 4)

    recurrence = trained(cell, inputs)[0].modules.recurrences[0]

    sequence = (inputs.transpose(0, 1) if options.get("batch_first") else inputs).double()
    weights = [w.double() for n, w in cell.named_parameters() if n.endswith("_l0")]
    expected = jacobian_decades(CELLS[kind], weights, sequence, 12, memory=kind is nn.LSTM)
    assert recurrence.cell == kind.__name__
    assert recurrence.steps == steps
    # The largest over layers and directions; one random vector tells it to about a decade in ten.
    assert recurrence.decades >= expected - 1.5
    if not options or options == {"batch_first": True}:
        assert recurrence.decades == pytest.approx(expected, abs=1.5)


def test_a_gradient_of_1e60_over_a_long_sequence_is_still_a_number():
    cell = nn.RNN(4, 12)
    with torch.no_grad():
        cell.weight_hh_l0.mul_(0.05)

    recurrence = trained(cell, torch.randn(60, 3, 4))[0].modules.recurrences[0]

    assert -150 < recurrence.decades < -50


@pytest.mark.parametrize(("kind", "first"), [(nn.RNN, 0), (nn.GRU, 16), (nn.LSTM, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_candidate_states_that_the_inputs_saturate_are_counted(kind, first, bias):
    cell, inputs = kind(4, 8, batch_first=True, bias=bias), 12 * torch.randn(3, 30, 4)

    recurrence = trained(cell, inputs)[0].modules.recurrences[0]

    driven = inputs.double() @ cell.weight_ih_l0[first : first + 8].double().mT
    driven = driven + cell.bias_ih_l0[first : first + 8].double() if bias else driven
    assert recurrence.saturated == pytest.approx(float((driven.tanh().abs() > 0.975).double().mean()), abs=1e-6)
    assert 0.2 < recurrence.saturated < 1


def test_a_recurrence_without_a_tanh_saturates_nothing():
    assert np.isnan(
        trained(nn.RNN(4, 8, nonlinearity="relu"), torch.randn(30, 3, 4))[0].modules.recurrences[0].saturated
    )


def test_where_the_loss_enters_is_told_apart():
    class Last(nn.Module):
        def __init__(self, *, every):
            super().__init__()
            self.cell, self.every = nn.GRU(4, 8), every

        def forward(self, inputs):
            outputs = self.cell(inputs)[0]
            return outputs if self.every else outputs[-1]

    last, every = (trained(Last(every=e), torch.randn(30, 3, 4))[0].modules.recurrences[0] for e in (False, True))

    assert last.last_tenth == pytest.approx(1.0)
    assert every.last_tenth < 0.5


def test_a_recurrence_written_as_a_loop_is_read_from_its_calls():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNNCell(4, 8)
            nn.init.normal_(self.cell.weight_hh, std=0.05)

        def forward(self, inputs):
            state = inputs.new_zeros(inputs.shape[1], 8)
            for step in inputs:
                state = self.cell(step, state)
            return state

    recurrences = trained(Loop(), torch.randn(25, 3, 4))[0].modules.recurrences

    assert [(r.module, r.cell, r.steps) for r in recurrences] == [("cell", "loop", 25)]
    assert recurrences[0].decades < -10


def test_reading_does_not_touch_the_random_numbers_of_the_run():
    def state(*, watching):
        torch.manual_seed(3)
        cell = nn.GRU(4, 8, dropout=0.0)
        if watching:
            trained(cell, torch.ones(6, 2, 4))
        return torch.randn(3)

    torch.manual_seed(3)
    nn.GRU(4, 8)
    assert torch.equal(torch.randn(3), state(watching=True))


def test_a_compiled_model_is_read_on_request_only():
    def modules(probe):
        torch.compiler.reset()
        model = torch.compile(mlp(), backend="eager")
        return trained(model, batch()[0], probe=probe)[0].modules

    assert modules(None) is None
    assert modules(True).operations[:2] == ("linear", "tanh")  # noqa: FBT003


def test_the_probe_can_be_switched_off():
    snapshot = trained(mlp(), batch()[0], probe=False)[0]

    assert snapshot.modules is None
    assert snapshot.input is not None


def test_a_failing_probe_switches_itself_off_and_training_goes_on(monkeypatch, caplog):
    monkeypatch.setattr("gradwatch.attach.forward.Recorder", lambda: 1 / 0)

    snapshots = trained(mlp(), batch()[0], steps=3)

    assert len(snapshots) == 3
    assert all(snapshot.modules is None for snapshot in snapshots)
    assert caplog.text.count("reading the forward pass failed") == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["func", "trace", "export"])
def test_passes_that_stand_for_something_else_are_not_read(how):
    model, (inputs, _) = mlp(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer, detectors=[])
    if how == "func":
        parameters = dict(model.named_parameters())

        def loss(weights, sample):
            return torch.func.functional_call(model, weights, (sample,)).square().sum()

        torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, 1e6 * inputs)
    elif how == "trace":
        assert list(torch.jit.trace(model, 1e6 * inputs, check_trace=False).graph.nodes())
    else:
        torch.export.export(model, (1e6 * inputs,))
    backward(model)
    optimizer.step()
    watch.close()

    assert memory.snapshots[0].input.max_abs < 10
    assert memory.snapshots[0].modules.operations[0] == "linear"
