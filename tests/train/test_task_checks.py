"""Tasks that return what they should not are told so in one sentence, before a run begins."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsgd_jax.config import Config
from lsgd_jax.data import BlankStream
from lsgd_jax.distributed import place
from lsgd_jax.errors import UsageError
from lsgd_jax.task import Data, Headline, Task
from lsgd_jax.train import compile_ahead, setup


@dataclasses.dataclass(frozen=True)
class Line(Task):
    """A line through points, with what a test gives in place of a part of it."""

    data_: Any = None
    network_: Any = None
    measures_: Any = None
    loss_: Any = None

    def data(self, data_dir=None):
        x = np.zeros((8, 1), np.float32)
        return (self.data_ or (lambda: Data((x, x[:, 0]), (x[:4], x[:4, 0]))))()

    def network(self, rngs):
        return (self.network_ or (lambda rngs: nnx.Linear(1, 1, rngs=rngs)))(rngs)

    def measures(self, network, examples):
        x, y = examples
        losses = (network(x)[:, 0] - y) ** 2
        return (self.measures_ or (lambda losses: {"loss": losses}))(losses)

    def loss(self, network, batch, key):
        loss = super().loss(network, batch, key)
        return (self.loss_ or (lambda loss: loss))(loss)


@dataclasses.dataclass(frozen=True)
class Missed(Line):
    headline: ClassVar[Headline] = Headline("misses", "misses")


@dataclasses.dataclass(frozen=True)
class Streaming(Line):
    is_streamed = True


@dataclasses.dataclass(frozen=True)
class Normed(Line):
    has_batch_norm = True


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.line, self.dropout = nnx.Linear(1, 1, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


def config(task):
    return Config(task=task, steps=2, learning_rate=0.1, groups=1, workers=2, batch_size=2)


STREAM = BlankStream(8, (np.zeros(1, np.float32), np.zeros((), np.float32)))
ONE_EACH = "Line.measures must return one number per example, of shape (3,) for 3 examples, but loss has the shape"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Line(data_=lambda: (1, 2)), "Line.data must return Data(train, test), got tuple."),
        (Line(data_=lambda: Data((np.zeros(3), np.zeros(4)), np.zeros(2))), "examples must be arrays with one number"),
        (Line(data_=lambda: Data(STREAM, STREAM)), "Line.is_streamed must be True for what Line.data returns."),
        (Streaming(), "Streaming.is_streamed must be False for what Streaming.data returns."),
        (Line(data_=lambda: 1 / 0), "Line.data raises ZeroDivisionError in line "),
        (Line(network_=lambda rngs: {}), "Line.network must return a module of Flax NNX, got dict: wrap networks of"),
        (Line(network_=lambda rngs: nnx.Dropout(0.5)), "Line.network must have parameters, nnx.Param, but has none."),
        (Line(network_=Noisy), "Line.network must have variables of the types Param and BatchStat only, got "),
        (
            Line(network_=lambda rngs: nnx.BatchNorm(1, rngs=rngs)),
            "Line.has_batch_norm must be True for what Line.network returns.",
        ),
        (Normed(), "Normed.has_batch_norm must be False for what Normed.network returns."),
        (Line(network_=lambda rngs: nnx.Linear(2, 1, rngs=rngs)), "Line.measures raises "),
        (Line(measures_=lambda losses: losses), 'Line.measures must return a dictionary with "loss", got '),
        (Line(measures_=lambda losses: {"a": losses}), 'Line.measures must return a dictionary with "loss", got a.'),
        (Missed(), 'Missed.measures must return a dictionary with "loss" and "misses", got loss.'),
        (Line(measures_=lambda losses: {"loss": losses.mean()}), f"{ONE_EACH} ()."),
        (Line(measures_=lambda losses: {"loss": losses[:, None]}), f"{ONE_EACH} (3, 1)."),
        (Line(loss_=lambda loss: loss[None]), "Line.loss must return one floating-point number, got float32[1]."),
        (Line(loss_=lambda loss: loss > 0), "Line.loss must return one floating-point number, got bool[]."),
        (Line(loss_=lambda loss: jnp.ones(3) @ jnp.ones(2)), "Line.loss raises TypeError in line "),
    ],
)
def test_a_task_that_is_wrong_is_one_sentence(task, message):
    with pytest.raises(UsageError) as error:
        setup.prepare(config(task))
    assert str(error.value).startswith(message)
    assert str(error.value).count("\n") == 0
    assert str(error.value).endswith(".")


def test_a_task_that_is_right_is_prepared_and_compiled_without_its_data():
    setup.prepare(config(Line()))
    stream = Streaming(data_=lambda: Data(STREAM, STREAM))
    assert setup.prepare(config(stream)).feed.shared == ()
    compile_ahead.lowered_steps(config(stream), place(1, 2))
    with pytest.raises(UsageError, match=r"^Line\.measures must return a dictionary"):
        compile_ahead.lowered_steps(config(Line(measures_=lambda losses: {})), place(1, 2))


def test_numbers_of_64_bits_are_trained_on_as_32():
    x = np.arange(8.0)[:, None]
    feed = setup.prepare(config(Line(data_=lambda: Data((x, x[:, 0]), (x[:4], x[:4, 0]))))).feed
    assert {leaf.dtype for leaf in feed.shared} == {np.dtype(np.float32)}
