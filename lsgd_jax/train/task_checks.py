"""Checks of what a task returns, with one-sentence error messages: before a run, and without computing anything."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lsgd_jax.data import Data, Feed, Stream
from lsgd_jax.data.feeds import batch_of
from lsgd_jax.errors import UsageError, sentence_of
from lsgd_jax.task import Task
from lsgd_jax.train.step import in_mode

EXAMPLES = 3
"""Number of test examples on which measures are checked."""


@contextlib.contextmanager
def raised_by(task: Task, method: str) -> Iterator[None]:
    """Turn what a method of a task raises into one sentence, with the line of its module.

    Raises:
      UsageError: instead of other exceptions.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        why = sentence_of(error, type(task).__module__)
        raise UsageError(f"{type(task).__name__}.{method} raises {why}") from error


def check_data(task: Task, data: Any) -> None:
    """Raise UsageError unless a task's data are examples, streamed if it says so."""
    name = type(task).__name__
    if not isinstance(data, Data):
        raise UsageError(f"{name}.data must return Data(train, test), got {type(data).__name__}.")
    if isinstance(data.train, Stream) != task.is_streamed:
        right = "True" if isinstance(data.train, Stream) else "False"
        raise UsageError(f"{name}.is_streamed must be {right} for what {name}.data returns.")


def check_network(task: Task, network: Any) -> None:
    """Raise UsageError unless a task's network is one whose variables the library keeps."""
    name = type(task).__name__
    if not isinstance(network, nnx.Module):
        raise UsageError(
            f"{name}.network must return a module of Flax NNX, got {type(network).__name__}:"
            " wrap networks of other libraries in lsgd_jax.models.Adapted."
        )
    _, params, statistics, others = nnx.split(network, nnx.Param, nnx.BatchStat, ...)
    if not jax.tree.leaves(params):
        raise UsageError(f"{name}.network must have parameters, nnx.Param, but has none.")
    if jax.tree.leaves(others):
        kinds = {type(each).__name__ for each in jax.tree.leaves(others, is_leaf=lambda x: isinstance(x, nnx.Variable))}
        raise UsageError(
            f"{name}.network must have variables of the types Param and BatchStat only, got {', '.join(sorted(kinds))}:"
            " layers like dropout take their random keys with the call, as in network(x, rngs=nnx.Rngs(key))."
        )
    if bool(jax.tree.leaves(statistics)) != task.has_batch_norm:
        right = "True" if jax.tree.leaves(statistics) else "False"
        raise UsageError(f"{name}.has_batch_norm must be {right} for what {name}.network returns.")


def check_functions(task: Task, network: nnx.Module, feed: Feed, batch_size: int) -> None:
    """Raise UsageError unless a task's loss and measures are numbers of the right shapes."""
    name = type(task).__name__

    trained, tested = (nnx.split(in_mode(network, training=training)) for training in (True, False))

    def loss(state: nnx.State, *of_batch: Any) -> Any:
        return task.loss(nnx.merge(trained[0], state), *of_batch)

    def measures(state: nnx.State, examples: Any) -> Any:
        return task.measures(nnx.merge(tested[0], state), examples)

    with raised_by(task, "measures"):
        found = jax.eval_shape(measures, tested[1], batch_of(feed.test_example, EXAMPLES))
    if not isinstance(found, dict) or not {"loss", task.headline.name} <= found.keys():
        names = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        wanted = " and ".join(f'"{each}"' for each in dict.fromkeys(["loss", task.headline.name]))
        raise UsageError(f"{name}.measures must return a dictionary with {wanted}, got {names}.")
    for measure, values in found.items():
        if jnp.shape(values) != (EXAMPLES,):
            raise UsageError(
                f"{name}.measures must return one number per example, of shape ({EXAMPLES},) for {EXAMPLES} examples,"
                f" but {measure} has the shape {jnp.shape(values)}."
            )
    with raised_by(task, "loss"):
        key = jax.eval_shape(lambda: jax.random.key(0))
        value = jax.eval_shape(loss, trained[1], batch_of(feed.example, batch_size), key)
    if jnp.shape(value) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise UsageError(f"{name}.loss must return one floating-point number, got {value.dtype}{list(value.shape)}.")
