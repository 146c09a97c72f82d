"""The house stands: each floor imports only from floors below it, the README's map is the tree, and public signatures
are complete."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxmech"
FLOORS = (
    "cli", "report", "study", "ahead", "organism", "interventions", "sae", "behavior", "activations", "answers",
    "models", "contrast", "io",
)  # fmt: skip
"""From the top down."""


def modules() -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of what is imported anywhere below, inside functions too, but not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imports(node)


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """Each module and the modules that it imports."""
    known = modules()

    def module(name: str) -> str:
        return name if name in known else name.rpartition(".")[0]

    return {
        name: {module(to) for to in imports(ast.parse(path.read_text())) if to.split(".")[0] == "jaxmech"} - {name}
        for name, path in known.items()
    }


def test_imports_go_down(arrows):
    height = {floor: -i for i, floor in enumerate(FLOORS)}
    up = [
        f"{name} -> {to}"
        for name, targets in arrows.items()
        for to in targets
        if name != "jaxmech" and (to == "jaxmech" or height[to.split(".")[1]] > height[name.split(".")[1]])
    ]
    assert not up


def test_no_modules_import_each_other(arrows):
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names them


def test_the_readmes_map_is_the_tree():
    said = re.search(r"^ +jaxmech/\n((?: +\S.*\n)+)", (ROOT / "README.md").read_text(), re.M)
    named = [line.split()[0].removesuffix(".py").removesuffix("/") for line in said[1].splitlines()]
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert named == list(FLOORS) and there == {*FLOORS, "__init__"}


def test_files_are_short():
    long = {name: n for name, path in modules().items() if (n := len(path.read_text().splitlines())) > 500}
    assert not long


def incomplete(body: list[ast.stmt], within: str = "") -> Iterator[str]:
    """Public functions and methods of public classes of which an argument, or what is returned, has no type."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from incomplete(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and re.match(r"[^_]|__init__$|__call__$", node.name):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            names = [a.arg for a in given if a and a.annotation is None]
            untyped = [name for name in names if name not in ("self", "cls") and not name.startswith("_")]
            if untyped or (node.returns is None and node.name != "__init__"):
                yield f"{within}{node.name}({', '.join(untyped)})"


def test_public_signatures_are_complete():
    found = {name: list(incomplete(ast.parse(path.read_text()).body)) for name, path in modules().items()}
    assert not {name: functions for name, functions in found.items() if functions}
