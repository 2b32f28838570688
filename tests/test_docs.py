"""The documentation's pages: their examples run and print what stands there, and all that is public is described."""

import pathlib
import re

import pytest
import torch

import novolstm_triton

DOCS = pathlib.Path(__file__).parents[1] / "docs"
BLOCKS = {
    str(path.relative_to(DOCS)): re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for path in sorted(DOCS.rglob("*.md"))
}
PAGES = [page for page, blocks in BLOCKS.items() if "python" in dict(blocks)]
API = "\n".join(path.read_text() for path in DOCS.glob("api/*.md"))


@pytest.mark.parametrize("page", PAGES)
# Of PyTorch's ONNX exporter itself.
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
def test_examples_run_in_their_order(page, capsys):
    torch.manual_seed(0)
    scope = {}
    for language, block in BLOCKS[page]:
        if language == "python":
            capsys.readouterr()
            exec(block, scope)
        elif language == "text":
            assert capsys.readouterr().out == block


@pytest.mark.parametrize("name", novolstm_triton.__all__)
def test_public_name_is_described(name):
    assert re.search(rf"(:::|#) ?{re.escape(f'novolstm_triton.{name}')}\b(?!\.)", API)
