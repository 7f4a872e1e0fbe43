"""No dead options: every option of the schema is read somewhere outside `opd.config`.

The code is searched, not run, so this is approximate: an option counts as read where an attribute of its name is taken
from something that is its section, told by the variable's name (`optim.lr`, `self.spec.optim.lr`), by the type that the
file gives the variable (`spec: Optim`), by a pattern (`case JsonlSource(path=path)`), or by handing on a whole section
(`Format(**spec.format.model_dump())`).
"""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import get_args, get_origin

import pytest

import opd
from opd.config.alignments import Alignment
from opd.config.behaviours import Behaviour
from opd.config.schema import Config
from opd.config.schema_walk import ROOT, Option
from opd.config.slots import Support, Weighting
from opd.config.spec import Spec
from opd.config.targets import Target

SOURCE = Path(opd.__file__).parent
# These two are read while a config is checked, and by nothing after it: what they stand for is in `terms`.
READ_BY_CHECKS = {("Objective", "preset"), ("Objective", "parameters")}
# A schedule is asked for its number at a step, and reads these itself.
READ_BY_ITSELF = {("Schedule", "start"), ("Schedule", "end"), ("Schedule", "steps")}
# Files of the config that other rooms call while they work.
CALLED_AT_WORK = ("naming", "scorers")
# Names that hold sections of more than one kind in the code.
ALIASES = {
    "Student": {"model"},
    "Scorer": {"model", "scorer"},
    "Shape": {"shape"},
    "Source": {"source"},
    "Grader": {"grader"},
    "Term": {"term"},
    "TeacherMixed": {"spec"},
    "Speculative": {"spec"},
    "Share": {"part"},
}
UNIONS = {
    "Target": Target,
    "Behaviour": Behaviour,
    "Writer": Behaviour,
    "Support": Support,
    "Weighting": Weighting,
    "Alignment": Alignment,
}


def sections(option: Option = ROOT, name: str = "config") -> dict[type[Spec], set[str]]:
    """Every section of the schema with the names of the fields that hold it."""
    found: dict[type[Spec], set[str]] = defaultdict(set)
    pending = [(option, name)]
    while pending:
        option, name = pending.pop()
        for kind in option.alternatives:
            if get_origin(kind) is tuple:
                pending.append((Option(get_args(kind)[0]), name))
        if option.values:
            pending.append((option.values, name))
        for section in option.sections.values():
            is_new = name not in found[section]
            found[section] |= {name, name.removesuffix("s")}
            if is_new:
                pending += [(Option(field.annotation), child) for child, field in section.model_fields.items()]
    return found


HOLDERS = sections()
LEAVES = [
    (section, name)
    for section in HOLDERS
    for name, field in section.model_fields.items()
    if name != "kind" and not Option(field.annotation).sections
]


class Reads(ast.NodeVisitor):
    """(owner, attribute) of every attribute in a file; owners of a variable are its name, its type, what it was set to.

    attributes   from an attribute's name to its types, gathered over all files, because `self.x` is typed elsewhere.
    """

    def __init__(self, tree: ast.Module, attributes: dict[str, set[str]]):
        self.attributes = attributes
        self.scopes: list[dict[str, set[str]]] = [defaultdict(set)]
        self.found: set[tuple[str, str]] = set()
        self.dumped: set[str] = set()
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        self.renamed = {name.asname: name.name for node in imports for name in node.names if name.asname}
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.scopes.append(defaultdict(set, {a.arg: self._words(a.annotation) for a in arguments if a.annotation}))
        self.generic_visit(node)
        self.scopes.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._learn(node.target, self._words(node.annotation))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.value, ast.Name | ast.Attribute):
            for target in node.targets:
                self._learn(target, self._owners(node.value))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owners = self._owners(node.value)
        self.found |= {(owner, node.attr) for owner in owners}
        if node.attr == "model_dump":
            self.dumped |= owners
        self.generic_visit(node)

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        self.found |= {(owner, name) for owner in self._words(node.cls) for name in node.kwd_attrs}
        self.generic_visit(node)

    def _learn(self, target: ast.expr, owners: set[str]) -> None:
        if isinstance(target, ast.Attribute):
            self.attributes[target.attr] |= owners
        elif isinstance(target, ast.Name):
            self.scopes[-1][target.id] |= owners
            if len(self.scopes) == 1:  # a field of a dataclass is an attribute everywhere else
                self.attributes[target.id] |= owners

    def _owners(self, node: ast.expr) -> set[str]:
        while isinstance(node, ast.Subscript | ast.Call):
            node = node.value if isinstance(node, ast.Subscript) else node.func
        if isinstance(node, ast.Attribute):
            return {node.attr} | self.attributes[node.attr]
        if isinstance(node, ast.Name):
            return {node.id}.union(*(scope.get(node.id, set()) for scope in self.scopes))
        return set()

    def _words(self, annotation: ast.expr) -> set[str]:
        nodes = list(ast.walk(annotation))
        words = {n.id for n in nodes if isinstance(n, ast.Name)} | {
            n.attr for n in nodes if isinstance(n, ast.Attribute)
        }
        return {self.renamed.get(word, word) for word in words}


@cache
def reads() -> tuple[set[tuple[str, str]], set[str]]:
    config = SOURCE / "config"
    working = {config / f"{name}.py" for name in CALLED_AT_WORK}
    files = [path for path in SOURCE.rglob("*.py") if config not in path.parents or path in working]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    attributes: dict[str, set[str]] = defaultdict(set)
    for tree in trees:  # once for the types of attributes, once to use them
        Reads(tree, attributes)
    read = [Reads(tree, attributes) for tree in trees]
    return set().union(*(file.found for file in read)), set().union(*(file.dumped for file in read))


def owners(section: type[Spec]) -> set[str]:
    """Names in the code that stand for the section: its field, its class and bases, and the unions it belongs to."""
    names = set(HOLDERS[section]) | {base.__name__ for base in section.__mro__[:-2]} - {"Spec", "BaseModel"}
    for union, words in ALIASES.items():
        if section.__name__.endswith(union) or (union == "Shape" and "shape" in HOLDERS[section]):
            names |= {union} | words
    return names | {union for union, members in UNIONS.items() if section in get_args(members)}


@pytest.mark.parametrize(("section", "name"), LEAVES, ids=[f"{s.__name__}.{n}" for s, n in LEAVES])
def test_O_22_every_option_is_read(section, name):
    if (section.__name__, name) in READ_BY_CHECKS | READ_BY_ITSELF:
        return
    found, dumped = reads()
    names = owners(section)
    assert names & dumped or any((owner, name) in found for owner in names), (
        f"nothing under src/opd reads {section.__name__}.{name} (looked for it on {', '.join(sorted(names))})"
    )


def test_the_walk_reaches_the_whole_schema():
    assert Config in HOLDERS and len(LEAVES) > 90
    assert {"JensenShannon", "PythonGrader", "InlineSource", "TextFormat", "Columns"} <= {s.__name__ for s in HOLDERS}
    algebra = {
        "DivergenceTerm",
        "OutcomeTerm",
        "Routed",
        "Veto",
        "IcePop",
        "TopK",
        "EntropyGate",
        "Mixture",
        "Speculative",
    }
    assert algebra | {"Scorer", "Context", "Rewards", "Schedule"} <= {s.__name__ for s in HOLDERS}
