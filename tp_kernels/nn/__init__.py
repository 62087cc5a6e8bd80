"""Modules: drop-ins for ``torch.nn``'s recurrent layers and cells."""

from tp_kernels.nn.cells import GRUCell, LSTMCell, RNNCell
from tp_kernels.nn.convert import convert
from tp_kernels.nn.gru import GRU
from tp_kernels.nn.learned_inverse import LearnedInverse
from tp_kernels.nn.lstm import LSTM
from tp_kernels.nn.rnn import RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "LearnedInverse", "RNNCell", "convert"]
