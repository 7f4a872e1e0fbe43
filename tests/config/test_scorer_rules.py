"""Scorers: names, who is read by what, options that nothing reads, targets that leave one out."""

from __future__ import annotations

import pytest

from opd.config.checks import ConfigWarning
from tests.config.recipes import BASE, PROMPTS, STUDENT, TASK, load, refused

NO_TEACHER = STUDENT + PROMPTS
LORA = STUDENT.replace("small", "small, revision: v1, lora: {}")


def target(text: str, *, more: str = "") -> str:
    return f"objective: {{behaviour: student, terms: [{{name: a, support: sampled, target: {text}{more}}}]}}\n"


def have(*names: str) -> str:
    return f"scorers: {{{', '.join(f'{name}: {{model: m_{name}}}' for name in names)}}}\n"


def assert_refused(tmp_path, text: str, *said: str, overrides: tuple[str, ...] = ()) -> None:
    error = refused(tmp_path, text, *overrides)
    assert all(part in error for part in said), error


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            NO_TEACHER,
            ["teacher.model: this is required: the objective's term 'reverse_kl' reads it", "teacher: {model"],
        ),
        (NO_TEACHER + target("maths"), ["scorers.maths: this is required: the objective's term 'a' reads it"]),
        (BASE + "objective: {preset: sft}\n", ["teacher: nothing reads it"]),
        (
            BASE + TASK.replace("{tasks", "{teacher: false, tasks") + "objective: {preset: sft}\n",
            ["teacher: nothing reads it"],
        ),
        (BASE + have("maths"), ["scorers.maths: nothing reads it"]),
        (NO_TEACHER + have("maths") + target("mats"), ["scorers.mats: this is required", "did you mean maths?"]),
        (BASE + have("teacher"), ["scorers.teacher: this is given twice"]),
        (BASE + have("student"), ["scorers.student: in a target this name is the student"]),
        (NO_TEACHER + target("student"), ["objective.terms.0.target: it is the student as it is now", "zero"]),
        (
            BASE + "objective: {behaviour: {kind: teacher_mixed, scorer: student}, terms: [{name: a}]}\n",
            ["objective.behaviour: no scorer has this name", "behaviour: student"],
        ),
        (NO_TEACHER + have("Big-1") + target("Big-1"), ["scorers.Big-1: metrics are called by this name"]),
        (
            BASE + TASK + "objective: {preset: sft, teacher_temperature: 2}\n",
            ["objective.teacher_temperature: nothing"],
        ),
        (
            NO_TEACHER + "objective: {behaviour: {kind: teacher, scorer: w}, terms: [{name: a, kind: data}]}\n",
            ["scorers.w: this is required: objective.behaviour teacher has it write"],
        ),
        (
            BASE + target("teacher", more=", tokens: {where: {of: gate, above: 1}}"),
            ["scorers.gate: this is required: the objective's term 'a' reads it"],
        ),
    ],
)
def test_X_11_scorers_are_there_exactly_where_something_reads_them(tmp_path, text, said):
    assert_refused(tmp_path, text, *said)


def test_either_way_of_giving_the_teacher_will_do(tmp_path):
    load(tmp_path, NO_TEACHER + have("teacher"))
    load(tmp_path, BASE + TASK + "objective: {preset: sft}\n")  # for the evals alone
    load(tmp_path, BASE + have("w") + "objective: {behaviour: {kind: teacher, scorer: w}, terms: [{name: a}]}\n")


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["initial", "ema", "past"])
@pytest.mark.parametrize("option", ["model: m", "dtype: float32", "device: cpu", "quantisation: int8", "revision: v2"])
def test_what_is_made_of_the_student_has_its_weights(tmp_path, kind, option):
    text = STUDENT + f"teacher: {{weights: {kind}, {option}}}\n" + PROMPTS
    name = option.partition(":")[0]
    assert_refused(tmp_path, text, f"teacher.{name}: nothing reads it: teacher.weights is {kind}")
    load(tmp_path, text.replace(f", {option}", ", offload: cpu"))


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        ("weights: model", "teacher.model: this is required"),
        ("model: big, ema_rate: 0.1", "teacher.ema_rate: nothing reads it: teacher.weights is model"),
        ("model: big, every: 5", "teacher.every: nothing reads it: teacher.weights is model"),
        ("weights: ema, every: 5", "teacher.every: nothing reads it: teacher.weights is ema"),
        ("weights: past, ema_rate: 0.1", "teacher.ema_rate: nothing reads it: teacher.weights is past"),
        ("weights: ema, offload: disk", "teacher.offload: disk loads a model that stays as it is"),
        ("weights: student, offload: cpu", "teacher.offload: nothing reads it"),
        ("weights: adapter_off", "teacher.weights: the student has no adapter to turn off"),
        ("weights: student", "the divergence is zero and trains nothing"),
        ("model: big, device: cpu, offload: cpu", "teacher.offload: nothing reads it: teacher.device is cpu"),
        ("model: big, context: {template: Hello.}", "teacher.context.template: nothing of the row has a place in it"),
        ("model: big, format: {plain_template: Q}", "teacher.format.plain_template: the prompt has no place in it"),
    ],
)
def test_options_of_a_scorer(tmp_path, scorer, said):
    assert_refused(tmp_path, STUDENT + f"teacher: {{{scorer}}}\n" + PROMPTS, said)


def test_the_student_in_another_context_or_sharper_is_a_teacher(tmp_path):
    for more in ("context: {template: 'Think. {prompt}'}", "temperature: 0.5", "format: {system_prompt: Think.}"):
        load(tmp_path, STUDENT + f"teacher: {{weights: student, {more}}}\n" + PROMPTS)


