"""What `benchmarks.gpu.steps` has PyTorch compile, compiled into PyTorch's cache while nothing is measured."""

from benchmarks.gpu.part import Record
from benchmarks.gpu.steps import fill_cache


def measure(record: Record, small: bool, network: str) -> None:
    """Compile; nothing is kept."""
    fill_cache(network, small)
