"""PyTorch's own recurrent modules, bound when this package is imported.

A program may put `torch.nn.LSTM = novolstm_triton.LSTM` before its other imports, so that `nn.LSTM`, looked up at run
time, is no longer PyTorch's. Code that means PyTorch's own takes it from here.
"""

from torch.nn import LSTM, LSTMCell, RNNBase, RNNCellBase

__all__ = ["LSTM", "LSTMCell", "RNNBase", "RNNCellBase"]
