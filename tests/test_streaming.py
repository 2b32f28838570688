"""Single cells against PyTorch's and the reference, and sequences fed in pieces against the same sequences whole."""

import collections
import copy
import re
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from novolstm_triton import LSTM, LSTMCell, NovoLSTM, NovoLSTMCell, detach_state
from novolstm_triton.cells import CELLS, LAYER_NORMS, VARIANTS, novolstm_cell
from novolstm_triton.engines import reference

from .support.ordered import ordered
from .support.twins import BACKENDS, assert_close, copied, differentiate, running_on

T, B, I, H = 7, 3, 4, 6
M = TypeVar("M", bound=nn.Module)

OPTIONS = [dict(variant=variant, layer_norm=norms) for variant in VARIANTS for norms in LAYER_NORMS]
STACKS = [
    pytest.param(LSTM, dict(), id="lstm"),
    pytest.param(LSTM, dict(num_layers=2, bias=False), id="lstm-stacked"),
    *(pytest.param(NovoLSTM, options | {"gate_gain": "hidden"}, id="-".join(options.values())) for options in OPTIONS),
    pytest.param(NovoLSTM, dict(num_layers=2, variant="notebook"), id="notebook-stacked"),
]
# What single cells have not.
LAYERS_ONLY = [
    pytest.param(LSTM, dict(proj_size=2, num_layers=2), id="lstm-projected"),
    pytest.param(NovoLSTM, dict(proj_size=2, gate_gain="hidden"), id="formula-projected"),
    pytest.param(NovoLSTM, dict(zoneout_h=0.25, zoneout_c=0.125), id="formula-zoneout"),
]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def jittered(module: M) -> M:
    """Return the module with all parameters moved, so that no two gates and no normalisation are alike."""
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter += 0.3 * normal(*parameter.shape, dtype=parameter.dtype, seed=k)
    return module


def make(cls: type, dtype: torch.dtype = torch.float64, **options) -> LSTM | NovoLSTM:
    return jittered(cls(I, H, dtype=dtype, **options)).eval()


def state_of(layer: LSTM | NovoLSTM, rows: int = B) -> tuple[Tensor, Tensor]:
    """Return a state whose gradients are wanted."""
    dtype, sizes = layer.weight_ih_l0.dtype, (layer.proj_size or H, H)
    h, c = (normal(layer.num_layers, rows, size, dtype=dtype, seed=size).requires_grad_() for size in sizes)
    return h, c


class Fed(nn.Module):
    """A module fed with a sequence by a function of itself, the sequence and the state, called like a layer."""

    def __init__(self, module: nn.Module, feed):
        super().__init__()
        self.module, self.feed = module, feed

    def forward(self, x, hx=None):
        return self.feed(self.module, x, hx)


def whole(layer, x, state):
    return layer(x, state)


def by_steps(layer, x, state):
    y = []
    time = 1 if layer.batch_first and x.dim() == 3 else 0
    for x_t in x.unbind(time):
        y_t, state = layer.step(x_t, state)
        y.append(y_t)
    return torch.stack(y, time), state


def in_chunks(layer, x, state):
    y = []
    for chunk in x.split((1, 4, 2), 1 if layer.batch_first else 0):
        y_chunk, state = layer(chunk, state)
        y.append(y_chunk)
    return torch.cat(y, 1 if layer.batch_first else 0), state


def by_cells(layer, x, state):
    cells = cells_of(layer)
    states = list(zip(*state, strict=True))
    y = []
    for h in x:
        for k, cell in enumerate(cells):
            states[k] = cell(h, states[k])
            h = states[k][0]
        y.append(h)
    h_n, c_n = (torch.stack(s) for s in zip(*states, strict=True))
    return torch.stack(y), (h_n, c_n)


def once(cell, x, state):
    h, c = cell(x, state)
    return h, (h, c)


