"""Rows of different length: run in buckets, so that memory and work follow what the rows hold."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from novolstm_triton import LSTM, NovoLSTM
from novolstm_triton.layers.ragged import cut

from .support.layers import B, H, I, T, both, layer, sequence, states

RAGGED = torch.tensor([3, 1, 60, 2, 3, 0, 3, 2, 1, 3, 2, 2, 0, 17, 3, 1, 2, 1, 3, 2, 1, 1, 3, 2])
"""Two long rows among short and empty ones, unsorted."""


def inputs(kind, lengths, **options):
    """Return a layer, its input and its state, in float64."""
    module = layer(kind, num_layers=2, bidirectional=True, **options).double()
    x = sequence(int(lengths.max()), len(lengths), dtype=torch.float64)
    hx = states(module, len(lengths), dtype=torch.float64)
    return module, x.requires_grad_(), tuple(s.requires_grad_() for s in hx)


def row_by_row(module, x, hx, lengths):
    """Run each row by itself; return y, zero after its length, h_n and c_n."""
    ys, states_after = [], []
    for b, length in enumerate(lengths.tolist()):
        own = tuple(s[:, b : b + 1] for s in hx)
        y, after = module(x[:length, b : b + 1], own) if length else (x.new_zeros(0, 1, 2 * H), own)
        ys.append(nn.functional.pad(y, (0, 0, 0, 0, 0, len(x) - length)))
        states_after.append(after)
    return torch.cat(ys, 1), *(torch.cat(parts, 1) for parts in zip(*states_after, strict=True))


def padded_steps(module, monkeypatch) -> list[int]:
    """Return a list to which every batch that the layers run adds its steps times its rows."""
    found, run = [], module._run
    monkeypatch.setattr(module, "_run", lambda x, *rest, **own: found.append(x[..., 0].numel()) or run(x, *rest, **own))
    return found


def assert_same_results_and_gradients(results, expected, wanted):
    torch.testing.assert_close(results, expected)
    weights = [torch.arange(r.numel(), dtype=r.dtype).view(r.shape).cos() for r in expected]
    gradients = [torch.autograd.grad(rs, wanted, weights) for rs in (results, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@both
def test_lengths_far_apart_run_in_buckets(kind, backend, monkeypatch):
    module, x, hx = inputs(kind, RAGGED, backend=backend)
    expected = row_by_row(module, x, hx, RAGGED)
    found = padded_steps(module, monkeypatch)
    y, (h_n, c_n) = module(x, hx, lengths=RAGGED)
    assert len(found) > 1
    assert sum(found) <= 2 * int(RAGGED.sum())
    assert_same_results_and_gradients((y, h_n, c_n), expected, [x, *hx, *module.parameters()])


@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@both
def test_packed_rows_far_apart_run_in_buckets(kind, enforce_sorted, monkeypatch):
    lengths = RAGGED[RAGGED > 0]
    lengths = lengths.sort(descending=True).values if enforce_sorted else lengths
    module, x, hx = inputs(kind, lengths)
    expected = row_by_row(module, x, hx, lengths)
    found = padded_steps(module, monkeypatch)
    packed, (h_n, c_n) = module(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted), hx)
    y, own_lengths = pad_packed_sequence(packed)
    assert torch.equal(own_lengths, lengths)
    assert len(found) > 1
    assert sum(found) <= 2 * int(lengths.sum())
    assert_same_results_and_gradients((y, h_n, c_n), expected, [x, *hx, *module.parameters()])


def test_rows_of_similar_length_stay_one_batch(monkeypatch):
    module, lengths = layer(LSTM), torch.tensor([5, 3, 4])
    found = padded_steps(module, monkeypatch)
    module(sequence(), lengths=lengths)
    module(pack_padded_sequence(sequence(), lengths, enforce_sorted=False))
    assert found == [T * B] * 2


def test_lengths_do_not_change_what_a_seed_draws():
    module, x = layer(LSTM, recurrent_dropout=0.5, zoneout_h=0.5), sequence(60, len(RAGGED))
    results = []
    for lengths in (RAGGED, None):
        torch.manual_seed(7)
        results.append(module(x, lengths=lengths)[0])
    rows = RAGGED == 60
    torch.testing.assert_close(results[0][:, rows], results[1][:, rows])
    assert not torch.equal(results[1], module(x)[0])


@given(st.lists(st.integers(0, 200), min_size=1, max_size=60))
def test_buckets_cover_the_rows_and_cost_no_more_than_one(lengths):
    lengths = torch.tensor(sorted(lengths, reverse=True))
    buckets = cut(lengths)
    assert [first for first, _ in buckets] == [0, *(last for _, last in buckets[:-1])]
    assert buckets[-1][1] == len(lengths)
    assert all(first < last for first, last in buckets)
    steps = [int(lengths[first]) for first, _ in buckets]
    padded = sum(n * (last - first) for n, (first, last) in zip(steps, buckets, strict=True))
    assert padded + 16 * sum(steps) + 256 * len(buckets) <= int(lengths[0]) * (len(lengths) + 16) + 256


def test_one_long_row_among_hundreds_is_a_bucket_of_its_own():
    lengths = torch.tensor([1000, *torch.arange(767).remainder(9).add(3).sort(descending=True).values])
    assert cut(lengths)[0] == (0, 1)
    assert sum(int(lengths[first]) * (last - first) for first, last in cut(lengths)) < 1.5 * int(lengths.sum())


class Tagger(nn.Module):
    """Packs rows, runs them and pads the results."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(self.module(packed)[0])[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
