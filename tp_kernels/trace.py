"""What researchers of credit assignment log by hand: displacements, adjoints, saturation, the angle to BP's update."""

import json
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointError

from tp_kernels._json import finite
from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.nn.learned_inverse import LearnedInverse
from tp_kernels.ops.recurrence import reference
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.ops.recurrence.feedback import feedback_of
from tp_kernels.ops.recurrence.op import Options, recurrent_layer, solver_iterations
from tp_kernels.ops.recurrence.timeline import Timeline
from tp_kernels.rules import BackProp, TargetProp

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What RecurrenceFunction takes and keeps, in its order.
_INPUTS = ("input", "weight_ih", "bias_ih", "weight_hh", "bias_hh", "h0", "feedback")
_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class Record:
    """One backward pass through one layer.

    Lists hold a number for each time step t = 1 … T, in the order in which the layer reads them. Norms are Euclidean,
    of one sequence at one time step; their mean and their largest over the batch are kept.

    Attributes:
        layer: the module's qualified name in the traced model; "" is the model itself. Where it has several layers or
            two directions, with the part behind it, as in "encoder.l0" and "encoder.l1_reverse".
        pass_index: how many backward passes went through the layer before, since the trace began.
        displacement_mean, displacement_max: ``‖λ_t‖``, of an LSTM of both parts of the state together.
        adjoint_mean, adjoint_max: ``‖μ_t‖``.
        gradient_mean, gradient_max: ``‖g_t‖``, of the gradient that arrives at h_t from outside the layer.
        saturated: share of the units with ``|h_t| > 1 - clip`` (tanh; the rule's clip, 1e-3 for ``BackProp``) or
            ``h_t = 0`` (relu); 0 for the identity. Of a GRU's candidates and gates with ``|n_t| > 1 - clip``, and
            ``|2r_t - 1|`` and ``|2z_t - 1|`` likewise; of an LSTM's with ``|g_t|``, ``|2i_t - 1|`` and so on.
        angle_weight_ih, angle_weight_hh, angle_all: degrees between the gradient that the layer returned and BP's, for
            one weight and for all trained parameters of the layer together. ``None`` where there is none: a parameter
            that is not trained, a gradient that is zero or not finite.
        weight_hh_norm: spectral norm ``‖W‖₂`` of the recurrent weight, [N, N], a GRU's [3N, N] or an LSTM's [4N, N].
        solver_iterations: the largest number of iterations at each time step, for an inverse found by iteration.
            ``None`` for the others.
    """

    layer: str
    pass_index: int
    displacement_mean: list[float]
    displacement_max: list[float]
    adjoint_mean: list[float]
    adjoint_max: list[float]
    gradient_mean: list[float]
    gradient_max: list[float]
    saturated: list[float]
    angle_weight_ih: float | None
    angle_weight_hh: float | None
    angle_all: float | None
    weight_hh_norm: float
    solver_iterations: list[int] | None


