"""Modules: drop-ins for ``torch.nn.RNN`` and ``torch.nn.GRU``."""

from tp_kernels.nn.convert import convert
from tp_kernels.nn.gru import GRU
from tp_kernels.nn.learned_inverse import LearnedInverse
from tp_kernels.nn.rnn import RNN

__all__ = ["GRU", "RNN", "LearnedInverse", "convert"]
