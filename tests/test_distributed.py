"""The layers in two processes that talk over gloo: DistributedDataParallel and fully_shard against one process."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from novolstm_triton import LSTM, NovoLSTM

from .support.layers import H, I, T, layer, sequence

# All cases share two processes.
pytestmark = pytest.mark.xdist_group("distributed")
STEPS, ROWS, WORLD = 6, 4, 2

LIMIT_S = 60
"""Time after which processes that wait for each other have failed."""

OPTIONS = dict(num_layers=2, bidirectional=True)


class Model(nn.Module):
    """A layer with a head, over rows of different length."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.rnn = layer(kind, **OPTIONS)
        self.head = nn.Linear(2 * H, I)

    def forward(self, x, lengths):
        y, (h_n, _) = self.rnn(x, lengths=lengths)
        return self.head(y + h_n[-1].repeat(1, 2))


def curve(model, rows) -> list[float]:
    """Train on some rows of the batch; return the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    x, target = (sequence(T, ROWS, seed=seed)[:, rows] for seed in (1, 2))
    lengths = torch.tensor([5, 1, 3, 4])[rows]
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x, lengths).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharing(name, model):
    """Return a model whose processes average their gradients."""
    if name == "ddp":
        return DistributedDataParallel(model)
    options = {}
    if name == "fsdp-bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.rnn, **options)
    return fully_shard(model, **options)


def work(rank: int, folder: str) -> None:
    """Be one of two processes: train on half of the rows; save the losses of both and the weights at the end."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    try:
        distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=LIMIT_S)
        )
    except Exception as error:
        raise RuntimeError("gloo cannot connect two processes here: does a sandbox forbid local sockets?") from error
    try:
        for kind, name in CASES:
            model = sharing(name, Model(kind))
            share = ROWS // WORLD
            losses = torch.tensor(curve(model, slice(rank * share, (rank + 1) * share)))
            distributed.all_reduce(losses)
            weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            if rank == 0:
                torch.save(((losses / WORLD).tolist(), weights), Path(folder, f"{kind.__name__}-{name}"))
    finally:
        distributed.destroy_process_group()


CASES = [(kind, name) for kind in (NovoLSTM, LSTM) for name in ("ddp", "fsdp", "fsdp-bf16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder with the results of two processes, which run all cases one after the other."""
    path = tmp_path_factory.mktemp("distributed")
    processes = start_processes(work, (str(path),), nprocs=WORLD, join=False, start_method="spawn")
    assert processes is not None
    try:
        # Returns at the end of each; where one waits in vain, gloo gives up.
        while not processes.join():
            pass
    finally:
        for process in processes.processes:
            if process is not None:
                process.kill()
    return path


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_processes_train_like_one_on_the_whole_batch(folder, kind, name):
    losses, weights = torch.load(folder / f"{kind.__name__}-{name}", weights_only=True)
    model = Model(kind)
    expected = curve(model, slice(None))
    tolerance = 3e-2 if name == "fsdp-bf16" else 1e-5
    assert losses == pytest.approx(expected, rel=tolerance)
    assert losses[-1] < 0.95 * losses[0]
    # The weights go back into a model of one process.
    twin = Model(kind)
    twin.load_state_dict(weights)
    for own, trained in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, trained, rtol=0, atol=0.1 if name == "fsdp-bf16" else 1e-4)
