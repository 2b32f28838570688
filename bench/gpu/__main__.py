"""The script, `python bench/gpu OUT_DIR`, and its workers, `python bench/gpu --worker DEVICE`."""

import importlib
import pathlib
import sys

if __name__ == "__main__":
    # In place of this folder, which Python has put there: the one that holds this package, layers.py and roofline.py.
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)
    if sys.argv[1:2] == ["--worker"]:
        importlib.import_module("gpu.worker").serve(sys.argv[2])
    else:
        sys.exit(importlib.import_module("gpu.run").main())
