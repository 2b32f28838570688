"""Interprets the kernels: the variable must be set before triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
