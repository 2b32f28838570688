"""What tests interpret the kernels with: a device on which everything fits, and the words that need no barrier."""

from novolstm_triton import plan

ROOMY = plan.Device("roomy", "cuda", 90, multiprocessors=64, smem_bytes=2**40)
"""A device on which every tiling fits."""

SELF_VALIDATING = ("row_ring_ptr", "h_ring_ptr", "dz_ptr", "late_ring_ptr")
"""Arguments whose words say themselves whether they have arrived, where the exchange is "words"."""
