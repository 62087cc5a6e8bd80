"""Modules: drop-ins for ``torch.nn.RNN``, ``torch.nn.GRU`` and ``torch.nn.LSTM``."""

from tp_kernels.nn.convert import convert
from tp_kernels.nn.gru import GRU
from tp_kernels.nn.learned_inverse import LearnedInverse
from tp_kernels.nn.lstm import LSTM
from tp_kernels.nn.rnn import RNN

__all__ = ["GRU", "LSTM", "RNN", "LearnedInverse", "convert"]
