"""A soak is summed up."""

import json
import signal
from collections import Counter
from pathlib import Path

from lsgd_jax.run_folder import environment
from tests.reliability.faults import SOAK

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # As in a script's background, and then in all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)

SUMMARY = Path(__file__).parents[2] / "benchmarks" / "reliability" / "results" / "soak.json"


def _add(counts, name, count):
    """A count, or the most of several measures."""
    counts[name] = max(counts[name], count) if name.startswith("most ") else counts[name] + count


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Keep what a soak has tried that has passed: the numbers that its tests have recorded, and the cases of each."""
    if hasattr(config, "workerinput"):  # Of pytest-xdist.
        return
    passed = terminalreporter.stats.get("passed", [])
    for told in sorted(
        {name for report in passed for name, _ in report.user_properties if name.startswith("not tried")}
    ):
        terminalreporter.write_line(told)
    if not SOAK or exitstatus != 0:
        return
    tried, cases = Counter(), Counter()
    for report in passed:
        cases[report.nodeid.split("::")[-1].split("[")[0]] += 1
        for name, count in report.user_properties:
            _add(tried, name, count)
    totals = Counter()
    for name, count in tried.items():
        _add(totals, name.split(":")[0], count)
    content = {
        "totals": totals,
        "tried": tried,
        "cases by test": cases,
        "environment": environment(),
    }
    SUMMARY.parent.mkdir(exist_ok=True)
    SUMMARY.write_text(json.dumps(content, indent=2) + "\n")
    told = [f"{name}: {count}" for name, count in totals.items()]
    terminalreporter.write_line("\n".join([*told, f"see {SUMMARY}"]))
