"""How a layer is launched: a pure function of sizes and device properties."""


def chunk_steps(steps: int, batch: int, hidden: int, itemsize: int) -> int:
    """Return how many time steps run as one chunk."""
    return min(steps, max(16, 2**25 // (batch * hidden * 5 * itemsize)))
