"""The Elman layer: swap ``torch.nn.RNN`` for ``tp_kernels.nn.RNN(rule=...)``."""

import torch
from torch import Tensor

from tp_kernels import _validate
from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.ops.recurrence.cell import CELLS, Cell
from tp_kernels.ops.rnn.cell import ACTIVATIONS
from tp_kernels.rules import Rule


class RNN(Recurrent):
    """Elman recurrent layer with the constructor, shapes and ``state_dict`` of ``torch.nn.RNN``, plus ``rule``.

    ``h_t = a(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)``. Initialization draws the same numbers in the same order as
    ``torch.nn.RNN``, so one seed gives one network.

    Args:
        input_size, hidden_size: M and N.
        num_layers: L; each layer reads the states of the one before.
        nonlinearity: "tanh", "relu" or "identity".
        bias: whether there are ``bias_ih_l0``, ``bias_hh_l0`` and so on.
        batch_first: inputs and outputs are [B, T, ·] instead of [T, B, ·].
        dropout: the share of a layer's outputs that the next one does not see in training. With one layer of no use.
        bidirectional: whether there are two directions, D = 2; the outputs of both lie side by side.
        device, dtype: of the parameters.
        rule: what backward computes: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.
        checkpoint_every: k >= 1: keep every k-th state for backward and compute the others again, k steps at a time,
            input projection included. ``None`` keeps all states.
        return_sequence: with ``False`` the first output is ``None``, and with ``checkpoint_every`` no array of
            T states exists at any time: memory grows with T/k + k.
        feedback: [N, N], a fixed matrix in place of the rule's inverse P, as a control of what P itself contributes;
            [L D, N, N] with several layers or directions, one for each. A buffer that is not in ``state_dict``.
            ``None`` is P.
        refresh: k >= 1: compute P at every k-th training pass only, and on the CPU whenever the weight has moved by a
            tenth (Frobenius norm) since; in between the last P serves. On a GPU only passes are counted: to see how far
            the weight is would be to wait for it. 1, the default, is exact. Worth it where P is a large share of a
            step: short sequences, few of them, large N. Then gradients depend on the passes before, and
            ``LinAlgError`` is raised in forward. Of no use to rules without P, or with ``feedback``.
        displacements: "sweep", "parallel" or "auto", as in ``tp_kernels.rnn``.
        backend: of the recurrence, as in ``tp_kernels.rnn``.

    Shape:
        Input ``[T, B, M]`` (``[B, T, M]`` with ``batch_first``) or unbatched ``[T, M]``; ``hx``: ``[L D, B, N]`` or
        ``[L D, N]``, zero where it is left out. Output: all states of the last layer ``[T, B, D N]``, ``[B, T, D N]``
        or ``[T, D N]``, and the last ones of every layer and direction ``[L D, B, N]`` or ``[L D, N]``.

    Each layer and direction has targets of its own, which go back in its own time. From a layer to the one below goes
    the gradient in its input; that layer takes it for the gradient in its states.

    Call:
        ``layer(input, hx=None, *, lengths=None, reset=None)``. ``input`` may be a ``PackedSequence``: so is the output
        then, and ``hx`` and the last states are in the order that the sequences had before they were sorted.

        lengths: [B], ints, a list or a tensor: of padded sequences. The output is zero beyond them, last states are
            those of each sequence's own end, and a second direction begins there.
        reset: bool, [T, B] ([B, T] with ``batch_first``, [T] unbatched, [P] in the order of a ``PackedSequence``):
            where another sequence begins. No state passes from the step before to that one, in no direction, and
            nothing goes back.

    The last state, handed to the next call as it is, makes the gradients of both calls those of one. Changed in
    between, it is a new tensor, through which no displacement goes back: a ``UserWarning`` says so.

    Under autocast the layer computes in the dtype of its parameters; its output has the dtype that torch's layer would
    return, its last state that of the parameters. The output must not be changed in place, as backward computes from
    it: change a copy. There are no second derivatives, no forward mode and no TorchScript: each raises.

    Warns:
        UserWarning: the rule sends displacements, and the first state was changed after a layer had returned it.

    Raises:
        TypeError, ValueError: an argument of another kind, shape or value than stated.

    Example:
        >>> import torch, tp_kernels as tp
        >>> layer = tp.nn.RNN(4, 8, rule=tp.TargetProp())
        >>> output, last = layer(torch.randn(10, 2, 4))
        >>> output.shape, last.shape
        (torch.Size([10, 2, 8]), torch.Size([1, 2, 8]))
    """

    _NAME = "nn.RNN"
    _MODE = "RNN_TANH"
    nonlinearity = "tanh"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
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
        displacements: str = "auto",
        backend: str = "auto",
    ) -> None:
        _validate.word(self._NAME, "nonlinearity", nonlinearity, tuple(ACTIVATIONS))
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
        self.nonlinearity = nonlinearity
        self.mode = f"RNN_{nonlinearity.upper()}"
        self.displacements = displacements
        self._check_displacements()

    @property
    def _cell(self) -> Cell:
        return CELLS[f"rnn_{self.nonlinearity}"]

    def _check_parameters(self, weights: list[list[Tensor]]) -> None:
        super()._check_parameters(weights)
        self._check_displacements()

    def _check_displacements(self) -> None:
        _validate.displacements(self._NAME, self.displacements, self.rule, self.checkpoint_every)
        if self.displacements == "parallel" and self.bidirectional:
            raise ValueError(f"{self._NAME}: displacements must be 'auto' or 'sweep' with bidirectional=True")

    def _own_options(self) -> list[str]:
        return [f"nonlinearity={self.nonlinearity!r}"] if self.nonlinearity != "tanh" else []
