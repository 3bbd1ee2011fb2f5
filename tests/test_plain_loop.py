"""Ordinary loops, nothing in them changed: each optimizer step is seen once, with its true gradient."""

from __future__ import annotations

import pytest
import torch
from loops import assert_close, backward, batch, mlp, norms_of, train, true_norm, watched
from torch import nn


def test_each_step_is_seen_once_with_the_norm_of_the_gradients():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer)

    expected = train(model, optimizer, 30)

    assert [snapshot.step for snapshot in memory.snapshots] == list(range(30))
    assert_close(norms_of(memory.snapshots), expected)
    assert {snapshot.source for snapshot in memory.snapshots} == {"backward"}
    assert watch.latest is memory.snapshots[-1]


def test_the_norm_before_the_users_clipping_is_shown_and_the_one_after_it_beside_it():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    expected, clipped = [], []

    for step in range(5):
        optimizer.zero_grad()
        backward(model, step, factor=10.0)
        expected.append(true_norm(model.parameters()))
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        clipped.append(true_norm(model.parameters()))
        optimizer.step()

    assert_close(norms_of(memory.snapshots), expected)
    assert_close([s.clipped_norm for s in memory.snapshots], clipped, rtol=1e-4)
    ratios = [after / before for after, before in zip(clipped, expected, strict=True)]
    assert_close([s.clip_coefficient for s in memory.snapshots], ratios, rtol=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "foreach"])
def test_clipping_by_value_has_a_norm_but_no_coefficient(backend):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer, backend=backend)

    backward(model)
    nn.utils.clip_grad_value_(model.parameters(), 0.01)
    clipped = true_norm(model.parameters())
    optimizer.step()

    (snapshot,) = memory.snapshots
    assert_close([snapshot.clipped_norm], [clipped], rtol=1e-5)
    assert snapshot.clip_coefficient is None


@pytest.mark.parametrize("backend", ["cpu", "foreach"])
def test_clipping_one_group_only_is_measured_in_full(backend):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer, backend=backend)

    backward(model)
    nn.utils.clip_grad_norm_(model[0].parameters(), 1e-3)
    clipped = true_norm(model.parameters())
    optimizer.step()

    (snapshot,) = memory.snapshots
    assert_close([snapshot.clipped_norm], [clipped], rtol=1e-5)
    assert snapshot.clip_coefficient is None


def test_without_clipping_nothing_is_said_about_it():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    train(model, optimizer, 2)

    assert [s.clipped_norm for s in memory.snapshots] == [None, None]
    assert [s.clip_coefficient for s in memory.snapshots] == [None, None]


def test_accumulation_shows_the_whole_window_once_and_before_clipping():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    expected = []

    for step in range(4):
        optimizer.zero_grad()
        for micro in range(3):
            backward(model, 10 * step + micro, factor=1 / 3)
        expected.append(true_norm(model.parameters()))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    assert_close(norms_of(memory.snapshots), expected)
    assert all(s.clip_coefficient is not None and s.clip_coefficient < 0.1 for s in memory.snapshots)


def test_a_shorter_last_window_is_measured_at_the_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    for window in (3, 3, 1):
        optimizer.zero_grad()
        for micro in range(window):
            backward(model, micro)
        last = true_norm(model.parameters())
        optimizer.step()

    assert [s.source for s in memory.snapshots] == ["backward", "backward", "step"]
    assert_close([memory.snapshots[-1].global_norm], [last])


@pytest.mark.parametrize("positional", [True, False])
def test_a_closure_is_observed_after_its_first_evaluation_and_its_value_is_returned(positional):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    expected, returned = [], []

    def closure():
        optimizer.zero_grad()
        loss = backward(model)
        expected.append(true_norm(model.parameters()))
        return loss

    for _ in range(3):
        loss = optimizer.step(closure) if positional else optimizer.step(closure=closure)
        returned.append(loss)

    assert_close(norms_of(memory.snapshots), expected)
    assert all(isinstance(loss, torch.Tensor) for loss in returned)


def test_lbfgs_shows_its_first_evaluation_and_counts_one_step():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    _, memory = watched(model, optimizer)
    norms = []

    def closure():
        optimizer.zero_grad()
        loss = backward(model)
        norms.append(true_norm(model.parameters()))
        return loss

    optimizer.step(closure)
    first_of_second_step = len(norms)
    optimizer.step(closure)

    assert first_of_second_step > 1
    assert_close(norms_of(memory.snapshots), [norms[0], norms[first_of_second_step]])
    assert all((s.update_ratio > 0).all() for s in memory.snapshots)


