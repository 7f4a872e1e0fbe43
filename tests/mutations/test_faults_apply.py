"""The list of seeded faults stays true to the source; `make mutants` runs the tests against each of them."""

from __future__ import annotations

import ast
import shutil
from functools import cache
from pathlib import Path

import pytest

from tests.mutations.fault import FAULTS, SOURCE, TESTS, Fault


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.name}")
def test_every_fault_applies_once_and_leaves_code_that_parses(tmp_path: Path, fault: Fault) -> None:
    copy = tmp_path / fault.path
    copy.parent.mkdir(parents=True)
    shutil.copy(SOURCE / fault.path, copy)
    fault.apply(tmp_path)
    changed, whole = copy.read_text(encoding="utf-8"), (SOURCE / fault.path).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(whole))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.name}")
def test_the_tests_that_catch_it_are_there(fault: Fault) -> None:
    assert fault.caught
    for name in fault.caught:
        file, _, test = name.partition("::")
        assert test in functions(TESTS / file), name


def test_faults_are_told_apart_and_are_many() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


def test_a_fault_whose_text_is_gone_is_told(tmp_path: Path) -> None:
    path = tmp_path / "opd" / "a.py"
    path.parent.mkdir()
    path.write_text("x = 1\nx = 1\n")
    with pytest.raises(ValueError, match=r"stands 2 times in a\.py, not once"):
        Fault("f", "a.py", "x = 1", "x = 2", ()).apply(tmp_path)
    with pytest.raises(ValueError, match="stands 0 times"):
        Fault("f", "a.py", "y = 1", "y = 2", ()).apply(tmp_path)
