"""The results of the GPU check as one page of tables.

python -m benchmarks.gpu.summary     # renews benchmarks/gpu/results/README.md from the results beside it
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTS = ("device", "steps", "workers", "exchange", "input", "tests", "comparisons")
TITLES = {
    "device": "Device",
    "steps": "Training step: JAX against PyTorch",
    "workers": "Several workers on one GPU",
    "exchange": "Exchange time relative to memory traffic",
    "input": "Input pipeline",
    "tests": "Tests on the GPU",
    "comparisons": "Tuned comparisons",
}
NOTES = {
    "device": "How float32 is rounded: a relative error near 3e-4 is TF32, near 1e-7 float32.",
    "steps": "Medians of interleaved rounds with 95 % intervals, and ratios to JAX's: above 1, JAX is faster.",
    "workers": "Milliseconds of one step of all workers, or of one program of the package up to an exchange.",
    "exchange": "Milliseconds, and ratios to a copy of as many bytes as an exchange has to read and write.",
    "input": "Milliseconds of a batch.",
    "comparisons": "Test errors of the evaluated model; hyperparameters are tuned on held-out training data.",
}
NO_RESULT = "No GPU result exists yet."


def write_summary(results: Path) -> None:
    """Write README.md into a folder of results."""
    (results / "README.md").write_text("\n".join(lines(results)) + "\n")


def lines(results: Path) -> Iterator[str]:
    """The lines of the page."""
    yield "# Results of the GPU check"
    parts = {part: json.loads(path.read_text()) for part in PARTS if (path := results / f"{part}.json").exists()}
    on_gpu = {part for part, of in parts.items() if "cpu" not in of["environment"]["devices"]}
    if not on_gpu:
        yield from ("", NO_RESULT)
    for part, content in parts.items():
        yield from ("", f"## {TITLES[part]}", "")
        yield f"{content['environment']['devices']}, JAX {content['environment']['packages']['jax']}."
        yield from ["", NOTES[part]] if part in NOTES else []
        yield ""
        good = {name: of for name, of in content["results"].items() if "error" not in of}
        yield from tables(part, good)
        yield from (f"- {name} failed: {of['error']}" for name, of in content["results"].items() if "error" in of)
    run = results / "run.json"
    processes = json.loads(run.read_text())["processes"] if run.exists() else {}
    problems = [f"- {name}: {of['problem']}" for name, of in processes.items() if of["problem"]]
    if problems:
        yield from ("", "## Incomplete parts", "", *problems)


def tables(part: str, results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The results of a part."""
    if part == "device":
        yield from table(["", ""], ([name, text(of)] for name, of in results.items()))
    elif part == "tests":
        for name, of in results.items():
            counts = ", ".join(
                f"{of[kind]} {kind.lower()}" for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED") if kind in of
            )
            yield f"- {name}: {counts}{'' if of['finished'] else '; stopped when the time was up'}. `{of['command']}`"
            yield from (f"  - `{test}`: {why}" for test, why in of["failed"].items())
    elif part == "comparisons":
        for name, of in results.items():
            yield from (f"### {name}", "", f"`{of['command']}`", "", *of["table"], "")
    else:
        yield from times(results)


def times(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Times and ratios of the programs of each result, one line per program."""
    rows = []
    for name, of in results.items():
        [[base, ratios]] = [(key, value) for key, value in of.items() if key.startswith("ratio to ")]
        for program, time in of["milliseconds"].items():
            ratio = f"{base} {interval(ratios[program], 'ratio')}" if program in ratios else ""
            rows.append([name, program, interval(time, "median"), ratio.removeprefix("ratio to ")])
    yield from table(["", "program", "ms [95 %]", "ratio to [95 %]"], rows)


def table(header: list[str], rows: Any) -> Iterator[str]:
    """A table in Markdown."""
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(row) + " |"


def interval(of: dict[str, float], middle: str) -> str:
    """A number with its interval."""
    return f"{of[middle]:.3g} [{of['low']:.3g}, {of['high']:.3g}]"


def text(value: Any) -> str:
    """A result in a line."""
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {text(of)}" for name, of in value.items() if not name.startswith(("milliseconds", "ratio"))
        )
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    write_summary(Path(__file__).parent / "results")
