"""User-facing checks. Every message names the op, the argument, what was expected and what came."""

import itertools
import math
import numbers

import torch

from tp_kernels._backends import NAMES, dtype_name
from tp_kernels.ops.recurrence.cell import Cell
from tp_kernels.rules import Rule, TargetProp, is_plain_weight, uses_inverse


class ShapeError(ValueError, RuntimeError):
    """A shape other than stated, where ``torch.nn`` raises a ``RuntimeError``: code that expects one goes on."""


_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def word(op: str, argument: str, value: object, words: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{op}: {argument} must be a str, got {type(value).__name__}")
    if value not in words:
        raise ValueError(f"{op}: {argument} must be one of {', '.join(map(repr, words))}, got {value!r}")


def backend(op: str, value: object) -> None:
    word(op, "backend", value, ("auto", *NAMES))


def floating_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {argument} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in _FLOATING:
        expected = ", ".join(map(dtype_name, _FLOATING))
        raise TypeError(f"{op}: {argument} must be of dtype {expected}, got {dtype_name(value.dtype)}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {argument} must be a dense tensor, got one of layout {value.layout}")


def same_kind(op: str, argument: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(
            f"{op}: {argument} must have the dtype of {other_name}, {dtype_name(other.dtype)}, "
            f"got {dtype_name(value.dtype)}"
        )
    if value.device != other.device:
        raise ValueError(f"{op}: {argument} must be on the device of {other_name}, {other.device}, got {value.device}")


def regularization(op: str, value: float | torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """A number is checked here; a tensor's value is checked by the op itself, when it runs on real data.

    With ``dtype``, that of the weight, the number must also be positive and finite in it: r is used in that dtype, in
    float32 for half precision.
    """
    if isinstance(value, torch.Tensor):
        floating_tensor(op, "reg", value)
        if value.dim() != 0:
            raise ValueError(f"{op}: reg must be a number or a tensor of shape (), got {_shape(value)}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: reg must be a number or a tensor, got {type(value).__name__}")
    elif not 0 < value < math.inf:  # false for NaN too
        raise ValueError(f"{op}: reg must be positive and finite, got {value!r}")
    elif dtype is not None:
        factored = torch.float64 if dtype == torch.float64 else torch.float32
        if factored == torch.float32 and not 2.0**-150 < value < 2.0**128 - 2.0**103:  # what rounds to 0 or infinity
            raise ValueError(f"{op}: reg must be positive and finite in {dtype_name(factored)}, got {value!r}")


def regularized_inverse(
    weight: torch.Tensor, reg: float | torch.Tensor, power: float, check_errors: bool, backend_name: str
) -> None:
    op = "regularized_inverse"
    floating_tensor(op, "weight", weight)
    if weight.dim() < 2:
        raise ValueError(f"{op}: weight must have shape [..., m, n], got {_shape(weight)}")
    if weight.shape[-1] == 0 or weight.shape[-2] == 0:
        raise ValueError(f"{op}: weight must have m >= 1 and n >= 1 in [..., m, n], got {_shape(weight)}")
    regularization(op, reg)
    if isinstance(power, bool) or not isinstance(power, (int, float)):
        raise TypeError(f"{op}: power must be a number, got {type(power).__name__}")
    if power not in (1.0, 0.5):  # no global floats: with dynamic=True torch.compile makes symbols of them
        raise ValueError(f"{op}: power must be one of 1.0, 0.5, got {power!r}")
    if not isinstance(check_errors, bool):
        raise TypeError(f"{op}: check_errors must be a bool, got {type(check_errors).__name__}")
    backend(op, backend_name)


def count(op: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {argument} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {argument} must be at least 1, got {value}")


def lengths(op: str, value: object, T: int, B: int) -> torch.Tensor:
    """Of padded sequences: [B], int64, on the CPU."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{op}: lengths must be of an integer dtype, got {dtype_name(value.dtype)}")
    elif not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: lengths must be a list of ints or a torch.Tensor, got {type(value).__name__}")
    elif not all(isinstance(length, numbers.Integral) and not isinstance(length, bool) for length in value):
        raise TypeError(f"{op}: lengths must be a list of ints, got {value!r}")
    value = torch.as_tensor(value, dtype=torch.int64, device="cpu")
    if list(value.shape) != [B]:
        raise ValueError(f"{op}: lengths must have shape [B] = {[B]}, got {_shape(value)}")
    for sequence, length in enumerate(value.tolist()):
        if not 1 <= length <= T:
            raise ValueError(f"{op}: lengths must be between 1 and T = {T}, got {length} for sequence {sequence}")
    return value


def batch_sizes(op: str, value: torch.Tensor, rows: int) -> None:
    """Of a ``PackedSequence``, which can be made by hand: the kernels read as many rows as it says."""
    sizes = value.tolist()
    if not sizes or sizes[-1] < 1 or any(later > size for size, later in itertools.pairwise(sizes)):
        raise ValueError(f"{op}: input must have batch_sizes that are positive and never grow, got {sizes}")
    if sum(sizes) != rows:
        raise ValueError(f"{op}: input must have as many rows as its batch_sizes sum up to, {sum(sizes)}, got {rows}")


def reset(op: str, value: object, letters: str, expected: list[int], device: torch.device) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: reset must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{op}: reset must be of dtype bool, got {dtype_name(value.dtype)}")
    if list(value.shape) != expected:
        raise ValueError(f"{op}: reset must have shape {letters} = {expected}, got {_shape(value)}")
    if value.device != device:
        raise ValueError(f"{op}: reset must be on {device}, where the input is, got {value.device}")


def pair(op: str, argument: str, value: object) -> tuple[object, object]:
    """Two parts of a state, or ``None``."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{op}: {argument} must be a tuple of two tensors or None, got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"{op}: {argument} must be a tuple of two tensors, got {len(value)}")
    for index, part in enumerate(value):
        floating_tensor(op, f"{argument}[{index}]", part)
    return value[0], value[1]


def checkpoint_every(op: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: checkpoint_every must be an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: checkpoint_every must be at least 1, got {value}")


def displacements(op: str, value: object, rule: Rule, every: int | None) -> None:
    word(op, "displacements", value, ("auto", "sweep", "parallel"))
    if value == "parallel" and not is_plain_weight(rule.words):
        raise ValueError(
            f"{op}: displacements='parallel' needs a rule with inverse='weight', without blend, latch and chunk, "
            f"got {rule!r}"
        )
    if value == "parallel" and every is not None:
        raise ValueError(f"{op}: displacements='parallel' needs all states: checkpoint_every must be None, got {every}")


def numbers_of_rule(op: str, rule: Rule, cell: Cell, dtype: torch.dtype) -> None:
    """Whether the rule's numbers mean something in this dtype."""
    if not isinstance(rule, TargetProp):
        return
    if rule.inverse == "jacobian":  # elsewhere, it is for regularized_inverse to say
        regularization(op, rule.reg, dtype)
        _in_dtype(op, "rtol", rule.rtol, torch.promote_types(dtype, torch.float32))
    _in_dtype(op, "step", rule.step, dtype)
    smallest = torch.finfo(dtype).eps
    if rule.inverse == "layer" and cell.clips and rule.clip < smallest:
        # 1 - clip(h)² would be 0 where h rounds to 1
        raise ValueError(
            f"{op}: rule must have clip of at least {smallest:.3g} in {dtype_name(dtype)}, got {rule.clip!r}"
        )


def _in_dtype(op: str, name: str, value: float, dtype: torch.dtype) -> None:
    """What the kernels compute with: no number that is zero, infinite or denormal there, which they take for zero."""
    limits = torch.finfo(dtype)
    if not limits.tiny <= value <= limits.max:
        raise ValueError(
            f"{op}: rule must have {name} between {limits.tiny:.3g} and {limits.max:.3g} in {dtype_name(dtype)}, "
            f"got {value!r}"
        )


def feedback(op: str, value: object, inverted: torch.Tensor, what: str, rule: Rule) -> None:
    """``inverted``: the blocks of the weight whose P it replaces, of the name ``what``."""
    if value is None:
        return
    floating_tensor(op, "feedback", value)
    if not uses_inverse(rule):
        raise ValueError(f"{op}: feedback must be None where the rule has no inverse to replace, got one with {rule!r}")
    if value.shape != inverted.shape:
        raise ValueError(f"{op}: feedback must have the shape of {what}, {_shape(inverted)}, got {_shape(value)}")
    same_kind(op, "feedback", value, what, inverted)
    if value.requires_grad:
        raise ValueError(f"{op}: feedback must not require a gradient, as none reaches it")


def recurrence(
    cell: Cell,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    first: dict[str, torch.Tensor | None],
    resets: torch.Tensor | None,
    feedback_matrix: torch.Tensor | None,
    rule: Rule,
    every: int | None,
    backend_name: str,
) -> None:
    """The arguments of a public function of a cell. ``first``: the parts of the first state, by name."""
    op, gates = cell.op, cell.gates
    letters = "N" if gates == 1 else f"{gates}N"
    floating_tensor(op, "u", u)
    floating_tensor(op, "weight", weight)
    if u.dim() not in (3, 4):
        raise ValueError(f"{op}: u must have shape [T, B, {letters}] or [T, B, H, {letters}], got {_shape(u)}")
    if u.shape[0] == 0:
        raise ValueError(f"{op}: u must have at least one time step (T >= 1), got {_shape(u)}")
    if u.shape[-1] == 0 or u.shape[-1] % gates or (u.dim() == 4 and u.shape[2] == 0):
        multiple = "" if gates == 1 else f"a last axis of {letters} with "
        raise ValueError(f"{op}: u must have {multiple}N >= 1 (and H >= 1 with heads), got {_shape(u)}")
    B, heads, N = u.shape[1], list(u.shape[2:-1]), u.shape[-1] // gates
    head = "H, " if heads else ""

    def of_shape(argument: str, value: torch.Tensor, shape: str, expected: list[int]) -> None:
        if list(value.shape) != expected:
            raise ValueError(f"{op}: {argument} must have shape {shape} = {expected}, got {_shape(value)}")
        same_kind(op, argument, value, "u", u)

    of_shape("weight", weight, f"[{head}{letters}, N]", [*heads, gates * N, N])
    for argument, value, shape, expected in (
        ("bias", bias, f"[{head}N]", [*heads, N]),
        *((argument, value, f"[B, {head}N]", [B, *heads, N]) for argument, value in first.items()),
    ):
        if value is not None:
            floating_tensor(op, argument, value)
            of_shape(argument, value, shape, expected)
    if resets is not None:
        reset(op, resets, "[T, B]", list(u.shape[:2]), u.device)
    rule_of_cell(op, rule, cell)
    if feedback_matrix is not None:
        inverted = cell.inverted(weight, rule.inverse) if uses_inverse(rule) else weight
        what = "weight" if gates == 1 else "the blocks of weight it replaces P of"
        feedback(op, feedback_matrix, inverted, what, rule)
    numbers_of_rule(op, rule, cell, u.dtype)
    checkpoint_every(op, every)
    backend(op, backend_name)


def rule_of_cell(op: str, rule: Rule, cell: Cell) -> None:
    """Whether the cell has this rule."""
    if not isinstance(rule, TargetProp):
        return
    if rule.mode != "linearized" and rule.mode not in cell.inverses:
        raise ValueError(f"{op}: rule must have mode='linearized', got mode={rule.mode!r}")
    if rule.inverse not in cell.inverses:
        words = ", ".join(map(repr, cell.inverses))
        raise ValueError(f"{op}: rule must have as inverse one of {words}, got {rule.inverse!r}")
    if rule.chunk is not None and rule.inverse not in cell.without_states:
        words = ", ".join(map(repr, cell.without_states))
        raise ValueError(
            f"{op}: rule must have as inverse one of {words} with chunk, as other displacements need the states, "
            f"got {rule.inverse!r}"
        )
    if cell.gates > 1 and rule.inverse == "layer" and rule.clip >= 0.5:
        raise ValueError(
            f"{op}: rule must have clip below 0.5, as gates are clipped to [clip, 1 - clip], got {rule.clip}"
        )
