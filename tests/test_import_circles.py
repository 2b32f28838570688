"""The modules of the package import each other in one direction, imports inside functions included."""

import ast
import graphlib
import pathlib
from importlib.util import resolve_name

import pytest

import novolstm_triton

ROOT = pathlib.Path(novolstm_triton.__file__).parent


def imported(name: str, package: str, source: str, modules: set[str]) -> set[str]:
    """Return which modules a module imports, but for annotations, and the other packages that this brings along."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(source)]
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
        else:
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{origin}.{alias.name}" for alias in node.names} & modules or {origin}
    parents = {target.rpartition(".")[0] for target in found}
    return (found | {parent for parent in parents if not f"{name}.".startswith(f"{parent}.")}) & modules


def check(sources: dict[str, str]) -> None:
    """Raise CycleError if modules import each other; those of packages have names that end in `__init__`."""
    names = {name: name.removesuffix(".__init__") for name in sources}
    modules = set(names.values())
    graph = {names[name]: imported(names[name], name.rpartition(".")[0], sources[name], modules) for name in sources}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_modules_import_each_other():
    paths = [*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    check({".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path.read_text() for path in paths})


@pytest.mark.parametrize(
    "line", ["from p import b", "from p.b import c", "from . import b", "import p.b", "import p.q.r"]
)
@pytest.mark.parametrize("where", ["if True:\n", "def f():\n"], ids=["module", "function"])
def test_a_circle_is_found(where, line):
    others = {"p.b": "import p.a", "p.q.__init__": "import p.a", "p.q.r": ""}
    check({"p.a": f"if TYPE_CHECKING:\n {line}", **others})
    with pytest.raises(graphlib.CycleError, match=r"p\.a"):
        check({"p.a": f"{where} {line}", **others})
