"""PyTorch's own recurrent modules, bound when this package is imported.

A program may put `torch.nn.LSTM = novolstm_triton.LSTM` before its other imports, so that `nn.LSTM`, looked up at run
time, is not PyTorch's any more. What is meant to be PyTorch's is taken from here.
"""

from torch.nn import LSTM, LSTMCell, RNNBase, RNNCellBase

__all__ = ["LSTM", "LSTMCell", "RNNBase", "RNNCellBase"]
