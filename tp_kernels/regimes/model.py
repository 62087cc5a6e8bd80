"""The cost model: what a step should cost, from operation counts and three constants fitted to this machine.

Counts for a batch of B sequences, in floating-point operations:

====================================  ==========================================
forward                               2TBN(N + M)
adjoint recursion (BP, total)         2TBN²
weight gradients                      2TBN(N + M)
displacement recursion (TP)           2TBN², in place of the adjoint's for local
regularized inverse (TP)              4⅓N³
====================================  ==========================================

So the inverse is a vanishing share of the step as TB/N grows: 4⅓N³ is about 2N/(TB) of one product of 2TBN².
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

INVERSE_SHARE = 0.1
"""Where the boundary is drawn: the inverse costs this share of BP's operations."""

_INVERSE = 13 / 3  # N³: Gram matrix, its Cholesky factor, two triangular solves
FUSED = ("bp", "tp", "tp-local", "tp-layer")


def operations(contender: str, T: int, N: int, B: int, M: int) -> float:
    """Floating-point operations of one step of a contender on this library's kernels."""
    products = 2 * (2 * T * B * N * (N + M)) + 2 * T * B * N**2
    if contender == "bp":
        return products
    return products + _INVERSE * N**3 + (2 * T * B * N**2 if contender == "tp" else 0)


def boundary_length(N: float, B: int, M: int) -> float:
    """The T from which the inverse costs less than ``INVERSE_SHARE`` of BP's operations.

    >>> round(boundary_length(128, B=16, M=1))
    57
    """
    return _INVERSE * N**3 / (INVERSE_SHARE * operations("bp", 1, N, B, M))


@dataclass(frozen=True)
class Fit:
    """The machine's constants, in seconds per call, seconds per sequential step and operations per second.

    ``errors`` has, for each contender, the median of |predicted/measured - 1| over its cells.
    """

    seconds_per_call: float
    seconds_per_step: float
    operations_per_second: float
    errors: Mapping[str, float]

    def seconds(self, record: Mapping) -> float:
        """Predicted seconds of one cell."""
        per_call, per_step, count = _terms(record)
        return per_call * self.seconds_per_call + per_step * self.seconds_per_step + count / self.operations_per_second


def _terms(record: Mapping) -> tuple[float, float, float]:
    """Factors of the three constants: a step runs T time steps forward and T back."""
    return 1.0, 2.0 * record["T"], operations(*(record[name] for name in ("contender", "T", "N", "B", "M")))


def fit(records: Iterable[Mapping]) -> Fit | None:
    """Least squares on the relative error over BP's cells; TP is then predicted, not fitted.

    Returns ``None`` with fewer than four cells, too few for three constants.
    """
    cells = [record for record in records if record["contender"] in FUSED and record["median_s"]]
    bp = [record for record in cells if record["contender"] == "bp"]
    if len(bp) < 4:
        return None
    terms = np.array([_terms(record) for record in bp])
    scale = terms.max(axis=0)  # the three constants differ by many orders of magnitude
    measured = np.array([record["median_s"] for record in bp])
    constants = nnls(terms / scale / measured[:, None], np.ones(len(bp)))[0] / scale
    per_call, per_step, per_operation = constants.tolist()
    if per_operation == 0:
        return None  # cells too small to show the cost of arithmetic
    found = Fit(per_call, per_step, 1 / per_operation, {})
    errors: dict[str, list[float]] = {}
    for record in cells:
        errors.setdefault(record["contender"], []).append(abs(found.seconds(record) / record["median_s"] - 1))
    return Fit(per_call, per_step, 1 / per_operation, {name: float(np.median(e)) for name, e in errors.items()})
