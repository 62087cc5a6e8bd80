"""Difference target propagation through time with a learned inverse: what the regularized one is compared with."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from tp_kernels import _validate
from tp_kernels._autograd import first_derivatives_only
from tp_kernels._library import differentiates_ops
from tp_kernels.nn.rnn import RNN
from tp_kernels.ops.rnn.cell import ACTIVATIONS
from tp_kernels.rules import BackProp, Rule, Sweep

_UPDATES = ("local", "total")
_INVERSE = ("inverse_ih_l0", "inverse_hh_l0", "inverse_bias_l0")


class LearnedInverse(RNN):
    """Elman layer whose targets come back through an inverse that is learned with it: a drop-in for ``torch.nn.RNN``.

    Forward is that of ``tp_kernels.nn.RNN``. Backward takes targets from ``v_T = h_T - step g_T`` back through the
    learned inverse ``G(v, x_t) = a(V v + U_b x_t + c)``, by differences:

    ``v_{t-1} = h_{t-1} + G(v_t, x_t) - G(h_t, x_t) - step g_{t-1}``,  with ``g_t = ∂loss/∂h_t``.

    The recurrent layer's gradients are those of ``Σ_t ½‖h_t - v_t‖²``, targets held constant, with the state before
    held constant as well (``update="local"``) or through the recurrence (``"total"``). The gradients of V, U_b and c
    are those of their own loss, whatever the loss of the model is: the mean, over steps and sequences, of

    ``‖G(f(h̃, x_t), x_t) - h̃‖²``,  ``h̃ = h_{t-1} + noise · ε``,  with ``f`` the layer's own step, ε standard normal.

    So one optimizer over ``parameters()`` trains both, and neither loss reaches the other's parameters or, but for the
    layer's, the input. ε is drawn in backward, from torch's global generator. Targets are plain PyTorch, a loop over T,
    and a displacement that is smaller than the rounding errors of a state is lost in the difference.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype: as
            in ``tp_kernels.nn.RNN``. One seed gives the recurrent weights of ``torch.nn.RNN``.
        update: "local" or "total".
        step: γ > 0, the step from a state to its target along the negative gradient. No mere scale: G is not linear.
        noise: standard deviation of the noise that the inverse is trained with, at least 0.
        backend: of the recurrence, as in ``tp_kernels.rnn``.

    ``state_dict`` is that of ``torch.nn.RNN`` and ``inverse_hh_l0`` (V: [N, N]), ``inverse_ih_l0`` (U_b: [N, M]) and,
    with ``bias``, ``inverse_bias_l0`` (c: [N]). Shapes are those of ``tp_kernels.nn.RNN``. It takes no rule:
    ``tp_kernels.nn.convert`` raises where it meets one, and ``tp_kernels.trace`` leaves it out. ``torch.compile``
    runs the layer as it is, and raises with ``fullgraph=True``.

    Raises:
        TypeError, ValueError: an argument of another kind, shape or value than stated.
        NotImplementedError: several layers, two directions, packed sequences.

    Source: Manchev and Spratling, "Target Propagation in Recurrent Neural Networks", JMLR 21, 2020; targets by
    differences and the noisy reconstruction from Lee, Zhang, Fischer and Bengio, "Difference Target Propagation",
    ECML PKDD 2015. A gradient source at every step, the default of ``noise`` and ``"total"`` are this library's.

    Example:
        >>> import torch, tp_kernels as tp
        >>> layer = tp.nn.LearnedInverse(4, 8)
        >>> output, last = layer(torch.randn(10, 2, 4))
        >>> last.sum().backward()
        >>> layer.weight_hh_l0.grad.shape, layer.inverse_hh_l0.grad.shape
        (torch.Size([8, 8]), torch.Size([8, 8]))
    """

    _NAME = "nn.LearnedInverse"

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
        update: str = "local",
        step: float = 1.0,
        noise: float = 0.1,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity=nonlinearity,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
        )
        if self.num_layers > 1:
            raise self._not_implemented(f"num_layers={num_layers}")
        if self.bidirectional:
            raise self._not_implemented("bidirectional=True")
        _validate.word(self._NAME, "update", update, _UPDATES)
        for name, value, least in (("step", step, "positive"), ("noise", noise, "at least 0")):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{self._NAME}: {name} must be a real number, got {type(value).__name__}")
            if not 0 <= value < math.inf or (value == 0 and least == "positive"):  # the first is false for NaN too
                raise ValueError(f"{self._NAME}: {name} must be {least} and finite, got {value!r}")
        self.update, self.step, self.noise = update, float(step), float(noise)
        kind = {"device": device, "dtype": dtype}
        self.inverse_ih_l0 = nn.Parameter(torch.empty(hidden_size, input_size, **kind))
        self.inverse_hh_l0 = nn.Parameter(torch.empty(hidden_size, hidden_size, **kind))
        self.register_parameter("inverse_bias_l0", nn.Parameter(torch.empty(hidden_size, **kind)) if bias else None)
        bound = 1 / math.sqrt(hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("inverse"):  # after those of the layer, which have the numbers of torch.nn.RNN
                nn.init.uniform_(parameter, -bound, bound)

    def _resolved(self, rule: Rule | None) -> Rule:
        """``BackProp()``: what the kernels do with the displacements. It cannot be another."""
        if rule is not None:
            raise TypeError(f"{self._NAME}: rule must be None (it learns its inverse), got {rule!r}")
        return BackProp()

    def invert(self, h: Tensor, x: Tensor) -> Tensor:
        """The state that the inverse takes to be the one before: ``G(h, x) = a(V h + U_b x + c)``.

        Args:
            h: [..., N], states, in the dtype of the parameters.
            x: [..., M], the inputs of the same time steps.

        Returns:
            [..., N].
        """
        inverse = [self.inverse_ih_l0, self.inverse_hh_l0, self.inverse_bias_l0]
        return ACTIVATIONS[self.nonlinearity](_before_activation(h, x, inverse))

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(input, PackedSequence):
            raise self._not_implemented("a PackedSequence as input")
        return super().forward(input, hx)

    def _layer(
        self,
        index: int,
        x: Tensor,
        starts: tuple[Tensor, ...],
        relay: Tensor | None,
        weights: list[Tensor],
        **options: Any,
    ) -> tuple[Tensor, tuple[Tensor], None]:
        if torch.is_grad_enabled() and differentiates_ops():
            raise self._not_implemented("training by torch.export, make_fx or torch.func")
        M, N = self.input_size, self.hidden_size
        inverse = [getattr(self, name) for name in _INVERSE]
        for name, parameter, shape in zip(_INVERSE, inverse, ((N, M), (N, N), (N,)), strict=True):
            if parameter is None and name == "inverse_bias_l0":
                continue
            if parameter.shape != shape:
                raise ValueError(f"{self._NAME}: {name} must have shape {shape}, got {tuple(parameter.shape)}")
            _validate.same_kind(self._NAME, name, parameter, "weight_ih_l0", weights[0])
        weight_ih, weight_hh, *biases = weights
        bias_ih, bias_hh = biases or (None, None)
        rule = LearnedRule(
            cell=self._cell.name,
            nonlinearity=self.nonlinearity,
            batch_first=self.batch_first,
            update=self.update,
            step=self.step,
            noise=self.noise,
            backend=self.backend,
        )
        h, last = LearnedInverseFunction.apply(
            x,
            weight_ih,
            bias_ih,
            weight_hh,
            bias_hh,
            starts[0] if starts else None,
            *inverse,
            rule,
        )
        return h, (last,), None

    def extra_repr(self) -> str:
        words = f"update={self.update!r}, step={self.step}, noise={self.noise}"
        return super().extra_repr().replace(f"rule={self.rule!r}", words)


class LearnedRule(NamedTuple):
    """What the layer's backward pass computes, and on which back-end."""

    cell: str
    nonlinearity: str
    batch_first: bool
    update: str
    step: float
    noise: float
    backend: str


