"""Long short-term memory: swap ``torch.nn.LSTM`` for ``tp_kernels.nn.LSTM(rule=...)``."""

import torch
from torch import Tensor, nn

from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.ops.lstm.cell import CELL
from tp_kernels.rules import Rule


class LSTM(Recurrent):
    """Long short-term memory with the constructor, shapes and ``state_dict`` of ``torch.nn.LSTM``, plus ``rule``.

    ``c_t = f c_{t-1} + i g`` and ``h_t = o tanh(c_t)`` with ``i, f, o = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)`` and
    ``g`` likewise with tanh. Initialization draws the same numbers in the same order as ``torch.nn.LSTM``, so one seed
    gives one network.

    Args:
        input_size, hidden_size: M and N.
        num_layers: L; each layer reads the states of the one before.
        bias: whether there are ``bias_ih_l0``, ``bias_hh_l0`` and so on.
        batch_first: inputs and outputs are [B, T, ·] instead of [T, B, ·].
        dropout: the share of a layer's outputs that the next one does not see in training. With one layer of no use.
        bidirectional: whether there are two directions, D = 2; the outputs of both lie side by side.
        proj_size: 0; more is not implemented yet.
        device, dtype: of the parameters.
        rule: what backward computes: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.
            ``inverse="layer"`` it does not have.
        checkpoint_every, return_sequence: as in ``tp_kernels.nn.RNN``.
        refresh: as there; only the block of the weight that the rule inverts, that of g, counts as moved.
        feedback: as there, in place of P of that block.
        backend: of the recurrence, as in ``tp_kernels.rnn``.

    Call:
        ``layer(input, hx=None, *, lengths=None, reset=None)`` as in ``tp_kernels.nn.RNN``, with pairs of states: ``hx``
        is ``(h_0, c_0)`` and the second result ``(h_T, c_T)``.

    Both last states, handed to the next call as they are, make the gradients of both calls those of one. Under
    autocast, second derivatives, transforms, in-place changes of the output: as in ``tp_kernels.nn.RNN``.

    Warns:
        UserWarning: the rule sends displacements, and a first state was changed after a layer had returned it.

    Raises:
        TypeError, ValueError: an argument of another kind, shape or value than stated.
        NotImplementedError: ``proj_size``.

    Example:
        >>> import torch, tp_kernels as tp
        >>> layer = tp.nn.LSTM(4, 8, rule=tp.TargetProp())
        >>> output, (h, c) = layer(torch.randn(10, 2, 4))
        >>> output.shape, h.shape, c.shape
        (torch.Size([10, 2, 8]), torch.Size([1, 2, 8]), torch.Size([1, 2, 8]))
    """

    _NAME = "nn.LSTM"
    _MODE = "LSTM"
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
        proj_size: int = 0,
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
        if proj_size != 0:
            raise self._not_implemented(f"proj_size={proj_size}")
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

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden
