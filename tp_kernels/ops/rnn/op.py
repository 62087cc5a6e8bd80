"""The recurrent layer (Elman): ``h_t = a(u_t + W h_{t-1})``, with targets or gradients sent back through time.

``backends.py`` has the recurrence itself, ``feedback.py`` the matrix that carries displacements back; here are the
layer around them, its autograd Function and the public function.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tp_kernels import _validate
from tp_kernels._autograd import first_derivatives_only
from tp_kernels._library import op, register
from tp_kernels.ops.rnn import parallel
from tp_kernels.ops.rnn.backends import BACKENDS, SWEEP, for_both_passes
from tp_kernels.ops.rnn.launch import sent_outputs
from tp_kernels.rules import Rule, Sweep, TargetProp, resolve


def _chunks(T: int, B: int, N: int) -> list[slice]:
    """Steps that are projected, swept and summed up together: their arrays stay in the second-level cache (a megabyte
    in float32), but for rows enough that packing the weights anew for each chunk does not show.
    """
    steps = max(1, max(2048, 2**18 // N) // max(1, B))
    return [slice(first, min(first + steps, T)) for first in range(0, T, steps)]


def _chunks_on(device: torch.device, T: int, B: int, N: int) -> list[slice]:
    """A GPU takes the whole sequence: each launch reads the matrices anew, and waits for the one before."""
    return _chunks(T, B, N) if device.type == "cpu" else [slice(0, T)]


def _layer_forward(
    x: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    h0: Tensor | None,
    nonlinearity: str,
    backend: str,
    inverse: str = "none",
) -> Tensor:
    T, B, N = x.shape[0], x.shape[1], weight.shape[-1]
    chosen = for_both_passes(backend, x, N, nonlinearity, inverse)
    # In the sweep the projection of few sequences would be products of a few rows; as one product it has T·B of them.
    if chosen.layer_forward is not None and (B >= 4 or 4 * x.shape[2] <= N):
        return chosen.layer_forward(x, projection, bias, weight, h0, nonlinearity)
    h, start = x.new_empty((T, B, N)), h0
    for steps in _chunks_on(x.device, T, B, N):
        u = functional.linear(x[steps], projection, bias)
        start = chosen.forward(u, weight, start, nonlinearity, out=h[steps])[-1]
    return h


def _layer_backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    *words: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *sweep, needs_x, needs_projection, needs_weight, backend = words
    sweep = Sweep(*sweep)
    backward = BACKENDS.resolve(backend, h, size=h.shape[-1], sweep=sweep).backward
    grad_x, grad_projection, grad_bias, grad_weight = _gradient_outputs(
        x, projection, h, needs_x, needs_projection, needs_weight
    )
    for gradient in (grad_projection, grad_bias, grad_weight):
        gradient.zero_()
    chunks = _chunks_on(h.device, *h.shape)
    for steps in reversed(chunks):
        start = h[steps.start - 1] if steps.start else h0
        u = functional.linear(x[steps], projection, bias) if sweep.inverse == "direct" else None
        grad_u, carried, through = backward(
            None if grad_h is None else grad_h[steps],
            grad_last if steps is chunks[-1] else None,
            *(h[steps], weight, feedback, carried, through, u, start, sweep._replace(first=sweep.first + steps.start)),
        )
        carried = None if sweep.inverse == "none" else carried
        through = None if sweep.update == "local" else through
        delta = grad_u.flatten(0, 1)
        if needs_x:
            grad_x[steps] = grad_u @ projection
        if needs_projection:
            grad_projection.addmm_(delta.mT, x[steps].flatten(0, 1))
            grad_bias.add_(delta.sum(0))
        if needs_weight and steps.start == 0:
            grad_weight.add_(_weight_gradient(grad_u, h[steps], h0))
        elif needs_weight:
            grad_weight.addmm_(delta.mT, h[steps.start - 1 : steps.stop - 1].flatten(0, 1))
    nothing = h.new_empty(0)
    sent = (nothing if tensor is None else tensor for tensor in (carried, through))
    return grad_x, grad_projection, grad_bias, grad_weight, *sent


def _gradient_outputs(
    x: Tensor, projection: Tensor, h: Tensor, needs_x: bool, needs_projection: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients in x, U, b and W; empty where they are not needed."""
    N = h.shape[-1]
    return (
        h.new_empty(x.shape if needs_x else (0,)),
        h.new_empty(projection.shape if needs_projection else (0,)),
        h.new_empty((N,) if needs_projection else (0,)),
        h.new_empty((N, N) if needs_weight else (0,)),
    )


