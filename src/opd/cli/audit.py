"""`opd audit`: from MODULE:FUNCTION to a table of what the function follows."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.errors import BadInput
from opd.objectives.audit import Findings, LossFunction, audit
from opd.objectives.audit.findings import ZERO
from opd.objectives.audit.references import REVERSE_KL
from opd.reports.printable import printable

SHOWN = 4  # fields listed besides the reverse KL


def load(target: str) -> LossFunction:
    """The function that MODULE:FUNCTION names; MODULE is importable from here, or the path of a .py file.

    Raises BadInput when there is no such thing.
    """
    module_name, colon, function_name = target.rpartition(":")
    if not colon or not module_name or not function_name:
        raise BadInput(f"{target} is not MODULE:FUNCTION; write my_losses:reverse_kl, or losses/mine.py:reverse_kl")
    module = _from_file(Path(module_name)) if module_name.endswith(".py") else _imported(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        what = "has no" if function is None else "has, but not as a function,"
        raise BadInput(f"{module_name} {what} {function_name}; its functions are {', '.join(sorted(there)) or 'none'}")
    return cast(LossFunction, function)  # whether it is one, its first call tells


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(f"{path} is not a file; give the path of a .py file, or a module that can be imported from here")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses in the file look themselves up
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _imported(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise BadInput(f"{name} cannot be imported from here: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)


def run(target: str, *, as_json: bool) -> None:
    """Audits the named function and prints what was found."""
    findings = audit(load(target), target)
    if as_json:
        print(json.dumps(findings.plain(), indent=2, allow_nan=False))
    else:
        show(findings, Console())


def show(findings: Findings, console: Console) -> None:
    """The verdict, the nearest fields, and the facts about teacher, masks and infinities."""
    console.print(Text(printable(f"{findings.function} follows: {findings.verdict}"), style="bold"))
    fields = Table(title="expected gradient beside exact ones", title_justify="left")
    fields.add_column("field")
    for name in ("cosine", "relative error", "times"):
        fields.add_column(name, justify="right")
    shown = list(findings.matches[:SHOWN])
    reverse = findings.match(REVERSE_KL)
    if reverse is not None and reverse not in shown:
        shown.append(reverse)
    for match in shown:
        fields.add_row(match.name, f"{match.cosine:.4f}", f"{match.relative:.2g}", f"{match.scale:.3g}")
    if shown:
        console.print(fields)
    facts = Table(show_header=False, title="what else is in it", title_justify="left")
    facts.add_column("fact", ratio=1)
    facts.add_column("answer", ratio=1)
    for fact, said in sentences(findings):
        facts.add_row(fact, said)
    console.print(facts)


def sentences(f: Findings) -> Iterator[tuple[str, str]]:
    """Questions and answers in words, for the table."""
    yield "mean over", f.averaging + ("; splitting a batch changes the direction" if f.splits else "")
    yield "noise of one answer, over the mean", f"{f.noise:.3g}"
    yield "the teacher is in the expected gradient", _share(f.teacher_in_mean, "another teacher changes it by")
    yield "the teacher is in single answers", _share(f.teacher_in_answers, "another teacher changes them by")
    yield "the teacher is held fixed", "yes" if f.teacher_held else "no: a gradient flows into its logits"
    yield "student = teacher: mean", _share(f.mean_at_teacher, "a gradient is left,", otherwise="zero")
    yield "student = teacher: single answers", _share(f.answers_at_teacher, "a gradient is left,", otherwise="zero")
    if f.stale is not None:
        said = "exact in the states visited" if f.stale <= ZERO else f"wrong by {f.stale:.0%}"
        yield "answers of another policy", said
    yield "gradient at masked tokens", _share(f.masked_gradient, "yes,", otherwise="none")
    yield "masked tokens change the others", _share(f.masked_values, "yes, by", otherwise="no")
    yield "NaN of the teacher at masked tokens", "makes the gradient NaN" if f.masked_nan else "does nothing"
    same = abs(f.padding - 1) <= ZERO
    yield "padding to twice the length", "changes nothing" if same or not f.expected else f"times {f.padding:.3g}"
    for who, text in (("both", "by both"), ("student", "by the student"), ("teacher", "by the teacher")):
        yield f"a token ruled out (-inf) {text}", "finite" if f.finite[who] else "not finite"


def _share(value: float, yes: str, otherwise: str = "no") -> str:
    return otherwise if value <= ZERO else f"{'yes: ' if otherwise == 'no' else ''}{yes} {value:.2g}"
