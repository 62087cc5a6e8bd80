"""The recurrence of every cell over a whole sequence, with targets or gradients sent back through time.

Here are its back-ends, its pair of ops, ``recurrence_fwd`` and ``recurrence_bwd``, and its autograd Function. A cell is
handed to them by name (``cell.py``); the public functions are in the folders of the cells. ``feedback.py`` has the
matrix that carries displacements back.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tp_kernels import _native, _triton
from tp_kernels._autograd import first_derivatives_only
from tp_kernels._backends import Backend, BackendTable
from tp_kernels._library import find_op, register
from tp_kernels.ops.recurrence import cpu, cuda, parallel, reference, triton_blocks
from tp_kernels.ops.recurrence.cell import CELLS, Cell
from tp_kernels.ops.recurrence.launch import forward_outputs, sent_outputs
from tp_kernels.rules import Rule, Sweep, TargetProp

# --- back-ends


def _triton_forward(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from tp_kernels.ops.recurrence import triton_kernel  # imports triton, which need not be there

    return triton_kernel.forward(*arguments, **options)


def _triton_backward(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    from tp_kernels.ops.recurrence import triton_kernel

    return triton_kernel.backward(*arguments, **options)


_BACKENDS = {
    "reference": Backend(reference.forward, reference.backward),
    "cpu": Backend(
        cpu.forward,
        cpu.backward,
        _native.cpu_available,
        _native.cpu_supports,
        fuses_projection=cpu.fuses_projection,
    ),
    "triton": Backend(_triton_forward, _triton_backward, _triton.available, triton_blocks.supports),
    # Opt-in, until it has run on a GPU.
    "cuda": Backend(cuda.forward, cuda.backward, _native.cuda_available, cuda.supports),
}
_ONLY = {"triton": ("rnn",), "cuda": ("rnn",)}
"""The ops that a back-end has kernels for; one that is not named has all."""


@functools.cache
def backends(op: str) -> BackendTable:
    """Of "rnn" or "gru". ``resolve`` is told what support depends on: ``size``, N, and ``sweep``, of the backward
    pass.
    """
    there = {name: backend for name, backend in _BACKENDS.items() if op in _ONLY.get(name, (op,))}
    on_cuda = tuple(name for name in ("triton", "reference") if name in there)
    return BackendTable(op, there, {"cpu": ("cpu", "reference"), "cuda": on_cuda})


# --- ops


def _chunks(device: torch.device, T: int, B: int, width: int) -> list[slice]:
    """Steps that are projected, swept and summed up together: their arrays stay in the second-level cache (a megabyte
    in float32), but for rows enough that packing the weights anew for each chunk does not show. A GPU takes the whole
    sequence: each launch reads the matrices anew, and waits for the one before.
    """
    steps = max(1, max(2048, 2**18 // width) // max(1, B)) if device.type == "cpu" else T
    return [slice(first, min(first + steps, T)) for first in range(0, T, steps)]


def _forward(
    cell_name: str,
    x: Tensor,
    projection: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    keep: bool,
    inverse: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The states, the last of them once more, and what the cell keeps for backward.

    The back-end is the one that a backward pass with this inverse resolves to ("none", which every back-end has, is
    also that of a call without gradients). So it fails here, at the user's call, where the back-end asked for could
    not do backward.
    """
    cell, N = CELLS[cell_name], weight.shape[-1]
    chosen = backends(cell.op).resolve(backend, x, size=N, sweep=Sweep(inverse))
    if projection is None:
        h, kept = chosen.forward(cell, x, weight, bias, start, keep=keep)
    elif chosen.fuses_projection(cell, x, N):
        h, kept = chosen.forward(cell, x, weight, bias, start, keep=keep, projection=projection, input_bias=input_bias)
    else:
        h, kept = forward_outputs(cell, x, weight, keep)
        for steps in _chunks(x.device, x.shape[0], x.shape[1], cell.gates * N):
            u = functional.linear(x[steps], projection, input_bias)
            out = h[steps], kept[steps] if kept.dim() > 1 else kept
            chosen.forward(cell, u, weight, bias, start, keep=keep, out=out)
            start = h[steps.stop - 1]
    return h, h[-1].clone(), kept


