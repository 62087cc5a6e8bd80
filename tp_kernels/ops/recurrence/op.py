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
from tp_kernels._library import differentiates_ops, dispatches_to_nobody, find_op, register
from tp_kernels.ops.recurrence import cpu, cuda, parallel, reference, triton_blocks
from tp_kernels.ops.recurrence.cell import CELLS, Cell
from tp_kernels.ops.recurrence.feedback import feedback_of
from tp_kernels.ops.recurrence.launch import forward_outputs, state_before, state_shape
from tp_kernels.ops.recurrence.state import new_relay
from tp_kernels.ops.recurrence.timeline import Timeline
from tp_kernels.rules import WITHOUT_INVERSE, Rule, Sweep, is_plain_weight, kinds_of

# --- back-ends


def _triton_forward(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor]:
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
        cpu.supports,
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
    """Of "rnn", "gru" or "lstm". ``resolve`` is told what support depends on: ``size``, N, ``sweep``, of the backward
    pass, ``time``, how the sequences lie, and ``cell``.
    """
    there = {name: backend for name, backend in _BACKENDS.items() if op in _ONLY.get(name, (op,))}
    on_cuda = tuple(name for name in ("triton", "reference") if name in there)
    return BackendTable(op, there, {"cpu": ("cpu", "reference"), "cuda": on_cuda})


# --- ops


