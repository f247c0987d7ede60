import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from lsgd_jax.models import BATCH_NORM, CNN7, MODELS, VGG16, ResNet20, ResNet50
from lsgd_jax.models.layers import max_pool
from lsgd_jax.models.resnet import _Basic
from tests.networks import drawn

SHAPES = {"conv1d": (40, 1), "mlp": (40, 1)}
PICTURE = (28, 28, 3)
DROPOUT = {"cnn7", "vgg16"}


def shape_of(name):
    return SHAPES.get(name, PICTURE)


def narrow(name, **options):
    build = MODELS[name][0]
    return drawn(lambda: build(shape_of(name), 10, width=1 / 16, rngs=nnx.Rngs(0), **options))


@functools.cache
def abstract(build, shape, classes):
    return nnx.eval_shape(lambda: build(shape, classes, rngs=nnx.Rngs(0)))


def examples(name, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, *shape_of(name)))


def kernels(model):
    return [module.kernel.shape for _, module in nnx.iter_modules(model) if hasattr(module, "kernel")]


@nnx.jit
def call(model, x, key):
    return model(x, rngs=None if key is None else nnx.Rngs(dropout=key))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("conv1d", (40, 1), 10, 28_298),
        ("mlp", (40, 1), 10, 7_434),
        ("cnn7", (28, 28, 3), 10, 4_864 + 204_928 + 73_792 + 65_792 + 2_570),
        ("vgg16", (28, 28, 3), 10, 15_253_578),
        ("vgg16", (32, 32, 3), 10, 15_253_578),
        ("resnet20", (28, 28, 3), 10, 269_722),
        ("resnet50", (224, 224, 3), 1000, 25_557_032),
    ],
)
def test_has_the_published_number_of_parameters(name, shape, classes, parameters):
    model = abstract(MODELS[name][0], shape, classes)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters


def test_has_the_published_layers():
    shapes = {build: kernels(abstract(build, PICTURE, 10)) for build in (CNN7, VGG16, ResNet20)}
    assert sorted(shapes[CNN7]) == sorted([(5, 5, 3, 64), (5, 5, 64, 128), (3, 3, 128, 64), (256, 256), (256, 10)])
    sizes = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    convolutions = [(3, 3, *pair) for pair in itertools.pairwise(sizes)]
    assert sorted(shapes[VGG16]) == sorted([*convolutions, (512, 512), (512, 512), (512, 10)])
    sizes = [3, *[16] * 7, *[32] * 6, *[64] * 6]
    convolutions = [(3, 3, *pair) for pair in itertools.pairwise(sizes)]
    assert sorted(shapes[ResNet20]) == sorted([*convolutions, (64, 10)])
    in_resnet50 = kernels(abstract(ResNet50, (224, 224, 3), 1000))
    assert len(in_resnet50) == 50 + 4  # Four shortcuts.
    assert {(7, 7, 3, 64), (3, 3, 512, 512), (1, 1, 1024, 2048), (2048, 1000)} <= set(in_resnet50)


@pytest.mark.parametrize("name", MODELS)
def test_holds_parameters_and_statistics_and_nothing_else(name):
    model = abstract(MODELS[name][0], shape_of(name), 10)
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    assert jax.tree.leaves(params)
    assert bool(jax.tree.leaves(stats)) == (name in BATCH_NORM)


@pytest.mark.parametrize("name", MODELS)
def test_computes_in_bfloat16_and_answers_in_float32(name):
    model = narrow(name, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    program = jax.make_jaxpr(lambda x: nnx.clone(model)(x, rngs=nnx.Rngs(0)))(examples(name))
    assert [str(logits) for logits in program.out_avals] == ["float32[2,10]"]
    assert "bf16[2,10]" in str(program)


@pytest.mark.parametrize("name", ["conv1d", "mlp", "cnn7", "vgg16"])
def test_draws_dropout_from_the_key_in_training_only(name):
    model, x, keys = narrow(name), examples(name), jax.random.split(jax.random.key(0))
    trained = [call(model, x, key) for key in (*keys, keys[0])]
    np.testing.assert_array_equal(trained[0], trained[2])
    assert (trained[0] != trained[1]).any() == (name in DROPOUT)
    model.eval()
    np.testing.assert_array_equal(call(model, x, keys[0]), call(model, x, None))


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
def test_updates_statistics_in_training_only(name):
    model, x, key = narrow(name), examples(name), jax.random.key(0)
    start = nnx.state(model, nnx.BatchStat)
    start = jax.tree.map(jnp.copy, start)
    call(model, x, key)
    after = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    changed = jax.tree.map(lambda old, new: bool((old != new).any()), start, after)
    assert all(jax.tree.leaves(changed))
    model.eval()
    call(model, x, key)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.BatchStat), after)


def test_statistics_follow_a_batch_by_a_tenth():
    model = narrow("resnet20")
    before, x = jax.tree.map(jnp.copy, nnx.state(model.stem.norm, nnx.BatchStat)), examples("resnet20")
    seen = model.stem.convolution(x)
    model.stem(x)
    norm = model.stem.norm
    np.testing.assert_allclose(norm.mean, 0.9 * before.mean[...] + 0.1 * seen.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(norm.var, 0.9 * before.var[...] + 0.1 * seen.var((0, 1, 2)), rtol=1e-4)


def test_has_the_gradients_of_the_stock_convolution():
    def gradients(model):
        def loss(model):
            return (model(examples("conv1d")) ** 2).mean()

        return jax.tree.leaves(nnx.jit(nnx.grad(loss))(model))

    model, stock = narrow("conv1d"), narrow("conv1d")
    for convolution in stock.convolutions:
        convolution.conv_general_dilated = lax.conv_general_dilated
    for ours, theirs in zip(gradients(model), gradients(stock), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (ours != 0).any()


def test_width_multiplies_and_leaves_one():
    assert narrow("cnn7").dense.kernel.shape == (16, 16)
    wide = nnx.eval_shape(lambda: ResNet20(PICTURE, 10, width=2.5, rngs=nnx.Rngs(0)))
    assert wide.out.kernel.shape == (160, 10)
    thin = nnx.eval_shape(lambda: MODELS["conv1d"][0]((40, 1), 10, width=1e-3, rngs=nnx.Rngs(0)))
    assert thin.out.kernel.shape == (5, 10)


def test_cnn7_wants_pictures_of_24_pixels():
    with pytest.raises(ValueError, match="at least 24 x 24 pixels, got 23 x 32"):
        CNN7((23, 32, 3), 10, rngs=nnx.Rngs(0))
    least = nnx.eval_shape(lambda: CNN7((24, 25, 3), 10, rngs=nnx.Rngs(0))(jnp.ones((1, 24, 25, 3)), rngs=nnx.Rngs(0)))
    assert least.shape == (1, 10)


@pytest.mark.parametrize("sides", [(8, 8), (7, 5), (1, 4)])
def test_max_pool_equals_that_of_windows(sides):
    x = jax.random.normal(jax.random.key(0), (2, *sides, 3))
    window = tuple(min(2, side) for side in sides)
    np.testing.assert_array_equal(max_pool(x), nnx.max_pool(x, window, strides=window))


def test_shortcuts_take_every_other_pixel_and_fill_up_with_zeros():
    block = _Basic(2, 3, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    block.second.norm.scale[...] = jnp.zeros(3)
    x = jnp.abs(examples("resnet20")[..., :2])
    y = nnx.jit(lambda block, x: block(x))(block, x)
    np.testing.assert_array_equal(y[..., :2], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 2], 0)