def _fake_forward(
    cell_name: str,
    x: Tensor,
    projection: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    keep: bool,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    h, kept = forward_outputs(CELLS[cell_name], x, weight, keep)
    return h, h.new_empty(h.shape[1:]), kept


def _backward(
    cell_name: str,
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor | None,
    projection: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor,
    start: Tensor | None,
    h: Tensor,
    kept: Tensor,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    needs_x: bool,
    needs_projection: bool,
    needs_weight: bool,
    needs_bias: bool,
    words: str,
    first: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients in x, U and its bias, W and the cell's own bias, empty where they are not needed; and what the first
    step sends on to those before it.
    """
    cell, sweep = CELLS[cell_name], Sweep.parse(words)
    chosen = backends(cell.op).resolve(backend, h, size=h.shape[-1], sweep=sweep)
    gradients = _gradients(cell, x, projection, h, needs_x, needs_projection, needs_weight, needs_bias)
    T, B, width = h.shape[0], h.shape[1], cell.gates * h.shape[-1]
    chunks = [slice(0, T)] if projection is None else _chunks(h.device, T, B, width)
    for steps in reversed(chunks):
        last = steps is chunks[-1]
        before = h[steps.start - 1] if steps.start else start
        of_steps = kept[steps] if kept.dim() > 1 else kept
        u = x if projection is None else None
        if projection is not None and sweep.inverse == "direct":
            u = functional.linear(x[steps], projection, input_bias)
        grad_u, carried, through = chosen.backward(
            cell,
            sweep,
            grad_h=None if grad_h is None else grad_h[steps],
            grad_last=grad_last if last else None,
            h=h[steps],
            kept=of_steps,
            weight=weight,
            feedback=feedback,
            carried=carried,
            through=through,
            u=u,
            start=before,
            first=first + steps.start,
        )
        if projection is None:
            gradients = gradients._replace(x=grad_u)
        elif needs_x:
            gradients.x[steps] = grad_u @ projection
        if needs_projection:
            delta = grad_u.flatten(0, 1)
            _accumulate(gradients.projection, delta.mT, x[steps].flatten(0, 1), anew=last)
            _add(gradients.input_bias, delta.sum(0), anew=last)
        if needs_weight or needs_bias:
            into = cell.into(grad_u, of_steps)
            if needs_weight:
                _weight_gradient(gradients.weight, into, h, steps, start, anew=last)
            if needs_bias:
                _add(gradients.bias, cell.bias_gradient(into), anew=last)
        carried = None if sweep.inverse == "none" else carried
        through = None if sweep.update == "local" else through
    nothing = h.new_empty(0)
    return *gradients, nothing if carried is None else carried, nothing if through is None else through


class _Gradients(NamedTuple):
    x: Tensor
    projection: Tensor
    input_bias: Tensor
    weight: Tensor
    bias: Tensor


def _gradients(
    cell: Cell,
    x: Tensor | None,
    projection: Tensor | None,
    h: Tensor,
    needs_x: bool,
    needs_projection: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> _Gradients:
    """Memory for them. Without a projection x is u, and its gradient what the sweep itself gives."""
    *heads, N = h.shape[2:]
    rows = cell.gates * N
    return _Gradients(
        x=h.new_empty(x.shape if needs_x and projection is not None else (0,)),
        projection=h.new_empty(projection.shape if needs_projection else (0,)),
        input_bias=h.new_empty((rows,) if needs_projection else (0,)),
        weight=h.new_empty((*heads, rows, N) if needs_weight else (0,)),
        bias=h.new_empty((*heads, N) if needs_bias else (0,)),
    )


def _accumulate(total: Tensor, left: Tensor, right: Tensor, anew: bool) -> None:
    """``total += left · right``, or ``=``; a product for each head where there are heads."""
    product = torch.addmm if total.dim() == 2 else torch.baddbmm
    product(total, left, right, beta=0 if anew else 1, out=total)


def _add(total: Tensor, part: Tensor, anew: bool) -> None:
    total.copy_(part) if anew else total.add_(part)


def _weight_gradient(
    total: Tensor, into: list[Tensor], h: Tensor, steps: slice, start: Tensor | None, anew: bool
) -> None:
    """``∂W = Σ_t into_tᵀ h_{t-1}`` over those steps, one large product for each part; the state before the first is
    zero where there is none.
    """
    for rows, part in zip(total.split([part.shape[-1] for part in into], dim=-2), into, strict=True):
        if steps.start:
            states = h[steps.start - 1 : steps.stop - 1]
            _accumulate(rows, *_by_head(part.flatten(0, 1), states.flatten(0, 1)), anew=anew)
            continue
        # Some of the rows of a matrix need not lie as a library's product would have them: it may round otherwise.
        product = rows if anew and rows.shape == total.shape else torch.empty_like(rows)
        _accumulate(product, *_by_head(part[1:].flatten(0, 1), h[: steps.stop - 1].flatten(0, 1)), anew=True)
        if start is not None:
            _accumulate(product, *_by_head(part[0], start), anew=False)
        if product is not rows:
            _add(rows, product, anew=anew)


def _by_head(into: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of ``intoᵀ · states``, [·, N] or [·, H, N] both, for each head by itself."""
    return (into.mT, states) if into.dim() == 2 else (into.permute(1, 2, 0), states.transpose(0, 1))


def _fake_backward(
    cell_name: str,
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor | None,
    projection: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor,
    start: Tensor | None,
    h: Tensor,
    kept: Tensor,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    needs_x: bool,
    needs_projection: bool,
    needs_weight: bool,
    needs_bias: bool,
    words: str,
    first: int,
    backend: str,
) -> tuple[Tensor, ...]:
    cell, sweep = CELLS[cell_name], Sweep.parse(words)
    gradients = _gradients(cell, x, projection, h, needs_x, needs_projection, needs_weight, needs_bias)
    if projection is None:
        gradients = gradients._replace(x=h.new_empty((*h.shape[:-1], cell.gates * h.shape[-1])))
    return *gradients, *sent_outputs(h, sweep)


register(
    "recurrence_fwd(str cell, Tensor x, Tensor? projection, Tensor? input_bias, Tensor weight, Tensor? bias, "
    "Tensor? start, bool keep, str inverse, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
register(
    "recurrence_bwd(str cell, Tensor? grad_h, Tensor? grad_last, Tensor? x, Tensor? projection, Tensor? input_bias, "
    "Tensor weight, Tensor? start, Tensor h, Tensor kept, Tensor? feedback, Tensor? carried, Tensor? through, "
    "bool needs_x, bool needs_projection, bool needs_weight, bool needs_bias, str words, SymInt first, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    twin=True,  # "jacobian" reads its residuals
)


# --- autograd


class Options(NamedTuple):
    """What a call is told beside its tensors.

    Attributes:
        cell: its name.
        sweep, words: the rule, and the same for an op.
        power: of P; ``None`` for a rule without.
        checkpoint_every, return_sequence, displacements, backend: as in the public functions.
        needs_backward: whether gradients will be asked for.
    """

    cell: str
    sweep: Sweep
    words: str
    power: float | None
    checkpoint_every: int | None
    return_sequence: bool
    displacements: str
    backend: str
    needs_backward: bool


class RecurrenceFunction(torch.autograd.Function):
    """A whole layer, input projection included where there is one: ``u = x Uᵀ + b``, or ``u = x``.

    Without checkpoints forward keeps all states and what the cell keeps, and nothing else but its inputs. With
    ``checkpoint_every=k`` it keeps every k-th state; backward computes the others again, k steps at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projection: Tensor | None,
        input_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        start: Tensor | None,
        feedback: Tensor | None,
        options: Options,
    ) -> tuple[Tensor | None, Tensor]:
        every, inverse = options.checkpoint_every, options.sweep.inverse
        # Without gradients any back-end will do that has the forward pass.
        inverse = inverse if options.needs_backward else "none"

        def states(x: Tensor, start: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
            return torch.ops.tp_kernels.recurrence_fwd(
                options.cell, x, projection, input_bias, weight, bias, start, keep, inverse, options.backend
            )

        if every is None:
            sequence, last, kept = states(x, start, options.needs_backward)
            saved = sequence
        else:
            T, N, last, ends, sequence, kept = x.shape[0], weight.shape[-1], start, [], None, None
            if options.return_sequence:
                sequence = x.new_empty((*x.shape[:-1], N))
            for first in range(0, T, every):
                steps = slice(first, first + every)
                h, last, _ = states(x[steps], last, False)
                ends.append(last)
                if options.return_sequence:
                    sequence[steps] = h
            saved = torch.stack(ends)
        needs_x = projection is not None or every is not None or inverse == "direct"
        ctx.save_for_backward(
            x if needs_x else None, projection, input_bias, weight, bias, start, feedback, saved, kept
        )
        ctx.set_materialize_grads(False)
        ctx.options = options
        return sequence if options.return_sequence else None, last

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, saved: tuple, grad_h: Tensor | None, grad_last: Tensor | None) -> tuple:
        x, projection, input_bias, weight, bias, start, feedback, states, kept = saved
        options = ctx.options
        cell, sweep, words, every = options.cell, options.sweep, options.words, options.checkpoint_every
        needs_x, needs_projection, needs_input_bias, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        if feedback is None and sweep.uses_inverse:
            inverted = CELLS[cell].inverted(weight, sweep.inverse)
            feedback = torch.ops.tp_kernels.recurrence_feedback(inverted, sweep.reg, options.power, options.backend)
        first_displacement = None
        if options.displacements == "parallel" or (
            options.displacements == "auto"
            and sweep.inverse == "weight"
            and "weight" in CELLS[cell].without_states
            and every is None
            and parallel.worth_it(grad_h, states)
        ):
            grad_h, first_displacement = torch.ops.tp_kernels.recurrence_displacements(
                grad_h, grad_last, states, feedback, sweep.step
            )
            grad_last, sweep = None, Sweep("none", sweep.update)
            words = sweep.words

        def gradients_of(
            first: int,
            x: Tensor | None,
            start: Tensor | None,
            h: Tensor,
            kept: Tensor,
            grad_h: Tensor | None,
            grad_last: Tensor | None,
            carried: Tensor | None,
            through: Tensor | None,
        ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
            """Gradients of the steps from ``first`` on, and what these send on to those before."""
            *gradients, carried, through = find_op("recurrence_bwd", waits=sweep.inverse == "jacobian")(
                cell,
                grad_h,
                grad_last,
                x,
                projection,
                input_bias,
                weight,
                start,
                h,
                kept,
                feedback,
                carried,
                through,
                needs_x,
                needs_projection or needs_input_bias,
                needs_weight,
                needs_bias,
                words,
                first,
                options.backend,
            )
            gradients = list(gradients)  # torch.compile of torch 2.11 makes a tuple of it
            carried = None if sweep.inverse == "none" else carried
            return gradients, carried, None if sweep.update == "local" else through

        if every is None:
            gradients, carried, through = gradients_of(0, x, start, states, kept, grad_h, grad_last, None, None)
            carried = carried if first_displacement is None else first_displacement
        else:
            gradients, carried, through = None, None, None
            grad_x = torch.empty_like(x) if needs_x else None
            for i in reversed(range(states.shape[0])):
                first = i * every
                steps = slice(first, first + every)
                before = states[i - 1] if i else start
                h, _, kept = torch.ops.tp_kernels.recurrence_fwd(
                    cell, x[steps], projection, input_bias, weight, bias, before, True, sweep.inverse, options.backend
                )
                grad = None if grad_h is None else grad_h[steps]
                part, carried, through = gradients_of(
                    first, x[steps], before, h, kept, grad, grad_last, carried, through
                )
                grad_last = None  # the last state is the last chunk's
                if needs_x:
                    grad_x[steps] = part[0]
                part[0] = None
                gradients = part if gradients is None else [_sum(a, b) for a, b in zip(gradients, part, strict=True)]
            gradients[0] = grad_x
        gradients.append(through if sweep.update == "total" else carried)  # of the first state
        needed = ctx.needs_input_grad[:6]
        found = [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
        return *found, None, None  # none in feedback and options


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return None if total is None else total.add_(part)


def recurrent_layer(
    cell: str,
    x: Tensor,
    weight: Tensor,
    start: Tensor | None,
    *,
    projection: Tensor | None = None,
    input_bias: Tensor | None = None,
    bias: Tensor | None = None,
    feedback: Tensor | None = None,
    rule: Rule,
    checkpoint_every: int | None = None,
    return_sequence: bool = True,
    displacements: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """All states (``None`` without ``return_sequence``) and the last one, from arguments that have been checked.

    The last state is an output of its own, so that its gradient needs no zero-filled [T, B, N].
    """
    trained = (tensor for tensor in (x, projection, input_bias, weight, bias, start) if tensor is not None)
    options = Options(
        cell=cell,
        sweep=Sweep.of(rule),
        words=rule.words,
        power=rule.power if isinstance(rule, TargetProp) else None,
        checkpoint_every=checkpoint_every,
        return_sequence=return_sequence,
        displacements=displacements,
        backend=backend,
        needs_backward=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained),
    )
    return RecurrenceFunction.apply(x, projection, input_bias, weight, bias, start, feedback, options)


def solver_iterations(
    cell: Cell, sweep: Sweep, *, grad_h: Tensor | None, h: Tensor, backend: str, **tensors: Tensor | None
) -> Tensor:
    """How many iterations each solve of "jacobian" took in the sweep of ``reference.backward``: [T, B(, H)], int32."""
    iterations = h.new_zeros(h.shape[:-1], dtype=torch.int32)
    chosen = backends(cell.op).resolve(backend, h, size=h.shape[-1], sweep=sweep)
    chosen.backward(cell, sweep, grad_h=grad_h, h=h, iterations=iterations, **tensors)
    return iterations
