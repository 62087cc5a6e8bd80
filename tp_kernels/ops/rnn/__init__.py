"""The recurrent layer. Read ``op.py`` first."""

from tp_kernels.ops.rnn.op import rnn

__all__ = ["rnn"]
