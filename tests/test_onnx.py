"""torch.onnx.export of the layers: onnxruntime computes the same numbers, for any number of steps and rows."""

import functools
import io

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from novolstm_triton import GRU, LSTM, RNN, GRUCell, LSTMCell, NovoLSTM, RecurrentLayer, RNNCell
from novolstm_triton.cells import CELLS

I, H = 5, 8
RESET_BEFORE, PEEPHOLE, COUPLED = (
    functools.partial(RecurrentLayer, CELLS[name]) for name in ("gru_reset_before", "peephole", "coupled")
)
pytestmark = [
    # Of PyTorch's exporter itself.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]


class Call(nn.Module):
    """A model around a layer, whose inputs are all tensors."""

    def __init__(self, layer: nn.Module, state: bool, lengths: bool) -> None:
        super().__init__()
        self.layer, self.state, self.lengths = layer, state, lengths

    def forward(self, x: Tensor, *others: Tensor) -> tuple:
        hx = None
        if self.state:
            hx = others[:2] if len(others) - self.lengths == 2 else others[0]
        y, last = self.layer(x, hx, lengths=others[-1] if self.lengths else None)
        return y, *(last if isinstance(last, tuple) else (last,))


def states_of(layer: RecurrentLayer) -> int:
    """Return how many states a layer has."""
    return len(layer._cell.states)


def arguments(layer: RecurrentLayer, steps: int, batch: int, state: bool, lengths: bool) -> list[Tensor]:
    """Return the inputs of a `Call`; of the rows with lengths the first has none, the last all steps."""
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(*((batch, steps) if layer.batch_first else (steps, batch)), I, generator=generator)
    given = [x]
    if state:
        layers = layer.num_layers * (2 if layer.bidirectional else 1)
        sizes = (layer.proj_size or H, H)[: states_of(layer)]
        given += [torch.randn(layers, batch, size, generator=generator) for size in sizes]
    if lengths:
        rows = torch.randint(0, steps + 1, (batch,), generator=generator)
        rows[0], rows[-1] = 0, steps
        given.append(rows)
    return given


def run_exported(module: nn.Module, example: list[Tensor], dynamic: tuple | None) -> tuple:
    """Export a module; return the ONNX graph's operators and a function that runs it in onnxruntime."""
    if dynamic is not None and len(dynamic) > 1:
        # As the signature has them.
        dynamic = (dynamic[0], dynamic[1:])
    program = torch.onnx.export(module, tuple(example), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())

    def run(given: list[Tensor]) -> list[Tensor]:
        feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), given, strict=True)}
        return [torch.from_numpy(a) for a in session.run(None, feed)]

    return [node.op_type for node in program.model.graph], run


@pytest.mark.covering(
    1, of=lambda cls, options, state, lengths, operator: (cls, state, lengths, operator, len(options))
)
@pytest.mark.parametrize(
    ("cls", "options", "state", "lengths", "operator"),
    [
        pytest.param(LSTM, {}, True, False, "LSTM", id="lstm"),
        pytest.param(
            LSTM, dict(num_layers=2, bidirectional=True, batch_first=True), True, True, "LSTM", id="lstm-lengths"
        ),
        pytest.param(LSTM, dict(proj_size=3, bias=False), False, True, "Scan", id="lstm-projected"),
        pytest.param(LSTM, dict(zoneout_h=0.2, zoneout_c=0.1), False, False, "Scan", id="lstm-zoneout"),
        pytest.param(NovoLSTM, dict(gate_gain="hidden"), False, False, "Scan", id="formula"),
        pytest.param(
            NovoLSTM, dict(bidirectional=True, batch_first=True, variant="notebook"), True, True, "Scan", id="notebook"
        ),
        pytest.param(NovoLSTM, dict(num_layers=2, layer_norm="all"), True, True, "Scan", id="formula-all"),
        pytest.param(GRU, {}, True, False, "GRU", id="gru"),
        pytest.param(
            GRU, dict(num_layers=2, bidirectional=True, batch_first=True), True, True, "GRU", id="gru-lengths"
        ),
        pytest.param(GRU, dict(zoneout_h=0.2, bias=False), False, True, "Scan", id="gru-zoneout"),
        pytest.param(RESET_BEFORE, dict(bidirectional=True), True, True, "GRU", id="gru-reset-before"),
        pytest.param(RESET_BEFORE, dict(zoneout_h=0.2), True, True, "Scan", id="gru-reset-before-zoneout"),
        pytest.param(RNN, dict(num_layers=2), False, False, "RNN", id="tanh"),
        pytest.param(
            RNN, dict(nonlinearity="relu", bias=False, bidirectional=True), True, True, "RNN", id="relu-lengths"
        ),
        pytest.param(PEEPHOLE, dict(bidirectional=True), True, True, "LSTM", id="peephole-lengths"),
        pytest.param(COUPLED, {}, True, True, "Scan", id="coupled"),
    ],
)
def test_computes_the_same_at_any_size(cls, options, state, lengths, operator):
    torch.manual_seed(1)
    layer = cls(I, H, **options)
    module, rows = Call(layer, state, lengths).eval(), 2 if lengths else 1
    time_and_rows = {0: "B", 1: "T"} if layer.batch_first else {0: "T", 1: "B"}
    dynamic = (time_and_rows, *[{1: "B"}] * (states_of(layer) * state), *[{0: "B"}] * lengths)
    operators, run = run_exported(module, arguments(layer, 6, 3, state, lengths), dynamic)
    assert operators.count(operator) == layer.num_layers * (2 if layer.bidirectional else 1)
    assert set(operators) & {"LSTM", "GRU", "RNN", "Scan"} == {operator}
    for steps, batch in ((6, 3), (1, rows), (70, 5)):
        given = arguments(layer, steps, batch, state, lengths)
        for result, expected in zip(run(given), module(*given), strict=True):
            torch.testing.assert_close(result, expected.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [LSTMCell, GRUCell, RNNCell])
def test_single_cell(kind):
    cell = kind(I, H).eval()
    x = torch.randn(3, I)
    operators, run = run_exported(cell, [x], None)
    assert kind.__name__.removesuffix("Cell") in operators
    states = cell(x) if kind is LSTMCell else (cell(x),)
    for result, expected in zip(run([x]), states, strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=0, atol=1e-6)


def test_layers_within_a_model():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, I)
            self.first = NovoLSTM(I, H, batch_first=True, num_layers=2, dropout=0.1)
            self.second = LSTM(H, H, batch_first=True)
            self.head = nn.Linear(H, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.second(self.first(self.embedding(tokens))[0])[0])

    model = Model().eval()
    operators, run = run_exported(model, [torch.zeros(2, 4, dtype=torch.int64)], ({0: "B", 1: "T"},))
    assert (operators.count("Scan"), operators.count("LSTM")) == (2, 1)
    tokens = torch.randint(0, 11, (4, 33))
    torch.testing.assert_close(run([tokens])[0], model(tokens).detach(), rtol=0, atol=2e-5)
