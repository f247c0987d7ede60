"""Which options have an effect in a run, given the others."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lsgd_jax.methods import METHODS


class _Rule(NamedTuple):
    """When options have an effect, whatever the method."""

    options: tuple[str, ...]
    have_effect: Callable[[Any], bool]
    """From a configuration, which need not have been checked yet."""
    otherwise: str
    """When they have none, as the end of a sentence."""


_STATISTICS = ("batch_statistics", "statistics_batches")
_RULES = (
    _Rule(("momentum",), lambda c: c.local_optimizer != "adamw", "with the local_optimizer adamw"),
    _Rule(
        ("adam_b1", "adam_b2"),
        lambda c: c.local_optimizer in ("adamw", "muon"),
        "unless the local_optimizer is adamw or muon",
    ),
    _Rule(
        ("learning_rate_decay",),
        lambda c: c.learning_rate_schedule == "constant",
        "unless the learning_rate_schedule is constant",
    ),
    _Rule(_STATISTICS, lambda c: c.task.has_batch_norm, "with a model without batch normalization"),
    _Rule(_STATISTICS[1:], lambda c: c.batch_statistics == "reestimate", "unless batch_statistics is reestimate"),
    _Rule(("data_processes",), lambda c: c.task.is_streamed, "unless examples are streamed, as ImageNet's are"),
    _Rule(("learning_rate_drops_in",), lambda c: bool(c.learning_rate_drops), "without learning_rate_drops"),
    _Rule(("checkpoint_every",), lambda c: c.asynchronous != "joined", "with joined, which keeps no checkpoints"),
    _Rule(("keep_checkpoints",), lambda c: c.asynchronous is None, "in asynchronous training"),
    _Rule(("keep_checkpoints",), lambda c: c.checkpoint_every != 0, "if checkpoint_every is 0"),
    _Rule(
        ("staleness",),
        lambda c: c.asynchronous == "posted" and METHODS[c.method].elects,
        "unless workers elect leaders among what is posted",
    ),
    _Rule(
        ("elect_by",),
        lambda c: METHODS[c.method].elects and c.asynchronous is None and not c.task.is_streamed,
        "unless workers elect leaders in step, with examples in memory",
    ),
    _Rule(("election_examples",), lambda c: c.elect_by != "training_losses", "unless elect_by is a batch"),
    _Rule(("evaluated_model",), lambda c: c.asynchronous is None, "in asynchronous training"),
    _Rule(("tail_share",), lambda c: c.evaluated_model == "tail_mean", "unless evaluated_model is tail_mean"),
    _Rule(("corrupt_workers",), lambda c: c.asynchronous is None, "in asynchronous training"),
    _Rule(("corruption",), lambda c: c.corrupt_workers != 0, "without corrupt_workers"),
    _Rule(("election",), lambda c: (c.fragments or 1) > 1, "unless there are several fragments"),
    _Rule(("min_step_seconds",), lambda c: c.asynchronous is not None, "unless training is asynchronous"),
    _Rule(("slowdowns",), lambda c: c.min_step_seconds != 0, "without min_step_seconds"),
    _Rule(("tune_periods",), lambda c: bool(c.tune_learning_rates), "without tune_learning_rates"),
)
"""When options that are not a method's have no effect; of a method's options, its row tells."""


def no_effect(name: str, config: Any) -> str | None:
    """Why an option has no effect in a run, as the end of a sentence; None if it has one."""
    if name in config.task.fields:
        return config.task.no_effect(name)
    if config.method not in METHODS:
        return None
    method, way = METHODS[config.method], config.asynchronous
    if name not in method.options:
        if having := [other for other, row in METHODS.items() if name in row.options]:
            return f"with {config.method}: it is an option of {', '.join(having)}"
    elif name in method.in_groups and config.groups == 1:
        return "with one group"
    elif way in method.asynchronous and name not in (with_effect := ["period", *method.asynchronous[way]]):
        return f"with {way}, where the options of {config.method} are {', '.join(with_effect)}"
    return next((rule.otherwise for rule in _RULES if name in rule.options and not rule.have_effect(config)), None)
