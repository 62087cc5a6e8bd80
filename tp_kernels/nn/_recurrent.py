"""What the drop-ins for ``torch.nn``'s recurrent layers share: all but the cell and what is peculiar to it."""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tp_kernels import _validate
from tp_kernels._library import autocast_enabled
from tp_kernels.ops.recurrence.cell import Cell
from tp_kernels.ops.recurrence.feedback import RefreshedFeedback
from tp_kernels.ops.recurrence.op import recurrent_layer
from tp_kernels.ops.recurrence.state import hand_on, relays_of
from tp_kernels.rules import Rule, resolve, uses_inverse

Relays = tuple[Tensor | None, ...] | None
"""Of a module's state: one for each layer and direction."""


def _ordered(tensors: Relays, order: Tensor | None) -> Relays:
    """First or last states, or their relays, the sequences in that order."""
    if tensors is None or order is None:
        return tensors
    return tuple(None if tensor is None else tensor.index_select(1, order) for tensor in tensors)


def _one_step_earlier(reset: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """Where a state that is read backwards starts anew: no state passes from a step to the one before either, where
    none does from the one before to the step.
    """
    if batch_sizes is None:
        return torch.cat((reset[1:], torch.zeros_like(reset[:1])))
    padded, lengths = pad_packed_sequence(PackedSequence(reset, batch_sizes))
    return pack_padded_sequence(_one_step_earlier(padded, None), lengths).data


class Ruled:
    """What every module with a rule has, beside its ``_NAME``, in errors, and its ``_cell``."""

    _NAME = ""
    _cell: Cell

    @property
    def rule(self) -> Rule:
        """What backward computes. Assigning ``None`` means ``TargetProp()``."""
        return self._rule

    @rule.setter
    def rule(self, rule: Rule | None) -> None:
        self._rule = self._resolved(rule)

    def _resolved(self, rule: Rule | None) -> Rule:
        """The rule that assigning this one gives, or an error."""
        rule = resolve(self._NAME, rule)
        _validate.rule_of_cell(self._NAME, rule, self._cell)
        return rule

    def _parts(self, hx: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """The parts of a first state; none where it is zero."""
        if hx is None:
            return ()
        return (hx,) if self._cell.states == 1 else _validate.pair(self._NAME, "hx", hx)

    @staticmethod
    def _in_own_dtype(value: object, weight: Tensor) -> object:
        """A floating-point tensor in the dtype of the parameters, whatever that of the layer before; the rest as is."""
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(weight.dtype) if floating else value

    def _as_leaf(self, input: fx.Proxy, hx: Any, **options: Any) -> fx.Proxy:
        """The call as one node of the graph that ``torch.fx`` is tracing, as of a module of ``torch.nn``."""
        options = {name: value for name, value in options.items() if value is not None}
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input, hx), options)


