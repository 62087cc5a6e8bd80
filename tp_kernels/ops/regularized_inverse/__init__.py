"""Batched regularized inverse. Read ``op.py`` first."""

from tp_kernels.ops.regularized_inverse.op import regularized_inverse

__all__ = ["regularized_inverse"]