def _fake_layer_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, x, projection, _, h, _, _, _, _, _, *sweep, needs_x, needs_projection, needs_weight, _ = arguments
    gradients = _gradient_outputs(x, projection, h, needs_x, needs_projection, needs_weight)
    return *gradients, *sent_outputs(h, Sweep(*sweep))


register(
    "rnn_layer_fwd(Tensor x, Tensor projection, Tensor? bias, Tensor weight, Tensor? h0, str nonlinearity, "
    "str backend, str inverse='none') -> Tensor",
    _layer_forward,
    lambda x, projection, bias, weight, *rest: x.new_empty((x.shape[0], x.shape[1], weight.shape[-1])),
)
register(
    "rnn_layer_bwd(Tensor? grad_h, Tensor? grad_last, Tensor x, Tensor projection, Tensor? bias, Tensor h, "
    "Tensor weight, Tensor? h0, Tensor? feedback, Tensor? carried, Tensor? through, "
    f"{SWEEP}, bool needs_x, bool needs_projection, bool needs_weight, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer_backward,
    _fake_layer_backward,
    twin=True,  # as of rnn_bwd
)


def _weight_gradient(grad_u: Tensor, h: Tensor, start: Tensor | None) -> Tensor:
    """``∂W = Σ_t δ_tᵀ h_{t-1}``, one large product; the state before the first is zero where there is none."""
    delta, state = grad_u[1:].flatten(0, 1), h[:-1].flatten(0, 1)
    if h.dim() == 3:
        grad_weight = delta.mT @ state
        return grad_weight if start is None else grad_weight.addmm_(grad_u[0].mT, start)
    grad_weight = delta.permute(1, 2, 0) @ state.transpose(0, 1)
    return grad_weight if start is None else grad_weight.baddbmm_(grad_u[0].permute(1, 2, 0), start.transpose(0, 1))


def _states(
    x: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    start: Tensor | None,
    nonlinearity: str,
    backend: str,
    inverse: str,
) -> Tensor:
    if projection is None:
        return torch.ops.tp_kernels.rnn_fwd(x, weight, start, nonlinearity, backend, inverse)
    return torch.ops.tp_kernels.rnn_layer_fwd(x, projection, bias, weight, start, nonlinearity, backend, inverse)