def test_a_temperature_of_its_own_is_read_by_terms_alone(tmp_path):
    text = STUDENT + "teacher: {model: big, temperature: 0.5}\n" + PROMPTS + "objective: {preset: seqkd}\n"
    assert_refused(tmp_path, text, "teacher.temperature: nothing reads it")
    both = STUDENT + "teacher: {model: big, temperature: 1.0}\n" + PROMPTS
    both += "objective: {preset: reverse_kl, teacher_temperature: 2}\n"
    assert_refused(tmp_path, both, "objective.teacher_temperature: nothing reads it: every scorer says its own")


def test_T_01_unlike_temperatures_warn(tmp_path):
    with pytest.warns(ConfigWarning, match="teacher.temperature: 0.5 and student_temperature 1.0 differ"):
        load(tmp_path, STUDENT + "teacher: {model: big, temperature: 0.5}\n" + PROMPTS)
    with pytest.warns(ConfigWarning, match="objective.teacher_temperature: 2.0 and student_temperature 1.0 differ"):
        load(tmp_path, BASE + "objective: {preset: reverse_kl, teacher_temperature: 2}\n")


# ---- adapters -------------------------------------------------------------------------------------------------------

SHARED = LORA + "teacher: {weights: adapter_off}\n" + PROMPTS


def test_a_teacher_that_is_the_student_with_its_adapter_off_is_fine(tmp_path):
    load(tmp_path, SHARED, "teacher.format.system_prompt=Think.", "student.quantisation=int4")
    load(tmp_path, SHARED, "teacher.model=small", "teacher.revision=v1")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("student.lora=null",), "teacher.weights: the student has no adapter to turn off"),
        (("teacher.model=big",), "teacher.model: nothing reads it: teacher.weights is adapter_off"),
        (("teacher.revision=v2",), "teacher.revision: nothing reads it: teacher.weights is adapter_off"),
        (("teacher.dtype=float32",), "teacher.dtype: nothing reads it: teacher.weights is adapter_off"),
        (("teacher.device=cpu", "teacher.offload=cpu"), "3 problems"),
        (("teacher.offload=cpu",), "teacher.offload: nothing reads it: weights: adapter_off"),
        (("teacher.quantisation=int8",), "teacher.quantisation: nothing reads it: teacher.weights is adapter_off"),
        (("teacher.weights=initial", "teacher.offload=cpu"), "teacher.offload: it would do nothing: weights: initial"),
    ],
)
def test_a_teacher_without_weights_of_its_own_has_no_say_about_them(tmp_path, overrides, said):
    assert_refused(tmp_path, SHARED, said, overrides=overrides)


# ---- targets --------------------------------------------------------------------------------------------------------

TWO = STUDENT + have("a", "b") + "prompts: {sources: [{kind: jsonl, path: x}, {kind: jsonl, path: y}]}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{kind: routed, routes: {x: a, z: b}}",
            ["target.routes.z: no row has the domain 'z'", "rows of y have no scor"],
        ),
        ("{kind: routed, routes: {x: a}}", ["target.routes: rows of y have no scorer", "scorers.b: nothing reads it"]),
        ("{kind: routed, routes: {x: a, y: a}, otherwise: b}", ["target.otherwise: nothing reads it"]),
        ("{kind: product, weights: {a: 1, b: 0}}", ["target.weights.b: with weight 0 nothing reads it"]),
        ("{kind: delta, strong: a, weak: a, base: b}", ["target.weak: a over itself is 1"]),
        ("{kind: veto, scorer: a, share: 1}", ["target.share: its fixed point is"]),
        ("{kind: veto, scorer: a, share: 0}", ["target.share: with share 0 the target is a itself"]),
        ("{kind: extrapolated, teacher: a, reference: a}", ["target.reference: a is its own reference"]),
        ("{kind: extrapolated, teacher: a, reference: {}}", ["target.reference: lambda 1.25 of a needs a reference"]),
        (
            "{kind: extrapolated, teacher: a, reference: b, scale: 1}",
            ["target.reference: nothing reads it: with lambda 1"],
        ),
        ("{kind: extrapolated, teacher: a, reference: {c: b}}", ["target.reference.c: c is no teacher of this target"]),
        (
            "{kind: extrapolated, teacher: a, reference: b, scale: {c: 2}}",
            ["target.scale.c: c is no teacher", "no lambda"],
        ),
    ],
)
def test_O_15_targets_that_leave_a_scorer_out(tmp_path, text, said):
    assert_refused(tmp_path, TWO + target(text), *said)


def test_O_15_every_teacher_has_its_own_reference_and_lambda(tmp_path):
    base = STUDENT + have("a", "b", "m") + "prompts: {sources: [{kind: jsonl, path: x}, {kind: jsonl, path: y}]}\n"
    text = (
        "{kind: extrapolated, teacher: {kind: routed, routes: {x: a, y: b}}, reference: {a: m}, scale: {a: 1.5, b: 1}}"
    )
    load(tmp_path, base + target(text))
    assert_refused(tmp_path, base + target(text.replace("b: 1}", "b: 2}")), "lambda 2 of b needs a reference")
    assert_refused(tmp_path, base + target(text.replace("{a: m}", "{b: m}")), "lambda 1.5 of a needs a reference")
    every = text.replace("{a: m}", "m").replace("1.5", "1")
    assert_refused(tmp_path, base + target(every), "target.reference: nothing reads it: every lambda is 1")


def test_routes_by_a_column_are_known_once_rows_are_read(tmp_path):
    load(tmp_path, TWO + target("{kind: routed, by: topic, routes: {one: a, two: b}}"))
    text = TWO.replace("path: x}", "path: x, columns: {domain: topic}}")
    load(tmp_path, text + target("{kind: routed, routes: {one: a, two: b}}"))
