"""The modules of the package import each other in one direction, imports inside functions included."""

import ast
import graphlib
import pathlib

import pytest

import novolstm_triton

ROOT = pathlib.Path(novolstm_triton.__file__).parent


def imported(name: str, nodes: list[ast.AST], modules: set[str]) -> set[str]:
    """Return which modules a module imports, but for annotations, and the other packages that this brings along."""
    found: set[str] = set()
    for node in nodes:
        if not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            targets = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= targets if targets <= modules else {*targets, f"{node.module}"}
    parents = {target.rpartition(".")[0] for target in found}
    return (found | {parent for parent in parents if not f"{name}.".startswith(f"{parent}.")}) & modules


def check(sources: dict[str, str]) -> None:
    """Raise CycleError if modules, given by their names, import each other."""
    graph = {name: imported(name, [ast.parse(text)], set(sources)) for name, text in sources.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_modules_import_each_other():
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    check({name.removesuffix(".__init__"): path.read_text() for path, name in names.items()})


LINES = ["from p import b", "from p.b import c", "from p import x", "def f(): import p.b", "import q.r"]


@pytest.mark.parametrize("line", LINES)
def test_a_circle_is_found(line):
    others = {"p": "import p.a", "p.b": "import p.a", "q": "import p.a", "q.r": ""}
    check({"p.a": f"if TYPE_CHECKING:\n {line}"} | others)
    with pytest.raises(graphlib.CycleError, match=r"p\.a"):
        check({"p.a": line} | others)
