"""Modules: drop-ins for ``torch.nn.RNN``."""

from tp_kernels.nn.learned_inverse import LearnedInverse
from tp_kernels.nn.rnn import RNN, convert

__all__ = ["RNN", "LearnedInverse", "convert"]
