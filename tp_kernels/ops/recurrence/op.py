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
from tp_kernels._library import dispatches_to_nobody, find_op, register
from tp_kernels.ops.recurrence import cpu, cuda, parallel, reference, triton_blocks
from tp_kernels.ops.recurrence.cell import CELLS, Cell
from tp_kernels.ops.recurrence.feedback import feedback_of
from tp_kernels.ops.recurrence.launch import forward_outputs
from tp_kernels.ops.recurrence.state import new_relay
from tp_kernels.rules import WITHOUT_INVERSE, Rule, Sweep

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


class Call(NamedTuple):
    """The parameters of one call, forward or backward, and the back-end that was chosen for it."""

    cell: Cell
    chosen: Backend
    weight_ih: Tensor | None
    bias_ih: Tensor | None
    weight_hh: Tensor
    bias_hh: Tensor | None

    @classmethod
    def of(
        cls,
        cell_name: str,
        x: Tensor,
        weight_ih: Tensor | None,
        bias_ih: Tensor | None,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        sweep: Sweep,
        backend: str,
    ) -> "Call":
        cell = CELLS[cell_name]
        chosen = backends(cell.op).resolve(backend, x, size=weight_hh.shape[-1], sweep=sweep)
        return cls(cell, chosen, weight_ih, bias_ih, weight_hh, bias_hh)

    def states(self, x: Tensor, start: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        """All states from this one on, and what the cell keeps of each step."""
        cell, run, weight_hh = self.cell, self.chosen.forward, self.weight_hh
        if self.weight_ih is None:
            return run(cell, x, weight_hh, self.bias_hh, start, keep=keep)
        input_bias, bias = cell.biases(self.bias_ih, self.bias_hh)
        if self.chosen.fuses_projection(cell, x, weight_hh.shape[-1]):
            projection = self.weight_ih
            return run(cell, x, weight_hh, bias, start, keep=keep, projection=projection, input_bias=input_bias)
        chunks = _chunks(x.device, x.shape[0], x.shape[1], weight_hh.shape[-2])
        if len(chunks) == 1:
            return run(cell, functional.linear(x, self.weight_ih, input_bias), weight_hh, bias, start, keep=keep)
        h, kept = forward_outputs(cell, x, weight_hh, keep)
        for steps in chunks:
            u, out = functional.linear(x[steps], self.weight_ih, input_bias), (h[steps], _cut(kept, steps))
            run(cell, u, weight_hh, bias, start, keep=keep, out=out)
            start = h[steps.stop - 1]
        return h, kept

    def projected(self, x: Tensor) -> Tensor:
        """u, the input's share."""
        if self.weight_ih is None:
            return x
        return functional.linear(x, self.weight_ih, self.cell.biases(self.bias_ih, self.bias_hh)[0])


def _cut(tensor: Tensor | None, steps: slice) -> Tensor | None:
    """The tensor's part of those steps."""
    return tensor if tensor is None or steps == slice(0, tensor.shape[0]) else tensor[steps]


def _forward(
    cell_name: str,
    x: Tensor,
    weight_ih: Tensor | None,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    start: Tensor | None,
    every: int | None,
    sequence: bool,
    keep: bool,
    inverse: str,
    backend: str,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """The states, ``None`` without ``sequence``; the last of them; with ``every=k`` every k-th of them, and the last;
    and without it what the cell keeps for backward.

    The back-end is the one that a backward pass with this inverse resolves to ("none", which every back-end has, is
    also that of a call without gradients). So it fails here, at the user's call, where the back-end asked for could
    not do backward.
    """
    call = Call.of(cell_name, x, weight_ih, bias_ih, weight_hh, bias_hh, Sweep(inverse), backend)
    start = _state(start, x)
    if every is None:
        h, kept = call.states(x, start, keep)
        return h, _last(h, weight_ih), None, kept
    T = x.shape[0]
    h = x.new_empty((*x.shape[:-1], weight_hh.shape[-1])) if sequence else None
    ends = []
    for first in range(0, T, every):
        steps = slice(first, min(first + every, T))
        part, _ = call.states(x[steps], start, False)
        start = part[-1]
        ends.append(start)
        if sequence:
            h[steps] = part
    ends = torch.stack(ends)
    return h, _last(ends, weight_ih), ends, None


def _state(start: Tensor | None, x: Tensor) -> Tensor | None:
    """[B, N] or [B, H, N] of a first state, which layers have as [1, B, N]."""
    return start[0] if start is not None and start.dim() == x.dim() else start


def _last(h: Tensor, weight_ih: Tensor | None) -> Tensor:
    """The last state, of its own memory, [B, N] or [B, H, N]; of a layer [1, B, N]."""
    return h[-1].clone() if weight_ih is None else h[-1:].clone()


def _fake_forward(
    cell_name: str,
    x: Tensor,
    weight_ih: Tensor | None,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    start: Tensor | None,
    every: int | None,
    sequence: bool,
    keep: bool,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, kept = forward_outputs(CELLS[cell_name], x, weight_hh, keep and every is None)
    last = h.new_empty(h.shape[1:] if weight_ih is None else (1, *h.shape[1:]))
    if every is None:
        return h, last, h.new_empty(0), h.new_empty(0) if kept is None else kept
    ends = h.new_empty(((x.shape[0] + every - 1) // every, *h.shape[1:]))
    return h if sequence else h.new_empty(0), last, ends, h.new_empty(0)


def _backward(
    cell_name: str,
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor | None,
    weight_ih: Tensor | None,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    start: Tensor | None,
    states: Tensor,
    kept: Tensor | None,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    every: int | None,
    needs_x: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    words: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients in x, W_ih and its bias, W_hh and its bias, ``None`` where they are not needed; and what the first step
    sends on to those before it.
    """
    sweep = Sweep.parse(words)
    call = Call.of(cell_name, states, weight_ih, bias_ih, weight_hh, bias_hh, sweep, backend)
    cell, projects = call.cell, weight_ih is not None
    T, B, N = (states if every is None else x).shape[0], states.shape[1], states.shape[-1]
    at_once = not projects and every is None  # then the gradient in x is what the sweep itself gives
    gradients = _gradients(cell, weight_ih, states, T, needs_x and not at_once, needs_input, needs_weight)
    start, grad_last = _state(start, states), _state(grad_last, states)
    anew = True  # nothing has been summed up yet
    for first in reversed(range(0, T, T if every is None else every)):
        h, before = states, start
        if every is not None:
            before = states[first // every - 1] if first else start
            h, kept = call.states(x[first : first + every], before, True)
        for steps in reversed(_chunks(h.device, len(h), B, cell.gates * N) if projects else [slice(0, len(h))]):
            here = slice(first + steps.start, first + steps.stop)
            x_here, of_steps = _cut(x, here), _cut(kept, steps)
            grad_u, carried, through = call.chosen.backward(
                cell,
                sweep,
                grad_h=_cut(grad_h, here),
                grad_last=grad_last if here.stop == T else None,
                h=_cut(h, steps),
                kept=of_steps,
                weight=weight_hh,
                feedback=feedback,
                carried=carried,
                through=through,
                u=call.projected(x_here) if sweep.inverse == "direct" and x is not None else None,
                start=h[steps.start - 1] if steps.start else before,
                first=here.start,
            )
            delta = grad_u.flatten(0, 1) if projects else grad_u
            if projects and needs_x:
                torch.mm(delta, weight_ih, out=_cut(gradients.x, here).flatten(0, 1))
            elif needs_x and at_once:
                gradients = gradients._replace(x=grad_u)
            elif needs_x:
                gradients.x[here] = grad_u
            if needs_input:
                _accumulate(gradients.weight_ih, delta.mT, x_here.flatten(0, 1), anew)
                gradients = gradients._replace(bias_ih=_sum(gradients.bias_ih, delta.sum(0)))
            if needs_weight or needs_bias:
                into = cell.into(grad_u, of_steps, in_place=projects)
                if needs_weight:
                    _weight_gradient(gradients.weight_hh, into, h, steps, before, anew)
                if needs_bias:  # without a projection the cell's own only, which is the last part's
                    part = into[-1].sum((0, 1))
                    gradients = gradients._replace(bias_hh=_sum(gradients.bias_hh, part))
            anew = False
    return *gradients, carried, through


class _Gradients(NamedTuple):
    """One for each, or the shape of each."""

    x: Any
    weight_ih: Any
    bias_ih: Any
    weight_hh: Any
    bias_hh: Any


def _gradients(
    cell: Cell,
    weight_ih: Tensor | None,
    states: Tensor,
    T: int,
    needs_x: bool,
    needs_input: bool,
    needs_weight: bool,
) -> _Gradients:
    """Memory for those that are summed up in place."""
    shapes = _gradient_shapes(cell, weight_ih, states, T)
    return _Gradients(
        x=states.new_empty(shapes.x) if needs_x else None,
        weight_ih=states.new_empty(shapes.weight_ih) if needs_input else None,
        bias_ih=None,
        weight_hh=states.new_empty(shapes.weight_hh) if needs_weight else None,
        bias_hh=None,
    )


def _gradient_shapes(cell: Cell, weight_ih: Tensor | None, states: Tensor, T: int) -> _Gradients:
    """The shape of each gradient. Without W_ih x is u, and the bias the cell's own."""
    B, *heads, N = states.shape[1:]
    rows = cell.gates * N
    width = rows if weight_ih is None else weight_ih.shape[1]
    return _Gradients(
        x=(T, B, *heads, width),
        weight_ih=(rows, width),
        bias_ih=(rows,),
        weight_hh=(*heads, rows, N),
        bias_hh=(*heads, N) if weight_ih is None else (rows,),
    )


def _accumulate(total: Tensor, left: Tensor, right: Tensor, anew: bool) -> None:
    """``total += left · right``, or ``=``; a product for each head where there are heads."""
    product = torch.addmm if total.dim() == 2 else torch.baddbmm
    product(total, left, right, beta=0 if anew else 1, out=total)


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _weight_gradient(
    total: Tensor, into: list[Tensor], h: Tensor, steps: slice, start: Tensor | None, anew: bool
) -> None:
    """``∂W = Σ_t into_tᵀ h_{t-1}`` over those steps, one large product for each part; the state before the first is
    zero where there is none.
    """
    several = len(into) > 1
    blocks = total.split([part.shape[-1] for part in into], dim=-2) if several else [total]
    for rows, part in zip(blocks, into, strict=True):
        if steps.start:
            states = h[steps.start - 1 : steps.stop - 1]
            _accumulate(rows, *_by_head(part.flatten(0, 1), states.flatten(0, 1)), anew=anew)
            continue
        # Some of the rows of a matrix need not lie as a library's product would have them: it may round otherwise.
        product = torch.empty_like(rows) if several or not anew else rows
        _accumulate(product, *_by_head(part[1:].flatten(0, 1), h[: steps.stop - 1].flatten(0, 1)), anew=True)
        if start is not None:
            _accumulate(product, *_by_head(part[0], start), anew=False)
        if product is not rows:
            rows.copy_(product) if anew else rows.add_(product)


def _by_head(into: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of ``intoᵀ · states``, [·, N] or [·, H, N] both, for each head by itself."""
    return (into.mT, states) if into.dim() == 2 else (into.permute(1, 2, 0), states.transpose(0, 1))


def _fake_backward(
    cell_name: str,
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor | None,
    weight_ih: Tensor | None,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    start: Tensor | None,
    states: Tensor,
    kept: Tensor | None,
    feedback: Tensor | None,
    carried: Tensor | None,
    through: Tensor | None,
    every: int | None,
    needs_x: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    words: str,
    backend: str,
) -> tuple[Tensor, ...]:
    sweep, T = Sweep.parse(words), (states if every is None else x).shape[0]
    gradients = _gradient_shapes(CELLS[cell_name], weight_ih, states, T)
    needed = needs_x, needs_input, needs_input, needs_weight, needs_bias
    sent = (states.shape[1:], sweep.inverse != "none"), (states.shape[1:], sweep.update == "total")
    shapes = (*zip(gradients, needed, strict=True), *sent)
    return tuple(states.new_empty(shape if needed else (0,)) for shape, needed in shapes)


_run_forward = register(
    "recurrence_fwd(str cell, Tensor x, Tensor? weight_ih, Tensor? bias_ih, Tensor weight_hh, Tensor? bias_hh, "
    "Tensor? start, SymInt? every, bool sequence, bool keep, str inverse, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_run_backward = register(
    "recurrence_bwd(str cell, Tensor? grad_h, Tensor? grad_last, Tensor? x, Tensor? weight_ih, Tensor? bias_ih, "
    "Tensor weight_hh, Tensor? bias_hh, Tensor? start, Tensor states, Tensor? kept, Tensor? feedback, Tensor? carried, "
    "Tensor? through, SymInt? every, bool needs_x, bool needs_input, bool needs_weight, bool needs_bias, str words, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
        batch_first: whether x and the states are [B, T, ·].
        checkpoint_every, return_sequence, displacements, backend: as in the public functions.
        needs_backward: whether gradients will be asked for.
    """

    cell: str
    sweep: Sweep
    words: str
    batch_first: bool
    checkpoint_every: int | None
    return_sequence: bool
    displacements: str
    backend: str
    needs_backward: bool


class RecurrenceFunction(torch.autograd.Function):
    """A whole layer, input projection included where there is one: ``u = x W_ihᵀ + b``, or ``u = x``.

    Without checkpoints forward keeps all states and what the cell keeps, and nothing else but its inputs. With
    ``checkpoint_every=k`` it keeps every k-th; backward computes the others again, k steps at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor | None,
        bias_ih: Tensor | None,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        start: Tensor | None,
        feedback: Tensor | None,
        relay: Tensor | None,
        options: Options,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        every, needs_backward = options.checkpoint_every, options.needs_backward
        # Without gradients any back-end will do that has the forward pass.
        inverse = options.sweep.inverse if needs_backward else "none"
        x = x.transpose(0, 1) if options.batch_first else x
        run = _run_forward if dispatches_to_nobody(x) else torch.ops.tp_kernels.recurrence_fwd
        h, last, ends, kept = run(
            options.cell,
            x,
            weight_ih,
            bias_ih,
            weight_hh,
            bias_hh,
            start,
            every,
            options.return_sequence,
            needs_backward,
            inverse,
            options.backend,
        )
        needs_x = weight_ih is not None or every is not None or inverse == "direct"
        states = h if every is None else ends
        if options.batch_first and options.return_sequence:  # a tensor of its own, not a view: it may be detached
            h = h.detach().transpose_(0, 1)
        if needs_backward:
            x, kept = x if needs_x else None, kept if every is None else None
            ctx.save_for_backward(x, weight_ih, bias_ih, weight_hh, bias_hh, start, feedback, states, kept)
            ctx.set_materialize_grads(False)
            ctx.options = options
        carries = needs_backward and options.sweep.inverse != "none"
        return h if options.return_sequence else None, last, new_relay(_state(last, states)) if carries else None

    @staticmethod
    @first_derivatives_only
    def backward(
        ctx: Any, saved: tuple, grad_h: Tensor | None, grad_last: Tensor | None, grad_relay: Tensor | None
    ) -> tuple:
        if grad_h is None and grad_last is None and grad_relay is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight_ih, bias_ih, weight_hh, bias_hh, start, feedback, states, kept = saved
        options: Options = ctx.options
        cell, sweep, words, every = options.cell, options.sweep, options.words, options.checkpoint_every
        needs_x, needs_weight_ih, needs_bias_ih, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        if grad_h is not None and options.batch_first:
            grad_h = grad_h.transpose(0, 1)
        if feedback is None and sweep.uses_inverse:
            feedback = feedback_of(weight_hh, CELLS[cell], sweep, words, options.backend)
        carried, through = (None, None) if grad_relay is None else grad_relay.unbind()
        first_displacement = None
        if options.displacements == "parallel" or (
            options.displacements == "auto"
            and sweep.inverse == "weight"
            and "weight" in CELLS[cell].without_states
            and every is None
            and parallel.worth_it(grad_h, states)
        ):
            grad_last = None if grad_last is None else _state(grad_last, states)
            if carried is not None:  # a source like any other, but for γ
                grad_last = carried / sweep.step if grad_last is None else grad_last + carried / sweep.step
            grad_h, first_displacement = torch.ops.tp_kernels.recurrence_displacements(
                grad_h, grad_last, states, feedback, sweep.step
            )
            grad_last, sweep = None, Sweep("none", sweep.update)
            words = WITHOUT_INVERSE[sweep.update]
        run = _run_backward
        if not dispatches_to_nobody(grad_h, grad_last, grad_relay):
            run = find_op("recurrence_bwd", waits=sweep.inverse == "jacobian")
        *gradients, carried, through = run(
            cell,
            grad_h,
            grad_last,
            x,
            weight_ih,
            bias_ih,
            weight_hh,
            bias_hh,
            start,
            states,
            kept,
            feedback,
            carried,
            through,
            every,
            needs_x,
            needs_weight_ih or needs_bias_ih,
            needs_weight,
            needs_bias,
            words,
            options.backend,
        )
        if needs_x and options.batch_first:
            gradients[0] = gradients[0].transpose(0, 1)
        carried = first_displacement if sweep.inverse == "none" else carried
        through = None if sweep.update == "local" else through
        sent = carried if through is None else through
        needs_start, needs_relay = ctx.needs_input_grad[5], ctx.needs_input_grad[7]
        gradients.append(sent if start is None else sent.view(start.shape))
        needed = (*ctx.needs_input_grad[:5], needs_start and not needs_relay)
        found = [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
        relayed = None
        if needs_relay:  # the call before gets both, and the state itself no gradient
            nothing = torch.zeros_like(sent)
            relayed = torch.stack([nothing if part is None else part for part in (carried, through)])
        return *found, None, relayed, None  # none in feedback and options


def recurrent_layer(
    cell: str,
    x: Tensor,
    weight_hh: Tensor,
    start: Tensor | None,
    *,
    weight_ih: Tensor | None = None,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    feedback: Tensor | None = None,
    relay: Tensor | None = None,
    rule: Rule,
    batch_first: bool = False,
    checkpoint_every: int | None = None,
    return_sequence: bool = True,
    displacements: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """All states (``None`` without ``return_sequence``), the last one and its relay (``state.py``), from arguments that
    have been checked.

    The last state is an output of its own, so that its gradient needs no zero-filled [T, B, N]. With ``weight_ih``
    first and last states are [1, B, N], as layers have them, and ``bias_hh`` is [G N]; without, it is the cell's own.
    """
    trained = (x, weight_hh, start, weight_ih, bias_ih, bias_hh)
    options = Options(
        cell=cell,
        sweep=Sweep.of(rule),
        words=rule.words,
        batch_first=batch_first,
        checkpoint_every=checkpoint_every,
        return_sequence=return_sequence,
        displacements=displacements,
        backend=backend,
        needs_backward=torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in trained),
    )
    return RecurrenceFunction.apply(x, weight_ih, bias_ih, weight_hh, bias_hh, start, feedback, relay, options)


def solver_iterations(
    cell: Cell, sweep: Sweep, *, grad_h: Tensor | None, h: Tensor, backend: str, **tensors: Tensor | None
) -> Tensor:
    """How many iterations each solve of "jacobian" took in the sweep of ``reference.backward``: [T, B(, H)], int32."""
    iterations = h.new_zeros(h.shape[:-1], dtype=torch.int32)
    chosen = backends(cell.op).resolve(backend, h, size=h.shape[-1], sweep=sweep)
    chosen.backward(cell, sweep, grad_h=grad_h, h=h, iterations=iterations, **tensors)
    return iterations
