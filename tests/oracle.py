"""Algorithm 1 and eq. 2 of arXiv:1905.10395 in plain NumPy loops, float64, written from the paper.

It shares nothing with `lsgd_jax`: no vectorisation over workers, no JAX, no optax.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Worker = tuple[int, int]  # (group, position in the group)
ALL = -1  # instead of a group


class Run(NamedTuple):
    x: np.ndarray  # [steps, groups, workers, dimensions], after each step
    local_leaders: list[list[int | None]]  # one entry an exchange: each group's leader
    global_leaders: list[int | None]  # one entry a global exchange: the leader's position, groups first
    scores: np.ndarray  # [steps, groups, workers]


def lowest(scores: dict[Worker, float], x: dict[Worker, np.ndarray]) -> Worker | None:
    """The worker with the lowest finite score whose parameters are finite; the first of several."""
    best = None
    for worker in sorted(scores):
        able = math.isfinite(scores[worker]) and all(math.isfinite(number) for number in x[worker])
        if able and (best is None or scores[worker] < scores[best]):
            best = worker
    return best


def sent(leader: np.ndarray, last: np.ndarray, wire: str | None) -> np.ndarray:
    """A leader as it is received: whole, with 8 significant bits, or by its rounded difference to the last one.

    Of the differences, as many equal blocks as it takes for none to have more than 256 have a scale each.
    """
    if wire == "bfloat16":
        fraction, exponent = np.frexp(leader)
        return np.ldexp(np.round(np.ldexp(fraction, 8)), exponent - 8)
    if wire == "int8":
        length = math.ceil(len(leader) / math.ceil(len(leader) / 256))
        received = leader.copy()
        for block in (slice(start, start + length) for start in range(0, len(leader), length)):
            if (scale := np.abs(leader[block] - last[block]).max() / 127) > 0:
                received[block] = last[block] + scale * np.round((leader[block] - last[block]) / scale)
        return received
    return leader


def lsgd(
    start: np.ndarray,
    gradient: Callable[[np.ndarray, int, Worker], np.ndarray],
    loss: Callable[[np.ndarray, int, Worker], float],
    *,
    steps: int,
    eta: float,
    pull: Callable[[int, Worker], float],
    period: int,
    global_pull: Callable[[int, Worker], float] | None = None,
    global_period: int = 1,
    window: int = 1,
    pull_at_x: bool = False,
    stale_pull: float = 0.0,
    global_stale_pull: float = 0.0,
    wire: str | None = None,
    delay: int = 0,
    fragments: tuple[slice, ...] = (slice(None),),
    overlap: int = 0,
    per_fragment: bool = False,
) -> Run:
    """Run all workers in step from `start`, [groups, workers, dimensions].

    `gradient` and `loss` are called with a point, the step (from 0) and the worker. `pull_at_x` takes eq. 2 literally;
    otherwise Algorithm 1 is run. Without `global_pull` there is no global leader. With a `delay` of 1 every pull comes
    an exchange later, from the points and leaders of then.

    Fragments are those of the dimensions that are sent together, one after the other in equal parts of the period; what
    is received pulls `overlap` steps later. The leader of the first one leads the others of a period, as long as it
    can, unless each elects its own. Then leaders are those of the first fragments.
    """
    groups, per_group = start.shape[:2]
    everyone = [(j, i) for j in range(groups) for i in range(per_group)]
    x = {worker: start[worker].astype(np.float64) for worker in everyone}
    seen: dict[Worker, list[float]] = {worker: [] for worker in everyone}
    # By group or for all, and fragment: the last leader as it came, what is on its way, and who was elected last.
    received: dict[tuple[int, int], np.ndarray] = {}
    flying: dict[tuple[int, int], tuple[dict[Worker, np.ndarray], Worker, np.ndarray]] = {}
    waiting: dict[tuple[int, int], tuple[dict[Worker, np.ndarray], Worker | None]] = {}
    leading: dict[int, Worker | None] = {}  # in this period
    trajectory, local_leaders, global_leaders, all_scores = [], [], [], []

    for t in range(steps):
        before = {worker: x[worker].copy() for worker in everyone}
        for worker in everyone:
            seen[worker].append(loss(before[worker], t, worker))
            x[worker] = x[worker] - eta * gradient(before[worker], t, worker)
        scores = {worker: sum(seen[worker][-window:]) / len(seen[worker][-window:]) for worker in everyone}

        def drawn_to_stored(level, strength, before=before):
            for worker in everyone:
                for k, part in enumerate(fragments):
                    group = ALL if level else worker[0]
                    if strength and (group, k) in received:
                        origin = (before[worker] if pull_at_x else x[worker])[part]
                        x[worker][part] = x[worker][part] - strength * (origin - received[group, k])

        def places(members, k, before=before):
            return {worker: (before if pull_at_x else x)[worker][fragments[k]].copy() for worker in members}

        def elect(members, group, k, scores=scores):
            place = places(members, k)
            candidates = members if k == 0 or per_fragment else [w for w in members if w == leading[group]]
            leading[group] = lowest({worker: scores[worker] for worker in candidates}, place)
            return place, leading[group]

        def send(group, k, place, leader):
            if leader is not None:
                last = received.get((group, k), np.zeros_like(place[leader]))
                flying[group, k] = place, leader, sent(place[leader], last, wire)

        def apply(members, group, k, pull, t=t):
            """Pull towards what has come, from where it was elected or, after an overlap, from where workers are."""
            place, leader, received[group, k] = flying.pop((group, k))
            place = places(members, k) if overlap else place
            for worker in members:
                if worker != leader:
                    x[worker][fragments[k]] -= pull(t, worker) * (place[worker] - received[group, k])

        def exchange(of_groups, pull, period, found, t=t):
            """Send a leader's fragments and pull towards it; with a delay, the one elected the time before."""
            for k in range(len(fragments)):
                falls = (k + 1) * period // len(fragments) % period
                due = (t + 1) % period == falls
                for group, members in of_groups.items():
                    if due:
                        send(group, k, *(waiting.get((group, k), ({}, None)) if delay else elect(members, group, k)))
                    if (t + 1 - overlap) % period == falls and (group, k) in flying:
                        apply(members, group, k, pull)
                    if due and delay:
                        waiting[group, k] = elect(members, group, k)
                if due and k == 0:
                    found.append([leading[group] for group in of_groups])

        drawn_to_stored(0, stale_pull / period)
        exchange({j: [(j, i) for i in range(per_group)] for j in range(groups)}, pull, period, local_leaders)
        drawn_to_stored(1, global_stale_pull / global_period)
        if global_pull is not None:
            exchange({ALL: everyone}, global_pull, global_period, global_leaders)

        trajectory.append([[x[j, i].copy() for i in range(per_group)] for j in range(groups)])
        all_scores.append([[scores[j, i] for i in range(per_group)] for j in range(groups)])

    local = [[None if leader is None else leader[1] for leader in leaders] for leaders in local_leaders]
    everybody = [None if leader is None else leader[0] * per_group + leader[1] for [leader] in global_leaders]
    return Run(np.array(trajectory), local, everybody, np.array(all_scores))


