"""The way of the examples to the network: indices from the host, 8-bit images cropped and flipped on the device."""

from benchmarks.gpu.part import Record, timed
from benchmarks.speed import input as cpu_input


def measure(record: Record, small: bool) -> None:
    """Time batches of CIFAR-10's shapes beside training steps of CNN7 on as many examples."""
    batches, rounds = (2, 2) if small else (50, 20)
    with record.attempt("CIFAR-10, batches of 128"):
        step = cpu_input.step_program(batches)
        programs = {"step of CNN7": step, "control": step, "input": cpu_input.input_program(batches)}
        result = timed(programs, rounds, "step of CNN7", batches)
        rates = {name: 1e3 * cpu_input.BATCH / of["median"] for name, of in result["milliseconds"].items()}
        record.keep("CIFAR-10, batches of 128", {"examples per second": rates} | result)
