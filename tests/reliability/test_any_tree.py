"""Random trees, methods, options and mappings: as the oracle has it, with everything else left alone to the bit."""

import dataclasses
import math
import random
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lsgd_jax.methods import METHODS
from lsgd_jax.variants import Revival, Stale, apply_updates, links
from tests import oracle
from tests.reliability import faults

GROUPS, WORKERS = 2, 2
EVERYONE = [(j, i) for j in range(GROUPS) for i in range(WORKERS)]
AXES, INNER = ("group", "worker"), "inner"
STEPS, ETA = 6, 0.125
FAILURE = (1, 1, 1)  # Group, worker and step.
MAPPINGS = ("vmap", "shard_map", "slots", "auto", "explicit")
"""Workers on devices of their own, two on one device, or each on two devices over an axis of one kind or the other."""
METHODS_IN_TURN = (*METHODS, "lsgd", "lsgd", "lsgd")
NARROWER = {"float32": "bfloat16", "float64": "float32", "complex128": "complex64", "float16": "bfloat16"}
WIDER = {"bfloat16": "float32", "float16": "float32", "float32": "float64", "complex64": "complex128"}
WIRE_ERRORS = {None: 0.0, "bfloat16": 2**-8, "int8": 1 / 127}
"""Of numbers up to 1, and of differences between such numbers."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a worker's parameters."""

    dtype: str
    shape: tuple[int, ...]
    role: str
    """Whether the optimizer trains it or has it frozen, or it is outside of what the method is given."""

    @property
    def is_inexact(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.inexact)

    @property
    def is_exchanged(self) -> bool:
        return self.role == "trained" and self.is_inexact and 0 not in self.shape


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, in words that reproduce it."""

    tree: Any
    method: str
    options: dict[str, Any]
    mapping: str
    around: str | None
    """Which transformation of optax keeps leaves outside of what the method is given."""
    gradients: str
    """Their dtypes beside the parameters'."""
    momentum: float | None
    fails: bool
    """Whether a worker meets an infinite gradient, and is revived."""
    passes_step: bool
    x64: bool


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    x64 = rng.random() < 0.25
    around = rng.choice((None, None, "masked", "partition"))
    momentum = rng.choice((None, 0.9))
    gradients = rng.choice(("equal", "equal", "narrower", "wider"))
    number, turn = divmod(seed, len(METHODS_IN_TURN))
    method, mapping = METHODS_IN_TURN[turn], MAPPINGS[number % len(MAPPINGS)]
    if method == "lsgd" or gradients != "equal":
        momentum = None  # The oracle of LSGD has none, and optax' momentum may change its dtype.
    roles = ["trained"] * 4 + ["frozen"] + ["outside"] * (around is not None)
    dtypes = ["float32"] * 4 + ["bfloat16", "bfloat16", "float16", "complex64", "int32", "bool"]
    dtypes += ["float64", "float64", "complex128"] * x64
    if rng.random() < 0.4:
        dtypes = [rng.choice(dtypes)]  # One for all, so that the tolerance is that of this one.

    def random_leaf() -> Leaf:
        dtype, role = rng.choice(dtypes), rng.choice(roles)
        if dtype in ("int32", "bool") and role == "trained" and momentum is not None:
            role = "frozen"  # Not even optax keeps their dtypes.
        return Leaf(dtype, rng.choice(((), (3,), (4,), (0,), (2, 3))), role)

    def random_tree(depth: int) -> Any:
        if depth == 0 or rng.random() < 0.2:
            return None if rng.random() < 0.1 else random_leaf()
        children = [random_tree(depth - 1) for _ in range(rng.choice((0, 1, 2, 2, 2, 3)))]
        kind = rng.choice((dict, list, tuple))
        return dict(zip("abc", children, strict=False)) if kind is dict else kind(children)

    options = random_options(method, rng)
    fails = options.get("revive") == "from_leader" and rng.random() < 0.5
    passes_step = rng.random() < 0.5
    tree = [random_tree(2), random_tree(1)] if rng.random() < 0.8 else random_tree(2) or {}  # None would be missing.
    return Case(tree, method, options, mapping, around, gradients, momentum, fails, passes_step, x64)