def cells_of(layer: LSTM | NovoLSTM) -> list[LSTMCell | NovoLSTMCell]:
    """Return a cell for each layer, which shares its parameters."""
    cells = []
    for k in range(layer.num_layers):
        features, options = layer.input_size if k == 0 else H, dict(bias=layer.bias, backend=layer.backend)
        if isinstance(layer, NovoLSTM):
            cell = NovoLSTMCell(
                features, H, **options, variant=layer.variant, layer_norm=layer.layer_norm, gate_gain=layer.gate_gain
            )
        else:
            cell = LSTMCell(features, H, **options)
        for name in dict(cell.named_parameters()):
            setattr(cell, name, layer.get_parameter(f"{name}_l{k}"))
        cells.append(cell)
    return cells


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "no-state"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_lstm_cell_computes_what_nn_lstm_cell_computes(bias, batched, given, dtype):
    theirs = nn.LSTMCell(I, H, bias, dtype=dtype)
    ours = LSTMCell(I, H, bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    rows = (B,) if batched else ()
    x = normal(*rows, I, dtype=dtype).requires_grad_()
    state = tuple(normal(*rows, H, dtype=dtype, seed=k).requires_grad_() for k in (2, 3)) if given else None
    expected, got = (differentiate(Fed(cell, once), x, state) for cell in (theirs, ours))
    assert_close(got, expected)


@pytest.mark.parametrize("cls", [LSTMCell, NovoLSTMCell])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_run_on_every_backend(backend, cls):
    cell = jittered(cls(I, H))
    x, state = normal(B, I), (normal(B, H, seed=2), normal(B, H, seed=3))
    truth = differentiate(Fed(copy.deepcopy(cell).double(), once), x, state)
    x, state = copied(x, torch.float32), copied(state, torch.float32)
    with running_on("reference"):
        eager = differentiate(Fed(cell, once), x, state)
    with running_on(backend):
        assert_close(differentiate(Fed(cell, once), x, state), truth, eager)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()))
def test_novolstm_cell_is_a_step_of_the_reference(options, bias):
    cell = jittered(NovoLSTMCell(I, H, bias, dtype=torch.float64, gate_gain=2.5, ln_eps=0.01, **options))

    def step(cell, x, state):
        total = torch.zeros(5 * H, dtype=torch.float64)
        if bias:
            missing = 5 * H - len(cell.bias_hh)
            total = cell.bias_ih + nn.functional.pad(cell.bias_hh, (0, missing))
        equations, vectors = CELLS[novolstm_cell(**options)], [*cell.ln_weight.split(H), *cell.ln_bias.split(H)]
        for block in equations.gained:
            vectors[block] = 2.5 * vectors[block]
        weights = reference.Weights(cell.weight_ih, cell.weight_hh, total, tuple(vectors))
        h, c = reference.step(x, state[0], state[1], weights, equations, 0.01)
        return h, (h, c)

    x, state = normal(B, I).requires_grad_(), (normal(B, H, seed=2), normal(B, H, seed=3))
    assert_close(differentiate(Fed(cell, once), x, state), differentiate(Fed(cell, step), x, state))


def test_gate_gain_hidden_of_a_cell_means_the_number_of_units():
    cells = [jittered(NovoLSTMCell(I, H, gate_gain=gain)) for gain in ("hidden", H, 1.0)]
    for cell in cells[1:]:
        cell.load_state_dict(cells[0].state_dict())
    h, same, other = (cell(normal(B, I, dtype=torch.float32))[0] for cell in cells)
    assert torch.equal(h, same)
    assert not torch.equal(h, other)


@pytest.mark.parametrize("cls", [LSTMCell, NovoLSTMCell])
@pytest.mark.parametrize("given", [True, False], ids=["state", "no-state"])
def test_cells_take_a_batch_of_no_rows(cls, given):
    cell = cls(I, H)
    state = (torch.zeros(0, H), torch.zeros(0, H)) if given else None
    h, c = cell(torch.zeros(0, I), state)
    assert h.shape == c.shape == (0, H)
    (h + c).sum().backward()
    assert all((p.grad == 0).all() for p in cell.parameters())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_lstm_cell_starts_and_looks_like_nn_lstm_cell(bias):
    made = []
    for cls in (nn.LSTMCell, LSTMCell):
        torch.manual_seed(0)
        made.append(cls(I, H, bias, dtype=torch.float64))
    theirs, ours = made
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (ours.bias_ih is None) == (theirs.bias_ih is None) == (not bias)


def test_novolstm_cell_shows_what_is_not_default():
    assert repr(NovoLSTMCell(I, H)) == f"NovoLSTMCell({I}, {H})"
    cell = NovoLSTMCell(I, H, False, variant="notebook", layer_norm="all", backend="torch")
    expected = f"NovoLSTMCell({I}, {H}, bias=False, backend='torch', variant='notebook', layer_norm='all')"
    assert repr(cell) == expected


