"""Each worker's own optimizer: its options, learning-rate schedules, and how optax makes it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import numpy.typing as npt
import optax
from jaxtyping import Float
from optax.contrib import MuonDimensionNumbers, muon


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Options of each worker's optimizer, as fields of `lsgd_jax.config.Config`."""

    learning_rate: float
    """Learning rate of each worker's optimizer; where it has a schedule, the highest."""
    local_optimizer: Literal["sgd", "adamw", "lars", "muon"] = "sgd"
    """Each worker's optimizer. Muon orthogonalizes the updates of weight matrices; all other parameters, such as
    embeddings, are those of AdamW (with Nesterov momentum) at the same learning rate."""
    momentum: float = 0.9
    """Momentum coefficient of SGD (Nesterov), LARS and Muon (Nesterov)."""
    adam_b1: float = 0.9
    """AdamW's decay rate of the mean of the gradients."""
    adam_b2: float = 0.999
    """AdamW's decay rate of the mean of the squared gradients."""
    weight_decay: float = 1e-4
    """Weight decay: added to the gradient by SGD; as AdamW, LARS and Muon define it."""
    clip_norm: float | None = None
    """Clip gradients to this global norm; by default they are not clipped."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """Learning-rate schedule after the warmup: constant, or falling to 0 along half a cosine."""
    learning_rate_warmup: float = 0.0
    """Fraction of the steps, the first, over which the learning rate grows linearly from 0."""
    learning_rate_decay: float = 0.0
    """Fraction of the steps, the last, over which a constant learning rate falls to 0."""
    learning_rate_drops: tuple[float, ...] = ()
    """When to multiply the learning rate by 0.1."""
    learning_rate_drops_in: Literal["fractions", "epochs", "seconds"] = "fractions"
    """Unit of the drops: fractions of all steps, epochs, or seconds of training. Runs with drops in seconds are not
    reproducible to the bit."""
    learning_rates: Literal["equal", "linear", "powers", "ladder"] = "equal"
    """Per-worker learning-rate scaling: equal, linear (1x, 2x, 3x, ...), powers (1x, 2x, 4x, ...), or a ladder around
    the leader's rate. The ladder is an experiment: it can rescue a rate that is far too low, and can hurt one that is
    right."""

    def _check_optimizer(self) -> None:
        """Check the ranges."""
        self._check("learning_rate", 0 < self.learning_rate < float("inf"), "positive")
        for name in ("momentum", "adam_b1", "adam_b2", "learning_rate_warmup", "learning_rate_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._check("weight_decay", 0 <= self.weight_decay < float("inf"), "at least 0")
        self._check("clip_norm", self.clip_norm is None or 0 < self.clip_norm < float("inf"), "positive")
        most = 1 - self.learning_rate_warmup
        self._check("learning_rate_decay", self.learning_rate_decay <= most, f"at most {most:g}, after the warmup")
        drops, in_fractions = self.learning_rate_drops, self.learning_rate_drops_in == "fractions"
        in_range = all(0 < drop < (1 if in_fractions else float("inf")) for drop in drops)
        self._check("learning_rate_drops", in_range, "fractions in (0, 1)" if in_fractions else "positive")
        self._check("learning_rate_drops", len(set(drops)) == len(drops), "different from each other")

    def _check(self, name: str, right: bool, demand: str) -> None:
        if not right:
            raise ValueError(f"{name} must be {demand}, got {getattr(self, name)}.")

    @property
    def has_schedule(self) -> bool:
        """Whether the learning rate has a warmup, decays, or follows a schedule."""
        return self.learning_rate_schedule != "constant" or self.learning_rate_warmup + self.learning_rate_decay > 0

    @property
    def rate_depends_on_steps(self) -> bool:
        """Whether the learning rate at a step depends on the number of all steps."""
        drops = bool(self.learning_rate_drops and self.learning_rate_drops_in == "fractions")
        return self.has_schedule or drops or self.learning_rates == "ladder"


def local_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """A worker's own optimizer at its highest learning rate: without schedule, drops and per-worker scaling."""
    optimizer = _OPTIMIZERS[options.local_optimizer](options)
    if options.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)


def _sgd(options: OptimizerOptions) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(options.weight_decay)
    return optax.chain(decay, optax.sgd(options.learning_rate, options.momentum, nesterov=True))


def _adamw(options: OptimizerOptions) -> optax.GradientTransformation:
    return optax.adamw(options.learning_rate, options.adam_b1, options.adam_b2, weight_decay=options.weight_decay)


def _lars(options: OptimizerOptions) -> optax.GradientTransformation:
    return optax.lars(options.learning_rate, options.weight_decay, momentum=options.momentum)


def _muon(options: OptimizerOptions) -> optax.GradientTransformation:
    return muon(
        options.learning_rate,
        beta=options.momentum,
        weight_decay=options.weight_decay,
        adam_b1=options.adam_b1,
        adam_b2=options.adam_b2,
        adam_weight_decay=options.weight_decay,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,  # That of AdamW's updates, so that one learning rate is for both.
    )


_OPTIMIZERS: dict[str, Callable[[OptimizerOptions], optax.GradientTransformation]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lars": _lars,
    "muon": _muon,
}


def matrices(params: optax.Params) -> Any:
    """The parameters that Muon orthogonalizes, and over which of their axes.

    A network says so in the metadata of its parameters, `nnx.Param(x, muon=MuonDimensionNumbers(...))`, or `muon=None`
    for none. Without that, it is those with two axes.

    Args:
      params: a tree of `nnx.Param` or of arrays.

    Returns:
      A tree with `optax.contrib.MuonDimensionNumbers` or None in place of each.
    """
    from flax import nnx  # It takes a while to import, and few who read a configuration need it.

    def axes(param: Any) -> MuonDimensionNumbers | None:
        metadata = param.get_metadata() if isinstance(param, nnx.Variable) else {}
        return metadata.get("muon", MuonDimensionNumbers() if np.ndim(param) == 2 else None)

    return jax.tree.map(axes, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def scheduled_factor(options: OptimizerOptions, steps: int, step: npt.ArrayLike) -> Float[np.ndarray, "..."] | float:
    """The factor of the learning rate by warmup, schedule and decay; drops are not in it.

    Args:
      options: of the optimizer.
      steps: number of all local steps.
      step: a number of steps taken, or several.
    """
    if not options.has_schedule:
        return 1.0
    shares = options.learning_rate_warmup, options.learning_rate_decay
    return _factors(options.learning_rate_schedule, steps, *shares)[np.minimum(step, steps - 1)]


@functools.lru_cache(maxsize=16)
def _factors(kind: str, steps: int, warmup: float, decay: float) -> Float[np.ndarray, " steps"]:
    """The factors of all steps, at once: a computation per step would wait for the devices."""
    first, last = int(warmup * steps), int(decay * steps)
    if kind == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, first, steps)
    else:
        growth, fall = optax.linear_schedule(0.0, 1.0, first), optax.linear_schedule(1.0, 0.0, last)
        schedule = optax.join_schedules([growth, optax.constant_schedule(1.0), fall], [first, steps - last])
    return np.asarray(schedule(np.arange(steps)), np.float32)