@dataclass
class Trace:
    """What ``trace`` recorded.

    Attributes:
        records: in the order of the backward passes.
    """

    records: list[Record] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; what JSON cannot represent (NaN, infinity) is ``None``."""
        return {"records": [finite(asdict(record)) for record in self.records]}

    def save(self, path: str | Path) -> None:
        """Write ``to_dict()`` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n")

    def plot(self, where: "str | Path | Sequence[Axes]") -> None:
        """Draw four pictures a layer: norms and saturation over time, the angle to BP and ``‖W‖₂`` over the passes.

        Those over time are of the layer's last recorded pass. ``Trace(records).plot(...)`` draws a selection.

        Args:
            where: the file to write, one row of pictures a layer; its ending is the format. Or the matplotlib axes to
                draw on, four for each layer.

        Raises:
            ValueError: there are no records, or not four axes a layer.
            ImportError: matplotlib is not installed.
        """
        layers: dict[str, list[Record]] = {}
        for record in self.records:
            layers.setdefault(record.layer, []).append(record)
        if not layers:
            raise ValueError("Trace.plot: there must be at least one record, got none")
        if not isinstance(where, (str, Path)):
            axes = list(np.ravel(where))
            if len(axes) != 4 * len(layers):
                raise ValueError(f"Trace.plot: where must have 4 axes a layer, {4 * len(layers)}, got {len(axes)}")
            _draw(layers, axes)
            return
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Trace.plot: matplotlib is not installed: pip install 'tp_kernels[regimes]'") from error
        figure = Figure(figsize=(15, 3.3 * len(layers)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        _draw(layers, list(figure.subplots(len(layers), 4, squeeze=False).ravel()))
        figure.savefig(where, dpi=150, facecolor="white")


def trace(model: nn.Module, every: int = 1) -> AbstractContextManager[Trace]:
    """Record how credit flows through every ``tp_kernels.nn.RNN``, ``GRU`` and ``LSTM`` of a model, from pass to pass.

    Inside the context each backward pass through a layer leaves one ``Record``: for every time step the norms of
    displacement ``λ_t``, adjoint ``μ_t`` and incoming gradient ``g_t`` and the share of saturated units; for the pass
    the angle between the rule's update and BP's, and ``‖W‖₂``. Gradients and results are, bit for bit, those without a
    trace, and a model that is not traced pays nothing: the hooks are there only inside the context.

    A recorded pass costs a forward and a BP pass of the layer on its own kernels, the recursion once more in plain
    PyTorch and in the layer's dtype (``ops/recurrence/reference.py``: many times slower than the kernels on a CPU), and
    a singular value decomposition of W; and memory for all T states, also where ``checkpoint_every`` saves it.

    Args:
        model: any module; its layers are those it has on entry.
        every: k >= 1: record only passes 0, k, 2k, … of each layer.

    Returns:
        A context manager, which gives the ``Trace`` that is being filled.

    Raises:
        TypeError: ``model`` is not a module or ``every`` not an int.
        ValueError: there is no recurrent layer of this library in ``model``, or ``every`` is less than 1.
        RuntimeError: inside the context, a layer runs under ``torch.compile``, or a recorded pass goes back through
            ``torch.utils.checkpoint`` with ``use_reentrant=False``.

    Example:
        >>> import torch, tp_kernels as tp
        >>> layer = tp.nn.RNN(4, 8)
        >>> with tp.trace(layer) as trace:
        ...     output, last = layer(torch.randn(10, 2, 4))
        ...     last.sum().backward()
        >>> record, = trace.records
        >>> len(record.displacement_mean), 0 < record.angle_weight_hh < 180
        (10, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"trace: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"trace: every must be an int, got {type(every).__name__}")
    if every < 1:
        raise ValueError(f"trace: every must be at least 1, got {every}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Recurrent) and not isinstance(module, LearnedInverse)
    }
    if not layers:
        raise ValueError(
            f"trace: model must have a tp_kernels.nn.RNN, GRU or LSTM in it, got a {type(model).__name__} without one"
        )
    return _tracing(layers, every)


@contextmanager
def _tracing(layers: dict[str, Recurrent], every: int) -> Iterator[Trace]:
    found = Trace()
    recorders = [_Recorder(name, layer, every, found.records) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for recorder in recorders:
            recorder.remove()


class _Recorder:
    """The hooks of one module: one on its forward, and one on the autograd node of each layer and direction, a call."""

    def __init__(self, name: str, layer: Recurrent, every: int, records: list[Record]) -> None:
        self.name, self.every, self.records = name, every, records
        self.passes: Counter[str] = Counter()
        # First in the row: other hooks may hand on something else than what the layer gave.
        self.forward = layer.register_forward_hook(self.on_forward, prepend=True)
        self.backwards: list[torch.utils.hooks.RemovableHandle] = []

    def remove(self) -> None:
        for handle in (self.forward, *self.backwards):
            handle.remove()

    def on_forward(self, layer: Recurrent, inputs: tuple, outputs: tuple[Tensor | None, Any]) -> None:
        compiled = f"trace: layer {self.name!r} cannot be traced under torch.compile: call the model that was compiled"
        if torch.compiler.is_compiling():
            raise RuntimeError(compiled)
        last = outputs[1] if isinstance(outputs[1], Tensor) else outputs[1][0]
        if not last.requires_grad or not last.numel():
            return
        node = last.grad_fn
        while node.name() in ("SqueezeBackward1", "IndexSelectBackward0"):  # unbatched, or sorted by length
            node = node.next_functions[0][0]
        if len(layer._all_weights) == 1:
            nodes = {self.name: node}
        else:  # a part that is not trained has none
            parts = [names[1].removeprefix("weight_hh_") for names in layer._all_weights]
            nodes = zip(parts, (before for before, _ in node.next_functions), strict=True)
            nodes = {f"{self.name}.{part}".lstrip("."): node for part, node in nodes if node is not None}
        self.backwards = [handle for handle in self.backwards if handle.hooks_dict_ref() is not None]
        for name, node in nodes.items():
            if node.name() != "RecurrenceFunctionBackward":
                raise RuntimeError(compiled)
            self.backwards.append(node.register_hook(self.on_backward(name, layer, node, last.device.type)))

    def on_backward(self, name: str, layer: Recurrent, node: Any, device: str) -> Callable[[tuple, tuple], None]:
        """The hook of one autograd node."""
        weak = weakref.ref(node)  # a hook that held its own node would keep the graph alive
        clip = layer.rule.clip if isinstance(layer.rule, TargetProp) else TargetProp.clip

        def record(gradients: tuple[Tensor | None, ...], arrived: tuple[Tensor | None, ...]) -> None:
            index = self.passes[name]
            self.passes[name] += 1
            if index % self.every:
                return
            with torch.autocast(device, enabled=False):  # as in the layer, which keeps to its parameters' dtype
                self.records.append(_record(name, index, weak(), gradients, arrived, clip))

        return record


def _record(
    name: str,
    pass_index: int,
    node: Any,
    gradients: tuple[Tensor | None, ...],
    arrived: tuple[Tensor | None, ...],
    clip: float,
) -> Record:
    """One backward pass, from its autograd node, the gradients it returned and those that arrived at its outputs."""
    try:
        saved = node.saved_tensors
    except CheckpointError as error:
        raise RuntimeError(
            f"trace: layer {name!r} cannot be traced inside torch.utils.checkpoint with use_reentrant=False, which "
            "gives saved tensors to backward only: take use_reentrant=True, or the layer's checkpoint_every=k"
        ) from error
    inputs = dict(zip(_INPUTS, saved[: len(_INPUTS)], strict=True))
    *_, batch_sizes, reset = saved
    present = [name for name, tensor in inputs.items() if tensor is not None]
    # A relay's gradient is the last.
    found = dict.fromkeys(_INPUTS) | dict(zip(present, gradients, strict=False))
    feedback, options = inputs.pop("feedback"), node.options
    cell, sweep, weight = CELLS[options.cell], options.sweep, inputs["weight_hh"]
    time = Timeline.of(inputs["input"], batch_sizes, reset, options.reverse)
    trained = [parameter for parameter in _PARAMETERS if found[parameter] is not None]
    h, kept = _states(inputs, time, options)
    g, grad_last, carried, through = _sources(h, arrived, time, options)
    bp = _back_propagation(inputs, trained, g, grad_last, through, time, options)
    if feedback is None and sweep.uses_inverse:
        feedback = feedback_of(weight, cell, sweep, options.words, options.backend)
    u = iterations = None
    if sweep.inverse == "direct":
        input_bias, _ = cell.biases(inputs["bias_ih"], inputs["bias_hh"])
        u = functional.linear(inputs["input"], inputs["weight_ih"], input_bias)
    start = None if inputs["h0"] is None else inputs["h0"][0]
    tensors = {"h": h, "kept": kept, "weight": weight, "feedback": feedback, "u": u, "start": start, "time": time}
    tensors |= {"grad_h": g, "grad_last": grad_last, "carried": carried, "through": through}

    def in_reading_order(array: Tensor) -> list[Tensor]:
        steps = time.split(array)
        return [steps[t] for t in time.order()]

    if sweep.inverse == "jacobian":
        steps = in_reading_order(solver_iterations(cell, sweep, backend=options.backend, **tensors))
        iterations = [step.max().item() for step in steps]
    sources = time.split(g)
    norms = [
        torch.stack([*_mean_and_max(back.displacement), *_mean_and_max(back.adjoint), *_mean_and_max(sources[back.t])])
        for back in reference.steps_back(cell, sweep, **tensors)
    ]
    saturated = in_reading_order(cell.saturated(h, kept, clip))

    def angle(*parameters: str) -> float | None:
        chosen = [parameter for parameter in parameters if parameter in trained]
        return _angle([found[parameter] for parameter in chosen], [bp[parameter] for parameter in chosen])

    return Record(
        name,
        pass_index,
        *torch.stack(norms[::-1], dim=1).tolist(),
        saturated=[step.double().mean().item() for step in saturated],
        angle_weight_ih=angle("weight_ih"),
        angle_weight_hh=angle("weight_hh"),
        angle_all=angle(*_PARAMETERS),
        weight_hh_norm=_spectral_norm(weight),
        solver_iterations=iterations,
    )


def _states(inputs: dict[str, Tensor | None], time: Timeline, options: Options) -> tuple[Tensor, Tensor]:
    """The layer's states h, to the same bits, and what its cell keeps, whether or not forward kept them."""
    h, _, _, kept, _ = torch.ops.tp_kernels.recurrence_fwd(
        options.cell,
        inputs["input"],
        inputs["weight_ih"],
        inputs["bias_ih"],
        inputs["weight_hh"],
        inputs["bias_hh"],
        inputs["h0"],
        None,  # feedback
        None,  # relay
        time.batch_sizes,
        time.reset,
        time.reverse,
        None,  # every
        True,  # sequence
        True,  # keep
        options.displacements,
        options.words,
        options.backend,
    )
    return h, kept


def _sources(
    h: Tensor, arrived: tuple[Tensor | None, ...], time: Timeline, options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradient g of h at every step, like h, of the last one included; that of the other part of the last states,
    if they have one; and the displacement and the adjoint that a later call sent.
    """
    grad_h, grad_relay, *grad_lasts = arrived
    g = torch.zeros_like(h)
    if grad_h is not None:
        g += grad_h.transpose(0, 1) if options.batch_first else grad_h
    if grad_lasts[0] is not None:
        steps = time.split(g)
        for t in range(time.T):  # those that end there
            following = t - 1 if time.reverse else t + 1
            later = len(steps[following]) if 0 <= following < time.T else 0
            steps[t][later:] += grad_lasts[0][0][later : len(steps[t])]
    second = None if len(grad_lasts) == 1 or grad_lasts[1] is None else grad_lasts[1][0]
    grad_last = None if second is None else torch.cat((torch.zeros_like(second), second), dim=-1)
    carried, through = (None, None) if grad_relay is None else grad_relay.unbind()
    return g, grad_last, carried, through


def _back_propagation(
    inputs: dict[str, Tensor | None],
    trained: list[str],
    g: Tensor,
    grad_last: Tensor | None,
    through: Tensor | None,
    time: Timeline,
    options: Options,
) -> dict[str, Tensor]:
    """BP's gradients in the layer's trained parameters, on its own kernels, from what arrived at the states: of a later
    call the adjoint.
    """
    if not trained:
        return {}
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in trained)
        for name, tensor in inputs.items()
    }
    parts = CELLS[options.cell].states
    starts = (None,) if leaves["h0"] is None else leaves["h0"].chunk(parts, dim=-1)
    with torch.enable_grad():
        h, lasts, _ = recurrent_layer(
            options.cell,
            leaves["input"],
            leaves["weight_hh"],
            *starts,
            weight_ih=leaves["weight_ih"],
            bias_ih=leaves["bias_ih"],
            bias_hh=leaves["bias_hh"],
            batch_sizes=time.batch_sizes,
            reset=time.reset,
            reverse=time.reverse,
            rule=BackProp(),
            backend=options.backend,
        )
    arriving = [torch.zeros_like(last) for last in lasts]
    for sent in (grad_last, through):
        if sent is not None:
            arriving = [sum_ + part for sum_, part in zip(arriving, sent[None].chunk(parts, dim=-1), strict=True)]
    gradients = torch.autograd.grad((h, *lasts), [leaves[name] for name in trained], (g, *arriving))
    return dict(zip(trained, gradients, strict=True))


def _spectral_norm(weight: Tensor) -> float:
    """NaN where the weight is not finite: a run that diverges is what one traces for."""
    return torch.linalg.matrix_norm(weight.double(), 2).item() if weight.isfinite().all() else math.nan


def _mean_and_max(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Of the norms of [B, N], in float64: squares of what the layer's dtype can hold may overflow there."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64)
    return norms.mean(), norms.amax()


def _angle(gradients: list[Tensor], others: list[Tensor]) -> float | None:
    """Degrees between two lists of tensors, each taken as one vector, by a formula that is exact near 0 and 180."""
    if not gradients:
        return None
    u, v = (torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (gradients, others))
    u, v = u / u.norm(), v / v.norm()
    degrees = math.degrees(2 * math.atan2((u - v).norm(), (u + v).norm()))
    return degrees if math.isfinite(degrees) else None


_NORMS = {"displacement": ("λ", "#5b3a8c"), "adjoint": ("μ", "#009E73"), "gradient": ("g", "#D55E00")}
_ANGLES = {
    "angle_weight_ih": ("weight_ih", "#56B4E9", "--"),
    "angle_weight_hh": ("weight_hh", "#0072B2", ":"),
    "angle_all": ("all parameters", "#1f2937", "-"),
}


def _draw(layers: dict[str, list[Record]], axes: "list[Axes]") -> None:
    for row, (layer, records) in enumerate(layers.items()):
        norms, saturation, angles, spectral = axes[4 * row : 4 * row + 4]
        last, passes = records[-1], [record.pass_index for record in records]
        steps = range(1, len(last.saturated) + 1)
        where = f"{layer or 'the layer'}, pass {last.pass_index}"
        for name, (letter, colour) in _NORMS.items():
            mean, largest = ([v if v > 0 else math.nan for v in getattr(last, f"{name}_{s}")] for s in ("mean", "max"))
            norms.plot(steps, mean, color=colour, linewidth=1.6, marker=".", markersize=3, label=f"‖{letter}‖ {name}")
            norms.fill_between(steps, mean, largest, color=colour, alpha=0.15, linewidth=0)
        norms.set(yscale="log", title=f"{where}: norms", xlabel="time step", ylabel="mean, shaded up to the largest")
        norms.legend(fontsize=8)
        saturation.plot(steps, [100 * share for share in last.saturated], color="#8c510a", linewidth=1.6, marker=".")
        saturation.set(title=f"{where}: saturation", xlabel="time step", ylabel="percent of the activations")
        saturation.set_ylim(0, max(1, 105 * max(last.saturated)))
        for name, (label, colour, style) in _ANGLES.items():
            values = [math.nan if getattr(record, name) is None else getattr(record, name) for record in records]
            angles.plot(passes, values, color=colour, linestyle=style, marker=".", label=label)
        angles.set(title=f"{layer or 'the layer'}: angle to BP", xlabel="pass", ylabel="degrees", ylim=(-4, 184))
        angles.set_yticks(range(0, 181, 45))
        angles.legend(fontsize=8)
        spectral.plot(passes, [record.weight_hh_norm for record in records], color="#1f2937", marker=".")
        spectral.set(title=f"{layer or 'the layer'}: ‖W‖₂ of weight_hh", xlabel="pass", ylabel="spectral norm")
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#eef0f3", linewidth=0.8)
        axis.set_axisbelow(True)