def _portion(device: torch.device, T: int, B: int, width: int) -> int:
    """How many steps are projected, swept and summed up together: their arrays stay in the second-level cache (a
    megabyte in float32), but for rows enough that packing the weights anew for each portion does not show. A GPU takes
    the whole sequence: each launch reads the matrices anew, and waits for the one before.
    """
    return max(1, max(2048, 2**18 // width) // max(1, B)) if device.type == "cpu" else T


class Call(NamedTuple):
    """The parameters of one call, forward or backward, and the back-end that was chosen for it."""

    cell: Cell
    chosen: Backend
    weight_ih: Tensor | None
    bias_ih: Tensor | None
    weight_hh: Tensor
    bias_hh: Tensor | None
    time: Timeline

    @classmethod
    def of(
        cls,
        cell_name: str,
        x: Tensor,
        weight_ih: Tensor | None,
        bias_ih: Tensor | None,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        time: Timeline,
        sweep: Sweep,
        backend: str,
    ) -> "Call":
        cell = CELLS[cell_name]
        chosen = backends(cell.op).resolve(backend, x, size=weight_hh.shape[-1], sweep=sweep, time=time, cell=cell)
        return cls(cell, chosen, weight_ih, bias_ih, weight_hh, bias_hh, time)

    def states(
        self, x: Tensor, start: Tensor | None, time: Timeline, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """h at all of these steps from the state ``start`` on, what the cell keeps of each, and the last states."""
        cell, run, weight_hh = self.cell, self.chosen.forward, self.weight_hh
        if self.weight_ih is None:
            return run(cell, x, weight_hh, self.bias_hh, start, keep=keep, time=time)
        input_bias, bias = cell.biases(self.bias_ih, self.bias_hh)
        B = x.shape[1] if start is None else start.shape[0]
        if self.chosen.fuses_projection(cell, x, B, weight_hh.shape[-1]):
            projection = self.weight_ih
            return run(
                cell, x, weight_hh, bias, start, keep=keep, time=time, projection=projection, input_bias=input_bias
            )
        length = _portion(x.device, time.T, B, weight_hh.shape[-2])
        if length >= time.T:
            u = functional.linear(x, self.weight_ih, input_bias)
            return run(cell, u, weight_hh, bias, start, keep=keep, time=time)
        h, kept = forward_outputs(cell, x, weight_hh, keep)
        for steps in time.portions(length):
            u = functional.linear(time.cut(x, steps), self.weight_ih, input_bias)
            out = time.cut(h, steps), time.cut(kept, steps)
            _, _, start = run(cell, u, weight_hh, bias, start, keep=keep, time=time.part(steps), out=out)
        return h, kept, start

    def projected(self, x: Tensor) -> Tensor:
        """u, the input's share."""
        if self.weight_ih is None:
            return x
        return functional.linear(x, self.weight_ih, self.cell.biases(self.bias_ih, self.bias_hh)[0])


def _forward(
    cell_name: str,
    x: Tensor,
    weight_ih: Tensor | None,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    start: Tensor | None,
    feedback: Tensor | None,
    relay: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    every: int | None,
    sequence: bool,
    keep: bool,
    displacements: str,
    words: str,
    backend: str,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """h at all steps, ``None`` without ``sequence``; the last states; with ``every=k`` the states after every k-th step
    that is read, and the last; without it what the cell keeps for backward; and the relay of the last states.

    The back-end is the one that a backward pass with this rule resolves to, or without gradients (``keep``) any. So it
    fails here, at the user's call, where the back-end asked for could not do backward. ``feedback``, ``relay`` and
    ``displacements`` are for backward, and not read here.
    """
    time, sweep = Timeline.of(x, batch_sizes, reset, reverse), Sweep.parse(words) if keep else Sweep("none")
    call = Call.of(cell_name, x, weight_ih, bias_ih, weight_hh, bias_hh, time, sweep, backend)
    start = _state(start, weight_ih)
    if every is None:
        h, kept, last = call.states(x, start, time, keep)
        relay = new_relay(last, sweep.kinds) if sweep.inverse != "none" else None
        return h, _of_layer(last, weight_ih), None, kept, relay
    h = x.new_empty((*x.shape[:-1], weight_hh.shape[-1])) if sequence else None
    ends = []
    for steps in time.portions(every):
        part, _, start = call.states(time.cut(x, steps), start, time.part(steps), False)
        ends.append(start)
        if sequence:
            time.cut(h, steps).copy_(part)
    relay = new_relay(start, sweep.kinds) if sweep.inverse != "none" else None
    return h, _of_layer(start.clone(), weight_ih), torch.stack(ends), None, relay


def _state(state: Tensor | None, weight_ih: Tensor | None) -> Tensor | None:
    """[B, S N] or [B, H, S N] of a first or last state, which layers have as [1, B, S N]."""
    return state if state is None or weight_ih is None else state[0]


def _of_layer(last: Tensor, weight_ih: Tensor | None) -> Tensor:
    """The reverse, in place: no view."""
    return last if weight_ih is None else last.unsqueeze_(0)


def _fake_forward(
    cell_name: str,
    x: Tensor,
    weight_ih: Tensor | None,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    start: Tensor | None,
    feedback: Tensor | None,
    relay: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    every: int | None,
    sequence: bool,
    keep: bool,
    displacements: str,
    words: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cell, T = CELLS[cell_name], (x if batch_sizes is None else batch_sizes).shape[0]
    h, kept = forward_outputs(cell, x, weight_hh, keep and every is None)
    state = state_shape(cell, h, _state(start, weight_ih))
    last = h.new_empty(state if weight_ih is None else (1, *state))
    sweep = Sweep.parse(words) if keep else Sweep("none")
    relay = h.new_empty(0) if sweep.inverse == "none" else new_relay(_state(last, weight_ih), sweep.kinds)
    if every is None:
        return h, last, h.new_empty(0), h.new_empty(0) if kept is None else kept, relay
    ends = h.new_empty(((T + every - 1) // every, *state))
    return h if sequence else h.new_empty(0), last, ends, h.new_empty(0), relay


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
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
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
    sweep, steps_of = Sweep.parse(words), states if every is None else x
    time = Timeline.of(steps_of, batch_sizes, reset, reverse)
    call = Call.of(cell_name, states, weight_ih, bias_ih, weight_hh, bias_hh, time, sweep, backend)
    cell, projects = call.cell, weight_ih is not None
    start, grad_last, kept = _state(start, weight_ih), _state(grad_last, weight_ih), kept if cell.kept else None
    B = states.shape[1] if start is None else start.shape[0]
    at_once = not projects and every is None  # then the gradient in x is what the sweep itself gives
    gradients = _gradients(cell, weight_ih, weight_hh, steps_of, needs_x and not at_once, needs_input, needs_weight)
    anew = True  # nothing has been summed up yet
    portions = time.portions(every or time.T)
    for index in reversed(range(len(portions))):
        portion, h, before = portions[index], states, start
        part = time.part(portion)
        if every is not None:
            before = states[index - 1] if index else start
            h, kept, _ = call.states(time.cut(x, portion), before, part, True)
        in_portions = projects and not sweep.chunk
        length = _portion(h.device, part.T, B, cell.gates * weight_hh.shape[-1]) if in_portions else part.T
        for steps in reversed(part.portions(length)):
            here = slice(portion.start + steps.start, portion.start + steps.stop)
            x_here, of_steps, h_here = time.cut(x, here), part.cut(kept, steps), part.cut(h, steps)
            time_here, start_here = part.part(steps), state_before(cell, h, kept, before, part, steps)
            is_last = anew or batch_sizes is not None
            grad_u, carried, through = call.chosen.backward(
                cell,
                sweep,
                grad_h=time.cut(grad_h, here),
                grad_last=grad_last if is_last else None,
                h=h_here,
                kept=of_steps,
                weight=weight_hh,
                feedback=feedback,
                carried=carried,
                through=through,
                u=call.projected(x_here) if sweep.inverse == "direct" and x is not None else None,
                start=start_here,
                time=time_here,
                first=here.start,
            )
            flat = _flat(grad_u, time)
            if projects and needs_x:
                torch.mm(flat, weight_ih, out=_flat(time.cut(gradients.x, here), time))
            elif needs_x and at_once:
                gradients = gradients._replace(x=grad_u)
            elif needs_x:
                time.cut(gradients.x, here).copy_(grad_u)
            if needs_input:
                _accumulate(gradients.weight_ih, flat.mT, _flat(x_here, time), anew)
                gradients = gradients._replace(bias_ih=_sum(gradients.bias_ih, flat.sum(0)))
            if needs_weight or needs_bias:
                into = cell.into(grad_u, of_steps, in_place=projects)
                if needs_weight:
                    _weight_gradient(gradients.weight_hh, into, h_here, start_here, time_here, anew)
                if needs_bias:  # without a projection the cell's own only, which is the last part's
                    sum_of = into[-1].sum(0 if batch_sizes is not None else (0, 1))
                    gradients = gradients._replace(bias_hh=_sum(gradients.bias_hh, sum_of))
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
    weight_hh: Tensor,
    steps: Tensor,
    needs_x: bool,
    needs_input: bool,
    needs_weight: bool,
) -> _Gradients:
    """Memory for those that are summed up in place."""
    shapes = _gradient_shapes(cell, weight_ih, weight_hh, steps)
    return _Gradients(
        x=steps.new_empty(shapes.x) if needs_x else None,
        weight_ih=steps.new_empty(shapes.weight_ih) if needs_input else None,
        bias_ih=None,
        weight_hh=steps.new_empty(shapes.weight_hh) if needs_weight else None,
        bias_hh=None,
    )


def _gradient_shapes(cell: Cell, weight_ih: Tensor | None, weight_hh: Tensor, steps: Tensor) -> _Gradients:
    """The shape of each gradient. Without W_ih x is u, and the bias the cell's own. ``steps``: any array over time."""
    *heads, rows, N = weight_hh.shape
    width = rows if weight_ih is None else weight_ih.shape[1]
    return _Gradients(
        x=(*steps.shape[:-1], width),
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
    total: Tensor, into: list[Tensor], h: Tensor, start: Tensor | None, time: Timeline, anew: bool
) -> None:
    """``∂W = Σ_t into_tᵀ h_{t-1}`` over these steps, one large product for each part; the state before the first is
    zero where there is none.
    """
    several = len(into) > 1
    blocks = total.split([part.shape[-1] for part in into], dim=-2) if several else [total]
    start = None if start is None else start[..., : h.shape[-1]]
    before = None
    if not time.plain:
        before = time.before(h, h.new_zeros(h.shape[1:]) if start is None else start)
    for rows, part in zip(blocks, into, strict=True):
        # Some of the rows of a matrix need not lie as a library's product would have them: it may round otherwise.
        product = torch.empty_like(rows) if several or not anew else rows
        if before is not None:
            _accumulate(product, *_by_head(_flat(part, time), _flat(before, time)), anew=True)
        else:
            _accumulate(product, *_by_head(part[1:].flatten(0, 1), h[:-1].flatten(0, 1)), anew=True)
            if start is not None:
                _accumulate(product, *_by_head(part[0], start), anew=False)
        if product is not rows:
            rows.copy_(product) if anew else rows.add_(product)


def _flat(array: Tensor, time: Timeline) -> Tensor:
    """All steps' rows, one after another."""
    return array if time.batch_sizes is not None else array.flatten(0, 1)


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
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
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
    sweep, cell, steps = Sweep.parse(words), CELLS[cell_name], states if every is None else x
    gradients = _gradient_shapes(cell, weight_ih, weight_hh, steps)
    needed = needs_x, needs_input, needs_input, needs_weight, needs_bias
    state = states.shape[1:] if every is not None else state_shape(cell, states, _state(start, weight_ih))
    displacements = (*state[:-1], sweep.kinds * state[-1])
    sent = (displacements, sweep.inverse != "none"), (state, sweep.update == "total")
    shapes = (*zip(gradients, needed, strict=True), *sent)
    return tuple(states.new_empty(shape if needed else (0,)) for shape, needed in shapes)


_run_backward = register(
    "recurrence_bwd(str cell, Tensor? grad_h, Tensor? grad_last, Tensor? x, Tensor? weight_ih, Tensor? bias_ih, "
    "Tensor weight_hh, Tensor? bias_hh, Tensor? start, Tensor? batch_sizes, Tensor? reset, bool reverse, "
    "Tensor states, Tensor? kept, Tensor? feedback, Tensor? carried, Tensor? through, SymInt? every, bool needs_x, "
    "bool needs_input, bool needs_weight, bool needs_bias, str words, str backend) "
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
        batch_first, reverse: whether x and h are [B, T, ·], and whether they are read from the last step.
        checkpoint_every, return_sequence, displacements, backend: as in the public functions.
        needs_backward: whether gradients will be asked for.
        dispatches_to_nobody: whether forward may go past the dispatcher.
    """

    cell: str
    sweep: Sweep
    words: str
    batch_first: bool
    reverse: bool
    checkpoint_every: int | None
    return_sequence: bool
    displacements: str
    backend: str
    needs_backward: bool
    dispatches_to_nobody: bool

    @property
    def op(self) -> str:
        """The public function, as errors name it."""
        return CELLS[self.cell].op


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
        second: Tensor | None,
        feedback: Tensor | None,
        relay: Tensor | None,
        batch_sizes: Tensor | None,
        reset: Tensor | None,
        options: Options,
    ) -> tuple[Tensor | None, ...]:
        every, needs_backward = options.checkpoint_every, options.needs_backward
        x = x.transpose(0, 1) if options.batch_first else x
        start = start if second is None else torch.cat((start, second), dim=-1)
        run = _run_forward if options.dispatches_to_nobody else torch.ops.tp_kernels.recurrence_fwd
        h, last, ends, kept, relay_of_last = run(
            options.cell,
            x,
            weight_ih,
            bias_ih,
            weight_hh,
            bias_hh,
            start,
            feedback,
            relay,
            batch_sizes,
            reset,
            options.reverse,
            every,
            options.return_sequence,
            needs_backward,
            options.displacements,
            options.words,
            options.backend,
        )
        states = h if every is None else ends
        if options.batch_first and options.return_sequence:  # a tensor of its own, not a view: it may be detached
            h = h.detach().transpose_(0, 1)
        if needs_backward:
            x = x if _needs_x(weight_ih, options) else None
            kept = kept if every is None else None
            ctx.save_for_backward(
                x, weight_ih, bias_ih, weight_hh, bias_hh, start, feedback, states, kept, batch_sizes, reset
            )
            ctx.set_materialize_grads(False)
            ctx.options = options
        carries = needs_backward and options.sweep.inverse != "none"
        lasts = (last,) if CELLS[options.cell].states == 1 else tuple(part.clone() for part in last.chunk(2, dim=-1))
        return h if options.return_sequence else None, relay_of_last if carries else None, *lasts

    @staticmethod
    @first_derivatives_only
    def backward(
        ctx: Any, saved: tuple, grad_h: Tensor | None, grad_relay: Tensor | None, *grad_lasts: Tensor | None
    ) -> tuple:
        grad_last = _side_by_side(grad_lasts)
        if grad_h is None and grad_last is None and grad_relay is None:
            return (None,) * len(ctx.needs_input_grad)
        options: Options = ctx.options
        needs_start, needs_second, _, needs_relay = ctx.needs_input_grad[5:9]
        if grad_h is not None and options.batch_first:
            grad_h = grad_h.transpose(0, 1)
        needed = (*ctx.needs_input_grad[:5], needs_start or needs_second)
        (grad_x, *gradients), sent, relayed = _send_back(
            saved, options, needed, needs_relay, grad_h, grad_last, grad_relay
        )
        if grad_x is not None and options.batch_first:
            grad_x = grad_x.transpose(0, 1)
        of_states = (sent, None)
        if sent is not None and CELLS[options.cell].states == 2:
            of_states = sent.chunk(2, dim=-1)
        of_states = (part if need else None for part, need in zip(of_states, (needs_start, needs_second), strict=True))
        return grad_x, *gradients, *of_states, None, relayed, None, None, None


class RecurrenceOpFunction(torch.autograd.Function):
    """The derivative of the op ``recurrence_fwd``, where it is called by itself: in a graph that ``torch.export`` or
    ``make_fx`` has made, or under ``torch.func``. That of ``RecurrenceFunction``, which costs less a call.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        cell, x, weight_ih, bias_ih, weight_hh, bias_hh, start, feedback, _, batch_sizes, reset, *rest = arguments
        reverse, every, sequence, keep, displacements, words, backend = rest
        h, _, ends, kept, relay = output = torch.ops.tp_kernels.recurrence_fwd(*arguments)
        ctx.options = options = Options(
            cell=cell,
            sweep=Sweep.parse(words),
            words=words,
            batch_first=False,
            reverse=reverse,
            checkpoint_every=every,
            return_sequence=sequence,
            displacements=displacements,
            backend=backend,
            needs_backward=keep,
            dispatches_to_nobody=False,
        )
        without = [ends, kept] if options.sweep.inverse != "none" and keep else [ends, kept, relay]
        ctx.mark_non_differentiable(*without)
        ctx.set_materialize_grads(False)
        if not keep:  # then backward raises
            ctx.save_for_backward(weight_hh)
            return output
        x = x if _needs_x(weight_ih, options) else None
        states, kept = (h, kept) if every is None else (ends, None)
        ctx.save_for_backward(
            x, weight_ih, bias_ih, weight_hh, bias_hh, start, feedback, states, kept, batch_sizes, reset
        )
        return output

    @staticmethod
    @first_derivatives_only
    def backward(
        ctx: Any, saved: tuple, grad_h: Tensor | None, grad_last: Tensor | None, *rest: Tensor | None
    ) -> tuple:
        *_, grad_relay = rest
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_h is None and grad_last is None and grad_relay is None:
            return tuple(found)
        if not ctx.options.needs_backward:
            raise RuntimeError(
                f"{ctx.options.op}: this graph was made where gradients were disabled, and keeps nothing "
                "for backward: make it again with gradients enabled (without torch.no_grad)"
            )
        needed, needs_relay = ctx.needs_input_grad[1:7], ctx.needs_input_grad[8]
        found[1:6], found[6], found[8] = _send_back(
            saved, ctx.options, needed, needs_relay, grad_h, grad_last, grad_relay
        )
        return tuple(found)


def _needs_x(weight_ih: Tensor | None, options: Options) -> bool:
    """Whether backward needs the input."""
    return weight_ih is not None or options.checkpoint_every is not None or options.sweep.inverse == "direct"


def _send_back(
    saved: tuple,
    options: Options,
    needed: tuple[bool, ...],
    needs_relay: bool,
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    grad_relay: Tensor | None,
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """One backward pass, over arrays in order of time.

    Args:
        needed: whether gradients are needed in x, W_ih, its bias, W_hh, its bias and the first state.
        needs_relay: whether the first state came with a relay.
        grad_h, grad_last, grad_relay: what arrived; one of them at least.

    Returns:
        The gradients in the first five of these; in the first state; and of its relay.
    """
    x, weight_ih, bias_ih, weight_hh, bias_hh, start, feedback, states, kept, batch_sizes, reset = saved
    cell, sweep, words, every = options.cell, options.sweep, options.words, options.checkpoint_every
    needs_x, needs_weight_ih, needs_bias_ih, needs_weight, needs_bias, needs_start = needed
    if feedback is None and sweep.uses_inverse:
        feedback = feedback_of(weight_hh, CELLS[cell], sweep, words, options.backend)
    carried, through = (None, None) if grad_relay is None else grad_relay.unbind()
    if through is not None and kinds_of(words) > 1:
        through = through.chunk(2, dim=-1)[0]
    first_displacement = None
    if options.displacements == "parallel" or (
        options.displacements == "auto"
        and is_plain_weight(words)
        and "weight" in CELLS[cell].without_states
        and every is None
        and Timeline.of(states, batch_sizes, reset, options.reverse).plain
        and parallel.worth_it(grad_h, states)
    ):
        grad_last = None if grad_last is None else _state(grad_last, weight_ih)
        if carried is not None:  # a source like any other, but for γ
            grad_last = carried / sweep.step if grad_last is None else grad_last + carried / sweep.step
        grad_h, first_displacement = torch.ops.tp_kernels.recurrence_displacements(
            grad_h, grad_last, states, feedback, sweep.step
        )
        grad_last, sweep = None, Sweep("none", sweep.update)
        words = WITHOUT_INVERSE[sweep.update]
    run = _run_backward
    if not dispatches_to_nobody(states, grad_h, grad_last, grad_relay):
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
        batch_sizes,
        reset,
        options.reverse,
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
    found = [grad if need else None for grad, need in zip(gradients, needed[:5], strict=True)]
    carried = first_displacement if sweep.inverse == "none" else carried
    through = None if sweep.update == "local" else through
    sent = carried if through is None else through
    if needs_relay:  # the call before gets both, and the state itself no gradient
        nothing = torch.zeros_like(sent)
        through = nothing if through is None else through
        if kinds_of(words) > 1:
            through = torch.cat((through, nothing), dim=-1)
        return found, None, torch.stack((torch.zeros_like(through) if carried is None else carried, through))
    return found, sent.view(start.shape) if needs_start else None, None


def _side_by_side(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """The gradient of a state of those parts."""
    there = [part for part in parts if part is not None]
    if len(parts) == 1 or not there:
        return parts[0]
    return torch.cat([torch.zeros_like(there[0]) if part is None else part for part in parts], dim=-1)


_run_forward = register(
    "recurrence_fwd(str cell, Tensor x, Tensor? weight_ih, Tensor? bias_ih, Tensor weight_hh, Tensor? bias_hh, "
    "Tensor? start, Tensor? feedback, Tensor? relay, Tensor? batch_sizes, Tensor? reset, bool reverse, SymInt? every, "
    "bool sequence, bool keep, str displacements, str words, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    derivative=RecurrenceOpFunction,
)


def recurrent_layer(
    cell: str,
    x: Tensor,
    weight_hh: Tensor,
    start: Tensor | None,
    second: Tensor | None = None,
    *,
    weight_ih: Tensor | None = None,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    feedback: Tensor | None = None,
    relay: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    rule: Rule,
    batch_first: bool = False,
    reverse: bool = False,
    checkpoint_every: int | None = None,
    return_sequence: bool = True,
    displacements: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor | None, tuple[Tensor, ...], Tensor | None]:
    """h at all steps (``None`` without ``return_sequence``), the last state, in its parts, and its relay
    (``state.py``), from arguments that have been checked.

    The last state is an output of its own, so that its gradient needs no zero-filled [T, B, N]. With ``weight_ih``
    first and last states are [1, B, N], as layers have them, and ``bias_hh`` is [G N]; without, it is the cell's own.

    Args:
        start, second: the first state's parts: a cell of two has both or none. Packed, they must be there.
        batch_sizes: [T], int64, on the CPU, as of a ``PackedSequence``: x is packed, [P, M], and so is h.
        reset: [T, B] or [P], bool: where a state starts anew, from zero, before the step is read.
        reverse: read from the last step of each sequence to its first. Each h is that after reading the x in its place.
    """
    if displacements == "parallel" and (batch_sizes is not None or reset is not None or reverse):
        raise ValueError(
            f"{CELLS[cell].op}: displacements must be 'auto' or 'sweep' with lengths, reset or reverse, got 'parallel'"
        )
    if checkpoint_every is not None and rule.chunk is not None:
        raise ValueError(
            f"{CELLS[cell].op}: checkpoint_every must be None with a rule that has chunk, as its chunks overlap, "
            f"got {checkpoint_every}"
        )
    to_nobody = dispatches_to_nobody(x)
    if not to_nobody and differentiates_ops():
        if batch_first:
            x = x.transpose(0, 1)
        h, last, _, _, relay_of_last = torch.ops.tp_kernels.recurrence_fwd(
            cell,
            x,
            weight_ih,
            bias_ih,
            weight_hh,
            bias_hh,
            start if second is None else torch.cat((start, second), dim=-1),
            feedback,
            relay,
            batch_sizes,
            reset,
            reverse,
            checkpoint_every,
            return_sequence,
            torch.is_grad_enabled(),  # who will call the graph, and with what, is not known yet
            displacements,
            rule.words,
            backend,
        )
        h = h.transpose(0, 1) if batch_first else h
        lasts = (last,) if CELLS[cell].states == 1 else last.chunk(2, dim=-1)
        carries = rule.carries and torch.is_grad_enabled()
        return h if return_sequence else None, lasts, relay_of_last if carries else None
    trained = (x, weight_hh, start, second, weight_ih, bias_ih, bias_hh)
    options = Options(
        cell=cell,
        sweep=Sweep.of(rule),
        words=rule.words,
        batch_first=batch_first,
        reverse=reverse,
        checkpoint_every=checkpoint_every,
        return_sequence=return_sequence,
        displacements=displacements,
        backend=backend,
        needs_backward=torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in trained),
        dispatches_to_nobody=to_nobody,
    )
    h, relay, *last = RecurrenceFunction.apply(
        x, weight_ih, bias_ih, weight_hh, bias_hh, start, second, feedback, relay, batch_sizes, reset, options
    )
    return h, tuple(last), relay


def solver_iterations(
    cell: Cell, sweep: Sweep, *, grad_h: Tensor | None, h: Tensor, backend: str, **tensors: Tensor | None
) -> Tensor:
    """How many iterations each solve of "jacobian" took in the sweep of ``reference.backward``: [T, B(, H)], int32."""
    iterations = h.new_zeros(h.shape[:-1], dtype=torch.int32)
    chosen = backends(cell.op).resolve(backend, h, size=h.shape[-1], sweep=sweep, cell=cell)
    chosen.backward(cell, sweep, grad_h=grad_h, h=h, iterations=iterations, **tensors)
    return iterations
