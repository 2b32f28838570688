"""The layer that is an nn.LSTM, and code that asks whether a layer is one."""

import copy
import functools
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, prune

from novolstm_triton import LSTM, NovoLSTM, TorchLSTM

from .support.hugging_face import transformers
from .support.layers import H, I, sequence
from .support.twins import NO_ONEDNN, assert_close, differentiate

pytestmark = pytest.mark.filterwarnings(NO_ONEDNN)

OPTIONS = [
    pytest.param(dict(), id="plain"),
    pytest.param(dict(num_layers=2, bidirectional=True, batch_first=True), id="stacked-bidirectional"),
    pytest.param(dict(bias=False, proj_size=2), id="projected"),
]


def twins(**options) -> tuple[TorchLSTM, nn.LSTM]:
    """Return both layers as the same seed draws them."""
    torch.manual_seed(0)
    ours = TorchLSTM(I, H, **options)
    torch.manual_seed(0)
    return ours, nn.LSTM(I, H, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_is_an_nn_lstm_inside_and_out(options):
    ours, theirs = twins(**options)
    assert isinstance(ours, nn.LSTM)
    assert isinstance(ours, LSTM)
    for name in ("mode", "_flat_weights_names", "_all_weights"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert all(a is getattr(ours, name) for a, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True))
    assert [len(own) for own in ours.all_weights] == [len(own) for own in theirs.all_weights]
    assert vars(theirs).keys() - vars(ours).keys() == {"_flat_weights"}
    x = sequence().requires_grad_()
    assert_close(differentiate(ours, x), differentiate(theirs, x))


def test_runs_on_this_library(monkeypatch):
    def refuse(*args):
        raise AssertionError("nn.LSTM's own forward")

    monkeypatch.setattr(nn.LSTM, "forward", refuse)
    ours, x = twins()[0], sequence()
    assert torch.equal(ours(x)[0], LSTM.from_torch(ours)(x)[0])


def test_has_the_options_of_ours():
    ours = TorchLSTM(I, H, recurrent_dropout=0.1, zoneout_h=0.2, zoneout_c=0.3, backend="reference")
    words = "recurrent_dropout=0.1, zoneout_h=0.2, zoneout_c=0.3, backend='reference'"
    assert repr(ours) == f"TorchLSTM({I}, {H}, {words})"
    # A conversion to a layer that has them loses none.
    assert repr(LSTM.from_torch(ours)) == f"LSTM({I}, {H}, {words})"
    assert repr(NovoLSTM.from_lstm(ours)) == f"NovoLSTM({I}, {H}, {words})"
    for options, words in (
        (dict(backend="cuda"), "backend: expected one of"),
        (dict(zoneout_c=2), "zoneout_c: expected a number in range"),
        (dict(proj_size=2, zoneout_h=0.5), "projected layer has no"),
        (dict(num_layers=0), "num_layers must be greater than zero"),
    ):
        with pytest.raises(ValueError, match=words):
            TorchLSTM(I, H, **options)


def test_conversions():
    ours, theirs = twins(num_layers=2, dropout=0.5)
    assert type(ours.to_torch()) is nn.LSTM
    assert type(TorchLSTM.from_torch(theirs)) is TorchLSTM
    assert repr(TorchLSTM.from_torch(theirs)) == f"Torch{theirs!r}"


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), nn.Module.double],
    ids=["deepcopy", "pickle", "double"],
)
def test_is_copied_and_moved(copied):
    ours, x = twins(num_layers=2)[0], sequence()
    expected = ours(x)[0].double()
    other = copied(ours)
    assert all(a is b for a, b in zip(other._flat_weights, other.parameters(), strict=True))
    torch.testing.assert_close(other(x.to(other.bias_ih_l0.dtype))[0].double(), expected)


def test_is_copied_with_a_parametrization():
    # nn.LSTM keeps the weight of its last call, which no deep copy takes.
    ours, x = parametrizations.weight_norm(twins()[0], "weight_hh_l0"), sequence()
    expected = ours(x)[0]
    assert torch.equal(copy.deepcopy(ours)(x)[0], expected)


