"""Classification: what its network sees, its loss with augmentation, and its measures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lsgd_jax.config import Config
from lsgd_jax.data import DESCRIPTIONS, load
from lsgd_jax.errors import UsageError
from lsgd_jax.task import check_fields
from lsgd_jax.tasks import Classification


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_the_network_sees_examples_as_they_are_preprocessed(name):
    task, about = Classification(name, "mlp"), DESCRIPTIONS[name]
    seen = jax.ShapeDtypeStruct((1, *about.shape), about.dtype)
    if about.preprocessing is not None:
        seen = jax.eval_shape(about.preprocessing.testing, seen)
    assert task._shape == seen.shape[1:]


def test_blank_examples_have_the_shapes_of_the_data():
    for name in ("mnist1d", "digits", "mnist5k"):
        task = Classification(name, "mlp")
        for blank, real in zip(jax.tree.leaves(task.blank()), jax.tree.leaves(task.data()), strict=True):
            assert (blank.shape, blank.dtype) == (real.shape, real.dtype)
    stream = Classification("imagenet2012", "mlp", image_size=16).blank().train
    x, y = stream.read(np.arange(2))
    assert (len(stream), x.shape, x.dtype, y.dtype) == (1_281_167, (2, 16, 16, 3), np.uint8, np.int32)


def test_the_training_loss_is_that_of_augmented_images_with_dropout():
    task = Classification("mnist5k", "cnn7", width=0.1)
    network, data, key = task.network(nnx.Rngs(0)), load("mnist5k"), jax.random.key(3)
    network.train()
    x, y = data.train_x[:8], data.train_y[:8]
    data_key, dropout_key = jax.random.split(key)
    logits = network(data.preprocessing.training(x, data_key), rngs=nnx.Rngs(dropout=dropout_key))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    assert task.loss(network, (x, y), key) == expected
    assert task.loss(network, (x, y), jax.random.key(4)) != expected


def test_a_logit_that_is_not_finite_is_an_error():
    logits = jnp.array([[0.0, 1.0], [1.0, 0.0], [jnp.nan, 1.0], [-jnp.inf, 1.0]])
    measures = Classification("digits", "mlp").measures(lambda x: logits, (None, jnp.array([1, 1, 1, 1])))
    assert measures["error"].tolist() == [False, True, True, True]
    np.testing.assert_allclose(measures["loss"][:2], np.log1p(np.exp([-1.0, 1.0])), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": float("nan")}, r"width must be in \(0, 64\], got nan"),
        ({"width": 0.0}, r"width must be in \(0, 64\], got 0\.0"),
        ({"image_size": 0, "dataset": "imagenet2012"}, r"image_size must be in \[1, 2\^31\), got 0"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"dataset": "mnist2d"}, "dataset must be mnist1d, mnist1d-10k, digits, .* or imagenet2012, got 'mnist2d'"),
        ({"width": True}, "width must be a number, got True"),
    ],
)
def test_a_field_out_of_range_is_one_sentence(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_fields(Classification(**fields))
    with pytest.raises(ValueError, match=f"^{message}"):
        Config(task=Classification(**fields), steps=1, learning_rate=0.1)


def test_a_model_that_is_not_for_the_data_is_one_sentence():
    with pytest.raises(UsageError, match=r"cnn7 is not for the data set mnist1d, .* \(40, 1\): use conv1d or mlp"):
        Classification("mnist1d", "cnn7").network(nnx.Rngs(0))
    with pytest.raises(UsageError, match="cnn7 is not for the data set digits: CNN7 needs images of at least 24 x 24"):
        Classification("digits", "cnn7").network(nnx.Rngs(0))
