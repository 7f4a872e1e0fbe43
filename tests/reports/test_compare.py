"""Runs side by side: the better one is named, what cannot be told apart is not, and why they differ is said."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from opd.errors import BadInput, DataError
from opd.reports.compare import Comparison, compare, read_runs, show_comparison
from opd.reports.options import changed, differences
from opd.reports.page.compare import compare_page, write_comparison
from tests.cli.test_train import opd
from tests.reports.parts import plain_console
from tests.reports.runs import HOSTILE, config, make_run


def made(tmp_path: Path, **runs: dict[str, Any]) -> Comparison:
    folders = [make_run(tmp_path / name, **given) for name, given in runs.items()]
    return compare(read_runs(folders))


def printed(comparison: Comparison) -> str:
    console, raw = plain_console()
    show_comparison(comparison, console)
    return raw.getvalue().decode()


def test_the_better_run_is_named_and_overlaps_are_not_told_apart(tmp_path: Path) -> None:
    clear = made(tmp_path / "1", a={"scores": (0.5, 0.7)}, b={"scores": (0.5, 0.9)}, c={"scores": (0.5, 0.6)})
    assert clear.best == ["B"] and clear.verdict.startswith("Best is B b: 90.0 %")
    close = made(tmp_path / "2", a={"scores": (0.5, 0.87)}, b={"scores": (0.5, 0.9)}, c={"scores": (0.5, 0.6)})
    assert close.best == ["B", "A"]
    assert "no difference from A a is shown: the intervals overlap" in close.verdict
    assert "The others are clearly lower" in close.verdict
    text = printed(close)
    assert re.search(r"A a +87\.0 %\* ", text) and re.search(r"C c +60\.0 %  ", text)
    assert max(map(len, text[: text.index("Highest is")].splitlines())) <= 80


def test_runs_that_took_the_same_problems_are_paired(tmp_path: Path) -> None:
    """Intervals that overlap hide ten problems better and none worse."""
    asked = {"problems": 100, "half": 0.09}
    two = made(tmp_path / "1", a={"scores": (0.5, 0.6), **asked}, b={"scores": (0.5, 0.7), **asked, "source": "other"})
    assert two.best == ["B"] and two.verdict == "Best is B b: 70.0 % [61.0, 79.0]; its lead is not chance."
    line = "B b against A a: better on 10 problems, worse on 0: not chance, p = 0.0020"
    assert line in printed(two) and line in compare_page(two) and "is multiplied" not in printed(two)
    chance = made(tmp_path / "2", a={"scores": (0.5, 0.66), **asked}, b={"scores": (0.5, 0.7), **asked})
    assert chance.best == ["B", "A"] and "no difference from A a is shown: that could be chance" in chance.verdict
    # Seven problems of one pair are not chance alone (p 0.016), but may be as the best of three pairs.
    three = {name: {"scores": (0.5, after), **asked} for name, after in (("a", 0.63), ("b", 0.7), ("c", 0.5))}
    several = made(tmp_path / "3", **three)
    assert several.best == ["B"] and [(x, y, pair.p) for x, y, pair in several.pairs] == [
        ("B", "A", 3 * 2 / 2**7),
        ("B", "C", 3 * 2 / 2**20),
    ]
    assert "p is multiplied by 3" in printed(several) and "p is multiplied by 3" in compare_page(several)
    three["a"]["scores"] = (0.5, 0.64)
    assert made(tmp_path / "4", **three).best == ["B", "A"]


def test_other_problems_are_not_paired_and_that_is_said(tmp_path: Path) -> None:
    a = {"scores": (0.5, 0.6), "problems": 100, "half": 0.09}
    two = made(tmp_path / "1", a=a, b={**a, "scores": (0.5, 0.7), "ask": "order"})
    assert two.pairs == [] and two.best == ["B", "A"] and "the intervals overlap" in two.verdict
    assert any("different problems of sorting: 0 of 100 are the same" in caveat for caveat in two.caveats)
    fewer = made(tmp_path / "2", a=a, b={**a, "problems": 50})
    assert fewer.pairs == [] and any("different numbers of problems" in caveat for caveat in fewer.caveats)


def test_a_file_under_another_name_is_the_same_task(tmp_path: Path) -> None:
    here, there = "evals.tasks.0.source.path", "evals.tasks.0.source.name"
    both = made(
        tmp_path / "1",
        a={"problems": 100, here: "/data/sets/h.jsonl"},
        b={"problems": 100, here: "h.jsonl", there: "mine", "source": "mine"},
    )
    assert not any("set up differently" in caveat or "different problems" in caveat for caveat in both.caveats)
    assert both.differences == [] and both.pairs
    other = made(
        tmp_path / "2",
        a={"problems": 100, "evals.tasks.0.grader.kind": "exact"},
        b={"problems": 100, "evals.tasks.0.grader.kind": "math"},
    )
    assert any("set up differently (grader" in caveat for caveat in other.caveats)
    longer = made(tmp_path / "3", a={"problems": 100}, b={"problems": 100, "sampling.max_tokens": "24"})
    assert any("set up differently" in caveat for caveat in longer.caveats), "tasks take the sampling of training"
    unknown = made(tmp_path / "4", a={here: "/data/one.jsonl"}, b={here: "/data/two.jsonl"})
    assert any("set up differently (source" in c for c in unknown.caveats), "an old record does not hold the prompts"


def test_models_and_data_are_the_same_by_their_fingerprints(tmp_path: Path) -> None:
    def begun(**prints: str) -> list[dict[str, Any]]:
        prints = {"student": "s", "teacher": "t-1", "data": "d"} | prints
        return [{"step": 0, "kind": "start", "message": "the run begins", **prints}]

    a = {"student.model": "models/student", "teacher.model": "models/teacher", "events": begun()}
    b = {"student.model": "/x/models/student", "teacher.model": "/x/teacher", "events": begun(teacher="t-2")}
    same = made(tmp_path / "1", a=a, b=b)
    assert same.differences == [] and not any("start from different" in caveat for caveat in same.caveats)
    other = made(tmp_path / "2", a=a, b={**b, "events": begun(teacher="u")})
    assert [name for name, _ in other.differences] == ["teacher.model"]
    assert any("different teachers" in caveat for caveat in other.caveats)
    sft = {"student.model": "models/student", "teacher": "null", "objective.preset": "sft", "events": begun()}
    assert "teacher.model" in dict(made(tmp_path / "3", a=a, b=sft).differences), "none is another one"


def test_runs_of_different_tasks_show_their_own_scores(tmp_path: Path) -> None:
    both = made(tmp_path, a={"task": "one", "scores": (0.5, 0.7)}, b={"task": "two", "scores": (0.5, 0.4)})
    assert [arm.task for arm in both.arms] == ["one", "two"] and both.best == [] and both.level is None
    text = printed(both)
    assert re.search(r"A a +70\.0 % +\[67\.0, 73\.0\] +41 %", text) and re.search(r"B b +40\.0 % ", text)
    assert "A on one" in text and "B on two" in text and "share no held-out task" in both.verdict
    page = compare_page(both)
    assert "70.0 %" in page and '<span class="note">two</span>' in page and "each run on its own task" in page


def test_a_run_that_got_worse_lost_points(tmp_path: Path) -> None:
    both = made(tmp_path, a={"scores": (0.5, 0.468)}, b={"scores": (0.5, 0.9)})
    assert re.search(r"A a .* lost 3\.2 pt", printed(both)) and "lost 3.2 pt" in compare_page(both)
    for said in (printed(both), compare_page(both)):
        assert "step time" in said and "-7 %" not in said


def test_cost_is_compared_among_those_that_got_better(tmp_path: Path) -> None:
    runs = {name: {"scores": (0.5, after)} for name, after in (("a", 0.8), ("b", 0.9), ("worse", 0.4))}
    three = made(tmp_path, **runs)
    assert three.level == 0.8 and three.arms[2].reached is None and three.per_cost is not None
    assert "worse" not in three.per_cost


def test_what_changed_on_the_way_is_said(tmp_path: Path) -> None:
    event = {"step": 3, "kind": "changed", "message": "optim.lr changes from 1e-4 to 5e-5"}
    both = made(tmp_path, a={"events": [event]}, b={})
    assert [caveat for caveat in both.caveats if "changed on the way" in caveat] == [
        "A a: options or the machine changed on the way (its report says which)."
    ]


def test_cost_to_the_best_common_score(tmp_path: Path) -> None:
    slow = {"steps": 40, "scores": (0.5, 0.55, 0.6, 0.7, 0.8)}
    fast = {"steps": 20, "scores": (0.5, 0.8, 0.9)}
    both = made(tmp_path, slow=slow, fast=fast)
    assert both.level == 0.8 and both.cheapest == "B"
    at = [arm.reached for arm in both.arms]
    assert at[0] is not None and at[1] is not None
    assert [a["step"] for a in at if a] == [40, 10]
    assert at[0]["flops"] == pytest.approx(4 * at[1]["flops"]) and at[1]["tokens"] == 400
    assert (
        both.per_cost is not None and "B fast took 90G FLOPs" in both.per_cost and "4 times the FLOPs" in both.per_cost
    )
    assert "FLOPs to 80.0 %" in printed(both)
    got_worse = made(tmp_path / "w", a={"scores": (0.5, 0.4)}, b={"scores": (0.5, 0.9)})
    assert got_worse.level is None and got_worse.per_cost is None and "FLOPs to" not in printed(got_worse)


def test_configs_are_compared_option_by_option(tmp_path: Path) -> None:
    both = made(
        tmp_path,
        a={"run.folder": "runs/a", "optim.lr": "1e-4", "student.model": "/home/a/one/student"},
        b={"optim.lr": "2e-4", "student.model": "/home/a/two/student", "objective.preset": "tml"},
    )
    found = dict(both.differences)
    assert found["optim.lr"] == ["0.0001", "0.0002"] and found["objective.preset"] == ["reverse_kl", "tml"]
    assert found["student.model"] == ["one/student", "two/student"], "equal last parts are told apart"
    assert not [name for name in found if name.startswith(("run.folder", "objective.terms"))]
    assert "/home" not in printed(both) + compare_page(both)
    assert any("different students" in caveat for caveat in both.caveats)
    assert made(tmp_path / "s", a={}, b={}).differences == []


def test_a_section_that_one_run_lacks_is_shown_by_what_was_set_in_it(tmp_path: Path) -> None:
    without = config() | {"teacher": None}
    assert differences([config(), without]) == [("teacher.model", ["models/teacher", "none"])]
    both = made(tmp_path, a={}, b={"teacher": "null", "objective.preset": "sft"})
    assert not any("teachers" in caveat for caveat in both.caveats)


def test_a_parameter_that_only_one_run_gives_is_a_difference() -> None:
    runs = [config(**{"objective.preset": "exopd"} | more) for more in ({}, {"objective.parameters.scale": "1.5"})]
    assert differences(runs) == [("objective.parameters.scale", ["-", "1.5"])]
    assert differences([runs[1], runs[1]]) == []


def test_an_option_of_one_run_only_and_a_run_without_config(tmp_path: Path) -> None:
    old = config() | {"gone": {"option": 3}}
    assert differences([old, config()]) == [("gone.option", ["3", "-"])]
    assert changed(old)["gone.option"] == 3
    assert differences([None, config()])


def test_why_runs_might_not_be_comparable(tmp_path: Path) -> None:
    odd = made(
        tmp_path,
        a={"run.seed": "1", "done": False},
        b={"run.seed": "2", "teacher.model": "other", "evals.tasks.0.samples": "4"},
    )
    said = " ".join(odd.caveats)
    assert "A a is not finished" in said and "different teachers" in said and "Their seeds differ: A 1, B 2" in said
    assert "set up differently" in said
    tasks = made(tmp_path / "t", a={"task": "one"}, b={"task": "two"})
    assert tasks.task is None and tasks.best == [] and "share no held-out task" in tasks.verdict
    assert any("A: one; B: two" in caveat for caveat in tasks.caveats)
    assert "share no held-out task" in printed(tasks) and compare_page(tasks)
    assert any("One seed each" in caveat for caveat in made(tmp_path / "u", a={}, b={}).caveats)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a")
    with pytest.raises(BadInput, match="two runs or more, and got 1"):
        read_runs([one])
    with pytest.raises(BadInput, match="named twice"):
        read_runs([one, tmp_path / "." / "a"])
    with pytest.raises(BadInput, match="up to 12 runs, and got 13"):
        read_runs([tmp_path / str(i) for i in range(13)])
    with pytest.raises(DataError, match="does not exist"):
        read_runs([one, tmp_path / "b"])
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="no run folder"):
        read_runs([one, tmp_path / "c"])


def test_compare_is_a_command(tmp_path: Path, capsys) -> None:
    runs = [str(make_run(tmp_path / name, scores=s)) for name, s in (("a", (0.5, 0.7)), ("b", (0.5, 0.9)))]
    out = tmp_path / "new" / "compare.html"
    assert opd("compare", *runs, "--out", str(out)) == 0
    assert "Best is B b" in capsys.readouterr().out and out.is_file()
    assert opd("compare", runs[0]) == 2
    assert "two runs or more" in capsys.readouterr().err
    assert opd("compare", *runs, "--out", runs[0]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_many_long_runs_make_a_small_page(tmp_path: Path) -> None:
    runs = {f"run{i}": {"steps": 120, "scores": [0.5 + j / 50 for j in range(16)]} for i in range(12)}
    page = compare_page(made(tmp_path, **runs))
    assert len(page.encode()) < 350_000


@pytest.mark.parametrize("width", [1400, 390])
def test_S_6_a_comparison_in_a_browser(browser, tmp_path: Path, width: int) -> None:
    name = "<img onerror='window.pwned=1' src=x>\u202e".replace("/", "\\")
    runs = {f"{name}{i}": {"text": HOSTILE, "task": HOSTILE, "scores": (0.5, 0.6 + i / 10)} for i in range(2)}
    both = made(tmp_path, **runs)
    assert "\u202e" not in printed(both) and "\x1b" not in printed(both)
    with browser.open(write_comparison(both, tmp_path / "compare.html"), width=width) as tab:

        def seen() -> list[str]:
            every = "[...document.querySelectorAll('figure[data-chart^=accuracy]')]"
            return tab.js(f"{every}.filter(f => f.getClientRects().length).map(f => f.dataset.chart)")

        assert seen() == ["accuracy-step"]
        tab.click("#axis-flops")
        assert seen() == ["accuracy-flops"]
        tab.hover("figure[data-chart='accuracy-flops'] svg.chart")
        said = tab.js("document.querySelector(\"figure[data-chart='accuracy-flops'] output\").textContent")
        assert said.startswith("FLOPs ") and "A " in said and " %" in said
        assert tab.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert tab.js("typeof window.pwned") == "undefined"
        assert tab.js("document.querySelectorAll('main img').length") == 0
        assert tab.problems() == []
    assert html.escape("<img") in compare_page(both)
