"""Conversions of whole models, on top of the layers: PyTorch's layers become this library's, or back.

`models` finds, judges and replaces the layers; `references` finds every place that holds one; `copies` copies models,
those that `copy.deepcopy` refuses, too. The weights of a single layer are the subject of `novolstm_triton.weights`.
"""

from novolstm_triton.convert.models import TARGETS, Entry, Report, convert_model

__all__ = ["TARGETS", "Entry", "Report", "convert_model"]
