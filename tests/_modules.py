"""What the tests of modules share: the layers there are, and one pass through one of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from _cases import RULES
from _oracle import ACTIVATIONS, SLOPES
from torch import Tensor, nn
from torch.nn import functional

import tp_kernels as tp
from tp_kernels.nn._recurrent import Recurrent
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
        """Those of ``RULES`` that the cell has."""
        inverses = ("none", *self.ours(1, 1)._cell.inverses)
        return {name: rule for name, rule in RULES.items() if Sweep.of(rule).inverse in inverses}

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

    def by_op(self, layer: Recurrent, x: Tensor, h0: Tensor | None = None, **options: object) -> Tensor:
        """The states that the op gives after a projection of x, [T, B, M]."""
        bias, outer = layer.bias_ih_l0, layer.bias_hh_l0
        if self.own_bias:
            n = layer.hidden_size
            options["bias"] = outer[-n:]
            outer = functional.pad(outer[:-n], (0, n))
        u = functional.linear(x, layer.weight_ih_l0, bias + outer)
        rule = options.pop("rule", layer.rule)
        return self.op(u, layer.weight_hh_l0, h0, rule=rule, backend=layer.backend, **self.options, **options)


# A new layer is one line more here.
LAYERS = (
    Layer("RNN", tp.rnn),
    Layer("GRU", tp.gru, own_bias=True),
)
# With variants whose arithmetic is another one.
VARIANTS = (*LAYERS, Layer("RNN", tp.rnn, options={"nonlinearity": "relu"}))
LAYERS_AND_RULES = tuple((layer, rule) for layer in LAYERS for rule in layer.rules)
"""Each layer with the name of each rule that it has."""


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


# --- back-propagation once more, in NumPy and in extended precision


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def _elman_forward(u: np.ndarray, product: np.ndarray, before: np.ndarray, word: str) -> np.ndarray:
    return ACTIVATIONS[word](u + product)


def _elman_back(
    mu: np.ndarray, u: np.ndarray, product: np.ndarray, before: np.ndarray, h: np.ndarray, word: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    delta = SLOPES[word](h) * mu
    return delta, delta, np.zeros_like(mu)


def _gates(u: np.ndarray, product: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    (u_r, u_z, u_n), (p_r, p_z, q) = np.split(u, 3, axis=-1), np.split(product, 3, axis=-1)
    r, z = _sigmoid(u_r + p_r), _sigmoid(u_z + p_z)
    return r, z, np.tanh(u_n + r * q), q


def _gru_forward(u: np.ndarray, product: np.ndarray, before: np.ndarray) -> np.ndarray:
    _, z, n, _ = _gates(u, product)
    return (1 - z) * n + z * before


def _gru_back(
    mu: np.ndarray, u: np.ndarray, product: np.ndarray, before: np.ndarray, h: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r, z, n, q = _gates(u, product)
    of_n = (1 - z) * (1 - n**2) * mu
    of_r, of_z = of_n * q * r * (1 - r), (before - n) * z * (1 - z) * mu
    return np.concatenate([of_r, of_z, of_n], -1), np.concatenate([of_r, of_z, r * of_n], -1), z * mu


_ORACLES = {"RNN": (_elman_forward, _elman_back), "GRU": (_gru_forward, _gru_back)}


def bp_oracle(
    layer: Layer,
    u: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    start: np.ndarray | None,
    h: np.ndarray,
    arrives: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The states; and, at the given ones, the gradients in u, in ``W h_{t-1} + b`` and in h_0.

    Args:
        u: [T, B, G N], the projected input with its own bias.
        weight, bias: [G N, N] and [G N], ``weight_hh_l0`` and ``bias_hh_l0``.
        h, arrives: [T, B, N], the states and ∂loss/∂h.
    """
    forward, back = _ORACLES[layer.name]
    words = {"word": layer.options.get("nonlinearity", "tanh")} if layer.name == "RNN" else {}
    zero = np.zeros_like(h[0])
    state, start, bias = zero if start is None else start, zero if start is None else start, 0 if bias is None else bias
    states = []
    for u_t in u:
        state = forward(u_t, state.dot(weight.T) + bias, state, **words)
        states.append(state)
    deltas, intos, through = [], [], zero
    for t in range(len(h) - 1, -1, -1):
        before = h[t - 1] if t else start
        delta, into, past = back(arrives[t] + through, u[t], before.dot(weight.T) + bias, before, h[t], **words)
        through = past + into.dot(weight)
        deltas.append(delta)
        intos.append(into)
    return np.stack(states), np.stack(deltas[::-1]), np.stack(intos[::-1]), through
