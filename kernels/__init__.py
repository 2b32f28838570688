"""Triton kernels of novolstm_triton. They import triton only; README.md in this folder holds equations and protocol."""

if __name__ != "novolstm_triton.kernels":
    raise ImportError(
        f"this folder is the package novolstm_triton.kernels and was imported as {__name__!r}: "
        "import novolstm_triton instead, and keep the checkout off the front of sys.path"
    )