class RNNFunction(torch.autograd.Function):
    """A whole layer, input projection included where there is one: ``u = x Uᵀ + b``, or ``u = x``.

    Without checkpoints forward keeps all states, and nothing else but its inputs. With ``checkpoint_every=k`` it
    keeps every k-th; backward computes the others again, k steps at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projection: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        h0: Tensor | None,
        feedback: Tensor | None,
        checkpoint_every: int | None,
        return_sequence: bool,
        displacements: str,
        power: float | None,
        sweep: Sweep,
        backend: str,
        needs_backward: bool,
    ) -> tuple[Tensor | None, Tensor]:
        # Without gradients any back-end will do that has the forward pass.
        choice = sweep.nonlinearity, backend, sweep.inverse if needs_backward else "none"
        if checkpoint_every is None:
            kept = sequence = _states(x, projection, bias, weight, h0, *choice)
            last = sequence[-1].clone()
        else:
            T, N, last, ends, sequence = x.shape[0], weight.shape[-1], h0, [], None
            if return_sequence:
                sequence = x.new_empty((*x.shape[:-1], N))
            for first in range(0, T, checkpoint_every):
                steps = slice(first, first + checkpoint_every)
                h = _states(x[steps], projection, bias, weight, last, *choice)
                last = h[-1].clone()
                ends.append(last)
                if return_sequence:
                    sequence[steps] = h
            kept = torch.stack(ends)
        needs_x = projection is not None or checkpoint_every is not None or sweep.inverse == "direct"
        ctx.save_for_backward(x if needs_x else None, projection, bias, weight, h0, feedback, kept)
        ctx.set_materialize_grads(False)
        ctx.checkpoint_every = checkpoint_every
        ctx.displacements = displacements
        ctx.words = (power, sweep, backend)
        return sequence if return_sequence else None, last

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, saved: tuple, grad_h: Tensor | None, grad_last: Tensor | None) -> tuple:
        x, projection, bias, weight, h0, feedback, kept = saved
        power, sweep, backend = ctx.words
        needs_x, needs_projection, needs_bias, needs_weight = ctx.needs_input_grad[:4]
        if feedback is None and sweep.uses_inverse:
            feedback = torch.ops.tp_kernels.rnn_feedback(weight, sweep.reg, power, backend)
        first_displacement = None
        if ctx.displacements == "parallel" or (
            ctx.displacements == "auto"
            and sweep.inverse == "weight"
            and ctx.checkpoint_every is None
            and parallel.worth_it(grad_h, kept)
        ):
            grad_h, first_displacement = torch.ops.tp_kernels.rnn_displacements(
                grad_h, grad_last, kept, feedback, sweep.step
            )
            grad_last, sweep = None, sweep._replace(inverse="none", step=1.0)

        def gradients_of(
            first: int, h: Tensor, start: Tensor | None, x: Tensor | None, *sources: Tensor | None
        ) -> tuple:
            """Gradients in x, U, b and W of the steps from ``first`` on, and what these send on to those before."""
            words, waits = sweep._replace(first=first), sweep.inverse == "jacobian"
            grad_h, grad_last, carried, through = sources
            if projection is None:
                grad_x, carried, through = op("rnn_bwd", waits=waits)(
                    grad_h, grad_last, h, weight, feedback, carried, through, x, start, *words, backend
                )
                gradients = [grad_x, None, None, _weight_gradient(grad_x, h, start) if needs_weight else None]
            else:
                *gradients, carried, through = op("rnn_layer_bwd", waits=waits)(
                    *(grad_h, grad_last, x, projection, bias, h, weight, start, feedback, carried, through),
                    *(*words, needs_x, needs_projection or needs_bias, needs_weight, backend),
                )
                gradients = list(gradients)  # torch.compile of torch 2.11 makes a tuple of it
            return gradients, carried if sweep.inverse != "none" else None, through if sweep.update == "total" else None

        if ctx.checkpoint_every is None:
            gradients, carried, through = gradients_of(0, kept, h0, x, grad_h, grad_last, None, None)
            carried = carried if first_displacement is None else first_displacement
        else:
            gradients, carried, through = None, None, None
            grad_x = torch.empty_like(x) if needs_x else None
            for i in reversed(range(kept.shape[0])):
                first = i * ctx.checkpoint_every
                steps = slice(first, first + ctx.checkpoint_every)
                start = kept[i - 1] if i else h0
                choice = sweep.nonlinearity, backend, sweep.inverse
                h = _states(x[steps], projection, bias, weight, start, *choice)
                grad = None if grad_h is None else grad_h[steps]
                part, carried, through = gradients_of(first, h, start, x[steps], grad, grad_last, carried, through)
                grad_last = None  # the last state is the last chunk's
                if needs_x:
                    grad_x[steps] = part[0]
                part[0] = None
                gradients = part if gradients is None else [_add(a, b) for a, b in zip(gradients, part, strict=True)]
            gradients[0] = grad_x
        gradients.append(through if sweep.update == "total" else carried)  # of the first state
        needed = ctx.needs_input_grad[:5]
        return (*(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), *[None] * 8)


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return None if total is None else total.add_(part)


def rnn_layer(
    x: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    h0: Tensor | None,
    *,
    feedback: Tensor | None = None,
    nonlinearity: str,
    rule: Rule | None,
    checkpoint_every: int | None,
    return_sequence: bool,
    displacements: str = "auto",
    backend: str,
) -> tuple[Tensor | None, Tensor]:
    """All states (``None`` without ``return_sequence``) and the last one, from arguments that have been checked.

    The last state is an output of its own, so that its gradient needs no zero-filled [T, B, N].
    """
    power = rule.power if isinstance(rule, TargetProp) else None
    sweep = Sweep.of(rule, nonlinearity)
    trained = (tensor for tensor in (x, projection, bias, weight, h0) if tensor is not None)
    needs_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    return RNNFunction.apply(
        *(x, projection, bias, weight, h0, feedback, checkpoint_every, return_sequence, displacements, power, sweep),
        *(backend, needs_backward),
    )


def rnn(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    feedback: Tensor | None = None,
    nonlinearity: str = "tanh",
    rule: Rule | None = None,
    checkpoint_every: int | None = None,
    displacements: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """States of an Elman recurrent layer over a whole sequence, with the rule's gradients.

    ``h_t = a(u_t + h_{t-1} Wᵀ)`` for t = 1 … T. What backward returns is the rule's: ``TargetProp`` sends targets
    back through regularized inverses, ``BackProp`` gradients through transposes. With heads, H independent layers
    run in one call.

    Args:
        u: [T, B, N] or, with heads, [T, B, H, N], floating point, any strides: the input's share of the
            pre-activation, ``x_t Uᵀ + b``. The "cpu" back-end takes float32 and float64.
        weight: [N, N] or [H, N, N], W, in the dtype and on the device of ``u``.
        h0: [B, N] or [B, H, N], the first state. ``None`` is zero.
        feedback: like ``weight``, a fixed matrix in place of the rule's inverse P, as a control of what P itself
            contributes; no gradient reaches it. ``None`` is P.
        nonlinearity: "tanh", "relu" or "identity".
        rule: ``TargetProp(...)`` or ``BackProp()``. ``None`` is ``TargetProp()``.
        checkpoint_every: k >= 1: keep u and every k-th state for backward, and compute the other states again, to the
            same bits. ``None`` keeps all states. Saves memory where u is at hand anyway and h is not kept.
        displacements: of ``inverse="weight"``: "sweep", step by step with the rest of backward; "parallel", all at once
            by about log₂T large products; or "auto", which measures faster. "parallel" excludes checkpoints.
        backend: "auto", "reference", "cpu", "triton" or "cuda": what runs the recurrence. P comes from the same one
            where that has a ``regularized_inverse``, else from its "auto".

    Returns:
        h: all states h_1 … h_T, of the shape, dtype and device of ``u``.

    Raises:
        TypeError: an argument of another kind or dtype than stated.
        ValueError: a shape, device or word other than stated, T = 0, or ``feedback`` with a rule that has no P.
        BackendUnavailableError: a back-end asked for by name that cannot run this call, or, where gradients are
            needed, the rule's backward pass.
        torch.linalg.LinAlgError: in backward, a Gram matrix of ``weight`` is not numerically positive definite (on
            the CPU; elsewhere nothing waits for that, and gradients are NaN), or a solve of ``inverse="jacobian"``
            does not come down to the rule's rtol.

    Source: Roulet and Harchaoui, "Target Propagation via Regularized Inversion", arXiv 2112.01453.

    Example:
        >>> import torch, tp_kernels as tp
        >>> _ = torch.manual_seed(0)
        >>> u = torch.randn(5, 2, 3, requires_grad=True)
        >>> weight = torch.eye(3, requires_grad=True)
        >>> h = tp.rnn(u, weight, rule=tp.TargetProp())
        >>> h[-1].sum().backward()
        >>> h.shape, weight.grad.shape
        (torch.Size([5, 2, 3]), torch.Size([3, 3]))
    """
    rule = resolve("rnn", rule)
    _validate.rnn(u, weight, h0, feedback, nonlinearity, rule, checkpoint_every, backend)
    _validate.displacements("rnn", displacements, rule, checkpoint_every)
    return rnn_layer(
        *(u, None, None, weight, h0),
        feedback=feedback,
        nonlinearity=nonlinearity,
        rule=rule,
        checkpoint_every=checkpoint_every,
        return_sequence=True,
        displacements=displacements,
        backend=backend,
    )[0]
