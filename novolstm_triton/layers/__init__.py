"""The layers as modules: a file for each, on `RecurrentLayer` and `RecurrentCell`, which take any cell.

`per_sample` prepares them for gradients per sample; `ragged` and `regularisers` are their parts.
"""
