"""Every statistic against a float64 reference, on both backends, over the whole range of the floating-point types."""

from __future__ import annotations

import sys
from unittest import mock

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradwatch.errors import ConfigurationError
from gradwatch.measure import blocks
from gradwatch.measure.blocks import BLOCK, PACK, SMALL
from gradwatch.measure.one_read import CHUNK, one_read
from gradwatch.measure.plan import SplitMeter, check, plan
from gradwatch.measure.sample import GRID_ROWS, flat, is_dense, places
from gradwatch.records import LOWEST_OCTAVE, GradientState
from gradwatch.table import columns

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

BACKENDS = ["cpu", "foreach"]

SHAPES = [
    (),
    (1,),
    (7,),
    (0,),
    (3, 0),
    (33, 5),
    (300,),
    (64, 3, 3, 3),
    (SMALL,),
    (SMALL + 1,),
    (CHUNK + 1, 3),
    (BLOCK + 5,),
]
MAGNITUDES = [1.0, 1e-3, 1e-25, 1e20, 3e-39, 0.0]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, 1e-25, 1e20]


@pytest.fixture(autouse=True, scope="module")
def small_tensors_are_read_by_numba_too():
    with mock.patch.object(blocks, "COMPILED", 0):
        yield


def wide(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()).resolve_conj().numpy()


def host(values: np.ndarray | Tensor) -> np.ndarray:
    return values.numpy() if isinstance(values, Tensor) else values


def named(table) -> dict[str, np.ndarray]:
    by_name, histogram = columns(host(table.values), table.missing)
    return by_name if histogram is None else {**by_name, "histogram": histogram}


def measured(backend, params, grads, *, detail=True, divisor=None):
    table = plan(params, backend=backend).measure(grads, divisor=divisor, detail=detail)
    return named(table)


@st.composite
def gradients(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    grads = []
    for _ in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        magnitude = draw(st.sampled_from(MAGNITUDES))
        grad = torch.randn(draw(st.sampled_from(SHAPES)), generator=generator, dtype=torch.float64) * magnitude
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
            if grad.numel():
                grad.view(-1)[draw(st.integers(0, grad.numel() - 1))] = value
        grads.append(grad.to(dtype))
    return grads


@pytest.mark.parametrize("compiled", [one_read, lambda: None], ids=["numba", "numpy"])
@pytest.mark.parametrize("few", [0, blocks.FEW], ids=["joined", "one_by_one"])
@settings(max_examples=50, deadline=None)
@given(grads=gradients())
def test_the_cpu_backend_agrees_with_float64_on_the_finite_elements(compiled, few, grads):
    with mock.patch.object(blocks, "FEW", few), mock.patch.object(blocks, "one_read", compiled):
        seen = measured("cpu", [torch.ones_like(g) for g in grads], grads)

    for index, grad in enumerate(grads):
        values = wide(grad)
        finite = values[np.isfinite(values)]
        norm = np.linalg.norm(finite)
        assert seen["norm"][index] == pytest.approx(norm, rel=2e-5, abs=0)
        assert seen["max_abs"][index] == pytest.approx(np.abs(finite).max(initial=0.0), rel=1e-6, abs=0)
        assert seen["nonfinite"][index] == values.size - finite.size
        assert seen["state"][index] == (GradientState.VALUE if (values != 0).any() else GradientState.ZERO)
        rms = norm / np.sqrt(max(finite.size, 1))
        assert seen["mean"][index] == pytest.approx(finite.mean() if finite.size else 0.0, abs=1e-5 * rms + 1e-300)
        assert seen["zero_fraction"][index] == pytest.approx((values == 0).mean() if values.size else 0.0)


@settings(max_examples=40, deadline=None)
@given(grads=gradients())
def test_the_foreach_backend_agrees_with_float64_or_shows_that_it_cannot(grads):
    seen = measured("foreach", [torch.ones_like(g) for g in grads], grads)

    for index, grad in enumerate(grads):
        values = wide(grad)
        bad = values.size - np.isfinite(values).sum()
        assert seen["nonfinite"][index] == bad
        assert seen["state"][index] == (GradientState.VALUE if (values != 0).any() else GradientState.ZERO)
        assert seen["zero_fraction"][index] == pytest.approx((values == 0).mean() if values.size else 0.0)
        if bad:
            assert not np.isfinite(seen["norm"][index])
            assert not np.isfinite(seen["max_abs"][index])
            continue
        norm = np.linalg.norm(values)
        assert seen["norm"][index] == pytest.approx(norm, rel=1e-9, abs=0)
        assert seen["max_abs"][index] == pytest.approx(np.abs(values).max(initial=0.0), rel=1e-6, abs=0)
        rms = norm / np.sqrt(max(values.size, 1))
        assert seen["mean"][index] == pytest.approx(values.mean() if values.size else 0.0, abs=1e-5 * rms + 1e-300)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_large_tensor_keeps_its_digits(backend, dtype):
    grad = torch.randn(3_000_000).to(dtype)

    seen = measured(backend, [torch.ones_like(grad)], [grad], detail=False)

    assert seen["norm"][0] == pytest.approx(np.linalg.norm(wide(grad)), rel=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("detail", [False, True])
def test_a_missing_gradient_is_missing_and_not_zero(backend, detail, monkeypatch):
    monkeypatch.setattr(blocks, "FEW", 0)
    params = [torch.ones(3), torch.ones(4, 5), torch.ones(SMALL + 1)]

    seen = measured(backend, params, [None, torch.ones(4, 5), None], detail=detail)

    assert list(seen["state"]) == [GradientState.MISSING, GradientState.VALUE, GradientState.MISSING]
    assert list(np.isnan(seen["norm"])) == [True, False, True]
    assert seen["norm"][1] == pytest.approx(np.sqrt(20))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t[..., :1].expand(t.shape),
        lambda t: t[::1, :, ::2, :].repeat_interleave(2, dim=2),
        lambda t: t.requires_grad_(),
    ],
    ids=["channels_last", "transposed", "expanded", "interleaved", "requires_grad"],
)
@pytest.mark.parametrize("size", [3, 40])
def test_the_layout_of_a_gradient_does_not_matter(backend, layout, size):
    grad = layout(torch.randn(size, 16, 4, 4))

    seen = measured(backend, [torch.ones(size, 16, 4, 4)], [grad])

    values = wide(grad)
    assert seen["norm"][0] == pytest.approx(np.linalg.norm(values), rel=1e-5)
    assert seen["mean"][0] == pytest.approx(values.mean(), abs=1e-5)
    assert seen["max_abs"][0] == pytest.approx(np.abs(values).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [6, 6000])
