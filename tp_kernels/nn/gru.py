"""The gated recurrent unit: swap ``torch.nn.GRU`` for ``tp_kernels.nn.GRU(rule=...)``."""

import torch
from torch import Tensor

from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.ops.gru.cell import CELL


class GRU(Recurrent):
    """Gated recurrent layer with the constructor, shapes and ``state_dict`` of ``torch.nn.GRU``, plus ``rule``.

    ``h_t = (1 - z) n + z h_{t-1}`` with ``r, z = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)`` and
    ``n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn))``. Initialization draws the same numbers in the same order as
    ``torch.nn.GRU``, so one seed gives one network.

    Args:
        input_size, hidden_size: M and N.
        num_layers: L; each layer reads the states of the one before.
        bias: whether there are ``bias_ih_l0``, ``bias_hh_l0`` and so on.
        batch_first: inputs and outputs are [B, T, ·] instead of [T, B, ·].
        dropout: the share of a layer's outputs that the next one does not see in training. With one layer of no use.
        bidirectional: whether there are two directions, D = 2; the outputs of both lie side by side.
        device, dtype: of the parameters.
        rule: what backward computes: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``. Which inverse
            does what, ``tp_kernels.gru`` says.
        checkpoint_every, return_sequence: as in ``tp_kernels.nn.RNN``.
        refresh: as there; only the blocks of the weight that the rule inverts count as moved.
        feedback: fixed matrices in place of the rule's inverse, as in ``tp_kernels.gru``: [N, N] for
            ``inverse="weight"``, [3, N, N] for "layer"; of several layers or directions [L D, …], one for each. A
            buffer that is not in ``state_dict``. ``None`` is P.
        backend: of the recurrence, as in ``tp_kernels.gru``.

    Shape:
        Input ``[T, B, M]`` (``[B, T, M]`` with ``batch_first``) or unbatched ``[T, M]``; ``hx``: ``[L D, B, N]`` or
        ``[L D, N]``, zero where it is left out. Output: all states of the last layer ``[T, B, D N]``, ``[B, T, D N]``
        or ``[T, D N]``, and the last ones of every layer and direction ``[L D, B, N]`` or ``[L D, N]``.

    Each layer and direction has targets of its own, which go back in its own time. From a layer to the one below goes
    the gradient in its input; that layer takes it for the gradient in its states.

    Call:
        ``layer(input, hx=None, *, lengths=None, reset=None)`` as in ``tp_kernels.nn.RNN``.

    The last state, handed to the next call as it is, makes the gradients of both calls those of one. Under autocast,
    second derivatives, transforms, in-place changes of the output: as in ``tp_kernels.nn.RNN``.

    Warns:
        UserWarning: the rule sends displacements, and the first state was changed after a layer had returned it.

    Raises:
        TypeError, ValueError: an argument of another kind, shape or value than stated.

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

    def _output_dtype(self, x: Tensor, starts: tuple[Tensor, ...], weight: Tensor) -> torch.dtype:
        half = super()._output_dtype(x, starts, weight)
        if x.device.type != "cpu":
            return half
        before = starts[0] if starts else x  # torch's kernel for the CPU adds the state before, in the dtype it came in
        return torch.promote_types(before.dtype, half) if isinstance(before, Tensor) else half
