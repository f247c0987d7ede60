"""One look per method in all figures: Okabe-Ito colors, which color-blind readers tell apart, dashes, and names."""

import itertools
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE, YELLOW, GRAY = (
    *("#0072B2", "#56B4E9", "#009E73", "#E69F00"),
    *("#D55E00", "#CC79A7", "#C9B500", "#7F7F7F"),
)


class Look(NamedTuple):
    """How a method is drawn."""

    name: str
    """As papers write it."""
    color: str
    dashes: tuple[int, ...] = ()
    """Lengths of dashes and gaps in points; empty for a solid line."""

    @property
    def line(self) -> dict[str, Any]:
        """What Matplotlib's `plot` takes for it."""
        return {"color": self.color, "linestyle": (0, self.dashes) if self.dashes else "-", "label": self.name}


_DASHED, _DOTTED = (6, 3), (2, 2)
_HUES = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY, YELLOW, GRAY)
MOST_HUES = len(_HUES)
"""Workers up to which each has a hue of its own."""
_LOOKS = {
    "lsgd": Look("LSGD", VERMILION),
    "lsgd-joined": Look("LSGD, joined", VERMILION, _DASHED),
    "lsgd-posted": Look("LSGD, posted", VERMILION, _DOTTED),
    "easgd": Look("EASGD", BLUE),
    "downpour": Look("DOWNPOUR", BLUE, _DOTTED),
    "local_sgd": Look("local SGD", SKY),
    "data_parallel": Look("data parallel", GRAY),
    "diloco": Look("DiLoCo", GREEN),
    "mgrawa": Look("MGRAWA", ORANGE),
    "lgrawa": Look("LGRAWA", ORANGE, _DASHED),
    "independent": Look("independent", GRAY, _DOTTED),
    "quorum": Look("quorum", PURPLE),
    "coordinate_median": Look("coordinate median", YELLOW),
    "trimmed_mean": Look("trimmed mean", YELLOW, _DASHED),
}
_OTHERS = [
    (color, dashes)
    for dashes in (_DASHED, _DOTTED, ())
    for color in (PURPLE, GREEN, ORANGE, SKY, VERMILION, BLUE, YELLOW, GRAY)
]


def look(method: str) -> Look:
    """The look of a method; one that is not known here has its name, and a look that depends on it alone."""
    if method in _LOOKS:
        return _LOOKS[method]
    return Look(method, *_OTHERS[sum(method.encode()) % len(_OTHERS)])


def worker_colors(count: int) -> list[str]:
    """Colors of so many workers: of few, those of the palette, and of many, shades from dark to bright."""
    if count <= MOST_HUES:
        return list(_HUES[:count])
    return [to_hex(color) for color in colormaps["viridis"](np.linspace(0.1, 0.95, count))]


def looks(count: int) -> list[tuple[str, tuple[int, ...]]]:
    """Colors and dashes for so many runs or workers, which differ as far as there are differing ones."""
    every = [(color, dashes) for dashes in ((), _DASHED, _DOTTED) for color in _HUES]
    return list(itertools.islice(itertools.cycle(every), count))
