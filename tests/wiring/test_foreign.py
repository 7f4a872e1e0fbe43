"""Scorers with another tokenizer: what a config can ask of them and what is said of them, before weights are loaded."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from opd.errors import BadInput, ConfigError, ModelError
from opd.text.crossing import Crossing
from opd.text.pieces import pieces
from opd.wiring.build import check_context, load_prompts, load_tasks, load_texts, read_prompts
from opd.wiring.dry_run import dry_run
from opd.wiring.foreign import foreign_notes
from opd.wiring.foreign_fit import check_fit, example, foreign_lines, measured, own_tokens
from opd.wiring.memory_plan import plan_memory
from opd.wiring.workload import planned_answers, workload
from tests.wiring import foreign_models as made

pytestmark = pytest.mark.filterwarnings("ignore::opd.config.checks.ConfigWarning")

SPAN = {"support": "sampled", "alignment": "span"}
ROUTED = {"kind": "routed", "routes": {"math": "a", "code": "b"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made.world(tmp_path_factory.mktemp("foreign"), "unigram", "wordpiece")


def refused(world, scorers, *terms, **sections) -> str:
    with pytest.raises(ConfigError) as caught:
        load_texts(made.config(world, scorers, *terms, **sections))
    return str(caught.value)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_A_02_A_12_who_is_foreign_is_known_by_content(world):
    config = made.config(world, {"a": "unigram", "b": "own"}, {"target": ROUTED})
    texts = load_texts(config)
    assert texts.foreign == ("a",)
    assert isinstance(texts.agreements["a"], Crossing) and not isinstance(texts.agreements["b"], Crossing)


def test_what_is_made_of_the_student_is_never_foreign(world):
    scorers = {"a": "unigram", "start": {"weights": "initial"}, "slow": {"weights": "ema"}}
    config = made.config(world, scorers, *({"target": name} for name in scorers))
    assert load_texts(config).foreign == ("a",)


def test_one_scorer_has_one_kind_of_rows(world):
    said = refused(world, {"a": "unigram"}, {"target": "a"}, {"target": "a", **SPAN})
    assert said.startswith(
        "objective.terms.1.alignment: a has another tokenizer, and objective.terms.0 joins its tokens"
    )
    assert "strict in all terms that read it" in said
    two = [{"target": "a", **SPAN}, {"target": "b", "alignment": "gold"}]
    assert load_texts(made.config(world, {"a": "unigram", "b": "wordpiece"}, *two)).foreign == ("a", "b")
    own = [{"target": "b"}, {"target": "b", **SPAN}]
    assert load_texts(made.config(world, {"b": "own"}, *own)).foreign == ()


PRODUCTS = [
    {"kind": "product", "weights": {"a": 0.5, "b": 0.5}},
    {"kind": "extrapolated", "teacher": "a", "reference": "b"},
    {"kind": "delta", "strong": "a", "weak": "b", "base": "b"},
]


@pytest.mark.parametrize("target", [*PRODUCTS, {"kind": "veto", "scorer": "a"}], ids=lambda target: target["kind"])
def test_products_of_vocabularies_are_refused_and_those_of_spans_are_not(world, target):
    names = {"a": "unigram", "b": "own"} if target["kind"] != "veto" else {"a": "unigram"}
    said = refused(world, names, {"target": target})
    assert f"objective.terms.0.target: a target of kind {target['kind']} multiplies distributions" in said
    assert "alignment: span" in said
    load_texts(made.config(world, names, {"target": target, **SPAN}))


@pytest.mark.parametrize("target", PRODUCTS, ids=lambda target: target["kind"])
def test_spans_of_two_families_are_not_the_same(world, target):
    said = refused(world, {"a": "unigram", "b": "wordpiece"}, {"target": target, **SPAN})
    assert "objective.terms.0.target: a and b have different tokenizers" in said
    load_texts(made.config(world, {"a": "unigram", "b": "unigram"}, {"target": target, **SPAN}))


def test_routed_teachers_of_two_families_each_have_their_rows(world):
    names = {"a": "unigram", "b": "wordpiece"}
    for term in ({"target": ROUTED}, {"target": ROUTED, **SPAN}, {"target": ROUTED, "alignment": "gold"}):
        load_texts(made.config(world, names, term))
    beyond = {"kind": "extrapolated", "teacher": ROUTED, "reference": {"a": "c", "b": "d"}, "scale": 1.5}
    families = {**names, "c": "unigram", "d": "wordpiece"}
    load_texts(made.config(world, families, {"target": beyond, **SPAN}))
    crossed = {**beyond, "reference": {"a": "d", "b": "c"}}
    assert "have different tokenizers" in refused(world, families, {"target": crossed, **SPAN})


def test_gates_baselines_and_mixed_writers_need_the_students_tokens(world):
    names = {"a": "unigram", "b": "own"}
    gate = {"target": "b", "tokens": {"where": {"of": "a", "above": 0.5}}}
    assert "objective.terms.0.tokens.where.of: a has another tokenizer" in refused(world, names, gate)
    baseline = {"target": "a", "support": "sampled", "credit": {"baseline": "exact"}}
    said = refused(world, {"a": "unigram"}, baseline)
    assert "objective.terms.0.credit.baseline: the baseline drops out of the mean only where no weight depends" in said
    for kind in ("teacher_mixed", "speculative"):
        said = refused(world, {"a": "unigram"}, {"target": "a"}, behaviour={"kind": kind, "scorer": "a"})
        assert f"objective.behaviour: a has another tokenizer, and {kind} takes the next token from both" in said


def test_what_a_teacher_writes_in_other_tokens_was_drawn_by_nobody(world):
    teacher, only = {"kind": "teacher", "scorer": "a"}, {"a": "unigram"}
    for term in ({"target": "a"}, {"target": "a", "support": "sampled", "alignment": "alm"}, {"kind": "data"}):
        load_texts(made.config(world, only, term, behaviour=teacher))
    span = {"target": "a", **SPAN, "importance": "ratio"}
    said = refused(world, only, span, behaviour=teacher)
    assert "objective.terms.0: a sampled term averages over tokens that a model drew" in said
    half = [{"writer": {"kind": "student"}, "share": 0.5}, {"writer": teacher, "share": 0.5}]
    mixture = {"kind": "mixture", "of": half}
    own = [{**span, "written_by": ["student"]}, {"kind": "data", "written_by": ["teacher"]}]
    load_texts(made.config(world, only, *own, behaviour=mixture))
    load_texts(made.config(world, {"a": "own"}, span, behaviour=teacher))


def test_words_that_end_an_exam_must_be_the_examinees(world):
    rows = {"kind": "inline", "name": "sums", "rows": [{"prompt": "1 + 1 =", "answer": "2"}]}
    task = {"name": "sums", "source": rows, "grader": {"kind": "exact"}, "sampling": {"stop_tokens": ["Ġ+"]}}
    config = made.config(world, {"teacher": "unigram"}, {"target": "teacher"}, evals={"tasks": [task]})
    texts, tasks = load_texts(config), load_tasks(config.evals)
    try:
        with pytest.raises(ModelError, match=r"sampling.stop_tokens: 'Ġ\+' is not one token of .*unigram"):
            check_context(config, texts, load_prompts(config, texts.student), tasks)
    finally:
        tasks[0].grader.close()


def test_what_runs_and_is_worth_a_word(world):
    own = made.config(world, {"a": "own"}, {"target": "a", **SPAN})
    (note,) = foreign_notes(own, load_texts(own))
    assert "objective.terms.0.alignment is span, and every scorer that it reads has the student's tokenizer" in note
    later = made.config(world, {"a": "unigram"}, {"target": "a", "support": "sampled", "credit": {"discount": 0.5}})
    (note,) = foreign_notes(later, load_texts(later))
    assert "tokens that are not the same to both cost nothing" in note
    plain = made.config(world, {"a": "unigram"}, {"target": "a", **SPAN})
    assert foreign_notes(plain, load_texts(plain)) == []


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json"])
def test_A_11_a_file_that_cannot_be_fetched_is_an_error_and_not_another_format(world, monkeypatch, file):
    """A teacher without its template would be read as plain text, and one without a tokenizer file as another one."""
    from transformers import tokenization_utils_base

    there = tokenization_utils_base.cached_file

    def unreachable(folder, name, **settings):
        if name == file and str(folder).endswith("unigram"):
            raise OSError("We couldn't connect to the hub to load this file")
        return there(folder, name, **settings)

    config = made.config(world, {"a": "unigram"}, {"target": "a"})
    assert load_texts(config).scorers["a"].kind == "chat"
    monkeypatch.setattr(tokenization_utils_base, "cached_file", unreachable)
    with pytest.raises(ModelError, match=r"unigram.*: no tokenizer could be loaded: We couldn't connect"):
        load_texts(config)


# ---- what is measured --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(world):
    config = made.config(world, {"a": "unigram", "b": "own"}, {"target": ROUTED})
    texts = load_texts(config)
    prompts = load_prompts(config, texts.student)
    return config, texts, prompts, read_prompts(config, prompts.prompts())


def test_a_fit_counts_every_token_once(run):
    _, texts, _, asked = run
    fit = measured(texts, "a", asked["a"])
    answers = [prompt.completion_ids for prompt in asked["a"]]
    assert (fit.texts, fit.of) == (len(answers), "answers of the data") == (16, "answers of the data")
    assert fit.ours == sum(map(len, answers)) and 0 < fit.same <= fit.mapped <= fit.ours
    assert 0 < fit.spans <= fit.mapped and fit.rate == fit.theirs / fit.ours
    assert fit.trained("strict") == fit.same / fit.ours and fit.trained("gold") == fit.mapped / fit.ours


def test_without_answers_the_prompts_own_text_is_looked_at(run):
    _, texts, _, asked = run
    import dataclasses

    bare = [dataclasses.replace(prompt, completion_ids=None) for prompt in asked["a"]]
    fit = measured(texts, "a", bare)
    assert fit.of == "prompts' texts" and fit.ours > 0 and fit.texts == len(bare)
    assert measured(texts, "a", []).ours == 0 and own_tokens(texts, "a", [], 7) == 7


def test_an_answer_has_other_lengths_for_other_tokenizers(run, world):
    config, texts, prompts, asked = run
    rate = measured(texts, "a", asked["a"]).rate
    assert rate > 1
    assert (
        own_tokens(texts, "a", asked["a"], 100) == int(np.ceil(100 * rate)) and own_tokens(texts, "b", [], 100) == 100
    )
    step = workload(config, texts, prompts, planned_answers(config, prompts))
    assert step.scoring["a"].text.answer_tokens == pytest.approx(10 * rate)
    assert step.scoring["b"].text.answer_tokens == pytest.approx(10)
    own = texts.scorers["a"].tokenizer.vocab_size
    assert step.scoring["a"].model.size.vocab == own != step.scoring["b"].model.size.vocab
    alike, known = plan_memory(config, prompts).parts, plan_memory(config, prompts, texts=texts).parts
    assert known["a_activations"] == pytest.approx(alike["a_activations"] * rate, rel=1e-6)
    assert known["b_activations"] == alike["b_activations"] and known["logits_chunk"] > alike["logits_chunk"]


def test_positions_are_counted_in_the_readers_tokens(world):
    """The student's 10 tokens are more than the 20 positions that are left to the teacher's prompt."""
    config = made.config(world, {"a": "unigram"}, {"target": "a"})
    texts = load_texts(config)
    prompts = load_prompts(config, texts.student)
    asked = read_prompts(config, prompts.prompts())["a"]
    longest = max(len(texts.scorers["a"].prompt_ids(prompt.row)) for prompt in asked)
    need = longest + own_tokens(texts, "a", asked, 10)
    for positions, fits in ((need, True), (need - 1, False)):
        made.save(world / "short", "unigram", max_position_embeddings=positions)
        short = made.config(world, {"a": "short"}, {"target": "a"})
        if fits:
            check_context(short, load_texts(short), prompts, [])
        else:
            with pytest.raises(BadInput, match=r"which are about \d+ of its own, needs"):
                check_context(short, load_texts(short), prompts, [])


def test_next_to_nothing_in_common_is_refused(run, monkeypatch):
    config, texts, prompts, asked = run
    check_fit(config, texts, asked)
    check_context(config, texts, prompts, [])
    monkeypatch.setattr("opd.wiring.foreign_fit.LEAST", 0.999)
    with pytest.raises(ConfigError, match=r"objective.terms.0.alignment: strict could train \d+.\d % of the student's"):
        check_context(config, texts, prompts, [])


# ---- what a person sees --------------------------------------------------------------------------------------------


def test_the_lines_say_what_is_shared_and_show_one_example(run):
    _, texts, _, asked = run
    shared, covered, shown = foreign_lines(texts, asked)
    crossing = texts.agreements["a"]
    assert f"{(crossing.teacher_of_V >= 0).sum()} are also among the student's 300" in shared
    assert "16 answers of the data" in covered and "the same token to both" in covered
    assert "<|im_end|>" in shown and "=" in shown


def test_an_example_is_the_text_of_both(run):
    """What stands between the marks is the answer, on the student's side and on the teacher's."""
    _, texts, _, asked = run
    crossing = texts.agreements["a"]
    import opd.wiring.foreign_fit as fit

    (rollout, _), *_ = fit._written(texts, asked["a"])
    line = example(crossing, rollout, characters=10_000)
    sides = [part.split("=") for part in line.split("  ")]
    ours = [piece.replace("␣", " ") for side in sides for piece in side[0].split("·")]
    theirs = [piece.replace("␣", " ") for side in sides for piece in side[-1].split("·")]
    assert ours == pieces(texts.student.tokenizer, rollout.response_ids)
    assert "".join(ours) == "".join(theirs) == "The answer is 19.<|im_end|>"
    assert theirs == [piece or "_" for piece in pieces(texts.scorers["a"].tokenizer, crossing.read(rollout).ids)]
    assert len(example(crossing, rollout, characters=5)) < len(line)


def test_a_dry_run_shows_it(world, tmp_path):
    out = io.StringIO()
    config = made.config(
        world,
        {"a": "unigram"},
        {"target": "a", "alignment": {"kind": "gold", "matched_weight": 0.5}},
        run={"folder": str(tmp_path / "run")},
    )
    dry_run(config, Console(file=out, width=300))
    said = out.getvalue()
    assert "a has another tokenizer" in said and "tokens joined as gold {matched_weight: 0.5}" in said
    assert not (tmp_path / "run").exists()