class LearnedInverseFunction(torch.autograd.Function):
    """The recurrence. Backward: displacements in the place of BP's gradients, and the inverse's own gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor,
        bias_ih: Tensor | None,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        start: Tensor | None,
        inverse_ih: Tensor,
        inverse_hh: Tensor,
        inverse_bias: Tensor | None,
        rule: LearnedRule,
    ) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1) if rule.batch_first else x
        h, last, *_ = torch.ops.tp_kernels.recurrence_fwd(
            rule.cell,
            x,
            weight_ih,
            bias_ih,
            weight_hh,
            bias_hh,
            start,
            None,  # feedback
            None,  # relay
            None,  # batch_sizes
            None,  # reset
            False,  # reverse
            None,  # every
            True,  # sequence
            False,  # keep
            "sweep",
            Sweep("none", rule.update).words,
            rule.backend,
        )
        ctx.save_for_backward(x, weight_ih, bias_ih, weight_hh, bias_hh, start, inverse_ih, inverse_hh, inverse_bias, h)
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        # A tensor of its own, not a view: it may be detached.
        return h.detach().transpose_(0, 1) if rule.batch_first else h, last

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, saved: tuple, grad_h: Tensor | None, grad_last: Tensor | None) -> tuple:
        x, weight_ih, bias_ih, weight_hh, bias_hh, start, *inverse, h = saved
        rule = ctx.rule
        grad = torch.zeros_like(h)
        if grad_h is not None:
            grad += grad_h.transpose(0, 1) if rule.batch_first else grad_h
        if grad_last is not None:
            grad[-1] += grad_last[0]
        displacements, first = _displacements(grad, h, x, inverse, rule.nonlinearity, rule.step)
        needs_x, needs_weight_ih, needs_bias_ih, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        # Displacements in the place of gradients and nothing carried: the last step of every rule.
        *gradients, _, through = torch.ops.tp_kernels.recurrence_bwd(
            rule.cell,
            displacements,
            None,  # grad_last
            x,
            weight_ih,
            bias_ih,
            weight_hh,
            bias_hh,
            start,
            None,  # batch_sizes
            None,  # reset
            False,  # reverse
            h,
            h.new_empty(0),  # kept
            None,  # feedback
            None,  # carried
            None,  # through
            None,  # every
            needs_x,
            needs_weight_ih or needs_bias_ih,
            needs_weight,
            needs_bias,
            Sweep("none", rule.update).words,
            rule.backend,
        )
        before = torch.cat([torch.zeros_like(h[:1]) if start is None else start, h[:-1]])
        bias = None if bias_ih is None else bias_ih + bias_hh
        u = functional.linear(x, weight_ih, bias)
        grad_inverse = _reconstruction_gradients(u, weight_hh, before, x, inverse, ctx.needs_input_grad[6:9], rule)
        gradients.append(None if start is None else (through if rule.update == "total" else first)[None])
        if needs_x and rule.batch_first:
            gradients[0] = gradients[0].transpose(0, 1)
        found = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad[:6], strict=True))
        return *found, *grad_inverse, None


def _before_activation(h: Tensor, x: Tensor, inverse: list[Tensor | None]) -> Tensor:
    """``V h + U_b x + c``."""
    ih, hh, bias = inverse
    return functional.linear(x, ih, bias) + h @ hh.mT


def _displacements(
    grad: Tensor, h: Tensor, x: Tensor, inverse: list[Tensor | None], nonlinearity: str, step: float
) -> tuple[Tensor, Tensor]:
    """``λ_t = h_t - v_t`` for t = 1 … T: [T, B, N], and ``λ_0``: [B, N], to which no gradient arrives from outside."""
    activation, hh = ACTIVATIONS[nonlinearity], inverse[1]
    at_state = _before_activation(h, x, inverse)
    displacements, carried = torch.empty_like(h), torch.zeros_like(h[0])
    for t in range(len(h) - 1, -1, -1):
        displacements[t] = carried + step * grad[t]
        at_target = at_state[t] - displacements[t] @ hh.mT
        carried = activation(at_state[t]) - activation(at_target)
    return displacements, carried


def _reconstruction_gradients(
    u: Tensor,
    weight: Tensor,
    before: Tensor,
    x: Tensor,
    inverse: list[Tensor | None],
    trained: tuple[bool, ...],
    rule: LearnedRule,
) -> list[Tensor | None]:
    """Gradients of the mean of ``‖G(f(h̃, x), x) - h̃‖²`` in the trained parameters of the inverse."""
    if not any(trained):
        return [None for _ in inverse]
    activation = ACTIVATIONS[rule.nonlinearity]
    noisy = before + rule.noise * torch.randn_like(before) if rule.noise else before
    after = activation(u + noisy @ weight.mT)
    with torch.enable_grad():
        leaves = [None if parameter is None else parameter.detach().requires_grad_() for parameter in inverse]
        miss = activation(_before_activation(after, x, leaves)) - noisy
        loss = miss.square().sum(-1).mean()
        wanted = [leaf for leaf, need in zip(leaves, trained, strict=True) if need]
        gradients = iter(torch.autograd.grad(loss, wanted))
    return [next(gradients) if need else None for need in trained]