@pytest.mark.parametrize("cls", [LSTMCell, NovoLSTMCell])
def test_device_and_dtype_of_a_cell_reach_all_parameters_and_results(cls):
    cell = cls(I, H, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in cell.parameters()} == {("meta", torch.bfloat16)}
    h, c = cell(torch.empty(B, I, device="meta", dtype=torch.bfloat16))
    assert (h.shape, h.dtype, h.device) == (c.shape, c.dtype, c.device) == ((B, H), torch.bfloat16, h.device)


def zeros(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    return tuple(torch.zeros(size, dtype=dtype, device=device) for size in sizes)


ROW, STATE = (B, I), (B, H)
SAME_ERRORS = {
    "features": (*zeros((B, I + 1)), None),
    "features-unbatched": (*zeros((I + 1,)), None),
    "rank-3": (*zeros((1, B, I)), None),
    "rank-0": (*zeros(()), None),
    "state-rank": (*zeros(ROW), zeros((1, B, H), (1, B, H))),
    "h-units": (*zeros(ROW), zeros((B, H + 1), STATE)),
    "c-units": (*zeros(ROW), zeros(STATE, (B, H + 1))),
    "units-unbatched": (*zeros((I,)), zeros((H + 1,), (H + 1,))),
    "h-rows": (*zeros(ROW), zeros((B + 1, H), STATE)),
    "c-rows": (*zeros(ROW), zeros(STATE, (B + 1, H))),
    "no-tensor": (None, None),
}
SAME_START = {
    "x-dtype": (*zeros(ROW, dtype=torch.float64), None),
    "x-integers": (*zeros(ROW, dtype=torch.int64), None),
    "h-dtype": (*zeros(ROW), (*zeros(STATE, dtype=torch.float64), *zeros(STATE))),
}
# Where nn.LSTMCell reads a rank as a size, names no device, or takes what does not fit.
OWN_WORDS = {
    "state-unbatched": (*zeros(ROW), zeros((H,), (H,)), RuntimeError, "For batched 2-D input, hx and cx should"),
    "state-batched": (*zeros((I,)), zeros((1, H), (1, H)), RuntimeError, "For unbatched 1-D input, hx and cx should"),
    "c-dtype": (
        *zeros(ROW),
        (*zeros(STATE), *zeros(STATE, dtype=torch.float64)),
        RuntimeError,
        r"got Double and Float: the dtypes of hx\[1\] and of the parameters",
    ),
    "x-device": (*zeros(ROW, device="meta"), None, RuntimeError, "Input and parameter tensors are not at the same"),
    "h-device": (*zeros(ROW), zeros(STATE, STATE, device="meta"), RuntimeError, "Input and hidden tensors are not at"),
    "one-tensor": (*zeros(ROW), *zeros((2, B, H)), TypeError, r"expected .* a tuple \(h_0, c_0\), got a Tensor"),
    "three-states": (*zeros(ROW), zeros(STATE, STATE, STATE), TypeError, "got tuple of Tensor, Tensor, Tensor"),
}


@pytest.mark.parametrize("case", [*SAME_ERRORS, *SAME_START])
@pytest.mark.parametrize("cls", [LSTMCell, NovoLSTMCell])
def test_bad_calls_of_a_cell_raise_what_nn_lstm_cell_raises(cls, case):
    arguments = SAME_ERRORS.get(case) or SAME_START[case]
    with pytest.raises((AttributeError, RuntimeError, ValueError)) as theirs:
        nn.LSTMCell(I, H)(*arguments)
    # Of two dtypes, ours also says what has them.
    rest = "$" if case in SAME_ERRORS else ": the dtypes of "
    words = re.escape(str(theirs.value)).replace("LSTMCell", cls.__name__)
    with pytest.raises(theirs.type, match=f"^{words}{rest}"):
        cls(I, H)(*arguments)


@pytest.mark.parametrize("case", OWN_WORDS)
def test_bad_calls_of_a_cell_in_our_own_words(case):
    *arguments, error, words = OWN_WORDS[case]
    with pytest.raises(error, match=words):
        LSTMCell(I, H)(*arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        pytest.param((0, H), dict(), ValueError, "input_size must be greater than zero", id="input_size"),
        pytest.param((I, 2.0), dict(), TypeError, "hidden_size should be of type int, got: float", id="hidden_size"),
        pytest.param((I, H, 1), dict(), TypeError, "bias should be of type bool, got: int", id="bias"),
        pytest.param((I, H), dict(variant="paper"), ValueError, "variant: expected one of", id="variant"),
        pytest.param((I, H), dict(layer_norm="none"), ValueError, "layer_norm: expected one of", id="layer_norm"),
        pytest.param((I, H), dict(gate_gain="large"), ValueError, "gate_gain: expected a finite", id="gate_gain"),
        pytest.param((I, H), dict(backend="cuda"), ValueError, "backend: expected one of", id="backend"),
    ],
)
def test_bad_constructor_arguments_of_a_cell(arguments, options, error, words):
    with pytest.raises(error, match=words):
        NovoLSTMCell(*arguments, **options)


