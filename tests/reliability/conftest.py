"""A soak is summed up, file by file: a run of one file renews its part of the summary."""

import json
import signal
from collections import Counter
from pathlib import Path

from lsgd_jax.tracking.environment import environment
from tests.reliability.faults import SOAK

# It is ignored in a script's background, and then in all that is started here.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SUMMARY = Path(__file__).parents[2] / "benchmarks" / "reliability" / "results" / "soak.json"


def _add(counts, name, count):
    """A count, or the most of several measures."""
    counts[name] = max(counts.get(name, 0), count) if name.startswith("most ") else counts.get(name, 0) + count


def _part(reports):
    """What the tests of a file have tried: the numbers that they have recorded, and the cases of each."""
    tried: dict[str, float] = {}
    for report in reports:
        for name, count in report.user_properties:
            _add(tried, name, count)
    cases = Counter(report.nodeid.split("::")[-1].split("[")[0] for report in reports)
    return {"tried": tried, "cases by test": cases, "environment": environment()}


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Keep what a soak has tried, if all tests of the files that were run have passed."""
    if hasattr(config, "workerinput"):  # Of pytest-xdist.
        return
    passed = terminalreporter.stats.get("passed", [])
    for told in sorted(
        {name for report in passed for name, _ in report.user_properties if name.startswith("not tried")}
    ):
        terminalreporter.write_line(told)
    whole_files = not config.getoption("keyword") and not any("::" in argument for argument in config.args)
    if not SOAK or exitstatus != 0 or not whole_files:
        return
    files = json.loads(SUMMARY.read_text())["files"]
    for file in sorted({report.nodeid.split("::")[0] for report in passed}):
        files[Path(file).name] = _part([report for report in passed if report.nodeid.startswith(f"{file}::")])
    totals: dict[str, float] = {}
    for part in files.values():
        for name, count in part["tried"].items():
            _add(totals, name.split(":")[0], count)
    SUMMARY.write_text(json.dumps({"totals": totals, "files": files}, indent=2) + "\n")
    told = [f"{name}: {count}" for name, count in totals.items()]
    terminalreporter.write_line("\n".join([*told, f"see {SUMMARY}"]))
