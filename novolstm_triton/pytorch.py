"""PyTorch's own recurrent modules, bound when this package is imported.

A program may put `torch.nn.LSTM = novolstm_triton.LSTM` before its other imports, so that `nn.LSTM`, looked up at run
time, is no longer PyTorch's. Code that means PyTorch's own takes it from here.
"""

from torch.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNBase, RNNCell, RNNCellBase

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNBase", "RNNCell", "RNNCellBase"]
