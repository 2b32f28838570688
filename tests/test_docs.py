"""The documentation's pages: their examples run and print what stands there, and all that is public is described."""

import importlib
import pathlib
import re

import pytest
import torch

import novolstm_triton

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
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


# What the site shows: its pages, and the files that they include.
SHOWN = sorted(DOCS.rglob("*.md")) + [ROOT / name for name in ("README.md", "CHANGELOG.md", "kernels/README.md")]
SHOWN.append(ROOT / "novolstm_triton/plans/data/README.md")


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_markers_of_included_text_are_whole(path):
    """A formatter once made `--8 < --` of a marker, and the site showed that instead of the file."""
    for line in path.read_text().splitlines():
        if not re.search(r"-\s*8\s*<", line):
            continue
        if re.fullmatch(r"<!-- --8<-- \[(start|end):\w+\] -->", line):
            continue
        marker = re.fullmatch(r'--8<-- "([\w./-]+?)(?::(\w+))?"', line)
        assert marker, line
        included = (ROOT / marker[1]).read_text()
        if marker[2]:
            assert re.search(rf"\[start:{marker[2]}\].*\[end:{marker[2]}\]", included, flags=re.DOTALL), line


def resolve(name: str) -> object:
    """Return what a dotted name of the package means: a module, or something in one."""
    found = importlib.import_module("novolstm_triton")
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_the_package_exist(path):
    text = path.read_text()
    for name in re.findall(r"`(novolstm_triton(?:\.\w+)+)`", text):
        resolve(name)
    for name, options in re.findall(r"^::: (\S+)\n((?: .*\n)*)", text, flags=re.MULTILINE):
        described = resolve(name)
        fields = getattr(described, "__dataclass_fields__", {})
        for member in re.findall(r"\w+", options.partition(" members:")[2].partition("filters:")[0]):
            assert member in fields or hasattr(described, member), f"{name}.{member}"


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """MkDocs checks those of the pages alone, and of a file that they include no more than the included part."""
    for target in re.findall(r"\]\((?!\w+://)([^)#\s]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_anchors_of_the_readme_exist():
    for file, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", (ROOT / "README.md").read_text()):
        headings = re.findall(r"^#+ (.*)$", (ROOT / (file or "README.md")).read_text(), flags=re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


def test_sections_of_the_readme_that_pages_name_exist():
    headings = re.findall(r"^## (.*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    named = [name for path in SHOWN for name in re.findall(r"README's(?: section)?\s+\"([^\"]+)\"", path.read_text())]
    assert named
    assert set(named) <= set(headings)
