"""What runs a call of a layer: the definition, PyTorch's operators, the Triton kernels, or ONNX's operators.

`reference` is a loop under autograd; `bptt` and `recompute` are backend "torch", the first with a hand-written backward
for the LSTM and NovoLSTM, the second for every other cell; `launch` is backend "triton"; `onnx` records a layer. The
folder is not named after the backends, because torch.compile traces no file with "triton/backends" in its path.
"""
