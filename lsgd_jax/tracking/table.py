"""Tables on a terminal: as many columns as fit it, the most important ones first."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_ENOUGH = 10_000
"""Columns of a terminal that any table fits."""


def fitting(columns: Iterable[Sequence[str]], width: int) -> Table:
    """Return a table of those columns that fit a terminal, so that no value is broken.

    Args:
      columns: each with its header and its values, the most important column first. That one is always shown, and of
        the others each that fits beside those before it.
      width: number of characters in a line of the terminal.

    Example:
      >>> columns = [("method", "lsgd"), ("final error", "1.8 %"), ("median", "1.7 %")]
      >>> [column.header for column in fitting(columns, 20).columns]
      ['method', 'median']
    """
    console = Console(width=_ENOUGH)
    shown: list[Sequence[str]] = []
    for column in columns:
        if not shown or console.measure(_table([*shown, column])).maximum <= width:
            shown.append(column)
    return _table(shown)


def _table(columns: Sequence[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, (header, *_) in enumerate(columns):
        table.add_column(header, justify="right" if i else "left", no_wrap=i == 0)
    for row in zip(*(values for _, *values in columns), strict=True):
        table.add_row(*row)
    return table
