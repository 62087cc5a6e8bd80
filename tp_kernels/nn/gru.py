"""The gated recurrent unit: swap ``torch.nn.GRU`` for ``tp_kernels.nn.GRU(rule=...)``."""

import torch
from torch import Tensor
from torch.nn import functional

from tp_kernels import _validate
from tp_kernels._library import without_autocast
from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.ops.gru.op import gru_states
from tp_kernels.rules import Rule


class GRU(Recurrent):
    """Gated recurrent layer with the constructor, shapes and ``state_dict`` of ``torch.nn.GRU``, plus ``rule``.

    ``h_t = (1 - z) n + z h_{t-1}`` with ``r, z = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)`` and
    ``n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn))``. Initialization draws the same numbers in the same order as
    ``torch.nn.GRU``, so one seed gives one network.

    Args:
        input_size, hidden_size: M and N.
        num_layers: 1; more is not implemented yet.
        bias: whether there are ``bias_ih_l0`` and ``bias_hh_l0``.
        batch_first: inputs and outputs are [B, T, ·] instead of [T, B, ·].
        dropout: 0; ``torch.nn.GRU`` applies it between layers, so with one layer it has no effect there either.
        bidirectional: ``False``; ``True`` is not implemented yet.
        device, dtype: of the parameters.
        rule: what backward computes: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``. Which inverse
            does what, ``tp_kernels.gru`` says.
        backend: of the recurrence, as in ``tp_kernels.gru``.

    Shape:
        Input ``[T, B, M]`` (``[B, T, M]`` with ``batch_first``) or unbatched ``[T, M]``; ``hx``: ``[1, B, N]`` or
        ``[1, N]``, zero where it is left out. Output: all states ``[T, B, N]``, ``[B, T, N]`` or ``[T, N]``, and the
        last one ``[1, B, N]`` or ``[1, N]``.

    Under autocast the layer computes in the dtype of its parameters. Its output must not be changed in place: backward
    computes from it. There are no second derivatives, no forward mode, no transforms of ``torch.func`` but
    ``functional_call``, and no TorchScript: each raises.

    Raises:
        TypeError, ValueError: an argument of another kind, shape or value than stated.
        NotImplementedError: several layers, two directions, packed sequences.

    Example:
        >>> import torch, tp_kernels as tp
        >>> layer = tp.nn.GRU(4, 8, rule=tp.TargetProp())
        >>> output, last = layer(torch.randn(10, 2, 4))
        >>> output.shape, last.shape
        (torch.Size([10, 2, 8]), torch.Size([1, 2, 8]))
    """

    _NAME = "nn.GRU"
    _GATES = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rule: Rule | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype),
            rule=rule,
            backend=backend,
        )
        self.reset_parameters()

    def _resolved(self, rule: Rule | None) -> Rule:
        rule = super()._resolved(rule)
        _validate.rule_of_gru(self._NAME, rule)
        return rule

    def _states(self, x: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor]:
        _validate.numbers_of_rule(self._NAME, self.rule, "tanh", x.dtype)
        bias = inner = None
        if self.bias:  # that of the state's share of n is multiplied by r
            outer, inner = self.bias_hh_l0.split([2 * self.hidden_size, self.hidden_size])
            bias = self.bias_ih_l0 + functional.pad(outer, (0, self.hidden_size))
        with without_autocast(x.device.type):
            u = functional.linear(x, self.weight_ih_l0, bias)
        return gru_states(u, self.weight_hh_l0, inner, h0, self.rule, self.backend)

    def extra_repr(self) -> str:
        return self._described([], [])
