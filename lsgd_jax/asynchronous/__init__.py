"""Asynchronous training: every worker runs at its own speed, as in Algorithm 1 of the paper.

A worker takes jitted local steps on its own device, driven by its own thread, and all workers' steps are counted
together. With n workers in all groups, an exchange is due when that count reaches the next multiple of n * period, a
global exchange at multiples of n * global_period: faster workers have taken more of those steps than slower ones. Data,
learning rates and scores follow each worker's own steps. There are three ways to exchange:

- `Joined`: all workers meet in one collective exchange, each when it has finished its current step. Everyone waits for
  the slowest worker's step.
- `Posted`: each worker posts its score and a reference to its parameters on a board. Where an exchange is due, a worker
  is pulled, at its own next boundary between steps, towards the best worker posted. Nobody waits.
- `Centered`: each worker meets a center variable every `period` of its own steps, as in the papers of EASGD and
  DOWNPOUR.

A worker's actions are a generator, `life`, that yields at every boundary between two of them: `Threads` lets all
workers run freely, and a test can schedule them in an order of its own.
"""

from lsgd_jax.asynchronous.board import Board, Gone, Post
from lsgd_jax.asynchronous.exchanges import Centered, Joined, Level, Posted
from lsgd_jax.asynchronous.workers import Exchanges, Model, StepReport, Threads, Worker, life

__all__ = [
    "Board",
    "Centered",
    "Exchanges",
    "Gone",
    "Joined",
    "Level",
    "Model",
    "Post",
    "Posted",
    "StepReport",
    "Threads",
    "Worker",
    "life",
]
