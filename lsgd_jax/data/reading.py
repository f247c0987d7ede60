"""Reads what is streamed while the workers train, in processes of its own."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import flags


def read_ahead(read: Callable[[int], Any], numbers: range, processes: int) -> Iterator[Any]:
    """Yield what a function returns for each of the numbers in order, prefetched.

    Args:
      read: the function, pickled for the processes.
      numbers: its arguments, one after the other.
      processes: number of processes that call it; 0: a thread of this process does.
    """
    flags.FLAGS.mark_as_parsed()  # Grain starts no process before: https://github.com/google/grain/issues/1355.
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(read)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    if processes:
        # Use pipes: batches in shared memory would outlive an abandoned iteration.
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, through_pipes)
        options = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, _end_with_parent)
    batches = iter(dataset)
    try:
        yield from batches
    finally:  # Also if the last batches are not consumed.
        batches.close()


def _end_with_parent(number: int, count: int) -> None:
    """Make this decoding process end exactly when the training process ends, however that ends."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # It has started this process.
        parent.join()  # Waits for a pipe that the kernel closes.
        os._exit(1)

    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Sent to all processes of a terminal or a job.
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
