"""Figures of runs: a run, a comparison, a simulation, a report."""
