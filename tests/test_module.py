"""NovoLSTM as a module: nn.LSTM's constructor, call, shapes and error texts."""

import copy

import pytest
import torch
from torch import nn

from novolstm_triton import NovoLSTM
from novolstm_triton.functional import novolstm

T, B, I, H = 5, 3, 4, 6


def layer(**options) -> NovoLSTM:
    torch.manual_seed(0)
    return NovoLSTM(I, H, **options)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "bidirectional"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True], ids=["T-first", "B-first"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("variant", ["formula", "notebook"])
def test_shapes_are_those_of_nn_lstm(layers, bidirectional, batch_first, batched, variant):
    options = dict(num_layers=layers, bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn(*((B, T, I) if batch_first else (T, B, I)) if batched else (T, I))
    y, (h, c) = layer(variant=variant, **options)(x)
    expected_y, (expected_h, expected_c) = nn.LSTM(I, H, **options)(x)
    assert (y.shape, h.shape, c.shape) == (expected_y.shape, expected_h.shape, expected_c.shape)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_carry_the_names_of_nn_lstm(bias):
    options = dict(num_layers=2, bidirectional=True, bias=bias)
    ours, theirs = layer(**options).state_dict(), nn.LSTM(I, H, **options).state_dict()
    added = {name for name in ours if name.startswith("ln_")}
    assert set(ours) - added == set(theirs)
    assert len(added) == 8
    for name, tensor in theirs.items():
        assert ours[name].shape == (5 * H, *tensor.shape[1:])


def test_notebook_has_no_recurrent_softmax_block():
    state = layer(variant="notebook").state_dict()
    assert state["weight_ih_l0"].shape == (5 * H, I)
    assert state["weight_hh_l0"].shape == (4 * H, H)
    assert state["bias_hh_l0"].shape == (4 * H,)


def test_initialisation_is_that_of_nn_lstm_with_an_identity_norm():
    big = NovoLSTM(64, 64)
    bound = 1 / 8
    for name, parameter in big.named_parameters():
        if name.startswith("ln_weight"):
            assert (parameter == 1).all()
        elif name.startswith("ln_bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_layers_and_directions_are_the_functional_layer_composed():
    module = layer(num_layers=2, bidirectional=True)
    x, h_0, c_0 = torch.randn(T, B, I), torch.randn(4, B, H), torch.randn(4, B, H)
    lengths = torch.tensor([5, 2, 0])
    y, (h_n, c_n) = module(x, (h_0, c_0), lengths=lengths)
    outputs, k = x, 0
    for number in range(2):
        results = []
        for suffix in (f"_l{number}", f"_l{number}_reverse"):
            p = {
                name: module.get_parameter(name + suffix) for name in ("weight_ih", "weight_hh", "ln_weight", "ln_bias")
            }
            bias = module.get_parameter("bias_ih" + suffix) + module.get_parameter("bias_hh" + suffix)
            options = dict(bias=bias, lengths=lengths, reverse="reverse" in suffix)
            results.append(novolstm(outputs, h_0[k], c_0[k], **p, **options, backend="reference"))
            torch.testing.assert_close(h_n[k], results[-1][1])
            torch.testing.assert_close(c_n[k], results[-1][2])
            k += 1
        outputs = torch.cat([r[0] for r in results], -1)
    torch.testing.assert_close(y, outputs)
    assert (y[2:, 1] == 0).all()
    assert torch.equal(h_n[:, 2], h_0[:, 2])


def test_batch_first_and_unbatched_give_the_numbers_of_the_plain_call():
    module, x = layer(), torch.randn(T, B, I)
    y, (h, _) = module(x)
    module.batch_first = True
    torch.testing.assert_close(module(x.transpose(0, 1))[0], y.transpose(0, 1))
    single, (h_1, _) = module(x[:, 1])
    torch.testing.assert_close(single, y[:, 1])
    torch.testing.assert_close(h_1, h[:, 1])


def test_state_is_carried():
    module, x = layer(num_layers=2), torch.randn(T, B, I)
    whole, final = module(x)
    first, state = module(x[:2])
    second, last = module(x[2:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(last, final)


def test_gate_gain_hidden_means_the_number_of_units():
    x = torch.randn(T, B, I)
    assert torch.equal(layer(gate_gain="hidden")(x)[0], layer(gate_gain=float(H))(x)[0])
    assert not torch.equal(layer()(x)[0], layer(gate_gain="hidden")(x)[0])


def test_dropout_lies_between_layers_and_only_in_training():
    module, x = layer(num_layers=2, dropout=0.5), torch.randn(T, B, I)
    plain = layer(num_layers=2)
    assert not torch.equal(module(x)[0], module(x)[0])
    # The first layer's state is before any dropout.
    torch.testing.assert_close(module(x)[1][0][0], plain(x)[1][0][0])
    torch.testing.assert_close(module.eval()(x)[0], plain(x)[0])
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        layer(dropout=0.5)


def test_backward_works_in_eval_mode():
    module = layer().eval()
    module(torch.randn(T, B, I))[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_dtype(dtype):
    y, (h, c) = layer(dtype=dtype)(torch.randn(T, B, I, dtype=dtype))
    assert {y.dtype, h.dtype, c.dtype} == {dtype}


def test_copies_and_state_dicts_give_equal_outputs():
    module, x = layer(num_layers=2), torch.randn(T, B, I)
    other = NovoLSTM(I, H, num_layers=2)
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module)):
        assert torch.equal(twin(x)[0], module(x)[0])


def test_repr_shows_what_is_not_default():
    assert repr(layer()) == f"NovoLSTM({I}, {H})"
    shown = repr(layer(num_layers=2, variant="notebook", gate_gain="hidden"))
    assert shown == f"NovoLSTM({I}, {H}, num_layers=2, variant='notebook', gate_gain='hidden')"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param(dict(num_layers=0), ValueError, id="layers"),
        pytest.param(dict(num_layers=1.5), TypeError, id="layers-type"),
        pytest.param(dict(bias=1), TypeError, id="bias"),
        pytest.param(dict(batch_first=None), TypeError, id="batch_first"),
        pytest.param(dict(dropout=1.5), ValueError, id="dropout"),
        pytest.param(dict(dropout=True), ValueError, id="dropout-bool"),
        pytest.param(dict(proj_size=H), ValueError, id="proj_size"),
        pytest.param(dict(variant="paper"), ValueError, id="variant"),
        pytest.param(dict(backend="cuda"), ValueError, id="backend"),
        pytest.param(dict(gate_gain="large"), ValueError, id="gate_gain"),
    ],
)
def test_bad_constructor_arguments(options, error):
    with pytest.raises(error):
        layer(**options)


def test_bad_sizes_are_refused_in_the_words_of_nn_lstm():
    for sizes in ((0, H), (I, 0), (I, -1)):
        with pytest.raises(ValueError, match="must be greater than zero"):
            NovoLSTM(*sizes)


@pytest.mark.parametrize(
    ("x", "state"),
    [
        pytest.param((T, B, I + 1), None, id="features"),
        pytest.param((T, B, I, 1), None, id="rank"),
        pytest.param((T, B, I), ((1, B, H + 1), (1, B, H)), id="h-size"),
        pytest.param((T, B, I), ((1, B, H), (2, B, H)), id="c-layers"),
        pytest.param((T, B, I), ((B, H), (B, H)), id="state-rank"),
        pytest.param((T, I), ((1, B, H), (1, B, H)), id="unbatched-state-rank"),
    ],
)
def test_bad_calls_raise_what_nn_lstm_raises(x, state):
    x, state = torch.zeros(x), state and tuple(torch.zeros(s) for s in state)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        nn.LSTM(I, H)(x, state)
    with pytest.raises(theirs.type) as ours:
        layer()(x, state)
    assert str(ours.value).replace("NovoLSTM", "LSTM") == str(theirs.value)


def test_state_that_is_no_pair():
    with pytest.raises(TypeError, match=r"tuple \(h_0, c_0\), got a Tensor"):
        layer()(torch.zeros(T, B, I), torch.zeros(2, B, H))


def test_lengths_need_batched_input():
    with pytest.raises(ValueError, match="lengths: expected batched input"):
        layer()(torch.zeros(T, I), lengths=torch.tensor([2]))
