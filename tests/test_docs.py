"""The documentation's pages: their examples run, and they describe what the package offers."""

import pathlib
import re

import pytest
import torch

import novolstm_triton

DOCS = pathlib.Path(__file__).parents[1] / "docs"
EXAMPLES = {
    path.stem: re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for path in sorted([*DOCS.glob("migration/*.md"), DOCS / "api" / "plan.md"])
}
API = "\n".join(path.read_text() for path in DOCS.glob("api/*.md"))


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run_in_their_order(page):
    torch.manual_seed(0)
    scope = {}
    assert EXAMPLES[page]
    for example in EXAMPLES[page]:
        exec(example, scope)


@pytest.mark.parametrize("name", novolstm_triton.__all__)
def test_public_name_is_described(name):
    assert re.search(rf"(:::|#) ?{re.escape(f'novolstm_triton.{name}')}\b(?!\.)", API)