@both
def test_traced_packed_rows_may_be_longer_and_more(kind):
    tagger = Tagger(layer(kind, num_layers=2, bidirectional=True))
    traced: Any = torch.jit.trace(tagger, (sequence(), torch.tensor([5, 3, 1])))
    for lengths in (torch.tensor([12, 2, 5, 1, 3, 3]), torch.tensor([2, 1]), RAGGED[RAGGED > 0]):
        x = sequence(int(lengths.max()), len(lengths))
        torch.testing.assert_close(traced(x, lengths), tagger(x, lengths))


@both
def test_packed_rows_on_meta_have_the_shapes_of_nn_lstm(kind):
    x, lengths = sequence(device="cpu").to("meta"), torch.tensor([5, 3, 1])
    packed = pack_padded_sequence(x, lengths)
    y, (h_n, c_n) = kind(I, H, device="meta")(packed)
    expected, (h_expected, c_expected) = nn.LSTM(I, H, device="meta")(packed)
    assert y.data.shape == expected.data.shape
    assert (h_n.shape, c_n.shape) == (h_expected.shape, c_expected.shape)
    assert y.data.is_meta


def test_compiling_around_packed_rows_warns_of_nothing():
    """The graph ends at the layer, as it does at nn.LSTM, and says no more of it than there."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(handler)
    try:
        for module in (nn.LSTM(I, H), layer(LSTM), layer(NovoLSTM)):
            tagger = Tagger(module)
            compiled = torch.compile(tagger, backend="eager")
            for lengths in (torch.tensor([5, 3, 1]), torch.tensor([7, 2])):
                x = sequence(int(lengths[0]), len(lengths))
                torch.testing.assert_close(compiled(x, lengths), tagger(x, lengths))
    finally:
        logger.removeHandler(handler)
        torch._dynamo.reset()
    assert messages == []


def test_packed_list_of_rows_gives_rows_back():
    rows = [sequence(steps, 1).squeeze(1) for steps in (40, 2, 1, 2, 3, 1, 2, 2, 1)]
    module = layer(LSTM)
    y, _ = module(pack_sequence(rows, enforce_sorted=False))
    for own, row in zip(pad_packed_sequence(y)[0].unbind(1), rows, strict=True):
        torch.testing.assert_close(own[: len(row)], module(row)[0])
