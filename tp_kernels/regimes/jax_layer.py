"""The layers of ``torch.nn`` in JAX, as its users write them: the input projected at once, ``lax.scan`` over time, and
the training step one compiled function. A baseline on one CPU thread.

This is the only file that imports JAX, which need not be there.
"""

import os
from collections.abc import Callable
from typing import Any

# Read once, when JAX first computes: one thread, whose work is not handed to a pool.
_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()

import jax  # noqa: E402
import torch  # noqa: E402
from jax import numpy as jnp  # noqa: E402
from torch import Tensor, nn  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)  # arrays have the dtypes they come with
jax.config.update("jax_cpu_enable_async_dispatch", False)

Parameters = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _rnn(parameters: Parameters, x: jax.Array) -> jax.Array:
    weight_ih, weight_hh, bias_ih, bias_hh = parameters

    def step(h: jax.Array, u: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(u + h @ weight_hh.T), None

    u = x @ weight_ih.T + (bias_ih + bias_hh)
    return jax.lax.scan(step, jnp.zeros((x.shape[1], weight_hh.shape[1]), x.dtype), u)[0]


def _gru(parameters: Parameters, x: jax.Array) -> jax.Array:
    weight_ih, weight_hh, bias_ih, bias_hh = parameters

    def step(h: jax.Array, u: jax.Array) -> tuple[jax.Array, None]:
        (u_r, u_z, u_n), (r, z, n) = jnp.split(u, 3, axis=-1), jnp.split(h @ weight_hh.T + bias_hh, 3, axis=-1)
        r, z = jax.nn.sigmoid(u_r + r), jax.nn.sigmoid(u_z + z)
        n = jnp.tanh(u_n + r * n)
        return n + z * (h - n), None

    u = x @ weight_ih.T + bias_ih
    return jax.lax.scan(step, jnp.zeros((x.shape[1], weight_hh.shape[1]), x.dtype), u)[0]


_LAYERS = {"RNN": _rnn, "GRU": _gru}


def _array(tensor: Tensor) -> jax.Array:
    return jnp.asarray(tensor.detach().contiguous().numpy())


def _tensor(array: jax.Array) -> Tensor:
    return torch.from_dlpack(array).clone()


class JaxLayer(nn.Module):
    """The last state, [B, N], of a layer that JAX computes, from parameters as ``torch.nn`` has them.

    Within torch, forward and backward are two calls of JAX with copies between: right, but not what a user of JAX runs.
    ``training_step`` is that.

    Args:
        layer: "RNN" or "GRU".
        M, N: input and hidden size.
    """

    def __init__(self, layer: str, M: int, N: int) -> None:
        super().__init__()
        for name, parameter in getattr(nn, layer)(M, N).named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach()))
        last = _LAYERS[layer]
        self._last = jax.jit(last)

        def loss(parameters: Parameters, x: jax.Array, grad: jax.Array) -> jax.Array:
            return jnp.vdot(last(parameters, x), grad)

        # Of the loss whose gradient in the last state is ``grad``; in x too where that is asked for.
        self._gradients = {
            needs_x: jax.jit(jax.value_and_grad(loss, argnums=(0, 1) if needs_x else (0,))) for needs_x in (False, True)
        }

    def forward(self, x: Tensor) -> Tensor:
        return _Last.apply(self, x, *self.parameters())

    def training_step(self, x: Tensor, grad: Tensor) -> Callable[[], Any]:
        """Loss and gradients in all parameters, and in x where it requires one, from arrays that are JAX's already."""
        arguments = tuple(_array(parameter) for parameter in self.parameters()), _array(x), _array(grad)
        run = self._gradients[x.requires_grad]
        return lambda: jax.block_until_ready(run(*arguments))


class _Last(torch.autograd.Function):
    """The compiled functions of a layer, between torch's tensors."""

    @staticmethod
    def forward(ctx: Any, layer: JaxLayer, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)
        return _tensor(layer._last(tuple(map(_array, parameters)), _array(x)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, *parameters = ctx.saved_tensors
        run = ctx.layer._gradients[ctx.needs_input_grad[1]]
        _, (of_parameters, *of_x) = run(tuple(map(_array, parameters)), _array(x), _array(grad))
        gradients = map(_tensor, (*of_x, *of_parameters))
        return None, *([] if of_x else [None]), *gradients