Layers = list[np.ndarray]


def peer(
    method: str,
    start: list[Layers],
    gradient: Callable[[Layers, int, int], Layers],
    loss: Callable[[Layers, int, int], float],
    *,
    steps: int,
    eta: float,
    momentum: float,
    period: int = 1,
    pull: float = 0.0,
    center_pull: float = 0.0,
    prox: float = 0.0,
    outer_learning_rate: float = 0.0,
    outer_momentum: float = 0.0,
    kappa: float = 0.0,
    trim: float = 0.5,
    window: int = 1,
    delay: int = 0,
    wire: str | None = None,
    fragments: list[list[int]] | None = None,
    overlap: int = 0,
    mixing: float = 1.0,
) -> tuple[list[list[Layers]], Layers]:
    """The methods LSGD is compared with, each from its paper's equations; local SGD with Nesterov momentum.

    With a `delay` of 1 workers move by how far each was from the mean at the end of the last exchange. With a `wire`
    what is summed is each one's rounded difference to the last mean. Fragments are the layers that are sent together,
    one after the other in equal parts of the period; what comes of them is applied `overlap` steps later. The quorum of
    the first one sends the others of a period, whoever of it still can.

    Returns every worker's layers after each step, and the model that the method reports at the end.
    """
    workers, layers = range(len(start)), range(len(start[0]))

    def average(points: list[Layers]) -> Layers:
        return [sum(points[i][k] for i in workers) / len(points) for k in layers]

    x = [[layer.astype(np.float64) for layer in worker] for worker in start]
    velocity = [[np.zeros_like(layer) for layer in worker] for worker in x]
    center, last_mean = average(x), average(x)
    last_center = [list(worker) for worker in x]
    waiting = [list(worker) for worker in x]
    outer_velocity = [np.zeros_like(layer) for layer in center]
    losses: list[list[float]] = [[] for _ in workers]
    flying: dict[int, np.ndarray | None] = {}  # by layer: the point that will come, and that which has
    received: dict[int, np.ndarray | None] = {}
    exchanged = [] if method in ("data_parallel", "independent") else fragments or [list(layers)]
    strength = mixing if method in ("local_sgd", "diloco", "downpour") else pull
    quorums: dict[int, list[int]] = {number: [] for number in range(len(exchanged))}  # by fragment
    trajectory = []

    def choose(number: int) -> None:
        """Whose layers of this fragment are averaged."""
        scores = {i: sum(losses[i][-window:]) / len(losses[i][-window:]) for i in workers}
        finite = [i for i in workers if all(np.isfinite(x[i][k]).all() for k in exchanged[number])]
        able = [i for i in finite if math.isfinite(scores[i]) and (number == 0 or i in quorums[number - 1])]
        if number == 0 and able:
            in_order = sorted(scores[i] for i in able)
            least, middle = in_order[0], in_order[len(in_order) // 2]
            able = [i for i in able if kappa == math.inf or scores[i] - least <= kappa * (middle - least)]
        quorums[number] = able

    def meet_quorum(k: int, who: list[int]) -> np.ndarray | None:
        """Where the layers k of all workers are pulled, if there is a quorum; the center moves."""
        if not who:
            return None
        place = waiting if delay else x
        if wire:
            rounded = sum(sent(place[i][k] - last_mean[k], last_mean[k], wire) for i in who)
            last_mean[k] = last_mean[k] + sent(rounded, last_mean[k], wire) / len(who)
        else:
            last_mean[k] = sum(place[i][k] for i in who) / len(who)
        if (outer_learning_rate, outer_momentum) == (1, 0):
            return last_mean[k]
        outer_velocity[k] = outer_momentum * outer_velocity[k] + last_mean[k] - center[k]
        center[k] = center[k] + outer_learning_rate * (last_mean[k] - center[k] + outer_momentum * outer_velocity[k])
        return center[k]

    def meet(k: int, g: list[Layers]) -> np.ndarray:
        """Where the layers k of all workers are pulled; the center moves."""
        if method in ("coordinate_median", "trimmed_mean"):
            finite = [x[i][k] for i in workers if all(np.isfinite(layer).all() for layer in x[i])]
            cut = min(int(trim * len(x)), (len(finite) - 1) // 2)
            return np.mean(np.sort(finite, axis=0)[cut : len(finite) - cut], axis=0)
        mean = sum(x[i][k] for i in workers) / len(x)
        if method == "easgd":
            point, center[k] = center[k], center[k] + center_pull * (mean - center[k])
            return point
        if method == "downpour":
            center[k] = center[k] + sum(x[i][k] - last_center[i][k] for i in workers)
            for i in workers:
                last_center[i][k] = center[k]
        elif method == "local_sgd":
            place = waiting if delay else x
            if wire:
                rounded = sum(sent(place[i][k] - center[k], center[k], wire) for i in workers)
                center[k] = center[k] + sent(rounded, center[k], wire) / len(workers)
            else:
                center[k] = sum(place[i][k] for i in workers) / len(x)
        elif method == "diloco":
            outer_gradient = center[k] - mean
            outer_velocity[k] = outer_momentum * outer_velocity[k] + outer_gradient
            center[k] = center[k] - outer_learning_rate * (outer_gradient + outer_momentum * outer_velocity[k])
        else:
            of_model = [math.sqrt(sum((layer**2).sum() for layer in g[i])) for i in workers]
            of_layer = [math.sqrt((g[i][k] ** 2).sum()) for i in workers]
            inverse = [1 / norm for norm in (of_model if method == "mgrawa" else of_layer)]
            return sum(inverse[i] / sum(inverse) * x[i][k] for i in workers)
        return center[k]

    for t in range(steps):
        for i in workers:
            losses[i].append(loss(x[i], t, i))
        g = [gradient(x[i], t, i) for i in workers]
        if method == "data_parallel":
            g = [average(g) for _ in workers]
        for i in workers:
            for k in layers:
                velocity[i][k] = momentum * velocity[i][k] + g[i][k]
                x[i][k] = x[i][k] - eta * (g[i][k] + momentum * velocity[i][k])
                if method in ("mgrawa", "lgrawa") and k in received:
                    x[i][k] = x[i][k] - prox / period * (x[i][k] - received[k])

        for number, part in enumerate(exchanged):
            falls = (number + 1) * period // len(exchanged) % period
            due = (t + 1) % period == falls
            if due and method == "quorum" and not delay:
                choose(number)
            if due:
                flying.update({k: meet_quorum(k, quorums[number]) if method == "quorum" else meet(k, g) for k in part})
            for k in part:
                if (t + 1 - overlap) % period == falls and k in flying:
                    received[k] = flying.pop(k)
                    for i in workers:
                        place = waiting[i][k] if delay else x[i][k]
                        if received[k] is not None:
                            x[i][k] = x[i][k] - strength * (place - received[k])
                        waiting[i][k] = x[i][k]
            if due and method == "quorum" and delay:
                choose(number)

        trajectory.append([[layer.copy() for layer in worker] for worker in x])

    if method in ("easgd", "downpour", "diloco"):
        return trajectory, center
    if method == "quorum":
        return trajectory, last_mean
    if method == "independent":
        scores = [sum(losses[i][-window:]) / len(losses[i][-window:]) for i in workers]
        return trajectory, x[scores.index(min(scores))]
    return trajectory, average(x)
