"""Asynchronous training: every worker at its own speed, as Algorithm 1 of the paper has it.

A worker takes jitted local steps on a device of its own, driven by a thread of its own, and counts each in one count of
all workers' steps. With n workers in all groups together, an exchange falls due when that count reaches the next
multiple of n * period, a global one at the multiples of n * global_period: the faster workers have taken more of those
steps than the slower. Data, learning rates and scores go by each worker's own steps. There are three ways to exchange:

- `Joined`: all meet in one collective exchange, each when it has finished the step at hand. Everybody waits for the
  slowest to end its step.
- `Posted`: each posts its score and a reference to its parameters on a board; where an exchange is due, a worker is
  pulled, at its own next boundary between steps, towards the best that is posted. Nobody waits.
- `Centred`: each worker meets a centre variable after every `period` of its own steps: EASGD and DOWNPOUR as their
  papers have them.

What a worker does is a generator, `life`, that gives up its turn at every boundary between two actions: `Threads` lets
all run as they come, and a test can give them turns in an order of its own.
"""

from lsgd_jax.asynchronous.board import Board, Post, SharedBoard
from lsgd_jax.asynchronous.exchanges import Centred, Joined, Level, Posted
from lsgd_jax.asynchronous.workers import Exchanges, Model, StepReport, Threads, Worker, life

__all__ = [
    "Board",
    "Centred",
    "Exchanges",
    "Joined",
    "Level",
    "Model",
    "Post",
    "Posted",
    "SharedBoard",
    "StepReport",
    "Threads",
    "Worker",
    "life",
]
