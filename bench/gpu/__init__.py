"""Check the Triton backend on a GPU against the float64 reference, and time it against nn.LSTM, within minutes.

    bash bench/gpu.sh OUT_DIR --seconds 500

OUT_DIR/<gpu name>.json is written again after every result, so that an early stop loses nothing:

    environment  device, versions and precision settings
    checks       name, shape, error, bound, ok, and how; `error` is null where `message` says what went wrong
    rows         layer, exchange, dtype, hidden, inputs, batch, steps; µs per step, tokens/s and share of the roofline,
                 of forward and of forward_backward; peak_mib, first_call_s, and how; or `error`, a text.
                 `python -m bench.report` makes tables and plots of them
    micro        constants of the roofline, measured on this device (micro.py)
    unfinished   tasks for which the time did not suffice

A persistent kernel with a bug may spin for ever, or leave CUDA unusable. Therefore this process never touches the GPU:
it hands tasks, one by one, to a worker process, kills a worker that falls silent and goes on with a new one. Meanwhile
further workers compile ahead of time what later tasks need; timing starts when they are done.

With --device cpu (the default under TRITON_INTERPRET=1) tiny sizes run in Triton's interpreter: a test of this script.
"""
