"""What stays in memory between forward and backward."""

import pytest
import torch

from novolstm_triton import NovoLSTM


def kept_bytes(layer: torch.nn.Module, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return the bytes of every storage that the graph of layer(x) keeps, parameters not counted, and y."""
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, _ = layer(x)
    for parameter in layer.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values()), y


@pytest.mark.parametrize("variant", ["formula", "notebook"])
def test_keeps_little_more_than_input_and_output(variant):
    steps, batch, hidden = 2048, 16, 256
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    kept, y = kept_bytes(NovoLSTM(hidden, hidden, variant=variant, backend="torch"), x)
    both = x.nbytes + y.nbytes
    # The lower bound shows that the hooks saw x and y at all.
    assert both <= kept <= 1.6 * both, f"kept {kept / both:.2f} times the bytes of x and y"


def test_the_reference_keeps_more():
    """The measurement itself: an autograd graph over the steps keeps many values a unit."""
    x = torch.randn(64, 4, 32, requires_grad=True)
    kept, y = kept_bytes(NovoLSTM(32, 32, backend="reference"), x)
    assert kept > 5 * (x.nbytes + y.nbytes)
