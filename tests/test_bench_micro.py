"""bench/gpu/micro.py's kernels whose programs wait for each other, interpreted with their programs concurrent."""

import importlib
import pathlib
import sys

import pytest
import torch

from novolstm_triton.testing import cooperative

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
gpu_micro = importlib.import_module("gpu.micro")


@pytest.mark.parametrize("seed", range(3))
def test_barrier_meets_every_round(seed):
    counter, words = torch.zeros(1, dtype=torch.int32), torch.zeros(4 * 128, dtype=torch.int32)
    with cooperative(seed):
        gpu_micro.barrier_kernel[(4,)](counter, words, 6, GROUP=4)
    assert counter.item() == 4 * 6
    assert torch.equal(words, torch.arange(4 * 128, dtype=torch.int32) + 5)


@pytest.mark.parametrize("seed", range(3))
def test_handoff_ends_with_the_last_word_of_both(seed):
    words = torch.zeros(64, dtype=torch.int32)
    # A word tells by itself that it has arrived: nothing else orders these accesses.
    with cooperative(seed, check_races=False):
        gpu_micro.handoff_kernel[(2,)](words, 5)
    assert (words[0].item(), words[32].item()) == (5, 5)


def test_chase_follows_the_chain():
    order = torch.tensor([2, 0, 3, 1])
    follow, out = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    follow[order] = order.roll(-1).to(torch.int32)
    with cooperative(0):
        gpu_micro.chase_kernel[(1,)](follow, out, 2)
    expected = follow[0]
    for _ in range(2):
        expected = follow[expected]
    assert out.item() == expected.item()


def test_read_sums_the_whole_buffer():
    data, out = torch.arange(64, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with cooperative(0):
        gpu_micro.read_kernel[(2,)](data, out, 3, 4, BLOCK=16)
    assert out.tolist() == [3 * data.sum().item()] * 2


def test_a_round_is_what_more_rounds_cost_more(monkeypatch):
    # 10 us to start, 2 us a round.
    monkeypatch.setattr(gpu_micro, "time_us", lambda function, device: 10 + 2 * function())
    assert gpu_micro.per_round_us(lambda count: count, 100, "cpu") == pytest.approx(2)