def test_gradients_made_by_hand_are_seen_at_the_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    backward(model)
    optimizer.zero_grad()

    inputs, labels = batch()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    for parameter, gradient in zip(
        model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        parameter.grad = gradient * 2
    expected = true_norm(model.parameters())
    optimizer.step()

    (snapshot,) = memory.snapshots
    assert snapshot.source == "step"
    assert_close([snapshot.global_norm], [expected])
    assert snapshot.clipped_norm is None


def test_a_gradient_penalty_is_one_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    inputs, _ = batch()
    inputs.requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    slope.pow(2).sum().backward()
    expected = true_norm(model.parameters())
    optimizer.step()

    (snapshot,) = memory.snapshots
    assert_close([snapshot.global_norm], [expected])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_seen_complete(reentrant):
    model = mlp(depth=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    expected = []

    for step in range(3):
        inputs, labels = batch(step)
        hidden = model[:2](inputs)
        hidden = torch.utils.checkpoint.checkpoint(model[2:6], hidden, use_reentrant=reentrant)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model[6:](hidden), labels).backward()
        expected.append(true_norm(model.parameters()))
        optimizer.step()

    assert_close(norms_of(memory.snapshots), expected)


def test_an_exception_inside_backward_does_not_blind_the_next_one():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    inputs, _ = batch()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(_context, value):
            return value.clone()

        @staticmethod
        def backward(_context, _gradient):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        model[2:](Fails.apply(model[:2](inputs))).sum().backward()
    optimizer.zero_grad()
    expected = train(model, optimizer, 2)

    assert_close(norms_of(memory.snapshots), expected)
    assert [s.source for s in memory.snapshots] == ["backward", "backward"]


def test_a_step_that_raises_is_not_counted():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    def closure():
        backward(model)
        raise RuntimeError("user")

    with pytest.raises(RuntimeError, match="user"):
        optimizer.step(closure)
    optimizer.zero_grad()
    expected = train(model, optimizer, 2)

    assert [s.step for s in memory.snapshots] == [0, 1]
    assert_close(norms_of(memory.snapshots), expected)


def test_two_optimizers_have_a_lane_each_with_their_own_parameters_only():
    generator, critic = nn.Linear(4, 8), mlp()
    opt_g = torch.optim.Adam(generator.parameters(), lr=1e-3)
    opt_d = torch.optim.SGD(critic.parameters(), lr=0.1)
    watch, memory = watched({"g": generator, "d": critic}, {"g": opt_g, "d": opt_d})
    expected = []

    for _ in range(3):
        for _ in range(2):
            opt_d.zero_grad()
            critic(generator(torch.randn(16, 4)).detach()).sum().backward()
            expected.append(("d", true_norm(critic.parameters())))
            opt_d.step()
        opt_g.zero_grad()
        critic(generator(torch.randn(16, 4))).sum().backward()  # fills the critic's gradients too
        expected.append(("g", true_norm(generator.parameters())))
        opt_g.step()

    assert [s.optimizer for s in memory.snapshots] == [name for name, _ in expected]
    assert_close(norms_of(memory.snapshots), [norm for _, norm in expected])
    assert [s.step for s in memory.snapshots if s.optimizer == "g"] == [0, 1, 2]
    assert memory.snapshots[0].names[0].startswith("d.0.")
    assert watch.alerts == ()


def test_the_users_own_step_hooks_still_run_and_see_the_same_gradients():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(true_norm(model.parameters())))
    _, memory = watched(model, optimizer)

    train(model, optimizer, 3)

    assert_close(norms_of(memory.snapshots), seen)


def test_a_loop_that_updates_by_hand_is_driven_by_step():
    model = mlp()
    watch, memory = watched(model, None)
    expected = []

    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = None
        backward(model, step)
        expected.append(true_norm(model.parameters()))
        watch.observe()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        watch.step()

    assert_close(norms_of(memory.snapshots), expected)


def test_calling_step_where_hooks_saw_it_already_counts_nothing_twice():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer)

    for step in range(3):
        train(model, optimizer, 1, start=step)
        watch.step()

    assert len(memory.snapshots) == 3


def test_a_step_without_any_gradient_is_a_skipped_step_and_no_norm_of_zero():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    optimizer.step()

    (snapshot,) = memory.snapshots
    assert snapshot.skipped
    assert snapshot.global_norm is None


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_the_learning_rate_is_read_whether_number_or_tensor(rate):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=False)
    _, memory = watched(model, optimizer)

    train(model, optimizer, 1)

    assert memory.snapshots[0].learning_rates == pytest.approx((0.1,))


