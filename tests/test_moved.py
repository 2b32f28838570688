"""Modules that have moved are found under their old names, too: by imports, in pickles, from a fresh interpreter."""

import importlib
import pickle
import re
import subprocess
import sys

import pytest

import novolstm_triton
from novolstm_triton.moved import MOVED

OLD = re.findall(
    r"\w+",
    """
    bptt bytemodel cells checks convert doctor environment files flops functional isolated keras_files keras_weights
    launch measure model_copy module onnx_export plan problems pytorch ragged recurrent reference references
    regularisers sample_gradients single_step streams text torch_lstm train tune tuned
    """,
)
"""The package's modules when all of them were at its top."""


def test_the_table_is_of_modules_that_were_at_the_top():
    assert set(MOVED) <= set(OLD)
    assert list(MOVED) == sorted(MOVED)


@pytest.mark.parametrize("name", OLD)
def test_every_old_name_is_that_of_a_module(name):
    module = importlib.import_module(f"novolstm_triton.{name}")
    assert module.__name__ == f"novolstm_triton.{MOVED.get(name, name)}".rstrip(".")
    assert module is importlib.import_module(module.__name__)
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__


def test_names_that_never_were_are_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"novolstm_triton\.nothing"):
        importlib.import_module("novolstm_triton.nothing")
    with pytest.raises(ModuleNotFoundError, match=r"tests\.train"):
        importlib.import_module("tests.train")
    assert not hasattr(novolstm_triton, "nothing")


@pytest.mark.parametrize("name", ["module LSTM", "plan Pins", "convert Report", "text UsageError"])
def test_a_pickle_that_names_an_old_module_loads(name):
    """Of protocol 0, which is text: what `torch.save(model)` writes of a class."""
    module, name = name.split()
    module = f"novolstm_triton.{module}"
    assert pickle.loads(f"c{module}\n{name}\n.".encode()) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("line", ["import novolstm_triton.text as old", "import novolstm_triton as n; old = n.text"])
def test_a_script_may_begin_with_an_old_name(line):
    code = f"{line}\nimport novolstm_triton.app.text as new\nassert old is new"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
