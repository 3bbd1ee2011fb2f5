"""Each transform against its equation in float64, and against what breaks the published ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradwatch import (
    AdaGC,
    AdaptiveGradientClip,
    AutoClip,
    ClipByGlobalNorm,
    ClipByTensorNorm,
    ClipByValue,
    ConfigurationError,
    DryRun,
    SkipNonfinite,
    SkipSpike,
    ZClip,
)
from gradwatch.transforms.gradients import Gradients
from gradwatch.transforms.memory import REARM

ADAPTIVE = [AutoClip, ZClip, AdaGC, SkipSpike]
sizes = st.floats(1e-3, 1e3)
seeds = st.integers(0, 2**31)


def gradients(values, *, names=None, params=None, dtype=torch.float32, divisor=None, loss=None):
    """A step with these gradients, lists of numbers or tensors."""
    grads = [torch.as_tensor(value, dtype=dtype).clone() for value in values]
    params = [torch.ones_like(grad) for grad in grads] if params is None else params
    names = [f"layer{i}.weight" for i in range(len(grads))] if names is None else names
    made = Gradients(
        names,
        params,
        grads,
        torch.zeros(len(grads), dtype=torch.float64),
        nonfinite=torch.zeros((), dtype=torch.bool),
        divisor=divisor,
        loss=loss,
    )
    made.measure()
    return made


def applied(transform, step):
    """Run one transform and apply it; return the gradients as float64 arrays."""
    transform(step)
    step.apply()
    return [grad.double().numpy() for grad in step.grads]


def norms_after(transform, series):
    """Feed steps of a single tensor with these norms; return the norms after the transform."""
    after = []
    for norm in series:
        step = gradients([[norm]])
        after.append(abs(float(applied(transform, step)[0][0])))
    return after


def random_grads(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return [scale * generator.normal(size=shape) for shape in ((3, 4), (5,), (2, 2, 2))]


# -- fixed limits --------------------------------------------------------------------------------------------------


@given(seeds, sizes, sizes)
def test_clipping_by_global_norm_is_torchs(seed, scale, limit):
    values = random_grads(seed, scale)
    params = [nn.Parameter(torch.zeros(v.shape)) for v in values]
    for parameter, value in zip(params, values, strict=True):
        parameter.grad = torch.tensor(value, dtype=torch.float32)
    nn.utils.clip_grad_norm_(params, limit)

    ours = applied(ClipByGlobalNorm(limit), gradients(values))

    for mine, parameter in zip(ours, params, strict=True):
        np.testing.assert_allclose(mine, parameter.grad.numpy(), rtol=2e-6, atol=1e-12)
    assert math.sqrt(sum((mine**2).sum() for mine in ours)) <= limit * (1 + 1e-5)


@given(seeds, sizes, sizes)
def test_clipping_by_value_is_torchs(seed, scale, limit):
    values = random_grads(seed, scale)

    ours = applied(ClipByValue(limit), gradients(values))

    for mine, value in zip(ours, values, strict=True):
        np.testing.assert_allclose(mine, np.clip(value.astype(np.float32), -limit, limit), rtol=1e-6)


@given(seeds, sizes, sizes)
def test_clipping_by_tensor_norm_holds_each_tensor_to_its_limit(seed, scale, limit):
    values = random_grads(seed, scale)

    ours = applied(ClipByTensorNorm(limit), gradients(values))

    for mine, value in zip(ours, values, strict=True):
        expected = value * min(1.0, limit / (np.linalg.norm(value) + 1e-6))
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-12)


@given(seeds, st.floats(0.001, 0.5))
def test_adaptive_clipping_is_equation_3_for_every_unit(seed, ratio):
    generator = np.random.default_rng(seed)
    weights = [generator.normal(size=(4, 3, 2)), generator.normal(size=5), generator.normal(size=(2, 4))]
    values = [generator.normal(size=w.shape) for w in weights]
    names = ["a.weight", "a.bias", "head.weight"]
    step = gradients(values, names=names, params=[torch.tensor(w, dtype=torch.float32) for w in weights])

    ours = applied(AdaptiveGradientClip(ratio), step)

    for mine, value, weight in zip(ours[:2], values[:2], weights[:2], strict=True):
        axes = tuple(range(1, value.ndim))
        unit = lambda x, axes=axes: np.sqrt((x**2).sum(axes, keepdims=True)) if axes else np.abs(x)  # noqa: E731
        limit = ratio * np.maximum(unit(weight), 1e-3)
        expected = np.where(unit(value) > limit, value * limit / np.maximum(unit(value), 1e-6), value)
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(ours[2], values[2], rtol=1e-6)  # the head is left out


def test_adaptive_clipping_leaves_out_what_it_is_told_to():
    values = [np.full((2, 2), 9.0)] * 2
    step = gradients(values, names=["a.weight", "b.weight"])

    ours = applied(AdaptiveGradientClip(exclude="a.*"), step)

    assert ours[0].max() == 9.0
    assert ours[1].max() < 1.0


# -- adaptive limits -----------------------------------------------------------------------------------------------


def zclip_reference(series, z, alpha, warmup, ceiling):
    """Equations 2 to 7 with the fixes: a limit at all times, nothing from a bad step."""
    seen, mean, variance, streak, after = [], 0.0, 0.0, 0, []
    for norm in series:
        deviation = math.sqrt(max(variance, 0.0))
        outlier = len(seen) >= warmup and (norm - mean) / (deviation + 1e-6) > z
        score = (norm - mean) / (deviation + 1e-6)
        target = min(mean + z * z * deviation / score if outlier else norm, ceiling)
        if len(seen) >= warmup:
            moved = alpha * mean + (1 - alpha) * target
            variance = alpha * variance + (1 - alpha) * (target - moved) ** 2
            mean = moved
            seen.append(target)
        else:
            seen.append(target)
            mean, variance = float(np.mean(seen)), float(np.var(seen))
        streak = streak + 1 if outlier else 0
        if streak >= REARM:
            seen, mean, variance, streak = [], 0.0, 0.0, 0
        after.append(norm * min(1.0, target / (norm + 1e-6)))
    return after


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_zclip_is_its_equations_over_a_long_series_with_spikes(seed):
    generator = np.random.default_rng(seed)
    series = generator.lognormal(0, 0.3, 120) * np.where(generator.random(120) < 0.05, 30.0, 1.0)

    after = norms_after(ZClip(max_norm=50.0), series.tolist())

    np.testing.assert_allclose(after, zclip_reference(series.tolist(), 2.5, 0.97, 25, 50.0), rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(seeds, st.sampled_from([10.0, 50.0, 90.0]))
def test_autoclip_clips_at_the_percentile_of_its_ring(seed, percentile):
    series = np.random.default_rng(seed).lognormal(0, 0.3, 60)
    window = 20

    after = norms_after(AutoClip(percentile=percentile, window=window, warmup=5, max_norm=100.0), series.tolist())

    for step in range(5, 60):
        limit = np.quantile(series[max(0, step + 1 - window) : step + 1], percentile / 100)
        assert after[step] == pytest.approx(min(series[step], limit), rel=1e-4)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_adagc_is_its_equations_after_the_warm_up(seed):
    series = np.random.default_rng(seed).lognormal(0, 0.3, 60)
    warmup, beta, ratio = 10, 0.9, 1.5

    after = norms_after(AdaGC(ratio=ratio, beta=beta, warmup=warmup, max_norm=100.0), series.tolist())

    gamma = float(np.mean(series[:warmup]))
    streak = 0
    for step in range(warmup, 60):
        clipped = series[step] * min(1.0, ratio * gamma / series[step])
        assert after[step] == pytest.approx(clipped, rel=1e-4)
        gamma = beta * gamma + (1 - beta) * clipped
        streak = streak + 1 if clipped < series[step] else 0
        assert streak < REARM


@pytest.mark.parametrize("kind", [AutoClip, ZClip])
@pytest.mark.parametrize("factor", [2.0, 3.0, 10.0])
def test_a_lasting_shift_of_the_norm_is_believed_after_25_clipped_steps(kind, factor):
    generator = np.random.default_rng(0)
    usual = generator.lognormal(0, 0.05, 200)
    series = [*usual, *(factor * usual)]
    clipper = kind(max_norm=100.0)

    after = norms_after(clipper, series)

    clipped = [a < 0.999 * n for a, n in zip(after, series, strict=True)]
    assert all(clipped[200 : 200 + REARM])
    assert int(clipper.rearmed) >= 1
    assert np.mean(clipped[260:]) < 0.15


def test_a_tensor_of_adagc_that_is_clipped_25_times_begins_afresh():
    clipper = AdaGC(warmup=10, max_norm=100.0)

    after = norms_after(clipper, [1.0] * 30 + [10.0] * 40)

    assert after[31] < 2
    assert after[-1] == pytest.approx(10.0, rel=0.01)


def test_a_tensor_whose_gradient_was_once_zero_revives_under_adagc():
    clipper = AdaGC(warmup=5, max_norm=100.0)
    after = []
    for step in range(40):
        made = gradients([[1.0], [0.0 if step < 20 else 1.0]])
        after.append(float(applied(clipper, made)[1][0]))

    assert after[21] > 0.5
    assert after[-1] > 0.9


@pytest.mark.parametrize("kind", [AutoClip, ZClip, AdaGC])
def test_an_absolute_limit_holds_during_the_warm_up(kind):
    assert norms_after(kind(max_norm=2.0), [1e6] * 10) == pytest.approx([2.0] * 10, rel=1e-3)


def test_the_history_of_autoclip_is_bounded():
    clipper = AutoClip(window=50)

    norms_after(clipper, [1.0] * 200)

    assert len(clipper.state()["values"]) == 50


@pytest.mark.parametrize("kind", [AutoClip, ZClip, AdaGC])
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_a_norm_within_the_limit_is_left_alone_to_the_last_bit(kind, seed):
    series = np.sort(np.random.default_rng(seed).uniform(1.0, 5.0, 60))[::-1].tolist()

    assert norms_after(kind(max_norm=10.0), series) == np.float32(series).tolist()


# -- what is not finite --------------------------------------------------------------------------------------------

EVERY = [
    lambda: ClipByGlobalNorm(1.0),
    lambda: ClipByTensorNorm(1.0),
    lambda: ClipByValue(1.0),
    AdaptiveGradientClip,
    *ADAPTIVE,
    SkipNonfinite,
]


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 2))
def test_one_bad_element_reaches_no_other_one(seed, bad, place):
    for make in EVERY:
        values = random_grads(seed)
        values[place].reshape(-1)[0] = bad
        step = gradients(values)

        ours = applied(make(), step)

        finite = [np.isfinite(mine) for mine in ours]
        assert sum((~f).sum() for f in finite) <= (4 if make is AdaptiveGradientClip else 1)
        for mine, value in zip(ours, values, strict=True):
            assert np.isfinite(mine[np.isfinite(value)]).all() or make is AdaptiveGradientClip


@pytest.mark.parametrize("kind", ADAPTIVE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 3, 40, 130])
def test_a_bad_step_leaves_no_trace_in_the_memory(kind, bad, at):
    series = np.random.default_rng(1).lognormal(0, 0.2, 160).tolist()
    series[150] *= 50
    with_bad = [*series[:at], bad, *series[at:]]

    clean, spoiled = kind(), kind()
    expected = vetoes_and_norms(clean, series)
    got = vetoes_and_norms(spoiled, with_bad)
    del got[at]

    if kind is AdaGC:  # its warm-up counts steps
        assert all(math.isfinite(norm) for norm, _ in got)
        assert got[-1][0] == pytest.approx(expected[-1][0], rel=0.05)
    else:
        assert got == expected


def vetoes_and_norms(transform, series):
    found = []
    for norm in series:
        step = gradients([[norm]])
        value = abs(float(applied(transform, step)[0][0]))
        found.append((value, bool(step.skip)))
    return found


# -- skipping ------------------------------------------------------------------------------------------------------


def test_a_step_is_vetoed_for_a_bad_element_and_for_nothing_else():
    good, bad = gradients([[1.0], [2.0]]), gradients([[1.0], [math.nan]])
    transform = SkipNonfinite()
    transform(good)
    transform(bad)

    assert not good.skip
    assert bad.skip


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_a_spike_is_six_deviations_of_what_was_accepted(seed):
    generator = np.random.default_rng(seed)
    series = generator.lognormal(0, 0.2, 200)
    series[generator.integers(70, 200, 6)] *= 40
    accepted, expected = [], []
    for norm in series:
        window = accepted[-128:]
        spike = len(accepted) >= 64 and norm > np.mean(window) + max(6 * np.std(window, ddof=1), 2 * np.mean(window))
        expected.append(bool(spike))
        if not spike:
            accepted.append(norm)

    found = [vetoed for _, vetoed in vetoes_and_norms(SkipSpike(), series.tolist())]

    assert found == expected


def test_a_norm_of_less_than_three_means_is_no_spike_however_calm_the_window_is():
    series = [1.0 + 0.01 * (i % 2) for i in range(100)] + [2.8, 3.2]

    assert [vetoed for _, vetoed in vetoes_and_norms(SkipSpike(), series)][-2:] == [False, True]


def test_a_spike_of_the_loss_alone_is_skipped_too():
    transform = SkipSpike(warmup=10)
    steps = [gradients([[1.0 + 0.01 * (i % 3)]], loss=2.0 + 0.01 * (i % 2) + (50 if i == 20 else 0)) for i in range(21)]
    for step in steps:
        transform(step)

    assert [bool(step.skip) for step in steps] == [False] * 20 + [True]


# -- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_a_restored_transform_goes_on_as_if_nothing_had_been(kind):
    series = np.random.default_rng(2).lognormal(0, 0.4, 260).tolist()
    whole, first, second = kind(), kind(), kind()
    expected = vetoes_and_norms(whole, series)[130:]
    vetoes_and_norms(first, series[:130])

    second.restore(first.state())

    assert vetoes_and_norms(second, series[130:]) == expected


def test_transforms_compose_in_their_order():
    step = gradients([[30.0, 40.0], [0.3]])

    ClipByTensorNorm(5.0)(step)
    ClipByGlobalNorm(1.0)(step)
    step.apply()

    assert float(step.global_norm) == pytest.approx(1.0, rel=1e-5)
    assert step.grads[0].tolist() == pytest.approx([0.6, 0.8], rel=2e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: ClipByGlobalNorm(1.0, i),
        lambda i: ClipByTensorNorm(1.0, i),
        lambda i: ClipByValue(1.0, i),
        lambda i: ZClip(max_norm=1.0, include=i),
        lambda i: AutoClip(max_norm=1.0, include=i),
    ],
)
def test_a_pattern_leaves_the_other_tensors_alone(make):
    step = gradients([[9.0], [9.0]], names=["body.weight", "head.weight"])

    ours = applied(make("head.*"), step)

    assert ours[0][0] == 9.0
    assert ours[1][0] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype):
    step = gradients([torch.full((90_000,), 300.0)], dtype=dtype)  # a norm of 90,000: infinite in float16

    ClipByGlobalNorm(1.0)(step)
    step.apply()

    assert float(step.grads[0].double().norm()) == pytest.approx(1.0, rel=0.01)


def test_scaled_gradients_are_clipped_in_their_own_size():
    scale = torch.tensor(1024.0)
    step = gradients([[3 * 1024.0, 4 * 1024.0]], divisor=scale)

    ClipByGlobalNorm(1.0)(step)
    ClipByValue(0.7)(step)
    step.apply()

    assert (step.grads[0] / scale).tolist() == pytest.approx([0.6, 0.7], rel=1e-4)


def test_a_dry_run_says_what_it_would_do_and_does_nothing():
    step = gradients([[30.0, 40.0]])

    factor = DryRun(ClipByGlobalNorm(1.0))(step)
    DryRun(ClipByValue(1.0))(step)
    DryRun(AdaptiveGradientClip())(step)
    DryRun(SkipNonfinite())(gradients([[math.nan]]))
    step.apply()

    assert float(factor) == pytest.approx(1 / 50, rel=1e-4)
    assert step.grads[0].tolist() == [30.0, 40.0]


def test_sparse_complex_and_empty_gradients_are_taken_as_they_are():
    sparse = torch.sparse_coo_tensor([[0, 2]], [[3.0], [4.0]], (4, 1), check_invariants=False).coalesce()
    imaginary = torch.tensor([3 + 4j])
    step = Gradients(
        ["a", "b"],
        [torch.zeros(4, 1), torch.zeros(1, dtype=torch.complex64)],
        [sparse, imaginary],
        torch.zeros(2, dtype=torch.float64),
        nonfinite=torch.zeros((), dtype=torch.bool),
    )
    step.measure()

    ClipByTensorNorm(1.0)(step)
    step.apply()
    AdaptiveGradientClip()(step)

    assert float(sparse.values().norm()) == pytest.approx(1.0, rel=1e-5)
    assert abs(complex(imaginary[0])) == pytest.approx(1.0, rel=1e-5) or abs(complex(imaginary[0])) < 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClipByGlobalNorm(0.0), "max_norm must be a positive number"),
        (lambda: ClipByValue(-1.0), "limit must be a positive number"),
        (lambda: ClipByTensorNorm("x"), "max_norm must be a positive number"),
        (lambda: AutoClip(percentile=0), "percentile must be a positive number"),
        (lambda: AutoClip(percentile=100), "100 - percentile must be a positive number"),
        (lambda: ZClip(alpha=1.0), r"alpha must lie in \[0, 1\)"),
        (lambda: AdaGC(beta=-0.1), r"beta must lie in \[0, 1\)"),
        (lambda: SkipSpike(sigma=0), "sigma must be a positive number"),
        (lambda: SkipNonfinite(max_consecutive=0), "max_consecutive must be a positive number"),
        (lambda: ClipByGlobalNorm(1.0, on_failure="stop"), "on_failure must be 'raise' or 'disable'"),
        (lambda: DryRun(3), "DryRun\\(\\) takes a transform"),
    ],
)
def test_options_that_cannot_work_are_refused_with_a_sentence(make, says):
    with pytest.raises(ConfigurationError, match=says):
        make()
