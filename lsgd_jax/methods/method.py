"""A row of the table of methods: all that the rest of the package knows of one."""

import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import optax

from lsgd_jax.exchange import ShardSpecs

Meeting = Callable[[optax.Params, optax.Params, optax.Params], tuple[optax.Params, optax.Params]]
"""From a worker's point, the center and the center that the worker met last: its new point and the new center."""


class Level(NamedTuple):
    """Exchanges among so many workers, each group's own or all."""

    workers: int
    """Workers that exchange with each other."""
    period: int
    """Local steps between exchanges."""
    options: Mapping[str, Any] = types.MappingProxyType({})
    """Options with which the method makes these exchanges, the only ones among so many workers."""


def one_level(options: Mapping[str, Any], groups: int, workers: int) -> list[Level]:
    """Exchanges among all workers, every `period` steps; in every step for methods without a period."""
    own = {name: value for name, value in options.items() if name != "period"}
    return [Level(groups * workers, options.get("period", 1), own)]


def no_level(options: Mapping[str, Any], groups: int, workers: int) -> list[Level]:
    """No exchanges."""
    return []


def once(options: Mapping[str, Any], among_all: bool) -> int:
    """One average of the starts, whatever the options."""
    return 1


def election(arrays: int, workers: int) -> tuple[int, ...]:
    """The scalars of an election: the lowest score, and the position of the worker that has it."""
    return (1, 1)


class Method(NamedTuple):
    """A row of the table of methods.

    Functions of `options` take the method's options by name, those that nobody has set at their defaults.
    """

    build: Callable[..., optax.GradientTransformationExtraArgs]
    """From the worker's optimizer, `axis_name` and the method's own options, all by keyword. Its signature, docstring
    and ValueErrors are the types, help and checks of the options everywhere."""
    center: Callable[[optax.Params, Any, Any], optax.Params]
    """From a worker's params, the method's state and `axis_name`: the model that the method reports."""
    exchanges: Literal["period", "step", "never"]
    """What workers exchange: parameters every period, gradients in every step, so that workers who start together stay
    together, or nothing."""
    grid: Mapping[str, tuple] = {}
    """Values of its own options that a tuned comparison tries, the first of each together, then the second, and so on;
    as many as other methods have."""
    reports: Literal["mean", "leader", "center"] = "mean"
    """What the model that the method reports is."""
    share: Callable[[optax.Params, Any], optax.Params] = lambda params, state: params
    """From a worker's params and the method's state, without a collective: its share of the model that the method
    reports, which is the mean of all shares, unless it is a leader."""
    adds_up: bool = False
    """Whether the workers' updates are summed, not averaged; a tuned comparison then scales learning rates by 1/n."""
    averages_start: Callable[[Mapping[str, Any], bool], int] = lambda options, among_all: 0
    """From the options, and whether an exchange is among all workers or in a group: how often workers average their
    starts at the first one, to form a center."""
    scalars: Callable[[int, int], Sequence[int]] = lambda arrays, workers: ()
    """From the numbers of arrays of parameters and of workers in an exchange: the scalars in each further all-reduce,
    beside the parameters. How parameters are sent, the options `broadcast` and `wire` say; without them, by one
    all-reduce."""
    gathers: bool = False
    """Whether every worker receives the parameters of all, by an all-gather in place of that all-reduce."""
    elects: bool = False
    """Whether workers elect a leader, alone or of a quorum, so that the method's state has a `LeaderPullState`."""
    meeting: Callable[[Mapping[str, Any], int], Meeting] | None = None
    """From the options and the number of workers: how one worker meets the center on its own clock; None for methods
    that don't have such a center."""
    asynchronous: Mapping[str, Collection[str]] = {}
    """The ways in which workers may run at their own speed, "joined" and "posted", each with the options that have an
    effect then, beside the period."""
    in_groups: Collection[str] = ()
    """Options without an effect if there is one group."""
    levels: Callable[[Mapping[str, Any], int, int], list[Level]] = one_level
    """From the options, groups and workers in each: the levels of exchanges, those in a group first."""
    derived: Callable[[Mapping[str, Any], int, int], dict[str, Any]] = lambda options, groups, workers: {}
    """From the options, groups and workers in each: the options whose values follow from others. Raises ValueError if
    the options do not fit the workers."""
    periods: Callable[[int, int], dict[str, int]] = lambda every, groups: {"period": every}
    """From the steps between exchanges among all workers, and groups: the options to set for it."""

    @property
    def options(self) -> Mapping[str, Any]:
        """The method's own options, with their defaults: what its builder takes by keyword, but for how workers lie."""
        return _options(self.build)

    @property
    def evaluated_models(self) -> list[str]:
        """The models of a run that can be evaluated, by name: the one that the method reports, and then others."""
        others = ["leader"] * self.elects + ["mean", "tail_mean"] * (self.exchanges != "never")
        return list(dict.fromkeys([self.reports, *others]))

    def filled(self, given: Mapping[str, Any], groups: int, workers: int) -> dict[str, Any]:
        """The method's options with the values that so many groups of workers train with, where some are given."""
        options = {**self.options, **given}
        return options | self.derived(options, groups, workers)

    def built(
        self,
        optimizer: optax.GradientTransformation,
        options: Mapping[str, Any],
        *,
        groups: Any,
        workers: Any,
        shard_specs: ShardSpecs | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The method around a worker's optimizer.

        Args:
          optimizer: the worker's own.
          options: those that are given, by name.
          groups: the axis, or the axes, on which groups lie; empty for one group.
          workers: the axis, or the axes, on which the workers of a group lie.
          shard_specs: how a worker's arrays lie over its chips, for methods that send shards; None: they are whole.
        """
        parameters = inspect.signature(self.build).parameters
        if shard_specs is not None and "shard_specs" in parameters:
            options = {**options, "shard_specs": shard_specs}
        if groups and "group_axis_name" in parameters:
            return self.build(optimizer, axis_name=workers, group_axis_name=groups, **options)
        return self.build(optimizer, axis_name=(*groups, *workers), **options)


@functools.cache
def _options(build: Callable) -> Mapping[str, Any]:
    keywords = (each for each in inspect.signature(build).parameters.values() if each.kind is each.KEYWORD_ONLY)
    own = (each for each in keywords if not each.name.endswith(("axis_name", "shard_specs")))
    return types.MappingProxyType({each.name: each.default for each in own})
