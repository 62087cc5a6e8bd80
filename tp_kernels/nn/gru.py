"""The gated recurrent unit: swap ``torch.nn.GRU`` for ``tp_kernels.nn.GRU(rule=...)``."""

import torch
from torch import Tensor

from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.ops.gru.cell import CELL
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
        checkpoint_every, return_sequence: as in ``tp_kernels.nn.RNN``.
        refresh: as there; only the blocks of the weight that the rule inverts count as moved.
        feedback: fixed matrices in place of the rule's inverse, as in ``tp_kernels.gru``: [N, N] for
            ``inverse="weight"``, [3, N, N] for "layer". A buffer that is not in ``state_dict``. ``None`` is P.
        backend: of the recurrence, as in ``tp_kernels.gru``.

    Shape:
        Input ``[T, B, M]`` (``[B, T, M]`` with ``batch_first``) or unbatched ``[T, M]``; ``hx``: ``[1, B, N]`` or
        ``[1, N]``, zero where it is left out. Output: all states ``[T, B, N]``, ``[B, T, N]`` or ``[T, N]``, and the
        last one ``[1, B, N]`` or ``[1, N]``.

    The last state, handed to the next call as it is, makes the gradients of both calls those of one. Changed in
    between, it is a new tensor, through which no displacement goes back: a ``UserWarning`` says so.

    Under autocast the layer computes in the dtype of its parameters. Its output must not be changed in place: backward
    computes from it. There are no second derivatives, no forward mode, no transforms of ``torch.func`` but
    ``functional_call``, and no TorchScript: each raises.

    Warns:
        UserWarning: the rule sends displacements, and the first state was changed after a layer had returned it.

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
    _MODE = "GRU"
    _cell = CELL

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
        checkpoint_every: int | None = None,
        return_sequence: bool = True,
        feedback: Tensor | None = None,
        refresh: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            rule=rule,
            checkpoint_every=checkpoint_every,
            return_sequence=return_sequence,
            feedback=feedback,
            refresh=refresh,
            backend=backend,
        )
