"""What the tests of modules share: the layers there are, and one pass through one of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from _cases import RULES
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import tp_kernels as tp
from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.ops.recurrence.cell import CELLS
from tp_kernels.rules import Rule, Sweep

M, N, T, B = 3, 5, 7, 4


@dataclass(frozen=True)
class Layer:
    """A layer of this library and its counterpart in ``torch.nn``.

    Attributes:
        name: of both, and in errors after ``nn.``.
        op: the public function that the layer is, after a projection of its input.
        own_bias: whether the op takes the last block of ``bias_hh_l0`` by itself.
        options: of both constructors, for a variant of the layer.
    """

    name: str
    op: Callable[..., Tensor]
    own_bias: bool = False
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *self.options.values()])

    @property
    def ours(self) -> type[Recurrent]:
        return getattr(tp.nn, self.name)

    @property
    def theirs(self) -> type[nn.RNNBase]:
        return getattr(nn, self.name)

    @property
    def rules(self) -> dict[str, Rule]:
        """Those of ``RULES`` that it has."""
        inverses = ("none", *CELLS[self.cell].inverses)
        return {name: rule for name, rule in RULES.items() if Sweep.of(rule).inverse in inverses}

    @property
    def cell(self) -> str:
        """What the ops call it."""
        return self.ours(1, 1, **self.options)._cell.name

    @property
    def gates(self) -> int:
        return self.ours(1, 1)._cell.gates

    @property
    def states(self) -> int:
        """The parts of a state."""
        return self.ours(1, 1)._cell.states

    def state(self, parts: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """As the layer takes it."""
        return parts[0] if self.states == 1 else tuple(parts)

    def make(self, *sizes: int, seed: int = 1, **options: object) -> Recurrent:
        """Ours, of M and N where no sizes are given."""
        torch.manual_seed(seed)
        return self.ours(*(sizes or (M, N)), **self.options, **options)

    def make_theirs(self, *sizes: int, seed: int = 1, **options: object) -> nn.RNNBase:
        torch.manual_seed(seed)
        return self.theirs(*(sizes or (M, N)), **self.options, **options)

    def pair(self, rule: Rule | None = None, backend: str = "auto", **options: object) -> tuple[nn.RNNBase, Recurrent]:
        """Theirs and ours, of one seed. Back-propagation, where no rule is given."""
        return self.make_theirs(**options), self.make(rule=rule or tp.BackProp(), backend=backend, **options)

    def projected(self, layer: Recurrent, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the op is given for x, [T, B, M]: u, and the cell's own bias where it has one."""
        if not layer.bias:
            return functional.linear(x, layer.weight_ih_l0), None
        inner, n = None, layer.hidden_size
        outer = layer.bias_hh_l0
        if self.own_bias:
            inner, outer = outer[-n:], functional.pad(outer[:-n], (0, n))
        return functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0 + outer), inner

    def by_op(self, layer: Recurrent, x: Tensor, h0: Tensor | None = None, **options: object) -> Tensor:
        """The states that the op gives after a projection of x."""
        u, bias = self.projected(layer, x)
        if bias is not None:
            options["bias"] = bias
        options |= {"rule": layer.rule, "backend": layer.backend, **self.options}
        return self.op(u, layer.weight_hh_l0, h0, **options)


# A new layer is one line more here.
LAYERS = (
    Layer("RNN", tp.rnn),
    Layer("GRU", tp.gru, own_bias=True),
)
LSTM = Layer("LSTM", tp.lstm)
ALL = (*LAYERS, LSTM)
# With variants whose arithmetic is another one.
VARIANTS = (*LAYERS, Layer("RNN", tp.rnn, options={"nonlinearity": "relu"}))
LAYERS_AND_RULES = tuple((layer, rule) for layer in LAYERS for rule in layer.rules)
"""Each layer with the name of each rule that it has."""
ALL_AND_RULES = tuple((layer, rule) for layer in ALL for rule in layer.rules)


def parts_of(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a state, as a layer returns it."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def skip_what_cpu_lacks(layer: Layer, rule: str, backend: str) -> None:
    if backend == "cpu" and layer.states == 2 and RULES[rule] in (RULES["jacobian-total"], RULES["jacobian-local"]):
        pytest.skip("it does not solve inverse='jacobian' for a state of 2 parts")


class Counted(nn.Module):
    """A parametrization that counts how often it is evaluated, and never gives the same value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluations = 0

    def forward(self, parameter: Tensor) -> Tensor:
        self.evaluations += 1
        return parameter * (1 + 0.01 * self.evaluations)


def count_evaluations(module: nn.Module) -> dict[str, Counted]:
    """Every parameter of the module parametrized by a counter, which is at zero."""
    counters = {name: Counted() for name, _ in module.named_parameters()}
    for name, counter in counters.items():
        parametrize.register_parametrization(module, name, counter)
        counter.evaluations = 0  # registering evaluates it
    return counters


def run(module: nn.Module, x: Tensor, h0: Tensor | None, grad: Tensor, grad_last: Tensor) -> dict[str, Tensor]:
    """Outputs and all gradients, from gradients that arrive at both outputs."""
    leaves = {"grad_x": x.clone().requires_grad_()}
    if h0 is not None:
        leaves["grad_h0"] = h0.clone().requires_grad_()
    output, last = module(*leaves.values())
    leaves |= {f"grad_{name.removeprefix('_orig_mod.')}": parameter for name, parameter in module.named_parameters()}
    grads = torch.autograd.grad((output, last), list(leaves.values()), (grad, grad_last))
    return {"output": output.detach(), "last": last.detach(), **dict(zip(leaves, grads, strict=True))}


def data(
    dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (B,), batch_first: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, hx and the gradients that arrive at the two outputs."""
    numbers = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype)

    x, hx, grad, grad_last = (random(T, *batch, M), random(1, *batch, N), random(T, *batch, N), random(1, *batch, N))
    return (x.transpose(0, 1), hx, grad.transpose(0, 1), grad_last) if batch_first else (x, hx, grad, grad_last)
