"""Calls of a layer at the edges of what it takes: sizes of one and none, unbatched input, strides of all kinds."""

import pytest
import torch
from torch import nn

from novolstm_triton import NovoLSTM

from .support.layers import B, H, I, T, both, layer, sequence, states
from .support.twins import BACKENDS, NO_ONEDNN, assert_close, copied, differentiate, pair, running_on

pytestmark = pytest.mark.filterwarnings(NO_ONEDNN)

ONES = {"one-step": (1, 3, 4, 6), "one-row": (5, 1, 4, 6), "one-unit": (5, 3, 4, 1), "one-of-all": (1, 1, 1, 1)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("steps", "rows", "features", "hidden"), ONES.values(), ids=list(ONES))
def test_sizes_of_one_are_those_of_nn_lstm(steps, rows, features, hidden, backend):
    theirs, ours = pair(features, hidden, bidirectional=True)
    x = torch.randn(steps, rows, features, requires_grad=True)
    with running_on(backend):
        results = differentiate(ours, x)
    eager = differentiate(theirs, x)
    assert_close(results, differentiate(theirs.double(), copied(x, torch.float64)), eager)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_state", [False, True], ids=["no-state", "state"])
@pytest.mark.parametrize("proj_size", [0, 2])
@both
def test_batch_of_no_rows(kind, proj_size, with_state, backend):
    """All results are empty, as nn.LSTM's are, and the parameters have gradients of zero."""
    options = dict(num_layers=2, bidirectional=True, batch_first=True, proj_size=proj_size)
    ours, theirs, x = layer(kind, **options), nn.LSTM(I, H, **options), torch.zeros(0, T, I, requires_grad=True)
    hx = states(ours, 0) if with_state else None
    with running_on(backend):
        results = differentiate(ours, x, hx)
        y, _ = ours(x, hx, lengths=torch.zeros(0, dtype=torch.int64))
    expected = differentiate(theirs, x, hx)
    for name in ("y", "h_n", "c_n", "grad input"):
        assert results[name].shape == expected[name].shape
    assert y.shape == results["y"].shape
    assert not any(value.any() for value in results.values())


@pytest.mark.parametrize("batch_first", [False, True], ids=["T-first", "B-first"])
@pytest.mark.parametrize("options", [dict(), dict(variant="notebook", layer_norm="all", proj_size=2)], ids=str)
def test_unbatched_input_is_a_batch_of_one_row(options, batch_first):
    """Its time comes first, whatever batch_first says."""
    module = layer(NovoLSTM, num_layers=2, bidirectional=True, batch_first=batch_first, **options)
    x, hx, batch = sequence(T, 1), states(module, 1), 0 if batch_first else 1
    y, last = module(x[:, 0], tuple(s[:, 0] for s in hx))
    expected, expected_last = module(x.transpose(0, 1) if batch_first else x, hx)
    torch.testing.assert_close(y, expected.squeeze(batch))
    torch.testing.assert_close(last, tuple(s.squeeze(1) for s in expected_last))


@pytest.mark.parametrize("batch_first", [False, True], ids=["T-first", "B-first"])
@pytest.mark.parametrize("sizes", [(B, T, I), (T, I)], ids=["batched", "unbatched"])
@both
def test_results_lie_in_memory_as_those_of_nn_lstm(kind, sizes, batch_first):
    """So a program that calls view() on them runs on."""
    options = dict(num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(sizes)
    (y, last), (expected, expected_last) = layer(kind, **options)(x), nn.LSTM(I, H, **options)(x)
    for mine, other in zip((y, *last), (expected, *expected_last), strict=True):
        assert (mine.shape, mine.stride()) == (other.shape, other.stride())


STRIDED = {
    "every-other-step": lambda x: x.repeat_interleave(2, 0)[::2],
    "features-first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "one-row-expanded": lambda x: x[:, :1].expand_as(x),
    "one-step-expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strided", STRIDED.values(), ids=list(STRIDED))
@both
def test_strides_of_input_and_state_change_nothing(kind, strided, backend):
    module, x = layer(kind), strided(sequence())
    hx = (torch.randn(H).expand(1, B, H), torch.randn(1, H, B).transpose(1, 2))
    assert not any(a.is_contiguous() for a in (x, *hx))
    with running_on(backend):
        results = module(x, hx)
        expected = module(x.contiguous(), tuple(s.contiguous() for s in hx))
    torch.testing.assert_close(results, expected)