def test_a_sparse_gradient_counts_its_rows_once(backend, width, monkeypatch):
    monkeypatch.setattr(blocks, "FEW", 0)
    index = torch.tensor([[1, 1, 4]])
    grad = torch.sparse_coo_tensor(index, torch.randn(3, width), (10, width))

    seen = measured(backend, [torch.ones(10, width)], [grad])

    values = wide(grad.to_dense())
    assert seen["norm"][0] == pytest.approx(np.linalg.norm(values), rel=1e-5)
    assert seen["max_abs"][0] == pytest.approx(np.abs(values).max(), rel=1e-5)
    assert seen["mean"][0] == pytest.approx(values.mean(), rel=1e-4)
    assert seen["zero_fraction"][0] == pytest.approx(0.8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_sparse_gradient_is_zero(backend):
    grad = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.long), torch.empty(0, 6), (10, 6))

    seen = measured(backend, [torch.ones(10, 6)], [grad])

    assert seen["state"][0] == GradientState.ZERO
    assert seen["norm"][0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_complex_gradient_has_the_norm_and_magnitude_of_its_elements(backend):
    grad = torch.randn(50, 4, dtype=torch.complex64)
    grad[0] = 0

    seen = measured(backend, [torch.ones(50, 4, dtype=torch.complex64)], [grad])

    values = wide(grad)
    assert seen["norm"][0] == pytest.approx(np.linalg.norm(values), rel=1e-5)
    assert seen["max_abs"][0] == pytest.approx(np.abs(values).max(), rel=1e-5)
    assert seen["zero_fraction"][0] == pytest.approx(4 / 200)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_small_tensors_fill_several_packs(backend):
    grads = [torch.randn(500) * 10.0 ** (i % 40 - 20) for i in range(3 * PACK // 500)]

    seen = measured(backend, [torch.ones(500)] * len(grads), grads)

    np.testing.assert_allclose(seen["norm"], [np.linalg.norm(wide(g)) for g in grads], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_still_multiplies_the_gradients_is_divided_out(backend):
    grads = [torch.randn(50, 4), torch.randn(20_000)]
    params = [torch.ones_like(g) for g in grads]

    plain = measured(backend, params, grads)
    scaled = measured(backend, params, [g * 1024 for g in grads], divisor=torch.tensor(1024.0))

    for name in plain:
        np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_histogram_counts_octaves_of_the_finite_non_zero_elements(backend):
    grad = torch.tensor([0.0, 1.0, 1.5, -2.0, 3.9, 2.0**-60, 2.0**40, float("nan"), float("inf")])

    histogram = measured(backend, [torch.ones(9)], [grad])["histogram"][0]

    expected = np.zeros(64)
    expected[-LOWEST_OCTAVE] = 2
    expected[1 - LOWEST_OCTAVE] = 2
    expected[0] = expected[63] = 1
    np.testing.assert_array_equal(histogram, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_have_no_spread_and_random_ones_have_all_of_it(backend):
    same, random = torch.randn(1, 200).repeat(50, 1), torch.randn(50, 200)

    seen = updated(backend, [random, same, torch.ones(9)], [same, random, torch.ones(9)], lambda: None)

    assert seen["row_spread"][0] == pytest.approx(0, abs=1e-6)
    assert seen["row_spread"][1] == pytest.approx(np.sqrt(1 - 1 / GRID_ROWS), abs=0.1)
    assert np.isnan(seen["row_spread"][2])
    assert seen["weight_row_spread"][0] == pytest.approx(np.sqrt(1 - 1 / GRID_ROWS), abs=0.1)
    assert seen["weight_row_spread"][1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_weight_norm_is_exact(backend, dtype):
    params = [torch.randn(30, 7).to(dtype), torch.randn(200_000).to(dtype)]

    seen = measured(backend, params, [torch.ones_like(p) for p in params])

    np.testing.assert_allclose(seen["weight_norm"], [np.linalg.norm(wide(p)) for p in params], rtol=1e-5)


def updated(backend, params, grads, change, *, steps=1):
    meter = plan(params, backend=backend)
    for _ in range(steps):
        table = meter.measure(grads, detail=True)
        meter.sample_before()
        change()
        meter.sample_after(table)
    return named(table)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(rate=st.sampled_from([1e-25, 1e-6, 0.1, 1e20]), seed=st.integers(0, 99))
def test_small_tensors_show_their_exact_update(backend, rate, seed):
    torch.manual_seed(seed)
    params = [torch.randn(30, 7), torch.randn(9), torch.zeros(4), torch.randn(3, dtype=torch.float64)]
    before = [wide(p).copy() for p in params]
    optimizer = torch.optim.SGD(params, lr=rate)
    for param in params:
        param.grad = torch.randn_like(param)

    seen = updated(backend, params, [p.grad for p in params], optimizer.step)

    for index, (old, param) in enumerate(zip(before, params, strict=True)):
        change, weight = np.linalg.norm(wide(param) - old), np.linalg.norm(old)
        assert seen["update_norm"][index] == pytest.approx(change, rel=1e-5, abs=0)
        if weight:
            assert seen["update_ratio"][index] == pytest.approx(change / weight, rel=1e-5, abs=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_update_of_a_large_tensor_is_estimated_within_a_tenth_of_an_octave(backend):
    param = torch.randn(400, 300)
    before = wide(param).copy()
    param.grad = torch.randn(400, 300)

    seen = updated(backend, [param], [param.grad], torch.optim.SGD([param], lr=0.01).step)

    change = np.linalg.norm(wide(param) - before)
    assert abs(np.log2(seen["update_norm"][0] / change)) < 0.1
    assert abs(np.log2(seen["update_ratio"][0] * np.linalg.norm(before) / change)) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_below_the_resolution_of_the_weights_are_lost(backend):
    param = torch.ones(1000, dtype=torch.bfloat16)
    grad = torch.ones(1000, dtype=torch.bfloat16)
    grad[:500] = 0
    grad[500:600] = 100

    def change():
        param.sub_(1e-3 * grad)

    seen = updated(backend, [param], [grad], change)

    assert seen["lost"][0] == pytest.approx(400 / 500)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_said_of_lost_updates_where_no_element_has_a_gradient(backend):
    param = torch.ones(10)

    seen = updated(backend, [param], [torch.zeros(10)], lambda: None)

    assert np.isnan(seen["lost"][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_move_between_our_steps_have_moved(backend):
    still, inside, between = torch.ones(5), torch.ones(5), torch.ones(5)
    params = [still, inside, between]
    grads = [torch.ones(5)] * 3
    meter = plan(params, backend=backend)

    seen = []
    for _ in range(2):
        table = meter.measure(grads, detail=True)
        meter.sample_before()
        inside.add_(1)
        meter.sample_after(table)
        between.add_(1)
        seen.append(named(table)["moved"])

    np.testing.assert_array_equal(seen[0], [np.nan, 1, np.nan])
    np.testing.assert_array_equal(seen[1], [0, 1, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_measuring_changes_neither_gradients_nor_weights_nor_any_generator(backend):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global one is what must not be touched
    params = [torch.randn(50, 4), torch.randn(20_000)]
    grads = [torch.randn_like(p) for p in params]
    copies = [t.clone() for t in (*params, *grads)]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    updated(backend, params, grads, lambda: None)

    assert all(torch.equal(a, b) for a, b in zip((*params, *grads), copies, strict=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_norms_can_be_taken_again(backend):
    params = [torch.ones(5), torch.ones(20_000), torch.ones(4)]
    grads = [torch.randn(5), torch.randn(20_000), None]
    meter = plan(params, backend=backend)
    exact = [float(grads[0].norm()), np.linalg.norm(wide(grads[1])), np.nan]

    np.testing.assert_allclose(np.asarray(meter.norms(grads)), exact, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(meter.norms(grads, [1])), exact[1:2], rtol=1e-6)


def test_a_gradient_may_have_another_dtype_than_its_parameter():
    params = [torch.ones(5), torch.ones(3), torch.ones(20_000)]
    grads = [torch.randn(5).bfloat16(), torch.randn(3), torch.randn(20_000).half()]

    seen = measured("cpu", params, grads)

    np.testing.assert_allclose(seen["norm"], [np.linalg.norm(wide(g)) for g in grads], rtol=1e-5)


def test_parts_on_several_devices_are_put_together_in_the_order_of_the_parameters():
    params = [torch.randn(5), torch.randn(6, 4), torch.randn(7)]
    grads = [torch.randn(5), torch.randn(6, 4), None]
    one = plan(params)
    split = SplitMeter({(0, 2): plan([params[0], params[2]], backend="foreach"), (1,): plan([params[1]])})

    tables = []
    for meter in (one, split):
        table = meter.measure(grads, detail=True)
        meter.sample_before()
        meter.sample_after(table)
        tables.append(named(table))

    for name in ("state", "norm", "max_abs", "mean", "weight_norm", "update_norm", "histogram"):
        np.testing.assert_allclose(tables[1][name], tables[0][name], rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(np.asarray(split.norms(grads, [1])), [float(grads[1].norm())], rtol=1e-6)


def test_the_sample_is_one_element_of_each_of_equal_stretches():
    (place,) = places([torch.empty(10_000)])

    assert len(place.elements) == 1024
    stretches = place.elements.astype(np.int64) * 1024 // 10_000
    assert (np.abs(stretches - np.arange(1024)) <= 1).all()
    assert (np.diff(place.elements) > 0).all()


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.randn(3, 4), True),
        (torch.randn(3, 4).t(), True),
        (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.randn(3, 8)[:, ::2], False),
        (torch.randn(3, 1).expand(3, 4), False),
    ],
)
def test_density_is_told_from_the_strides(tensor, dense):
    assert is_dense(tensor) == dense
    assert sorted(flat(tensor).tolist()) == sorted(tensor.reshape(-1).tolist())


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigurationError, match="backend must be 'cpu', 'foreach' or None, got 'gpu'"):
        check([torch.ones(3)], "gpu")


@pytest.fixture
def afresh():
    one_read.cache_clear()
    yield
    one_read.cache_clear()


def test_numba_is_used_where_it_is_installed(afresh):
    squares, peak, total, zeros = one_read()(block := np.array([3.0, 0.0, -4.0], np.float32), block.view(np.int32))

    assert (squares, peak, total, zeros) == (25.0, 4.0, -1.0, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_largest_magnitude_shows_an_element_that_is_not_finite(bad):
    block = np.array([1e30, bad, 2.0], np.float32)

    assert not np.isfinite(one_read()(block, block.view(np.int32))[1])


@pytest.mark.parametrize(("elements", "loads"), [(999_999, 0), (1_000_000, 1)])
def test_a_small_model_does_not_load_numba(elements, loads):
    with mock.patch.object(blocks, "COMPILED", 1_000_000), mock.patch.object(blocks, "one_read") as one_read:
        blocks.Blocks([torch.ones(elements)])

    assert one_read.call_count == loads


def test_numpy_measures_where_numba_is_missing(afresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)

    assert one_read() is None
    assert measured("cpu", [torch.ones(BLOCK + 1)], [torch.ones(BLOCK + 1)])["max_abs"][0] == 1


def test_numpy_measures_where_numba_may_not_compile(afresh, monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)

    assert one_read() is None


def test_numpy_measures_where_numba_fails_and_says_so_once(afresh, monkeypatch, caplog):
    def fail(*_, **__):
        raise TypeError("no such option")

    monkeypatch.setattr(numba, "njit", fail)

    assert one_read() is None
    assert one_read() is None
    assert [record.getMessage() for record in caplog.records] == [
        "measuring by Numba instead of NumPy failed and is switched off; training goes on. TypeError: no such option"
    ]


def test_numba_compiles_anew_where_it_finds_no_room_for_its_cache(afresh, monkeypatch, caplog):
    njit = numba.njit

    def without_cache(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function '_one_read': no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(numba, "njit", without_cache)

    assert one_read() is not None
    assert not caplog.records
