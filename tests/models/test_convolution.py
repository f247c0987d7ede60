"""The convolution equals the stock one to the bit on small integers, of which every sum is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from lsgd_jax.models import convolution
from lsgd_jax.models.convolution import convolve
from tests.mapping import need_devices

WORKERS = 2


@pytest.fixture(autouse=True, scope="module")
def small_cache():
    """Several examples are more than a cache holds here, as in a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "CACHE", 800)
        yield


@st.composite
def layers(draw):
    """Shapes of x and the kernel, strides and padding."""
    dimensions = draw(st.integers(1, 2))

    def by_axis(elements):
        return draw(st.tuples(*[elements] * dimensions))

    space, strides = by_axis(st.integers(3, 6)), by_axis(st.integers(1, 3))
    taps = tuple(min(pair) for pair in zip(by_axis(st.integers(1, 4)), space, strict=True))
    pad = st.integers(0, 3)
    padding = draw(st.sampled_from(["SAME", "VALID"])) if draw(st.booleans()) else by_axis(st.tuples(pad, pad))
    batch, inputs, outputs = draw(st.tuples(*[st.integers(1, 3)] * 3))
    return (batch, *space, inputs), (*taps, inputs, outputs), strides, padding


def stock_layer(strides, padding, **options):
    def layer(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=order(x), **options)

    return layer


def fast_layer(strides, padding, **options):
    def layer(x, kernel):
        return convolve(x, kernel, strides, padding, dimension_numbers=order(x), **options)

    return layer


def order(x):
    space = "HW"[: x.ndim - 2]
    return lax.conv_dimension_numbers(x.shape, x.shape, (f"N{space}C", f"{space}IO", f"N{space}C"))


def test_a_kernel_larger_than_its_input_gives_nothing():
    x, kernel = jnp.ones((2, 2, 3)), jnp.ones((4, 3, 5))
    assert fast_layer((1,), "VALID")(x, kernel).shape == stock_layer((1,), "VALID")(x, kernel).shape == (2, 0, 5)


def value_and_gradients(layer):
    def function(x, kernel, g):
        value, gradients = jax.vjp(layer, x, kernel)
        return value, *gradients(g.reshape(-1)[: value.size].reshape(value.shape))

    return function


def integers(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).integers(-4, 5, shape), jnp.float32)


def assert_equal(ours, stock, *arguments):
    both = jax.jit(lambda *arguments: (ours(*arguments), stock(*arguments)))
    jax.tree.map(np.testing.assert_array_equal, *both(*arguments))


def scanned(function):
    return lambda *stacked: lax.scan(lambda _, arguments: (None, function(*arguments)), None, stacked)[1]


@settings(max_examples=15)
@given(layers())
@example(((2, 5, 4, 6), (3, 2, 6, 2), (1, 1), ((2, 0), (0, 1))))  # Fields along one axis each.
@example(((2, 5, 4, 6), (3, 3, 6, 2), (1, 1), ((3, 0), (4, 1))))  # More padding than a gradient has.
@example(((12, 5, 3), (2, 3, 5), (1,), "VALID"))  # Chunks of several examples.
@example(((8, 3, 2, 2), (3, 3, 2, 2), (1, 1), "SAME"))
def test_equals_the_stock_convolution(layer):
    x, kernel, *how = layer
    ours, stock = (value_and_gradients(make(*how)) for make in (fast_layer, stock_layer))
    assert_equal(ours, stock, integers(*x), integers(*kernel), integers(10_000))


@pytest.mark.parametrize(
    ("mapped", "axes"),
    [
        (lambda f: jax.vmap(f), (1, 1)),
        (lambda f: jax.vmap(f, in_axes=(0, None, 0)), (1, 0)),
        (lambda f: jax.vmap(f, in_axes=(None, 0, 0)), (0, 1)),
        (scanned, (1, 1)),
        (lambda f: scanned(jax.vmap(f)), (2, 2)),
        (lambda f: jax.vmap(scanned(jax.vmap(f))), (3, 3)),
    ],
    ids=["vmap", "vmap x", "vmap kernels", "scan", "vmap in scan", "vmap in scan in vmap"],
)
@settings(max_examples=3)
@given(layer=layers())
def test_equals_the_stock_convolution_over_workers_and_in_loops(mapped, axes, layer):
    x, kernel, *how = layer
    ours, stock = (mapped(value_and_gradients(make(*how))) for make in (fast_layer, stock_layer))
    stacked = (integers(*(WORKERS,) * axes[0], *x), integers(*(WORKERS,) * axes[1], *kernel))
    assert_equal(ours, stock, *stacked, integers(*(WORKERS,) * max(axes), 2_000))


