"""The Elman layer: swap ``torch.nn.RNN`` for ``tp_kernels.nn.RNN(rule=...)``."""

import torch
from torch import Tensor

from tp_kernels import _validate
from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.ops.rnn.feedback import RefreshedFeedback
from tp_kernels.ops.rnn.op import rnn_layer
from tp_kernels.rules import Rule, uses_inverse


class RNN(Recurrent):
    """Elman recurrent layer with the constructor, shapes and ``state_dict`` of ``torch.nn.RNN``, plus ``rule``.

    ``h_t = a(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)``. Initialization draws the same numbers in the same order as
    ``torch.nn.RNN``, so one seed gives one network.

    Args:
        input_size, hidden_size: M and N.
        num_layers: 1; more is not implemented yet.
        nonlinearity: "tanh", "relu" or "identity".
        bias: whether there are ``bias_ih_l0`` and ``bias_hh_l0``.
        batch_first: inputs and outputs are [B, T, ·] instead of [T, B, ·].
        dropout: 0; ``torch.nn.RNN`` applies it between layers, so with one layer it has no effect there either.
        bidirectional: ``False``; ``True`` is not implemented yet.
        device, dtype: of the parameters.
        rule: what backward computes: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.
        checkpoint_every: k >= 1: keep every k-th state for backward and compute the others again, k steps at a time,
            input projection included. ``None`` keeps all states.
        return_sequence: with ``False`` the first output is ``None``, and with ``checkpoint_every`` no array of
            T states exists at any time: memory grows with T/k + k.
        feedback: [N, N], a fixed matrix in place of the rule's inverse P, as a control of what P itself contributes. A
            buffer that is not in ``state_dict``. ``None`` is P.
        refresh: k >= 1: compute P at every k-th training pass only, and on the CPU whenever the weight has moved by a
            tenth (Frobenius norm) since; in between the last P serves. On a GPU only passes are counted: to see how far
            the weight is would be to wait for it. 1, the default, is exact. Worth it where P is a large share of a
            step: short sequences, few of them, large N. Then gradients depend on the passes before, and
            ``LinAlgError`` is raised in forward. Of no use to rules without P, or with ``feedback``.
        displacements: "sweep", "parallel" or "auto", as in ``tp_kernels.rnn``.
        backend: of the recurrence, as in ``tp_kernels.rnn``.

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
        >>> layer = tp.nn.RNN(4, 8, rule=tp.TargetProp())
        >>> output, last = layer(torch.randn(10, 2, 4))
        >>> output.shape, last.shape
        (torch.Size([10, 2, 8]), torch.Size([1, 2, 8]))
    """

    _NAME = "nn.RNN"

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
        _validate.word(self._NAME, "nonlinearity", nonlinearity, _validate.NONLINEARITIES)
        _validate.checkpoint_every(self._NAME, checkpoint_every)
        if not isinstance(return_sequence, bool):
            raise TypeError(f"{self._NAME}: return_sequence must be a bool, got {type(return_sequence).__name__}")
        super().__init__(
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype),
            rule=rule,
            backend=backend,
        )
        _validate.displacements(self._NAME, displacements, self.rule, checkpoint_every)
        _validate.feedback(self._NAME, feedback, self.weight_hh_l0, "weight_hh_l0", self.rule)
        self.nonlinearity = nonlinearity
        self.checkpoint_every = checkpoint_every
        self.return_sequence = return_sequence
        self.displacements = displacements
        self.register_buffer("feedback", feedback, persistent=False)
        self.refresh = refresh
        self.reset_parameters()

    @Recurrent.rule.setter
    def rule(self, rule: Rule | None) -> None:
        self._rule = self._resolved(rule)
        self._forget_inverse()

    @property
    def refresh(self) -> int:
        """At every how many training passes P is computed anew."""
        return 1 if self.refreshed is None else self.refreshed.refresh

    @refresh.setter
    def refresh(self, refresh: int) -> None:
        _validate.count(self._NAME, "refresh", refresh)
        self.refreshed = RefreshedFeedback(self.weight_hh_l0, refresh) if refresh > 1 else None

    def _forget_inverse(self) -> None:
        if getattr(self, "refreshed", None) is not None:
            self.refreshed.forget()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._forget_inverse()

    def _feedback(self) -> Tensor | None:
        """The matrix to take in place of P; ``None``: P of the weight as it is."""
        if self.feedback is None and self.refreshed is not None and torch.is_grad_enabled() and uses_inverse(self.rule):
            return self.refreshed(self.weight_hh_l0, self.rule, self.backend)
        return self.feedback

    def _states(self, x: Tensor, h0: Tensor | None) -> tuple[Tensor | None, Tensor]:
        _validate.numbers_of_rule(self._NAME, self.rule, self.nonlinearity, x.dtype)
        return rnn_layer(
            x,
            self.weight_ih_l0,
            self.bias_ih_l0 + self.bias_hh_l0 if self.bias else None,
            self.weight_hh_l0,
            h0,
            feedback=self._feedback(),
            nonlinearity=self.nonlinearity,
            rule=self.rule,
            checkpoint_every=self.checkpoint_every,
            displacements=self.displacements,
            return_sequence=self.return_sequence,
            backend=self.backend,
        )

    def _check_parameters(self) -> None:
        super()._check_parameters()
        _validate.feedback(self._NAME, self.feedback, self.weight_hh_l0, "weight_hh_l0", self.rule)
        _validate.displacements(self._NAME, self.displacements, self.rule, self.checkpoint_every)

    def extra_repr(self) -> str:
        own = []
        if self.checkpoint_every is not None:
            own.append(f"checkpoint_every={self.checkpoint_every}")
        if not self.return_sequence:
            own.append("return_sequence=False")
        if self.feedback is not None:
            own.append("feedback=...")
        if self.displacements != "auto":
            own.append(f"displacements={self.displacements!r}")
        if self.refresh > 1:
            own.append(f"refresh={self.refresh}")
        return self._described([f"nonlinearity={self.nonlinearity!r}"] if self.nonlinearity != "tanh" else [], own)
