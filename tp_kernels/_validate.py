"""User-facing checks. Every message names the op, the argument, what was expected and what came."""

import math

import torch

from tp_kernels._backends import NAMES, dtype_name
from tp_kernels.rules import Rule, TargetProp, uses_inverse

NONLINEARITIES = ("tanh", "relu", "identity")
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
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {argument} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {argument} must be at least 1, got {value}")


def checkpoint_every(op: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: checkpoint_every must be an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: checkpoint_every must be at least 1, got {value}")


def displacements(op: str, value: object, rule: Rule, every: int | None) -> None:
    word(op, "displacements", value, ("auto", "sweep", "parallel"))
    if value == "parallel" and (not isinstance(rule, TargetProp) or rule.inverse != "weight"):
        raise ValueError(f"{op}: displacements='parallel' needs a rule with inverse='weight', got {rule!r}")
    if value == "parallel" and every is not None:
        raise ValueError(f"{op}: displacements='parallel' needs all states: checkpoint_every must be None, got {every}")


def numbers_of_rule(op: str, rule: Rule, nonlinearity: str, dtype: torch.dtype) -> None:
    """Whether the rule's numbers mean something in this dtype."""
    if not isinstance(rule, TargetProp):
        return
    if rule.inverse == "jacobian":  # elsewhere, it is for regularized_inverse to say
        regularization(op, rule.reg, dtype)
    smallest = torch.finfo(dtype).eps
    if rule.inverse == "layer" and nonlinearity == "tanh" and rule.clip < smallest:
        # 1 - clip(h)² would be 0 where h rounds to 1
        raise ValueError(
            f"{op}: rule must have clip of at least {smallest:.3g} in {dtype_name(dtype)}, got {rule.clip!r}"
        )


def feedback(op: str, value: object, weight: torch.Tensor, weight_name: str, rule: Rule) -> None:
    if value is None:
        return
    floating_tensor(op, "feedback", value)
    if not uses_inverse(rule):
        raise ValueError(f"{op}: feedback must be None where the rule has no inverse to replace, got one with {rule!r}")
    if value.shape != weight.shape:
        raise ValueError(f"{op}: feedback must have the shape of {weight_name}, {_shape(weight)}, got {_shape(value)}")
    same_kind(op, "feedback", value, weight_name, weight)
    if value.requires_grad:
        raise ValueError(f"{op}: feedback must not require a gradient, as none reaches it")


def rnn(
    u: torch.Tensor,
    weight: torch.Tensor,
    h0: torch.Tensor | None,
    feedback_matrix: torch.Tensor | None,
    nonlinearity: str,
    rule: Rule,
    every: int | None,
    backend_name: str,
) -> None:
    op = "rnn"
    floating_tensor(op, "u", u)
    floating_tensor(op, "weight", weight)
    if u.dim() not in (3, 4):
        raise ValueError(f"{op}: u must have shape [T, B, N] or [T, B, H, N], got {_shape(u)}")
    if u.shape[0] == 0:
        raise ValueError(f"{op}: u must have at least one time step (T >= 1), got {_shape(u)}")
    if u.shape[-1] == 0 or (u.dim() == 4 and u.shape[2] == 0):
        raise ValueError(f"{op}: u must have N >= 1 (and H >= 1 with heads), got {_shape(u)}")
    letters = "[N, N]" if u.dim() == 3 else "[H, N, N]"
    expected = [*u.shape[2:], u.shape[-1]]
    if list(weight.shape) != expected:
        raise ValueError(f"{op}: weight must have shape {letters} = {expected}, got {_shape(weight)}")
    same_kind(op, "weight", weight, "u", u)
    if h0 is not None:
        floating_tensor(op, "h0", h0)
        if h0.shape != u.shape[1:]:
            letters = "[B, N]" if u.dim() == 3 else "[B, H, N]"
            raise ValueError(f"{op}: h0 must have shape {letters} = {list(u.shape[1:])}, got {_shape(h0)}")
        same_kind(op, "h0", h0, "u", u)
    feedback(op, feedback_matrix, weight, "weight", rule)
    word(op, "nonlinearity", nonlinearity, NONLINEARITIES)
    numbers_of_rule(op, rule, nonlinearity, u.dtype)
    checkpoint_every(op, every)
    backend(op, backend_name)


def rule_of_gru(op: str, rule: Rule) -> None:
    if isinstance(rule, TargetProp) and rule.mode != "linearized":
        raise ValueError(f"{op}: rule must have mode='linearized', got mode={rule.mode!r}")
    if isinstance(rule, TargetProp) and rule.inverse == "layer" and rule.clip >= 0.5:
        raise ValueError(
            f"{op}: rule must have clip below 0.5, as gates are clipped to [clip, 1 - clip], got {rule.clip}"
        )


def gru(
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h0: torch.Tensor | None,
    rule: Rule,
    backend_name: str,
) -> None:
    op = "gru"
    floating_tensor(op, "u", u)
    floating_tensor(op, "weight", weight)
    if u.dim() != 3 or u.shape[-1] == 0 or u.shape[-1] % 3:
        raise ValueError(f"{op}: u must have shape [T, B, 3N] with N >= 1, got {_shape(u)}")
    if u.shape[0] == 0:
        raise ValueError(f"{op}: u must have at least one time step (T >= 1), got {_shape(u)}")
    B, N = u.shape[1], u.shape[2] // 3
    if list(weight.shape) != [3 * N, N]:
        raise ValueError(f"{op}: weight must have shape [3N, N] = {[3 * N, N]}, got {_shape(weight)}")
    same_kind(op, "weight", weight, "u", u)
    for argument, value, letters, expected in (("bias", bias, "[N]", [N]), ("h0", h0, "[B, N]", [B, N])):
        if value is not None:
            floating_tensor(op, argument, value)
            if list(value.shape) != expected:
                raise ValueError(f"{op}: {argument} must have shape {letters} = {expected}, got {_shape(value)}")
            same_kind(op, argument, value, "u", u)
    rule_of_gru(op, rule)
    numbers_of_rule(op, rule, "tanh", u.dtype)
    backend(op, backend_name)