@pytest.mark.parametrize("check_vma", [True, False])
def test_runs_in_shard_map(check_vma):
    need_devices(WORKERS)
    mesh = jax.make_mesh((WORKERS,), ("worker",), axis_types=(AxisType.Auto,))
    arguments = integers(WORKERS, 2, 5, 5, 3), integers(WORKERS, 3, 3, 3, 2), integers(WORKERS, 100)
    for strides in ((1, 1), (2, 2)):
        ours, stock = (value_and_gradients(make(strides, "SAME")) for make in (fast_layer, stock_layer))

        def on_device(*own, function=ours):
            return jax.tree.map(lambda y: y[None], function(*(x[0] for x in own)))

        spec = PartitionSpec("worker")
        sharded = jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
        assert_equal(sharded, jax.vmap(stock), *arguments)


def test_sums_the_gradient_of_a_kernel_shared_by_devices():
    need_devices(WORKERS)
    mesh = jax.make_mesh((WORKERS,), ("worker",), axis_types=(AxisType.Auto,))
    x, kernel = integers(2 * WORKERS, 5, 5, 3), integers(3, 3, 3, 2)

    def gradient(layer):
        return jax.grad(lambda kernel, x: (layer(x, kernel) ** 2).sum())

    for strides in ((1, 1), (2, 2)):
        ours, stock = (gradient(make(strides, "SAME")) for make in (fast_layer, stock_layer))
        specs = PartitionSpec(), PartitionSpec("worker")
        assert_equal(jax.shard_map(ours, mesh=mesh, in_specs=specs, out_specs=specs[0]), stock, kernel, x)


@pytest.mark.parametrize("options", [{"rhs_dilation": (2, 2)}, {"lhs_dilation": (2, 1)}, {"feature_group_count": 2}])
def test_is_the_stock_convolution_with_dilations_and_groups(options):
    groups = options.get("feature_group_count", 1)
    ours, stock = (make((1, 1), ((1, 0), (0, 2)), **options) for make in (fast_layer, stock_layer))
    assert_equal(ours, stock, integers(2, 7, 7, 4), integers(3, 3, 4 // groups, 2))


def test_is_the_stock_convolution_in_a_program_for_tpus():
    def lowered(layer, platform):
        arguments = integers(2, 7, 7, 4), integers(3, 3, 4, 2), integers(100)
        program = jax.jit(value_and_gradients(layer)).trace(*arguments)
        return program.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")

    assert lowered(stock_layer((2, 2), "SAME"), "tpu") == 3
    assert lowered(fast_layer((2, 2), "SAME"), "tpu") == 3
    assert lowered(fast_layer((2, 2), "SAME"), "cpu") == 0


def test_sums_of_16_bits_are_rounded_once():
    x, kernel = (jnp.ones(shape, jnp.bfloat16) for shape in ((4096, 3, 1), (2, 1, 1)))
    _, gradients = jax.vjp(fast_layer((1,), "VALID"), x, kernel)
    assert gradients(jnp.ones((4096, 2, 1), jnp.bfloat16))[1].ravel().tolist() == [8192, 8192]
    x, kernel = (jnp.ones(shape, jnp.bfloat16) for shape in ((1, 9, 1), (5, 1, 1)))
    _, gradients = jax.vjp(fast_layer((1,), "VALID"), x, kernel)
    g = jnp.array([256, 1, 1, 1, 1], jnp.bfloat16).reshape(1, 5, 1)
    assert gradients(g)[0].ravel().tolist()[4] == 260


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_keeps_the_dtype(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        arguments = [integers(*shape).astype(dtype) for shape in ((1, 4, 2), (3, 2, 2), (100,))]
        ours, stock = (value_and_gradients(make((1,), "SAME")) for make in (fast_layer, stock_layer))
        assert {y.dtype for y in ours(*arguments)} == {jnp.dtype(dtype)}
        assert_equal(ours, stock, *arguments)