def test_several_losses_before_one_step_are_averaged():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer)

    for losses in ((1.0, 3.0), (torch.tensor(5.0),), ()):
        for loss in losses:
            watch.log_loss(loss)
        train(model, optimizer, 1)

    assert [s.loss for s in memory.snapshots] == [2.0, 5.0, None]


def test_a_loss_changed_in_place_afterwards_keeps_its_value():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer)
    loss = torch.tensor(4.0)

    watch.log_loss(loss)
    loss.mul_(0)
    train(model, optimizer, 1)

    assert memory.snapshots[0].loss == 4.0


def test_a_loss_goes_to_the_named_optimizer_or_to_whichever_steps_next():
    g, d = mlp(), mlp()
    opt_g, opt_d = torch.optim.SGD(g.parameters(), lr=0.1), torch.optim.SGD(d.parameters(), lr=0.1)
    watch, memory = watched({"g": g, "d": d}, {"g": opt_g, "d": opt_d})

    watch.log_loss(1.0)
    train(d, opt_d, 1)
    watch.log_loss(2.0, optimizer="d")
    watch.log_loss(3.0, optimizer="g")
    train(g, opt_g, 1)
    train(d, opt_d, 1)

    assert [(s.optimizer, s.loss) for s in memory.snapshots] == [("d", 1.0), ("g", 3.0), ("d", 2.0)]


def test_nothing_is_seen_while_paused():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, memory = watched(model, optimizer)

    train(model, optimizer, 1)
    with watch.paused():
        train(model, optimizer, 5)
    train(model, optimizer, 1)

    assert [s.step for s in memory.snapshots] == [0, 1]


def test_an_optimizer_that_steps_inside_backward_is_seen_once_a_step():
    model = mlp()
    optimizers = {name: torch.optim.SGD([parameter], lr=0.1) for name, parameter in model.named_parameters()}
    _, memory = watched(model, optimizers)
    for name, parameter in model.named_parameters():

        def update(_parameter, optimizer=optimizers[name]):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)

    for step in range(3):
        backward(model, step)

    counts = {name: sum(s.optimizer == name for s in memory.snapshots) for name in optimizers}
    assert set(counts.values()) == {3}
    assert all(s.global_norm is not None and s.global_norm > 0 for s in memory.snapshots)


def test_two_optimizers_over_shared_parameters_each_see_them():
    model = mlp()
    both = {
        "all": torch.optim.SGD(model.parameters(), lr=0.1),
        "head": torch.optim.SGD(model[-1].parameters(), lr=0.1),
    }
    _, memory = watched(model, both)

    backward(model)
    norms = [true_norm(model.parameters()), true_norm(model[-1].parameters())]
    for optimizer in both.values():
        optimizer.step()

    assert_close(norms_of(memory.snapshots), norms)


def test_a_graph_that_is_walked_twice_is_one_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)

    inputs, labels = batch()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward(retain_graph=True)
    loss.backward()
    expected = true_norm(model.parameters())
    optimizer.step()

    (snapshot,) = memory.snapshots
    assert_close([snapshot.global_norm], [expected])


def test_a_closure_that_clips_shows_the_norm_before_it():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, memory = watched(model, optimizer)
    expected = []

    def closure():
        optimizer.zero_grad()
        loss = backward(model)
        expected.append(true_norm(model.parameters()))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss

    optimizer.step(closure)

    assert_close(norms_of(memory.snapshots), expected)
    assert memory.snapshots[0].clipped_norm == pytest.approx(1e-3, rel=1e-2)


def test_a_step_that_nobody_observed_is_measured_by_step_itself():
    model = mlp()
    watch, memory = watched(model, None)
    with watch.paused():
        backward(model)

    watch.step()

    assert_close(norms_of(memory.snapshots), [true_norm(model.parameters())])


@pytest.mark.parametrize("log_every", [1, 3, 7, 10, 13, 50])
def test_logged_steps_bring_detail_and_detail_is_about_every_tenth_step(log_every):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    _, memory = watched(model, optimizer, log_every=log_every, detectors=[])

    train(model, optimizer, 320)

    detail = [s.step for s in memory.snapshots if s.detail and s.step >= 20]
    logged = [step for step in detail if step % log_every == 0]
    assert max(b - a for a, b in zip([20, *detail], [*detail, 320], strict=True)) <= 20
    assert len(detail) <= 55
    assert len(logged) >= min(300 // log_every, 15)
