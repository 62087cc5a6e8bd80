"""The gated recurrent unit. Read ``op.py`` first."""

from tp_kernels.ops.gru.op import gru

__all__ = ["gru"]