def random_options(method: str, rng: random.Random) -> dict[str, Any]:
    def strength() -> float:
        return rng.choice((0.0, 0.25, 0.5, 1.0))

    if method == "data_parallel":
        return {}
    if method == "independent":
        return {"window": rng.choice((1, 2, 4))}
    period = rng.choice((1, 2, 3))
    if method == "easgd":
        options = {"pull": strength() / 4, "center_pull": strength()}
    elif method == "diloco":
        options = {"outer_learning_rate": rng.choice((0.5, 1.0)), "outer_momentum": rng.choice((0.0, 0.5))}
    elif method == "quorum":
        options = {"kappa": rng.choice((0.0, 1.0, 3.0, math.inf)), "pull": strength(), "window": rng.choice((1, 2, 4))}
        options |= {"outer_learning_rate": rng.choice((0.5, 1.0)), "outer_momentum": rng.choice((0.0, 0.5))}
        options |= {"delay": rng.choice((0, 0, 1)), "wire": rng.choice((None, None, "bfloat16"))}
    elif method in ("coordinate_median", "trimmed_mean"):
        options = {"pull": strength()} | ({"trim": rng.choice((0.0, 0.25, 0.5))} if method == "trimmed_mean" else {})
    elif method in ("mgrawa", "lgrawa"):
        options = {"pull": strength(), "prox": strength() / 4}
    elif method == "lsgd":
        options = random_leader_options(period, rng)
    elif method == "local_sgd":
        options = {"delay": rng.choice((0, 0, 1)), "wire": rng.choice((None, None, "bfloat16"))}
    else:
        options = {}
    return {"period": period} | options


def random_leader_options(period: int, rng: random.Random) -> dict[str, Any]:
    def pull() -> Any:
        return rng.choice((0.25, 0.5, 1.0, halved, tuple(tuple(rng.choices((0.0, 0.5), k=2)) for _ in range(2))))

    options = {
        "pull": pull(),
        "window": rng.choice((1, 2, 4)),
        "pull_at": rng.choice(("after_step", "before_step")),
        "stale_pull": rng.choice((0.0, 0.0, 0.5)),
        "delay": rng.choice((0, 0, 1)),
        "revive": rng.choice(("never", "from_leader")),
        "wire": rng.choice((None, None, "bfloat16", "int8")),
        "broadcast": rng.choice(("auto", "all_reduce", "ring", "chain", "hierarchical")),
    }
    if rng.random() < 0.5:
        options["global_period"] = period * rng.choice((1, 2))
        options |= {"global_pull": pull(), "global_stale_pull": rng.choice((0.0, 0.5))}
    return options


def halved(step):
    """A schedule of the pull."""
    return 0.5 / (1 + step)


def transformation(case: Case) -> optax.GradientTransformationExtraArgs:
    roles = jax.tree.map(lambda leaf: leaf.role, case.tree)
    optimizer = optax.sgd(ETA, case.momentum, nesterov=case.momentum is not None)
    if "frozen" in jax.tree.leaves(roles):
        # The optimizer sees neither what is outside nor its label.
        optimizer = optax.partition(
            {"trained": optimizer, "frozen": optax.set_to_zero()},
            jax.tree.map(lambda role: optax.MaskedNode() if role == "outside" else role, roles),
        )
    options = {name: jnp.array(value) if isinstance(value, tuple) else value for name, value in case.options.items()}
    axes = {"axis_name": AXES}
    if "global_pull" in options:
        axes = {"axis_name": "worker", "group_axis_name": "group"}
    method = METHODS[case.method].build(optimizer, **axes, **options)
    if case.around == "masked":
        return optax.masked(method, jax.tree.map(lambda role: role != "outside", roles))
    if case.around == "partition":
        labels = jax.tree.map(lambda role: "outside" if role == "outside" else "method", roles)
        return optax.partition({"method": method, "outside": optax.set_to_zero()}, labels)
    return method


