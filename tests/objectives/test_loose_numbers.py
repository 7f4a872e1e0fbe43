"""No number of an objective hides in its code: each is a field of the config, a named constant, or structure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import opd.objectives

SOURCE = Path(opd.objectives.__file__).parent
INSTRUMENTS = {"oracle", "audit"}  # measure objectives, and are none
# Signs, ends of ranges, squares, halves and doubles: what a formula has by itself.
STRUCTURE = {0, 1, 2, 0.5}
# (file, function, number): numbers of mathematics that have no better name.
MATHEMATICS = {
    ("tanh_value.py", "_slope", 4),  # arctan 1 = pi / 4
    *(("kernels/triton_shapes.py", "expm1", n) for n in range(3, 10)),  # n!
    *(("kernels/triton_shapes.py", "log1p", n) for n in (3, 5, 7, 9, 11, 13)),  # odd powers of artanh
    ("kernels/triton_shapes.py", "masses", 3),  # the last of four columns that lie one behind the other
}
FILES = sorted(p for p in SOURCE.rglob("*.py") if p.relative_to(SOURCE).parts[0] not in INSTRUMENTS)


def loose(tree: ast.Module, function: str = "") -> Iterator[tuple[str, int, float]]:
    """(function, line, number) of every number that is no constant of the module, default, index or count."""
    named = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and _is_constant(node)]
    skipped: set[int] = {id(inner) for node in named for inner in ast.walk(node)}
    pending: list[tuple[ast.AST, str]] = [(node, function) for node in tree.body]
    while pending:
        node, inside = pending.pop()
        if id(node) in skipped:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = node.name
            outside = [*node.args.defaults, *(d for d in node.args.kw_defaults if d), *node.decorator_list]
            skipped |= {id(inner) for part in outside for inner in ast.walk(part)}
        if isinstance(node, ast.Subscript | ast.Slice):  # a place in a tuple, a part of a tensor
            index = node.slice if isinstance(node, ast.Subscript) else node
            skipped |= {id(n) for n in ast.walk(index) if isinstance(n, ast.Constant)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            skipped |= {id(n) for n in ast.walk(node)}
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value not in STRUCTURE:
            yield inside, node.lineno, node.value
        pending += [(child, inside) for child in ast.iter_child_nodes(node)]


def _is_constant(node: ast.Assign | ast.AnnAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return bool(names) and all(n.id.lstrip("_").isupper() for n in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_O_24_numbers_of_an_objective_have_names(path: Path) -> None:
    name = path.relative_to(SOURCE).as_posix()
    found = [
        f"{name}:{line}: {number:g} in {function or 'the module'}"
        for function, line, number in loose(ast.parse(path.read_text(encoding="utf-8")))
        if (name, function, number) not in MATHEMATICS
    ]
    assert not found, "make it a field of the config or a constant with a name: " + "; ".join(found)


@pytest.mark.parametrize(
    ("code", "numbers"),
    [
        ("def f(x):\n    return x.clamp(min=-0.2)", [0.2]),
        ("def f(x):\n    return x + 1e-3 * x", [1e-3]),
        ("LIMIT = 0.2\n_FLOOR: float = 1e-6\ndef f(x, n=8):\n    return (1 - x[3]) ** 2 / 2 + 0.5 * x[:, 4:]", []),
        ("limit = 0.2", [0.2]),
        ("class A:\n    floor: float = 7", [7]),
        ("def f(x):\n    LIMIT = 3\n    return x", [3]),
    ],
)
def test_O_24_the_lint_sees_what_it_is_for(code: str, numbers: list[float]) -> None:
    assert [number for _, _, number in loose(ast.parse(code))] == numbers


def test_O_24_no_exception_is_left_over() -> None:
    used = {
        (path.relative_to(SOURCE).as_posix(), function, number)
        for path in FILES
        for function, _, number in loose(ast.parse(path.read_text(encoding="utf-8")))
    }
    there = {path.relative_to(SOURCE).as_posix() for path in FILES}
    assert {entry for entry in MATHEMATICS if entry[0] in there} <= used