def test_pruning_tools_find_it():
    layer: Any = TorchLSTM(I, H)
    first, x = nn.Linear(I, I), sequence()
    model: Any = nn.Sequential(first, layer)
    # As such tools choose what to prune.
    chosen = [(m, "weight_hh_l0") for m in model if isinstance(m, nn.RNNBase)]
    prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=0.5)
    pruned: Any = layer.weight_hh_l0
    assert int(pruned.count_nonzero()) == 2 * H * H
    assert layer._flat_weights[1] is layer.weight_hh_l0
    dense = nn.LSTM(I, H)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(getattr(layer, name))
    torch.testing.assert_close(model(x)[0], dense(first(x))[0])
    prune.remove(layer, "weight_hh_l0")
    assert layer._flat_weights[1] is layer.get_parameter("weight_hh_l0")


def test_registries_of_types_find_it():
    @functools.singledispatch
    def kind(module):
        return "unknown"

    @kind.register
    def _(module: nn.LSTM):
        return "recurrent"

    assert kind(TorchLSTM(I, H)) == "recurrent"


def graphs(function: Callable[..., Any], *args: Any) -> int:
    """Return how many graphs a function is compiled into, with the results that it has otherwise."""
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.testing.assert_close(torch.compile(function, backend=counter)(*args), function(*args))
    return counter.frame_count


def test_compiling_leaves_it_out_of_the_graph():
    ours, theirs = twins()
    plain, x = LSTM.from_torch(ours), sequence()
    assert [graphs(layer, x) for layer in (ours, theirs, plain)] == [0, 0, 1]
    assert [graphs(lambda x, layer=layer: 2 * layer(2 * x)[0], x) for layer in (ours, theirs, plain)] == [0, 0, 1]
    torch._dynamo.reset()
    with pytest.raises(Unsupported):
        torch.compile(ours, backend="eager", fullgraph=True)(x)


@pytest.fixture(scope="module")
def library() -> Any:
    return transformers()


def checkpointed(library: Any, path: pathlib.Path, layer: Any, *bases: type, lacks: str) -> tuple[Any, Any]:
    """Return a tagger, and what is loaded from its checkpoint, which lacks the parameters that contain a word."""

    class Tagger(*bases, library.PreTrainedModel):
        config_class = library.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed = nn.Linear(I, I)
            self.tagger = layer(I, H, num_layers=2, bidirectional=True)
            self.post_init()

        def forward(self, x):
            return self.tagger(self.embed(x))[0]

    model = Tagger(library.PretrainedConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    state = {name: tensor for name, tensor in model.state_dict().items() if lacks not in name}
    model.save_pretrained(path, state_dict=state)
    return model, Tagger.from_pretrained(path)


@pytest.mark.parametrize("lacks", ["tagger", "reverse"])
def test_parameters_that_a_checkpoint_lacks_are_initialised(lacks, library, tmp_path):
    model, loaded = checkpointed(library, tmp_path, TorchLSTM, lacks=lacks)
    for name, parameter in loaded.named_parameters():
        if lacks not in name:
            assert torch.equal(parameter, model.get_parameter(name))
        elif parameter.dim() == 1:
            # What transformers does with every nn.LSTM: biases of zero, and Xavier's bounds.
            assert not parameter.any()
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert bound / 3 < parameter.std() < parameter.abs().max() <= bound
    assert loaded(sequence()).isfinite().all()


def recipe() -> type:
    """Return the class that the page about nn.LSTM gives to users of layers that are none."""
    page = pathlib.Path(__file__).parents[1] / "docs" / "migration" / "torch.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "_init_weights" in block)
    scope: dict[str, Any] = {"LSTM": LSTM}
    exec(block, scope)
    return scope["InitialisesLayers"]


@pytest.mark.parametrize("lacks", ["tagger", "reverse"])
@pytest.mark.parametrize("layer", [LSTM, NovoLSTM])
def test_recipe_for_layers_that_are_none(layer, lacks, library, tmp_path):
    model, loaded = checkpointed(library, tmp_path, layer, recipe(), lacks=lacks)
    for name, parameter in loaded.named_parameters():
        if lacks not in name:
            assert torch.equal(parameter, model.get_parameter(name))
        elif ".ln_" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float("weight" in name)))
        else:
            bound = H**-0.5
            assert bound / 3 < parameter.std() < parameter.abs().max() <= bound
    assert loaded(sequence()).isfinite().all()