def problem(case: Case, seed: int) -> tuple[Any, Any, np.ndarray]:
    """Starts [group, worker, ...], gradients [group, worker, step, ...] and losses, of which no two differ little."""
    rng = np.random.default_rng(seed)

    def numbers(leaf: Leaf, dtype: str, *more: int) -> jax.Array:
        shape = (GROUPS, WORKERS, *more, *leaf.shape)
        x = rng.normal(size=shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * rng.normal(size=shape)
        if not leaf.is_inexact:
            x = rng.integers(-(2**20), 2**20, size=shape)
            x = x * 0 if more else x % 2 if dtype == "bool" else x
        if more and case.fails and leaf.is_exchanged:
            x[FAILURE] = np.inf
        return jnp.asarray(x, dtype)

    def gradient_dtype(leaf: Leaf) -> str:
        other = {"equal": {}, "narrower": NARROWER, "wider": WIDER}[case.gradients].get(leaf.dtype, leaf.dtype)
        return leaf.dtype if other in ("float64", "complex128") and not case.x64 else other

    start = jax.tree.map(lambda leaf: numbers(leaf, leaf.dtype), case.tree)
    gradients = jax.tree.map(lambda leaf: numbers(leaf, gradient_dtype(leaf), STEPS), case.tree)
    return start, gradients, rng.integers(1, 2**20, size=(GROUPS, WORKERS, STEPS)).astype(np.float32)


def trained(case: Case, start: Any, gradients: Any, losses: np.ndarray) -> tuple[Any, Any, Any, Any]:
    """Points and revivals [group, worker, step, ...], the model that the method reports, and the stored leaders."""
    tx = transformation(case)

    def train(x: Any, gradients: Any, losses: jax.Array) -> tuple[Any, Any, Any, Any]:
        def step(carry: tuple, now: tuple) -> tuple:
            x, state = carry
            number, gradient, loss = now
            timing = {"step": number} if case.passes_step else {}
            updates, state = tx.update(gradient, state, x, value=loss, **timing)
            assert jax.tree.structure(updates) == jax.tree.structure(x)
            x = apply_updates(x, updates, state)
            return (x, state), (x, of_kind(Revival, state, "revived"))

        # A scan takes no state that changes its structure, shapes or dtypes.
        (x, state), (path, revived) = jax.lax.scan(step, (x, tx.init(x)), (jnp.arange(STEPS), gradients, losses))
        center = None if case.around else METHODS[case.method].center(x, state, AXES)
        return path, revived, center, stored(state)

    return jax.tree.map(np.asarray, over_workers(train, case.mapping)(start, gradients, losses))


def of_kind(kind: type, state: Any, field: str) -> list[Any]:
    """A field of all parts of a kind in a state."""
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, kind))
    return [getattr(part, field) for part in parts if isinstance(part, kind)]


def stored(state: Any) -> list[list[Any]]:
    """By level, what workers keep of the leaders that were sent: the last ones, and an int8 wire's reconstructions."""
    return [[pull.leader.sent, *of_kind(Stale, pull, "point")] for pull in links(state)]


def over_workers(function: Any, mapping: str) -> Any:
    if mapping == "vmap":
        return jax.jit(jax.vmap(jax.vmap(function, axis_name="worker"), axis_name="group"))
    sizes = {"group": GROUPS} | ({} if mapping == "slots" else {"worker": WORKERS})
    sizes |= {INNER: 2} if mapping in ("auto", "explicit") else {}
    kinds = [AxisType.Explicit if (name, mapping) == (INNER, "explicit") else AxisType.Auto for name in sizes]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=tuple(kinds), devices=devices)
    axes = tuple(name for name in sizes if name != INNER)
    spec = PartitionSpec(*axes)

    def placed(x: Any, before: int) -> jax.Array:
        """Over the workers, and each worker's own array over its devices along the first dimension that allows it."""
        x, own = jnp.asarray(x), [None] * (jnp.ndim(x) - 2)
        for i, size in enumerate(x.shape[before:]):
            if INNER in sizes and size and size % 2 == 0:
                own[before - 2 + i] = INNER
                break
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes, *[None] * (2 - len(axes)), *own)))

    def on_device(*stacked: Any) -> Any:
        own = jax.tree.map(lambda x: x.reshape(x.shape[len(axes) :]), stacked)
        result = jax.vmap(function, axis_name="worker")(*own) if mapping == "slots" else function(*own)
        return jax.tree.map(lambda x: x[(None,) * len(axes)], result)

    program = jax.shard_map(
        on_device, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=set(axes), check_vma=mapping != "slots"
    )

    def run(start: Any, gradients: Any, losses: np.ndarray) -> Any:
        arguments = [jax.tree.map(partial(placed, before=n), tree) for tree, n in ((start, 2), (gradients, 3))]
        with jax.set_mesh(mesh):
            return jax.block_until_ready(jax.jit(program)(*arguments, placed(losses, 3)))

    return run


