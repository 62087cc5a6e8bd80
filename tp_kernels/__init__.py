"""Target propagation by regularized inversion as fused, drop-in PyTorch ops.

>>> import tp_kernels as tp
>>> layer = tp.nn.RNN(input_size=8, hidden_size=32, rule=tp.TargetProp())
"""

from torch import fx

from tp_kernels import nn
from tp_kernels._backends import BackendUnavailableError
from tp_kernels.ops.gru import gru
from tp_kernels.ops.lstm import lstm
from tp_kernels.ops.regularized_inverse import regularized_inverse
from tp_kernels.ops.rnn import rnn
from tp_kernels.rules import BackProp, TargetProp
from tp_kernels.trace import trace

for _op in ("gru", "lstm", "regularized_inverse", "rnn"):
    fx.wrap(_op)  # a call of tp.rnn is one node of a graph of torch.fx, as one of torch's own functions is

__version__ = "0.1.0"

__all__ = [
    "BackProp",
    "BackendUnavailableError",
    "TargetProp",
    "gru",
    "lstm",
    "nn",
    "regularized_inverse",
    "rnn",
    "trace",
]
