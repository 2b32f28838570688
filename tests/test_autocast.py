"""Both layers inside torch.autocast on the CPU: dtypes of results and gradients, and what is never cast."""

import pytest
import torch

from novolstm_triton import LSTM, NovoLSTM

from .support.layers import REGULARISED, assert_equal, both, layer, sequence, states
from .support.twins import BACKENDS, differentiate, running_on

sixteen_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@both
@pytest.mark.parametrize("backend", BACKENDS)
@sixteen_bits
def test_results_have_its_dtype_and_gradients_their_tensors(kind, backend, dtype):
    module, x = layer(kind), sequence(requires_grad=True)
    with running_on(backend):
        with torch.autocast("cpu", dtype):
            y, (h_n, c_n) = module(x)
        gradients = torch.autograd.grad((y.sum() + h_n.sum() + c_n.sum()).float(), [x, *module.parameters()])
    assert {y.dtype, h_n.dtype, c_n.dtype} == {dtype}
    assert {g.dtype for g in gradients} == {torch.float32}


@both
@sixteen_bits
def test_numbers_are_those_of_a_layer_of_its_dtype(kind, dtype):
    module = layer(kind, num_layers=2, bidirectional=True)
    with torch.autocast("cpu", dtype):
        inside = differentiate(module, sequence(requires_grad=True))
    # Its bias is the sum of two in fp32; here, as there, it is rounded once.
    twin = layer(kind, num_layers=2, bidirectional=True)
    for name, parameter in twin.named_parameters():
        if name.startswith("bias_ih"):
            other = twin.get_parameter(name.replace("ih", "hh"))
            parameter.data += other.data
            other.data.zero_()
    outside = differentiate(twin.to(dtype), sequence(requires_grad=True, dtype=torch.float32).to(dtype))
    for name in ("y", "h_n", "c_n"):
        assert torch.equal(inside[name], outside[name])


@both
def test_regularisers_and_lengths(kind):
    module, x = layer(kind, **REGULARISED), sequence(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x, lengths=torch.tensor([5, 0, 2]))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@both
def test_a_disabled_block_inside_is_as_outside(kind):
    module = layer(kind)
    expected = differentiate(module, sequence())
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_equal(differentiate(module, sequence()), expected)


@both
def test_float64_is_never_cast(kind):
    module = layer(kind, dtype=torch.float64, **REGULARISED)
    x = sequence(dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    expected = differentiate(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        assert_equal(differentiate(module, x), expected)


@both
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_state_and_input_may_have_other_dtypes(kind, state_dtype):
    module = layer(kind, proj_size=2)
    h_0, c_0 = (s.to(state_dtype).requires_grad_() for s in states(module))
    x = sequence().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = module(x, (h_0, c_0))
        # What comes out goes in again.
        assert module(x, state)[0].dtype == torch.bfloat16
        assert module.step(x[0], state)[0].dtype == torch.bfloat16
        expected, _ = module(x.float(), tuple(s.float() for s in (h_0, c_0)))
        if state_dtype != torch.float16:
            assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y.float().sum(), [x, h_0, c_0])
    assert [g.dtype for g in gradients] == [torch.bfloat16, state_dtype, state_dtype]


@both
@sixteen_bits
def test_backward_may_run_inside_or_outside(kind, dtype):
    module, x = layer(kind, num_layers=2), sequence(requires_grad=True)
    gradients = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype):
            loss = module(x)[0].float().square().sum()
        with torch.autocast("cpu", dtype, enabled=inside):
            gradients.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_other_dtypes_are_refused_outside_only():
    module = layer(LSTM)
    with torch.autocast("cpu", torch.bfloat16):
        module(sequence().half())
    with pytest.raises(ValueError, match=r"RNN input dtype .* does not match weight dtype"):
        module(sequence().half())


def test_training_step_in_mixed_precision_learns():
    module, target = layer(NovoLSTM), sequence(seed=9)
    head = torch.nn.Linear(6, 4)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.03)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.mse_loss(head(module(sequence())[0]).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