def vectors(case: Case, tree: Any, more: int = 0) -> list[np.ndarray]:
    """What is exchanged, array by array, as [group, worker, ..., real numbers]."""
    layers = []
    for leaf, x in zip(jax.tree.leaves(case.tree), jax.tree.leaves(tree), strict=True):
        if leaf.is_exchanged:
            x = np.asarray(x).reshape(*x.shape[: 2 + more], -1)
            real = [x.real, x.imag] if np.iscomplexobj(x) else [x]
            layers.append(np.concatenate([part.astype(np.float64) for part in real], axis=-1))
    return layers


def expected(case: Case, start: Any, gradients: Any, losses: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The oracle's points, by layer [group, worker, step, numbers], and its center, by layer."""
    x, g = vectors(case, start), vectors(case, gradients, more=1)
    if case.method == "lsgd":
        return expected_of_leaders(case, x, g, losses)
    path, center = oracle.peer(
        case.method,
        [[layer[worker] for layer in x] for worker in EVERYONE],
        lambda x, t, i: [layer[EVERYONE[i]][t] for layer in g],
        lambda x, t, i: float(losses[EVERYONE[i]][t]),
        steps=STEPS,
        eta=ETA,
        momentum=case.momentum or 0.0,
        **case.options,
    )
    by_step = [np.array([[point[k] for point in points] for points in path]) for k in range(len(x))]
    return [np.moveaxis(layer, 0, 1).reshape(GROUPS, WORKERS, STEPS, -1) for layer in by_step], center


def expected_of_leaders(
    case: Case, x: list[np.ndarray], g: list[np.ndarray], losses: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    options = dict(case.options)
    grouped = "global_pull" in options
    shape = (GROUPS, WORKERS) if grouped else (1, GROUPS * WORKERS)

    def stacked(layers: list[np.ndarray]) -> np.ndarray:
        layer = np.concatenate(layers, axis=-1)
        return layer.reshape(*shape, *layer.shape[2:])

    def strength(pull: Any) -> Any:
        if callable(pull):
            return lambda t, worker: pull(t)
        own = np.broadcast_to(pull, (GROUPS, WORKERS)).reshape(shape)
        return lambda t, worker: own[worker]

    gradients, losses = stacked(g), losses.reshape(*shape, STEPS)
    for name in ("wire", "broadcast", "revive"):  # These move nobody further than `tolerance` allows.
        options.pop(name)
    pull_at = options.pop("pull_at")
    pulls = {name: strength(options.pop(name)) for name in ("pull", "global_pull") if name in options}
    run = oracle.lsgd(
        stacked(x),
        lambda x, t, worker: gradients[worker][t],
        lambda x, t, worker: float(losses[worker][t]),
        steps=STEPS,
        eta=ETA,
        pull_at_x=pull_at == "before_step",
        **pulls,
        **options,
    )
    ends = np.cumsum([layer.shape[-1] for layer in x])[:-1]
    path = np.moveaxis(run.x, 0, 2).reshape(GROUPS, WORKERS, STEPS, -1)
    return np.split(path, ends, axis=-1), np.split(run.x[-1].mean((0, 1)), ends)


def tolerances(case: Case, gradients: Any, path: list[np.ndarray]) -> list[float]:
    """How far each layer's numbers may be from the oracle's: a few roundings a step of the narrowest dtype."""
    pairs = zip(jax.tree.leaves(case.tree), jax.tree.leaves(gradients), strict=True)
    rounding = [max(float(jnp.finfo(d).eps) for d in (leaf.dtype, g.dtype)) for leaf, g in pairs if leaf.is_exchanged]
    if case.method == "mgrawa":  # Its weights are of all layers.
        rounding = [max(rounding)] * len(rounding)
    wire = WIRE_ERRORS[case.options.get("wire")]
    return [
        STEPS * (2 * eps + wire) * max(1.0, float(np.abs(layer).max()))
        for eps, layer in zip(rounding, path, strict=True)
    ]


def untouched(case: Case, leaf: Leaf, start: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The points of a leaf that is not exchanged."""
    moves = case.around == "masked" and leaf.role == "outside"  # As it came, the gradient is the update.
    points, x = [], start
    for t in range(STEPS):
        x = optax.apply_updates(x, gradients[:, :, t]) if moves else x
        points.append(x)
    return np.stack(points, axis=2)


@pytest.mark.parametrize("seed", range(2000 if faults.SOAK else len(METHODS_IN_TURN) * len(MAPPINGS)))
def test_any_tree_is_trained_as_the_oracle_has_it(seed, record_property):
    case = random_case(seed)
    print(case)  # With a failure, pytest shows it.
    with jax.enable_x64(case.x64):
        start, gradients, losses = problem(case, seed)
        path, revived, center, kept = trained(case, start, gradients, losses)
        arrays = [jax.tree.leaves(tree) for tree in (case.tree, start, gradients, path)]
        for leaf, x, g, points in zip(*arrays, strict=True):
            assert (points.dtype, points.shape) == (leaf.dtype, (GROUPS, WORKERS, STEPS, *leaf.shape))
            if not leaf.is_exchanged and (leaf.role != "trained" or not leaf.is_inexact):
                np.testing.assert_array_equal(points, untouched(case, leaf, x, g))
        assert jax.tree.structure(path) == jax.tree.structure(start)
        if case.fails and vectors(case, path, 1):
            assert all(np.isfinite(x).all() for x in vectors(case, path, 1))
            for flags in revived:
                found = {tuple(worker) for *worker, _ in np.argwhere(flags)}
                assert found == {FAILURE[:2]} or (not found and is_on_its_way(case, path))
        else:
            check_values(case, start, gradients, losses, path, center)
        for i, level in enumerate(kept):
            for x in jax.tree.leaves(level):  # The same on all who share a leader.
                members = x[:, :1] if i == 0 and len(kept) > 1 else x[:1, :1]
                np.testing.assert_array_equal(x, np.broadcast_to(members, x.shape))
    record_property("trees tried", 1)
    if seed % 25 == 24:
        jax.clear_caches()  # The programs of a soak would fill the memory.


def is_on_its_way(case: Case, path: Any) -> bool:
    """Whether the failed worker has been sent to its leader, so near to zero that 16 bits take another exchange."""
    own = [points[FAILURE[:2]] for points in vectors(case, path, more=1)]
    moved = any((points[-1] != points[FAILURE[2]]).any() for points in own)
    return moved and all(
        jnp.dtype(leaf.dtype).itemsize == 2 for leaf in jax.tree.leaves(case.tree) if leaf.is_exchanged
    )


def check_values(case: Case, start: Any, gradients: Any, losses: np.ndarray, path: Any, center: Any) -> None:
    got = vectors(case, path, more=1)
    if not got:
        return
    want, want_center = expected(case, start, gradients, losses)
    allowed = tolerances(case, gradients, want)
    for x, y, tolerance in zip(got, want, allowed, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)
    if center is not None:
        assert jax.tree.structure(center) == jax.tree.structure(start)
        for x, y, tolerance in zip(vectors(case, center), want_center, allowed, strict=True):
            np.testing.assert_allclose(x, np.broadcast_to(y, x.shape), rtol=0, atol=tolerance)
