"""Workers without threads: given turns in an order of the test's own, on problems of a few numbers."""

from functools import cache

import jax
import numpy as np

from lsgd_jax.asynchronous import Model, StepReport, Worker, life


def drive(workers, exchanges, turns):
    """Give the workers turns until all have ended; who waits is passed over, and that all wait is an error.

    `turns` gives numbers in [0, 1): which of those who can go on is next.
    """
    lives = {worker.position: life(worker, exchanges) for worker in workers}
    waits_for = dict.fromkeys(lives)
    while lives:
        able = [i for i in lives if waits_for[i] is None or waits_for[i].is_set()]
        assert able, f"workers {list(lives)} wait for each other for ever"
        i = able[int(next(turns) * len(able))]
        try:
            waits_for[i] = next(lives[i])
        except StopIteration:
            del lives[i]


def drive_in_step(workers, exchanges):
    """Give all workers a turn after each other; who waits is passed over."""
    lives = {worker.position: life(worker, exchanges) for worker in workers}
    waits_for = dict.fromkeys(lives)
    while lives:
        for i in list(lives):
            if waits_for[i] is None or waits_for[i].is_set():
                try:
                    waits_for[i] = next(lives[i])
                except StopIteration:
                    del lives[i]


def scripted(position, steps, told=lambda step: StepReport(0.0, 0.0, True), moves=None):
    """A worker that starts at 0, moves by its step's entry of `moves` and tells what the script says."""

    def take_step(step, model, optimizer):
        params = model.params if moves is None else model.params + moves[step]
        return Model(params, ()), optimizer, told(step)

    return Worker(position, steps, Model(zero(), ()), (), take_step)


@cache
def zero():
    return jax.device_put(np.zeros((1, 1), np.float32))