class Recurrent(Ruled, nn.RNNBase):
    """Layers of one cell, with the parameters, names and initialization of their ``torch.nn`` counterpart, and the
    options of this library. What is a subclass's own: ``_NAME``, ``_MODE`` and ``_cell``.

    Each layer and direction is a recurrence of its own, with displacements in its own time: from one layer down to the
    one below goes the gradient in its input, ``Uᵀ δ``, which that layer takes for the gradient in its states.
    """

    _MODE = ""  # what torch.nn calls the cell
    displacements = "auto"

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
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            _validate.count(self._NAME, name, size)
        for name, value in (("bias", bias), ("batch_first", batch_first)):
            if not isinstance(value, bool):
                raise TypeError(f"{self._NAME}: {name} must be a bool, got {type(value).__name__}")
        if bidirectional not in (False, True):
            raise TypeError(f"{self._NAME}: bidirectional must be a bool, got {type(bidirectional).__name__}")
        if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout <= 1:
            raise ValueError(f"{self._NAME}: dropout must be a number in [0, 1], got {dropout!r}")
        _validate.checkpoint_every(self._NAME, checkpoint_every)
        if not isinstance(return_sequence, bool):
            raise TypeError(f"{self._NAME}: return_sequence must be a bool, got {type(return_sequence).__name__}")
        _validate.backend(self._NAME, backend)
        super().__init__(
            self._MODE,
            int(input_size),
            int(hidden_size),
            int(num_layers),
            bias=bias,
            batch_first=batch_first,
            dropout=float(dropout),
            bidirectional=bool(bidirectional),
            device=device,
            dtype=dtype,
        )
        self.rule = rule
        self.checkpoint_every = checkpoint_every
        self.return_sequence = return_sequence
        self.backend = backend
        if feedback is not None:  # register_buffer has an error of its own
            _validate.floating_tensor(self._NAME, "feedback", feedback)
        self.register_buffer("feedback", feedback, persistent=False)
        self._check_feedback(self.weight_hh_l0)
        self.refresh = refresh

    @Ruled.rule.setter
    def rule(self, rule: Rule | None) -> None:
        Ruled.rule.fset(self, rule)
        if getattr(self, "refreshed", None) is not None:
            self.refresh = self.refresh  # what is inverted may be another part of the weight

    @property
    def refresh(self) -> int:
        """At every how many training passes P is computed anew."""
        return 1 if self.refreshed is None else self.refreshed[0].refresh

    @refresh.setter
    def refresh(self, refresh: int) -> None:
        _validate.count(self._NAME, "refresh", refresh)
        self.refreshed = None  # or one for each layer and direction
        if refresh > 1:
            weights = (getattr(self, names[1]) for names in self._all_weights)
            self.refreshed = nn.ModuleList(RefreshedFeedback(self._inverted(weight), refresh) for weight in weights)

    def _forget(self) -> None:
        """Every P that ``refresh`` keeps, if any."""
        for refreshed in getattr(self, "refreshed", None) or ():
            refreshed.forget()

    def _inverted(self, weight: Tensor) -> Tensor:
        """The blocks of the recurrent weight whose P the rule needs."""
        return self._cell.inverted(weight.detach(), self.rule.inverse if uses_inverse(self.rule) else "weight")

    def reset_parameters(self) -> None:
        """Uniform on ±1/√N, as in ``torch.nn``."""
        super().reset_parameters()
        self._forget()

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._forget()  # what is kept is of the weights that were

    def _init_flat_weights(self) -> None:
        super()._init_flat_weights()
        # Of a parametrized weight the value: a part of a graph could not be copied.
        self._flat_weights = [
            weight if weight is None or weight.is_leaf else weight.detach() for weight in self._flat_weights
        ]

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels take the parameters as they are. Here for code written for ``torch.nn``."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence | None, Tensor | tuple[Tensor, Tensor]]:
        if isinstance(input, fx.Proxy):
            return self._as_leaf(input, hx, lengths=lengths, reset=reset)
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        weights = self.all_weights  # each once: it may be parametrized
        starts = self._parts(hx)
        output_dtype = None
        if isinstance(x, Tensor) and autocast_enabled(x.device.type):
            output_dtype = self._output_dtype(x, starts, weights[0][0])
            x = self._in_own_dtype(x, weights[0][0])
            starts = tuple(self._in_own_dtype(start, weights[0][0]) for start in starts)
        self._check_parameters(weights)
        self._check_input(x, starts, input.batch_sizes if packed else None, weights[0][0])
        _validate.numbers_of_rule(self._NAME, self.rule, self._cell, x.dtype)
        if lengths is not None or reset is not None:
            lengths = self._check_time(x, packed, lengths, reset)
        relays = relays_of(starts, self._NAME, self.rule.carries)
        batched, time = packed or x.dim() == 3, 1 if self.batch_first else 0
        if not batched:
            x, starts = x.unsqueeze(1 - time), tuple(start.unsqueeze(1) for start in starts)
            reset = None if reset is None else reset.unsqueeze(1 - time)
        if packed:
            h, lasts, relays = self._packed(PackedSequence(x, *input[1:]), starts, relays, weights, reset)
        elif lengths is not None:
            h, lasts, relays = self._padded(x, lengths, starts, relays, weights, reset)
        else:
            if reset is not None and self.batch_first:
                reset = reset.transpose(0, 1)
            h, lasts, relays = self._stack(x, starts, relays, weights, batch_first=self.batch_first, reset=reset)
        if not batched:
            h, lasts = None if h is None else h.squeeze(1 - time), tuple(last.squeeze(1) for last in lasts)
        lasts = tuple(hand_on(last, relays) for last in lasts)
        if output_dtype is not None and h is not None:
            h = h.to(output_dtype)
        return h, lasts if len(lasts) > 1 else lasts[0]

    def _padded(
        self,
        x: Tensor,
        lengths: Tensor,
        starts: tuple[Tensor, ...],
        relays: Relays,
        weights: list[list[Tensor]],
        reset: Tensor | None,
    ) -> tuple[Tensor | None, tuple[Tensor, ...], Relays]:
        """``_packed`` on padded sequences. Their rows are gathered and put back at once: torch's own functions go step
        by step, and take longer than the recurrence.
        """
        T, B = x.shape[:2] if not self.batch_first else (x.shape[1], x.shape[0])
        sorted_lengths, order = lengths.sort(descending=True)
        there = torch.arange(int(sorted_lengths[0]))[:, None] < sorted_lengths
        step, sequence = there.nonzero(as_tuple=True)
        sequence = order[sequence]
        rows = (sequence * T + step if self.batch_first else step * B + sequence).to(x.device)
        order = order.to(x.device)
        packed = PackedSequence(x.flatten(0, 1).index_select(0, rows), there.sum(1), order, order.argsort())
        reset = None if reset is None else reset.flatten().index_select(0, rows)
        h, lasts, relays = self._packed(packed, starts, relays, weights, reset)
        if h is not None:
            states = h.data.new_zeros(T * B, h.data.shape[-1]).index_copy(0, rows, h.data)
            h = states.unflatten(0, x.shape[:2])
        return h, lasts, relays

    def _packed(
        self,
        sequence: PackedSequence,
        starts: tuple[Tensor, ...],
        relays: Relays,
        weights: list[list[Tensor]],
        reset: Tensor | None,
    ) -> tuple[PackedSequence | None, tuple[Tensor, ...], Relays]:
        """``_stack`` on packed sequences, and first states in the order that these had before they were sorted."""
        x, batch_sizes, order, back = sequence
        starts = starts or tuple(
            x.new_zeros(len(weights), int(batch_sizes[0]), self.hidden_size) for _ in range(self._cell.states)
        )
        h, lasts, relays = self._stack(
            x,
            _ordered(starts, order),
            _ordered(relays, order),
            weights,
            batch_first=False,
            batch_sizes=batch_sizes,
            reset=reset,
        )
        h = None if h is None else PackedSequence(h, batch_sizes, order, back)
        return h, _ordered(lasts, back), _ordered(relays, back)

    def _stack(
        self,
        x: Tensor,
        starts: tuple[Tensor, ...],
        relays: Relays,
        weights: list[list[Tensor]],
        *,
        batch_first: bool,
        batch_sizes: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | None, tuple[Tensor, ...], Relays]:
        """All layers and directions.

        Args:
            x: [T, B, M], [B, T, M] or, packed, [P, M].
            starts, relays: the parts of the first states, [L D, B, N], none for zero, and their relays.
            batch_first: whether x and h are [B, T, ·].
            batch_sizes, reset: as in ``recurrent_layer``.

        Returns:
            h of the last layer, the parts of the last states of all, [L D, B, N], and their relays.
        """
        count, directions = len(weights), 2 if self.bidirectional else 1
        if count == 1:  # no work that it can do without
            h, lasts, relay = self._layer(
                0,
                x,
                starts,
                None if relays is None else relays[0],
                weights[0],
                batch_first=batch_first,
                batch_sizes=batch_sizes,
                reset=reset,
                return_sequence=self.return_sequence,
            )
            return h, lasts, (relay,)
        parts = list(zip(*(start.split(1) for start in starts), strict=True)) or [()] * count
        resets = reset, reset
        if reset is not None and directions == 2:
            resets = reset, _one_step_earlier(reset, batch_sizes)
        lasts, sent = [], []
        if batch_first and count > directions:  # in order of time, as in torch.nn: one seed drops the same numbers
            x = x.transpose(0, 1)
        for first in range(0, count, directions):
            ends = first + directions == count
            if batch_first and ends and first > 0:
                x = x.transpose(0, 1)
            outputs = []
            for direction in range(directions):
                index = first + direction
                h, last, relay = self._layer(
                    index,
                    x,
                    parts[index],
                    None if relays is None else relays[index],
                    weights[index],
                    batch_first=batch_first and ends,
                    batch_sizes=batch_sizes,
                    reset=resets[direction],
                    reverse=direction == 1,
                    return_sequence=self.return_sequence or not ends,
                )
                outputs.append(h)
                lasts.append(last)
                sent.append(relay)
            x = outputs[0] if directions == 1 or outputs[0] is None else torch.cat(outputs, -1)
            if self.dropout and not ends:
                x = functional.dropout(x, self.dropout, self.training)
        return x, tuple(torch.cat(part) for part in zip(*lasts, strict=True)), tuple(sent)

    def _layer(
        self,
        index: int,
        x: Tensor,
        starts: tuple[Tensor, ...],
        relay: Tensor | None,
        weights: list[Tensor],
        **options: Any,
    ) -> tuple[Tensor | None, tuple[Tensor, ...], Tensor | None]:
        """One layer in one direction, the one of this index in ``hx``: h, the parts of the last state and its relay."""
        weight_ih, weight_hh, *biases = weights
        bias_ih, bias_hh = biases or (None, None)
        return recurrent_layer(
            self._cell.name,
            x,
            weight_hh,
            *(starts or (None,)),
            weight_ih=weight_ih,
            bias_ih=bias_ih,
            bias_hh=bias_hh,
            feedback=self._feedback(index, weight_hh),
            relay=relay,
            rule=self.rule,
            checkpoint_every=self.checkpoint_every,
            displacements=self.displacements,
            backend=self.backend,
            **options,
        )

    def _feedback(self, index: int, weight: Tensor) -> Tensor | None:
        """The matrix to take in place of P; ``None``: P of the weight as it is."""
        if self.feedback is not None:
            return self.feedback if len(self._all_weights) == 1 else self.feedback[index]
        if self.refreshed is not None and torch.is_grad_enabled() and uses_inverse(self.rule):
            return self.refreshed[index](self._inverted(weight), self.rule, self.backend)
        return None

    def _not_implemented(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{self._NAME}: {what} is not implemented yet")

    def _output_dtype(self, x: Tensor, starts: tuple[Tensor, ...], weight: Tensor) -> torch.dtype:
        """Of the output under autocast, as of torch's layer. Last states keep the parameters': the next call goes on
        from them.
        """
        return weight.dtype if weight.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)

    def _check_parameters(self, weights: list[list[Tensor]]) -> None:
        """Parameters can be put in from outside; the kernels read them by their address."""
        N, rows = self.hidden_size, self._cell.gates * self.hidden_size
        directions = 2 if self.bidirectional else 1
        for index, (names, parameters) in enumerate(zip(self._all_weights, weights, strict=True)):
            width = self.input_size if index < directions else N * directions
            shapes = ((rows, width), (rows, N), (rows,), (rows,))
            for name, parameter, shape in zip(names, parameters, shapes, strict=False):  # there may be no biases
                if parameter.shape != shape:
                    raise ValueError(f"{self._NAME}: {name} must have shape {shape}, got {tuple(parameter.shape)}")
                _validate.same_kind(self._NAME, name, parameter, "weight_ih_l0", weights[0][0])
        self._check_feedback(weights[0][1])

    def _check_feedback(self, weight: Tensor) -> None:
        if self.feedback is None:
            return
        inverted, count = self._inverted(weight), len(self._all_weights)
        what = "weight_hh_l0" if self._cell.gates == 1 else "the blocks of weight_hh_l0 it replaces P of"
        if count > 1:
            inverted, what = inverted.expand(count, *inverted.shape), f"{what}, {count} times"
        _validate.feedback(self._NAME, self.feedback, inverted, what, self.rule)

    def _check_input(
        self, input: Tensor, starts: tuple[Tensor, ...], batch_sizes: Tensor | None, weight: Tensor
    ) -> None:
        _validate.floating_tensor(self._NAME, "input", input)
        letters, expected_dims = ("[B, T, M]" if self.batch_first else "[T, B, M]"), (2, 3)
        if batch_sizes is not None:
            letters, expected_dims = "[P, M] where it is packed,", (2,)
        elif input.dim() == 2:
            letters = "[T, M]"
        if input.dim() not in expected_dims:
            raise ValueError(f"{self._NAME}: input must have shape {letters} or [T, M], got {tuple(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise _validate.ShapeError(
                f"{self._NAME}: input must have shape {letters} with M = {self.input_size}, got {tuple(input.shape)}"
            )
        if batch_sizes is not None:
            _validate.batch_sizes(self._NAME, batch_sizes, len(input))
        elif input.shape[1 if self.batch_first and input.dim() == 3 else 0] == 0:
            raise _validate.ShapeError(
                f"{self._NAME}: input must have at least one time step (T >= 1), got {tuple(input.shape)}"
            )
        _validate.same_kind(self._NAME, "input", input, "weight_ih_l0", weight)
        if not starts:
            return
        count = len(self._all_weights)
        if batch_sizes is None and input.dim() == 2:
            letters, expected = f"[{count}, N]", [count, self.hidden_size]
        else:
            B = int(batch_sizes[0]) if batch_sizes is not None else input.shape[0 if self.batch_first else 1]
            letters, expected = f"[{count}, B, N]", [count, B, self.hidden_size]
        for index, start in enumerate(starts):
            name = "hx" if len(starts) == 1 else f"hx[{index}]"
            _validate.floating_tensor(self._NAME, name, start)
            if list(start.shape) != expected:
                raise _validate.ShapeError(
                    f"{self._NAME}: {name} must have shape {letters} = {expected}, got {tuple(start.shape)}"
                )
            _validate.same_kind(self._NAME, name, start, "input", input)

    def _check_time(
        self, input: Tensor, packed: bool, lengths: Tensor | Sequence[int] | None, reset: Tensor | None
    ) -> Tensor | None:
        """The lengths as a tensor, on the CPU."""
        if lengths is not None:
            if packed:
                raise ValueError(f"{self._NAME}: lengths must be None with a PackedSequence, which has its own")
            if input.dim() == 2:
                raise ValueError(f"{self._NAME}: lengths must be None without a batch, with input of shape [T, M]")
            B, T = input.shape[:2] if self.batch_first else input.shape[1::-1]
            lengths = _validate.lengths(self._NAME, lengths, T, B)
        if reset is not None:
            letters = "[P]" if packed else "[T]" if input.dim() == 2 else "[B, T]" if self.batch_first else "[T, B]"
            _validate.reset(self._NAME, reset, letters, list(input.shape[:-1]), input.device)
        return lengths

    def extra_repr(self) -> str:
        """What is not as by default."""
        words = [f"{self.input_size}, {self.hidden_size}", *self._own_options()]
        if self.num_layers > 1:
            words.append(f"num_layers={self.num_layers}")
        if not self.bias:
            words.append("bias=False")
        if self.batch_first:
            words.append("batch_first=True")
        if self.dropout:
            words.append(f"dropout={self.dropout}")
        if self.bidirectional:
            words.append("bidirectional=True")
        words.append(f"rule={self.rule!r}")
        if self.checkpoint_every is not None:
            words.append(f"checkpoint_every={self.checkpoint_every}")
        if not self.return_sequence:
            words.append("return_sequence=False")
        if self.feedback is not None:
            words.append("feedback=...")
        if self.displacements != "auto":
            words.append(f"displacements={self.displacements!r}")
        if self.refresh > 1:
            words.append(f"refresh={self.refresh}")
        if self.backend != "auto":
            words.append(f"backend={self.backend!r}")
        return ", ".join(words)

    def _own_options(self) -> list[str]:
        """The options of the subclass, for ``extra_repr``."""
        return []
