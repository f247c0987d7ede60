"""A part of the GPU check in a process of its own, and its results: `python -m benchmarks.gpu.part steps CNN7 ...`."""

import argparse
import importlib
import json
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.speed.interleaved import milliseconds, ratio, time_interleaved
from lsgd_jax import files
from lsgd_jax.tracking.environment import environment


class Record:
    """The results of a part by name, in a file that is whole after each of them."""

    def __init__(self, part: str, folder: Path, size: str) -> None:
        self._path, self._size, self._lock = folder / f"{part}.json", size, threading.Lock()

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Write and print a result; it replaces one of the same name."""
        with self._lock:
            content: dict[str, Any] = {"size": self._size, "results": {}}
            if self._path.exists():
                content = json.loads(self._path.read_text())
            content["results"][name] = result
            content["environment"] = environment()
            files.write(self._path, json.dumps(content, indent=2) + "\n")
        print(f"{name}: {json.dumps(rounded(result))[:160]}", flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Keep an error as the result, and go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.keep(name, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})


def timed(programs: dict[str, Callable[[], Any]], rounds: int, base: str, calls: int = 1) -> dict[str, Any]:
    """Times of interleaved programs, each of which does something `calls` times, and ratios to one of them."""
    seconds = {name: of / calls for name, of in time_interleaved(programs, rounds).items()}
    return {
        "milliseconds": {name: milliseconds(of) for name, of in seconds.items()},
        f"ratio to {base}": {name: ratio(of, seconds[base]) for name, of in seconds.items() if name != base},
    }


def rounded(value: Any) -> Any:
    """The value with three digits of each number, to be printed."""
    if isinstance(value, dict):
        return {name: rounded(of) for name, of in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", help="module of benchmarks.gpu")
    parser.add_argument("details", nargs="*", help="what of the part")
    parser.add_argument("--size", choices=("small", "full"), required=True)
    parser.add_argument("--results", type=Path, required=True, help="folder")
    arguments = parser.parse_args()
    record = Record(arguments.part, arguments.results, arguments.size)
    importlib.import_module(f"benchmarks.gpu.{arguments.part}").measure(
        record, arguments.size == "small", *arguments.details
    )


if __name__ == "__main__":
    main()
