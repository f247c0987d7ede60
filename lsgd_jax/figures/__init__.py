"""Figures of runs, comparisons and simulations, and the report."""
