"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops: two for each multiply-add of a matrix product,
and of a factorization what the textbook says. Elementwise work is not counted, as nowhere in torch.

``torch.utils.flop_counter`` imports triton, which takes longer than all else: so this is imported where a counter is
found at work (``tell_counters``), and not with the library.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode, flop_registry, register_flop_formula

from tp_kernels._library import WAITING
from tp_kernels.rules import Sweep

Shape = Sequence[int]
_OPS = torch.ops.tp_kernels


def recurrence_fwd(cell: str, x: Shape, weight_ih: Shape | None, bias_ih: Any, weight_hh: Shape, *rest: Any, **_: Any):
    """At each step ``W h``, and ``W_ih x`` where there is a projection."""
    rows = math.prod(x[:-1])
    return _product(rows, weight_hh) + _product(rows, weight_ih)


def recurrence_bwd(
    cell: str,
    grad_h: Shape | None,
    grad_last: Shape | None,
    x: Shape | None,
    weight_ih: Shape | None,
    bias_ih: Shape | None,
    weight_hh: Shape,
    bias_hh: Shape | None,
    start: Shape | None,
    batch_sizes: Shape | None,
    reset: Shape | None,
    reverse: bool,
    states: Shape,
    kept: Shape | None,
    feedback: Shape | None,
    carried: Shape | None,
    through: Shape | None,
    every: int | None,
    needs_x: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    words: str,
    backend: str,
    **_: Any,
) -> int:
    """At each step ``Wᵀ into`` of an adjoint, P of a displacement; and a product for each gradient that is needed. With
    checkpoints the forward pass once more. The solves of "jacobian" are not counted: how many products they take, the
    numbers decide.
    """
    sweep = Sweep.parse(words)
    rows = math.prod((states if every is None else x)[:-1])
    recurrent, projection = _product(rows, weight_hh), _product(rows, weight_ih)
    total = recurrent * (sweep.update == "total") + recurrent * needs_weight
    total += projection * (needs_x + needs_input) + (recurrent + projection) * (every is not None)
    if sweep.uses_inverse:  # one P, or for a cell of several blocks as many, behind the heads
        total += _product(rows, feedback) * math.prod(feedback[len(weight_hh) - 2 : -2])
    if sweep.inverse == "direct":
        total += projection
    return total


def recurrence_displacements(
    grad_h: Shape | None, grad_last: Shape | None, h: Shape, feedback: Shape, *rest: Any, **_: Any
) -> int:
    """Of one source a product for each step; of many twice that. The log₂T powers of P are not counted."""
    return _product(math.prod(h[:-1]), feedback[-2:]) * (1 if grad_h is None else 2)


def regularized_inverse_fwd(weight: Shape, reg: Shape, power: float, *rest: Any, **_: Any) -> int:
    """At power 1 the Gram matrix, its Cholesky factor and two triangular solves; at 1/2 a thin singular value
    decomposition (Golub and Van Loan, Matrix Computations, 8.6) and the product of its parts.
    """
    count, large, small = _orders(weight)
    if power == 1.0:
        return count * (4 * large * small**2 + small**3 // 3)
    return count * (8 * large * small**2 + 20 * small**3)


def regularized_inverse_bwd(grad: Shape, weight: Shape, inverse: Shape, reg: Shape, power: float, *rest: Any, **_: Any):
    """What forward takes, once more, and the products of the gradient's formula: three, at power 1/2 four and five of
    the order of the smaller side.
    """
    count, large, small = _orders(weight)
    products = 6 * large * small**2 if power == 1.0 else 8 * large * small**2 + 10 * small**3
    return regularized_inverse_fwd(weight, reg, power) + count * products


def recurrence_feedback(weight: Shape, words: str, *rest: Any, **_: Any) -> int:
    """The regularized inverse of the weight's blocks."""
    return regularized_inverse_fwd(weight, (), Sweep.parse(words).power)


def _product(rows: int, matrix: Shape | None) -> int:
    """Of each row with its matrix, [m, n], or with one of several, [H, m, n]."""
    return 0 if matrix is None else 2 * rows * math.prod(matrix[-2:])


def _orders(matrix: Shape) -> tuple[int, int, int]:
    """How many matrices, their larger side and their smaller one."""
    return math.prod(matrix[:-2]), max(matrix[-2:]), min(matrix[-2:])


_FORMULAS = {
    _OPS.recurrence_fwd: recurrence_fwd,
    _OPS.recurrence_bwd: recurrence_bwd,
    getattr(_OPS, "recurrence_bwd" + WAITING): recurrence_bwd,
    _OPS.recurrence_displacements: recurrence_displacements,
    _OPS.recurrence_feedback: recurrence_feedback,
    _OPS.regularized_inverse_fwd: regularized_inverse_fwd,
    _OPS.regularized_inverse_bwd: regularized_inverse_bwd,
}
for _op, _formula in _FORMULAS.items():
    register_flop_formula(_op)(_formula)


def tell_counters() -> None:
    """Counters that are at work already have formulas of their own, from before these were there."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, _FlopCounterMode):
            for op in _FORMULAS:
                mode.counter.flop_registry.setdefault(op, flop_registry[op])
