"""The layers under torch.compile: one graph, few compilations over many lengths, the results of eager mode."""

import copy

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from novolstm_triton import LSTM, LSTMCell, NovoLSTM, NovoLSTMCell, detach_state, plan, use_backend

from .support.layers import REGULARISED, B, H, I, assert_equal, both, layer, sequence, states
from .support.twins import assert_close, differentiate, running_on

# Dynamo itself does what these warnings of PyTorch's forbid.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_copy(module, **options):
    """Return a copy that compiles itself at its first call into one graph, and the counter of its graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    other = copy.deepcopy(module)
    other.compile(backend=counter, fullgraph=True, **options)
    return other, counter


def seeded(module, *args, **options):
    """Return results and gradients of a call from a known state of the generator, and that state after it."""
    torch.manual_seed(3)
    results = differentiate(module, *args, **options)
    return results | {"generator": torch.random.get_rng_state()}


@pytest.mark.covering(1)
@both
@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(bidirectional=True, batch_first=True), id="bidirectional"),
        pytest.param(dict(proj_size=2), id="projected"),
        pytest.param(REGULARISED, id="regularised"),
    ],
)
def test_eight_lengths_take_two_graphs(kind, options, with_lengths):
    module = layer(kind, **options)
    compiled, counter = compiled_copy(module)
    for steps in (5, 6, 7, 9, 16, 17, 64, 130):
        x = sequence(steps)
        x = (x.transpose(0, 1) if module.batch_first else x).requires_grad_()
        given = dict(lengths=torch.tensor([steps, 0, steps // 2])) if with_lengths else {}
        assert_equal(seeded(compiled, x, **given), seeded(module, x, **given))
    # The first length has a graph of its own; one other serves all lengths, so a step leaves nothing in it.
    assert counter.frame_count <= 2


@both
def test_batches_of_eight_sizes_take_two_graphs(kind):
    module = layer(kind)
    compiled, counter = compiled_copy(module)
    for rows in (2, 3, 4, 7, 8, 33, 100, 300):
        x = sequence(rows=rows, requires_grad=True)
        assert_equal(differentiate(compiled, x), differentiate(module, x))
    assert counter.frame_count <= 2


@both
def test_graph_does_not_grow_with_the_sequence(kind):
    sizes = []
    for steps in (5, 200):
        compiled, counter = compiled_copy(layer(kind, **REGULARISED), dynamic=False)
        differentiate(compiled, sequence(steps, requires_grad=True))
        sizes += [len(graph.graph.nodes) for graph in counter.graphs]
    assert len(sizes) == 2
    assert len(set(sizes)) == 1


@both
def test_state_is_carried(kind):
    module = layer(kind, num_layers=2)
    compiled, counter = compiled_copy(module)
    x, state, expected_state = sequence(12), states(module), states(module)
    for part in x.split(4):
        y, state = compiled(part, detach_state(state))
        expected, expected_state = module(part, detach_state(expected_state))
        assert torch.equal(y, expected)
    assert torch.equal(state[0], expected_state[0])
    assert torch.equal(state[1], expected_state[1])
    assert counter.frame_count == 1


class Tagger(nn.Module):
    """A model in which the layer is a part."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embedding = nn.Embedding(10, I)
        self.rnn = layer(kind, **options)
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, 10)

    def forward(self, tokens, lengths):
        y, (h_n, _) = self.rnn(self.embedding(tokens), lengths=lengths)
        logits = self.head(self.norm(y) + h_n[-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@both
def test_training_a_model_that_contains_a_layer(kind):
    curves = []
    model = Tagger(kind, **REGULARISED)
    other, counter = compiled_copy(model)
    for each in (model, other):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.05)
        torch.manual_seed(5)
        losses = []
        for steps in (6, 9, 4, 11):
            loss = each(torch.randint(10, (steps, B)), torch.randint(1, steps + 1, (B,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == curves[1]
    assert counter.frame_count <= 2


@both
def test_without_gradients(kind):
    module = layer(kind, num_layers=2).eval()
    compiled, _ = compiled_copy(module)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(sequence())[0], module(sequence())[0])


@both
def test_step_by_step(kind):
    module = layer(kind, num_layers=2)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(module.step, backend=counter, fullgraph=True)
    state = states(module)
    y, _ = module(sequence(), state)
    for t, x in enumerate(sequence()):
        out, state = step(x, state)
        torch.testing.assert_close(out, y[t])
    # The first state has no history.
    assert counter.frame_count <= 2


@both
def test_autocast_within_the_graph(kind):
    module = layer(kind, bidirectional=True)
    compiled, _ = compiled_copy(module)
    results = []
    for each in (module, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(differentiate(each, sequence(requires_grad=True)))
    assert results[0]["y"].dtype == torch.bfloat16
    assert_equal(*results)


@both
def test_checkpoint_within_the_graph(kind):
    module = layer(kind, **REGULARISED)
    x = sequence(requires_grad=True)

    def loss(x):
        return checkpoint(lambda x: module(x)[0].square().sum(), x, use_reentrant=False)

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(function(x), [x, *module.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_packed_rows_break_the_graph_and_nothing_else():
    """The sizes of a PackedSequence are values of a tensor, which no graph knows; `lengths` keeps it whole."""
    module = layer(LSTM, bidirectional=True)
    compiled = torch.compile(module, backend="aot_eager")
    for lengths in ([5, 3, 1], [4, 4, 2]):
        packed = pack_padded_sequence(sequence(), torch.tensor(lengths))
        assert torch.equal(compiled(packed)[0].data, module(packed)[0].data)


@both
def test_on_triton(kind):
    module = layer(kind, bidirectional=True)
    with running_on("triton"):
        compiled, _ = compiled_copy(module)
        x, lengths = sequence(3, requires_grad=True), torch.tensor([3, 0, 2])
        assert_equal(differentiate(compiled, x, lengths=lengths), differentiate(module, x, lengths=lengths))


@both
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")
def test_inductor(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module = layer(kind)
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True)
    x, lengths = sequence(requires_grad=True), torch.tensor([5, 0, 2])
    # No pool of compiling processes, which would outlive the test.
    with torch._inductor.config.patch(compile_threads=1):
        results = differentiate(compiled, x, lengths=lengths)
    assert_close(results, differentiate(module, x, lengths=lengths))


@pytest.mark.parametrize("kind", [NovoLSTMCell, LSTMCell])
def test_a_single_cell_in_a_loop(kind):
    torch.manual_seed(0)
    cell = kind(I, H)

    def loop(x, state):
        for part in x.unbind(0):
            state = cell(part, state)
        return state

    compiled = torch.compile(loop, backend="aot_eager", fullgraph=True)
    state = (torch.randn(B, H), torch.randn(B, H))
    for h, expected in zip(compiled(sequence(), state), loop(sequence(), state), strict=True):
        # A graph has an operator where a call outside one takes PyTorch's own: another order of sums.
        torch.testing.assert_close(h, expected)


def test_transforms_within_a_graph_name_the_way_out():
    module, x = layer(NovoLSTM), sequence()

    def gradient(x):
        return torch.func.grad(lambda x: module(x)[0].sum())(x)

    # Where the graph may break, that is what happens.
    assert torch.equal(torch.compile(gradient, backend="aot_eager")(x), gradient(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="use backend='reference'"):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(x)


def test_choices_in_force_are_those_of_the_tracing():
    module, x = layer(NovoLSTM), sequence(requires_grad=True)
    with plan.forced(chunk=2), use_backend("torch"):
        expected = differentiate(module, x)
        compiled, _ = compiled_copy(module)
        assert_equal(differentiate(compiled, x), expected)
    # Outside of the block, too.
    assert_equal(differentiate(compiled, x), expected)
