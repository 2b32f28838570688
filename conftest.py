"""Puts the checkout last on sys.path: its folder `kernels` must not hide the package of that name on the index."""

import pathlib
import sys

_ROOT = str(pathlib.Path(__file__).resolve().parent)
if _ROOT in sys.path or "" in sys.path:
    sys.path[:] = [entry for entry in sys.path if entry not in (_ROOT, "")]
    sys.path.append(_ROOT)
