"""What the drop-ins for ``torch.nn``'s recurrent layers share: constructor checks, parameters, and shapes of a call."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tp_kernels import _validate
from tp_kernels._library import autocast_enabled
from tp_kernels.rules import Rule, resolve


class Recurrent(nn.Module):
    """One layer, one direction, with the parameters, names and initialization of its ``torch.nn`` counterpart, ``rule``
    and ``backend``. What is its own: ``_NAME``, ``_GATES`` and ``_states``.
    """

    _NAME = ""  # in errors
    _GATES = 1  # blocks of N rows in the weights

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        rule: Rule | None,
        backend: str,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            _validate.count(self._NAME, name, size)
        for name, value in (("bias", bias), ("batch_first", batch_first), ("bidirectional", bidirectional)):
            if not isinstance(value, bool):
                raise TypeError(f"{self._NAME}: {name} must be a bool, got {type(value).__name__}")
        if num_layers > 1:
            raise self._not_implemented(f"num_layers={num_layers}")
        if bidirectional:
            raise self._not_implemented("bidirectional=True")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"{self._NAME}: dropout must be a number in [0, 1], got {dropout!r}")
        _validate.backend(self._NAME, backend)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.rule = rule
        self.backend = backend
        for name, shape in Recurrent._shapes(self).items():  # what a subclass adds comes after these
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    @property
    def rule(self) -> Rule:
        """What backward computes. Assigning ``None`` means ``TargetProp()``."""
        return self._rule

    @rule.setter
    def rule(self, rule: Rule | None) -> None:
        self._rule = self._resolved(rule)

    def _resolved(self, rule: Rule | None) -> Rule:
        """The rule that assigning this one gives, or an error."""
        return resolve(self._NAME, rule)

    def reset_parameters(self) -> None:
        """Uniform on ±1/√N, as in ``torch.nn``."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels take the parameters as they are. Here for code written for ``torch.nn``."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        return [list(self.parameters())]

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        if isinstance(input, PackedSequence):
            raise self._not_implemented("a PackedSequence as input")
        if isinstance(input, Tensor) and autocast_enabled(input.device.type):
            input, hx = self._in_own_dtype(input), self._in_own_dtype(hx)
        self._check_parameters()
        self._check_input(input, hx)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        h, last = self._states(
            x.transpose(0, 1) if self.batch_first else x, hx[0] if batched and hx is not None else hx
        )
        if h is not None:
            h = h.squeeze(1) if not batched else h.transpose(0, 1) if self.batch_first else h
        return h, last.unsqueeze(0) if batched else last

    def _states(self, x: Tensor, h0: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The layer itself, on x: [T, B, M] and h0: [B, N]: all states and the last one."""
        raise NotImplementedError

    def _not_implemented(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{self._NAME}: {what} is not implemented yet")

    def _in_own_dtype(self, value: object) -> object:
        """A floating-point tensor in the dtype of the parameters, whatever that of the layer before; the rest as is."""
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.weight_ih_l0.dtype) if floating else value

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by name."""
        M, N, rows = self.input_size, self.hidden_size, self._GATES * self.hidden_size
        biases = {"bias_ih_l0": (rows,), "bias_hh_l0": (rows,)} if self.bias else {}
        return {"weight_ih_l0": (rows, M), "weight_hh_l0": (rows, N)} | biases

    def _check_parameters(self) -> None:
        """Parameters can be put in from outside; the kernels read them by their address."""
        for name, shape in self._shapes().items():
            parameter = getattr(self, name)
            if parameter.shape != shape:
                raise ValueError(f"{self._NAME}: {name} must have shape {shape}, got {tuple(parameter.shape)}")
            _validate.same_kind(self._NAME, name, parameter, "weight_ih_l0", self.weight_ih_l0)

    def _check_input(self, input: Tensor, hx: Tensor | None) -> None:
        _validate.floating_tensor(self._NAME, "input", input)
        letters = "[B, T, M]" if self.batch_first else "[T, B, M]"
        if input.dim() not in (2, 3):
            raise ValueError(f"{self._NAME}: input must have shape {letters} or [T, M], got {tuple(input.shape)}")
        if input.shape[-1] != self.input_size:
            letters = letters if input.dim() == 3 else "[T, M]"
            raise ValueError(
                f"{self._NAME}: input must have shape {letters} with M = {self.input_size}, got {tuple(input.shape)}"
            )
        if input.shape[1 if self.batch_first and input.dim() == 3 else 0] == 0:
            raise ValueError(f"{self._NAME}: input must have at least one time step (T >= 1), got {tuple(input.shape)}")
        _validate.same_kind(self._NAME, "input", input, "weight_ih_l0", self.weight_ih_l0)
        if hx is None:
            return
        _validate.floating_tensor(self._NAME, "hx", hx)
        if input.dim() == 2:
            letters, expected = "[1, N]", [1, self.hidden_size]
        else:
            letters, expected = "[1, B, N]", [1, input.shape[0 if self.batch_first else 1], self.hidden_size]
        if list(hx.shape) != expected:
            raise ValueError(f"{self._NAME}: hx must have shape {letters} = {expected}, got {tuple(hx.shape)}")
        _validate.same_kind(self._NAME, "hx", hx, "input", input)

    def _described(self, first: list[str], own: list[str]) -> str:
        """For ``extra_repr``: what is not as by default, with a layer's own words before and after the shared ones."""
        words = [f"{self.input_size}, {self.hidden_size}", *first]
        if not self.bias:
            words.append("bias=False")
        if self.batch_first:
            words.append("batch_first=True")
        words += [f"rule={self.rule!r}", *own]
        if self.backend != "auto":
            words.append(f"backend={self.backend!r}")
        return ", ".join(words)