@pytest.mark.parametrize("feed", [by_steps, in_chunks], ids=lambda feed: feed.__name__)
@pytest.mark.parametrize(("cls", "options"), [*STACKS, *LAYERS_ONLY])
def test_layer_fed_in_pieces_computes_what_it_computes_of_the_whole(cls, options, feed):
    layer = make(cls, **options)
    arguments = normal(T, B, I).requires_grad_(), state_of(layer)
    assert_close(differentiate(Fed(layer, feed), *arguments), differentiate(Fed(layer, whole), *arguments))


@pytest.mark.parametrize(("cls", "options"), STACKS)
def test_cells_with_a_layers_parameters_compute_what_it_computes(cls, options):
    layer = make(cls, **options)
    arguments = normal(T, B, I).requires_grad_(), state_of(layer)
    assert_close(differentiate(Fed(layer, by_cells), *arguments), differentiate(Fed(layer, whole), *arguments))


@pytest.mark.parametrize(("cls", "options"), STACKS)
def test_reference_computes_the_same_bits_whole_or_in_pieces(cls, options):
    layer = make(cls, dtype=torch.float32, backend="reference", **options)
    x, state = normal(T, B, I, dtype=torch.float32), state_of(layer)
    with ordered():
        y, (h, c) = layer(x, state)
        fed = [feed(layer, x, state) for feed in (by_steps, in_chunks, by_cells)]
    for fed_y, (fed_h, fed_c) in fed:
        assert torch.equal(fed_y, y)
        assert torch.equal(fed_h, h)
        assert torch.equal(fed_c, c)


@pytest.mark.parametrize("cls", [LSTM, NovoLSTM])
def test_triton_computes_of_steps_what_it_computes_of_the_whole(cls):
    layer = make(cls, dtype=torch.float32)
    double, x = copy.deepcopy(layer).double(), normal(3, B, I)
    truth = differentiate(Fed(double, whole), x, state_of(double))
    arguments = copied(x, torch.float32), state_of(layer)
    with running_on("reference"):
        eager = differentiate(Fed(layer, whole), *arguments)
    with running_on("triton"):
        assert_close(differentiate(Fed(layer, by_steps), *arguments), truth, eager)


@pytest.mark.parametrize("feed", [by_steps, in_chunks], ids=lambda feed: feed.__name__)
def test_pieces_of_a_sequence_with_its_batch_first(feed):
    layer = make(NovoLSTM, num_layers=2, batch_first=True)
    arguments = normal(B, T, I).requires_grad_(), state_of(layer)
    assert_close(differentiate(Fed(layer, feed), *arguments), differentiate(Fed(layer, whole), *arguments))


@pytest.mark.parametrize("batch_first", [False, True], ids=["T-first", "B-first"])
def test_steps_of_one_unbatched_sequence(batch_first):
    layer = make(LSTM, num_layers=2, batch_first=batch_first)
    x, (h, c) = normal(T, I), state_of(layer, rows=1)
    arguments = x, (h.squeeze(1), c.squeeze(1))
    assert_close(differentiate(Fed(layer, by_steps), *arguments), differentiate(Fed(layer, whole), *arguments))
    assert layer.step(x[0])[0].shape == (H,)


def test_first_step_needs_no_state():
    layer = make(NovoLSTM, num_layers=2)
    x = normal(T, B, I)
    torch.testing.assert_close(by_steps(layer, x, None)[0], layer(x)[0])


