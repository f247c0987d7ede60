r"""Statistics over the seeds of a comparison: intervals of means, and differences to the first method.

Differences are paired by seed, since initialization, data and their order are the same. With m methods beside the
first, their intervals are simultaneous at 95 % by Bonferroni's inequality (Dunn 1961): each is a t-interval at the
level 1 - 0.05 / m, so that all of them together cover the true differences with that probability. Significance is that
of the paired t-test with Holm's step-down correction (Holm 1979): with the p-values in ascending order,

.. math:: \tilde p_{(k)} = \max_{j \le k} \min(1, (m - j + 1) \, p_{(j)}),

where the chance that any :math:`\tilde p < 0.05` belongs to a true difference of 0 is at most 5 %. An interval without
0 implies such a p-value; the reverse may fail, since Holm's test is the more powerful of the two. Step-down
intervals, at the levels of Holm's test, would not cover simultaneously, and those that do and agree with it say no more
than the sign of what was found (Strassburger, Bretz 2008). Both hold however the methods' results depend on each other,
and rely on differences that are about normal.

Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
Dunn, "Multiple comparisons among means", Journal of the American Statistical Association 56 (1961).
Strassburger, Bretz, "Compatible simultaneous lower confidence bounds for the Holm procedure and other Bonferroni-based
closed tests", Statistics in Medicine 27 (2008).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95
"""Level of intervals; of differences that of all together."""

SAME = 1e-6
"""Values that deviate by at most this share of the largest one compared are the same, but for rounding. A t-test would
take them for certain; with few seeds and errors counted on few examples, they are the same by chance."""


def over_seeds(values: Float[np.ndarray, " seeds"]) -> dict[str, Any]:
    """Return mean, half of the 95 % t-interval, median and values of a method's seeds.

    Seeds that have failed are not finite. They are never left out: if there are any, there is neither mean nor
    interval, and in the median they are the worst. What is not finite is None, and so is the interval of a single seed,
    or of seeds that all have the same value.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    median = finite(np.median(np.nan_to_num(values, nan=np.inf)))
    return _mean(values, _error(values, values), LEVEL) | {"median": median}


def differences_to_first(finals: Mapping[str, Float[np.ndarray, " seeds"]]) -> dict[str, dict[str, Any]]:
    """Return each method's difference to the first, by method, with its simultaneous interval and its p-values.

    A method with failed seeds has no interval and no p-value, but counts among the comparisons. Without two seeds there
    are none either, nor where all seeds differ by the same.

    Args:
      finals: what is compared, in the same order of seeds; failed seeds are NaN.
    """
    first, *others = finals
    level = 1 - (1 - LEVEL) / max(1, len(others))
    found, p_values = {}, {}
    for method, values in finals.items():
        differences = values - finals[first]
        error = _error(differences, [values, finals[first]])
        found[method] = _mean(differences, error, level)
        p_values[method] = 2 * stats.t.sf(abs(differences.mean()) / error, len(differences) - 1)
    corrected = dict(zip(others, holm([p_values[method] for method in others]), strict=True))
    for method, of in found.items():
        of |= {"p_value": finite(p_values[method]), "p_holm": finite(corrected.get(method, math.nan))}
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method; NaN stays NaN, and counts as a comparison.

    Example:
      >>> print(*(round(p, 3) for p in holm([0.01, 0.04, 0.03, 0.005])))
      0.03 0.06 0.06 0.02
    """
    corrected, largest = [math.nan] * len(p_values), 0.0
    ascending = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(ascending):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[i] = largest
    return corrected


def finite(value: Any) -> float | None:
    """Return a number; None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def _mean(values: np.ndarray, error: float, level: float) -> dict[str, Any]:
    """The mean, half of its t-interval and the values."""
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
    numbers = {"mean": finite(values.mean()), "half_width": finite(half)}
    return numbers | {"values": [finite(value) for value in values]}


def _error(values: np.ndarray, compared: Any) -> float:
    """The standard error of the mean; NaN for less than two values, and for values that are the same."""
    if len(values) < 2:
        return math.nan
    deviation = values.std(ddof=1)
    return deviation / math.sqrt(len(values)) if deviation > SAME * np.abs(compared).max() else math.nan
