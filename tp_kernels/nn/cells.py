"""One step at a time: swap ``torch.nn.RNNCell``, ``GRUCell`` and ``LSTMCell`` for this library's."""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tp_kernels import _validate
from tp_kernels._library import autocast_enabled, without_autocast
from tp_kernels.nn._recurrent import Ruled
from tp_kernels.ops.gru.cell import CELL as GRU
from tp_kernels.ops.lstm.cell import CELL as LSTM
from tp_kernels.ops.recurrence.cell import CELLS, Cell
from tp_kernels.ops.recurrence.op import recurrent_layer
from tp_kernels.ops.recurrence.state import hand_on, relays_of
from tp_kernels.ops.rnn.cell import ACTIVATIONS
from tp_kernels.rules import Rule


class RecurrentCell(Ruled, nn.RNNCellBase):
    """One step of a layer, with the parameters, names and initialization of its ``torch.nn`` counterpart."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rule: Rule | None = None,
        backend: str = "auto",
    ) -> None:
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            _validate.count(self._NAME, name, size)
        if not isinstance(bias, bool):
            raise TypeError(f"{self._NAME}: bias must be a bool, got {type(bias).__name__}")
        _validate.backend(self._NAME, backend)
        super().__init__(int(input_size), int(hidden_size), bias, self._cell.gates, device=device, dtype=dtype)
        self.rule = rule
        self.backend = backend

    def forward(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None, *, reset: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(input, fx.Proxy):
            return self._as_leaf(input, hx, reset=reset)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = {name: getattr(self, name) for name in names}  # each once: it may be parametrized
        starts = self._parts(hx)
        if isinstance(input, Tensor) and autocast_enabled(input.device.type):
            input, *starts = (self._in_own_dtype(each, weights["weight_ih"]) for each in (input, *starts))
        self._check(input, starts, reset, weights)
        relays = relays_of(tuple(starts), self._NAME, self.rule.carries)
        batched = input.dim() == 2
        if not batched:
            input, starts = input[None], [start[None] for start in starts]
            reset = None if reset is None else reset[None]
        with without_autocast(input.device.type):
            input_bias, bias = self._cell.biases(weights["bias_ih"], weights["bias_hh"])
            u = functional.linear(input, weights["weight_ih"], input_bias)
        _, lasts, relay = recurrent_layer(
            self._cell.name,
            u[None],
            weights["weight_hh"],
            *(starts or (None,)),
            bias_hh=bias,
            relay=None if relays is None else relays[0],
            reset=None if reset is None else reset[None],
            rule=self.rule,
            return_sequence=False,
            backend=self.backend,
        )
        lasts = lasts if batched else tuple(last[0] for last in lasts)
        lasts = tuple(hand_on(last, (relay,)) for last in lasts)
        return lasts if len(lasts) > 1 else lasts[0]

    def _check(
        self, input: Tensor, starts: tuple[Tensor, ...], reset: Tensor | None, weights: dict[str, Tensor | None]
    ) -> None:
        M, N, rows = self.input_size, self.hidden_size, self._cell.gates * self.hidden_size
        shapes = ((rows, M), (rows, N), (rows,), (rows,))
        for (name, weight), shape in zip(weights.items(), shapes, strict=True):
            if weight is None and name.startswith("bias"):
                continue
            if weight.shape != shape:
                raise ValueError(f"{self._NAME}: {name} must have shape {shape}, got {tuple(weight.shape)}")
            _validate.same_kind(self._NAME, name, weight, "weight_ih", weights["weight_ih"])
        _validate.floating_tensor(self._NAME, "input", input)
        if input.dim() not in (1, 2):
            raise ValueError(f"{self._NAME}: input must have shape [B, M] or [M], got {tuple(input.shape)}")
        batch = list(input.shape[:-1])
        letters = "[B, {}]" if batch else "[{}]"
        if input.shape[-1] != M:
            raise _validate.ShapeError(
                f"{self._NAME}: input must have shape {letters.format('M')} with M = {M}, got {tuple(input.shape)}"
            )
        _validate.same_kind(self._NAME, "input", input, "weight_ih", weights["weight_ih"])
        for index, start in enumerate(starts):
            name = "hx" if len(starts) == 1 else f"hx[{index}]"
            _validate.floating_tensor(self._NAME, name, start)
            if list(start.shape) != [*batch, N]:
                raise _validate.ShapeError(
                    f"{self._NAME}: {name} must have shape {letters.format('N')} = {[*batch, N]}, "
                    f"got {tuple(start.shape)}"
                )
            _validate.same_kind(self._NAME, name, start, "input", input)
        if reset is not None:
            _validate.reset(self._NAME, reset, "[B]" if batch else "[]", batch, input.device)
        _validate.numbers_of_rule(self._NAME, self.rule, self._cell, input.dtype)

    def extra_repr(self) -> str:
        words = [super().extra_repr(), f"rule={self.rule!r}"]
        if self.backend != "auto":
            words.append(f"backend={self.backend!r}")
        return ", ".join(words)


class RNNCell(RecurrentCell):
    """One step of ``tp_kernels.nn.RNN``: a drop-in for ``torch.nn.RNNCell``, plus ``rule``.

    A chain of calls in which each is given the state as the one before returned it has the gradients of one call of the
    layer, under every rule. A state that was changed in between is a new one, through which no displacement goes back:
    a ``UserWarning`` says so.

    Args:
        input_size, hidden_size: M and N.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: "tanh", "relu" or "identity".
        device, dtype: of the parameters.
        rule: what backward computes: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.
        backend: of the recurrence, as in ``tp_kernels.rnn``.

    Call:
        ``cell(input, hx=None, *, reset=None)``: input [B, M] or [M], ``hx`` [B, N] or [N], zero where it is left out.
        Returns the next state, like ``hx``.

        reset: bool, [B] or []: where the state starts anew, from zero, before this step. Nothing goes back there.

    Raises:
        TypeError, ValueError: an argument of another kind, shape or value than stated.

    Example:
        >>> import torch, tp_kernels as tp
        >>> cell, h = tp.nn.RNNCell(4, 8), None
        >>> for x in torch.randn(10, 2, 4):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([2, 8])
    """

    _NAME = "nn.RNNCell"
    nonlinearity = "tanh"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rule: Rule | None = None,
        backend: str = "auto",
    ) -> None:
        _validate.word(self._NAME, "nonlinearity", nonlinearity, tuple(ACTIVATIONS))
        super().__init__(input_size, hidden_size, bias, device, dtype, rule=rule, backend=backend)
        self.nonlinearity = nonlinearity

    @property
    def _cell(self) -> Cell:
        return CELLS[f"rnn_{self.nonlinearity}"]


class GRUCell(RecurrentCell):
    """One step of ``tp_kernels.nn.GRU``: a drop-in for ``torch.nn.GRUCell``, plus ``rule``.

    Calls, states and a chain of calls are as in ``tp_kernels.nn.RNNCell``.

    Args:
        input_size, hidden_size: M and N.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.
        rule: what backward computes: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.
        backend: of the recurrence, as in ``tp_kernels.gru``.

    Example:
        >>> import torch, tp_kernels as tp
        >>> tp.nn.GRUCell(4, 8)(torch.randn(2, 4)).shape
        torch.Size([2, 8])
    """

    _NAME = "nn.GRUCell"
    _cell = GRU


class LSTMCell(RecurrentCell):
    """One step of ``tp_kernels.nn.LSTM``: a drop-in for ``torch.nn.LSTMCell``, plus ``rule``.

    Calls and a chain of calls are as in ``tp_kernels.nn.RNNCell``, with pairs of states: ``hx`` and the result are
    ``(h, c)``. Both have to be handed on as they came.

    Args:
        input_size, hidden_size: M and N.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.
        rule: what backward computes: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.
        backend: of the recurrence, as in ``tp_kernels.lstm``.

    Example:
        >>> import torch, tp_kernels as tp
        >>> h, c = tp.nn.LSTMCell(4, 8)(torch.randn(2, 4))
        >>> h.shape, c.shape
        (torch.Size([2, 8]), torch.Size([2, 8]))
    """

    _NAME = "nn.LSTMCell"
    _cell = LSTM
