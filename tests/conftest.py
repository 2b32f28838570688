"""Interprets the kernels: the variable must be set before triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

# The tests' tensors are small: a second thread only adds its wake-up to every operation.
torch.set_num_threads(1)