def test_rows_of_different_length_in_chunks():
    layer, lengths = make(NovoLSTM, num_layers=2), torch.tensor([7, 0, 3])
    x, state = normal(T, B, I), state_of(layer)
    y, (h, c) = layer(x, state, lengths=lengths)
    parts, start = [], 0
    for chunk in x.split((2, 4, 1)):
        part, state = layer(chunk, state, lengths=(lengths - start).clamp(0, len(chunk)))
        parts.append(part)
        start += len(chunk)
    for got, expected in zip((torch.cat(parts), *state), (y, h, c), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cls", [LSTM, NovoLSTM])
def test_step_refuses_what_has_no_single_steps(cls):
    with pytest.raises(ValueError, match="step: a bidirectional layer needs the whole sequence"):
        cls(I, H, bidirectional=True).step(torch.zeros(B, I))
    with pytest.raises(ValueError, match=rf"step: expected input \[B, I\] or \[I\], got \[1, {B}, {I}\]"):
        cls(I, H).step(torch.zeros(1, B, I))


def test_step_raises_what_forward_raises():
    layer = NovoLSTM(I, H)
    with pytest.raises(RuntimeError, match=r"For batched 3-D input, hx and cx should also be 3-D but got \(2-D, 2-D\)"):
        layer.step(torch.zeros(B, I), (torch.zeros(B, H), torch.zeros(B, H)))
    with pytest.raises(RuntimeError, match=rf"input\.size\(-1\) must be equal to input_size\. Expected {I}, got 1"):
        layer.step(torch.zeros(B, 1))


@pytest.mark.parametrize(("cls", "options"), [STACKS[1], STACKS[2]])
def test_chunk_after_a_detached_state_has_the_gradients_of_the_chunk_alone(cls, options):
    layer, x = make(cls, **options), normal(T, B, I).requires_grad_()
    start = state_of(layer)

    def after_the_first(layer, chunk, state):
        _, state = layer(x[:4], state)
        return layer(chunk, detach_state(state))

    _, middle = layer(x[:4], start)
    alone = differentiate(Fed(layer, whole), x[4:].detach(), copied(detach_state(middle)))
    # The start is no leaf of the comparison: nothing reaches it.
    got = differentiate(Fed(layer, lambda layer, chunk, _: after_the_first(layer, chunk, start)), x[4:].detach())
    assert_close(got, alone)
    y, _ = after_the_first(layer, x[4:], start)
    to_x, *to_start = torch.autograd.grad(y.sum(), [x, *start], allow_unused=True)
    assert to_start == [None, None]
    assert (to_x[:4] == 0).all()
    assert (to_x[4:] != 0).all()


def test_detached_state_keeps_its_form_and_values():
    Pair = collections.namedtuple("Pair", ["h", "c"])
    h, c = (torch.full((2,), value, requires_grad=True) for value in (2.0, 3.0))
    state = (None, h, Pair(h, c), [(h, c), [None, c]])
    none, tensor, named, nested = detached = detach_state(state)
    assert none is None
    assert [type(part) for part in detached] == [type(part) for part in state]
    assert [type(part) for part in nested] == [tuple, list]
    for leaf, given in (
        (tensor, h),
        (named.h, h),
        (named.c, c),
        (nested[0][0], h),
        (nested[0][1], c),
        (nested[1][1], c),
    ):
        assert torch.equal(leaf, given)
        assert not leaf.requires_grad
    assert h.requires_grad
    with pytest.raises(TypeError, match="detach_state: expected tensors in tuples or lists, got dict"):
        detach_state({"h": h})


@pytest.mark.parametrize("cls", [LSTM, NovoLSTM])
def test_cell_and_layer_load_and_share_parameters(cls):
    layer, cell_cls = make(cls), {LSTM: LSTMCell, NovoLSTM: NovoLSTMCell}[cls]
    cell = jittered(cell_cls(I, H, dtype=torch.float64))
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    x = normal(B, I)
    torch.testing.assert_close(layer.step(x)[0], cell(x)[0])
    for name, parameter in cell.named_parameters():
        setattr(layer, f"{name}_l0", parameter)
    layer(normal(T, B, I))[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in cell.parameters())
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    torch.testing.assert_close(layer.step(x)[0], cell(x)[0])
