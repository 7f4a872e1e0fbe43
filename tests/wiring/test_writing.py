"""From a config to writers and rewards: what is checked before weights load, and who becomes what."""

from __future__ import annotations

import json

import pytest

from opd.config.behaviours import (
    Cached,
    DatasetWrites,
    Mixture,
    Share,
    Speculative,
    StudentWrites,
    TeacherMixed,
    TeacherWrites,
)
from opd.config.objective import Objective
from opd.config.schema import Config
from opd.errors import ConfigError, DataError
from opd.prompts.mixture import PromptStream
from opd.rollouts.engine import EmbeddedEngine
from opd.types import Prompt, Row, SamplingParams
from opd.wiring.writing import check_writers, make_rewards, make_sampler, needs_completions, one_answer
from tests.rollouts.reference import causal, prompts
from tests.rollouts.scorers import scorer_for

HALF = Mixture(of=(Share(writer=StudentWrites(), share=0.5), Share(writer=DatasetWrites(), share=0.5)))
EXACT = {"grader": {"kind": "exact"}}


def _config(behaviour, terms=(), **sections) -> Config:
    base = {"student": {"model": "s"}, "prompts": {"sources": [{"kind": "inline", "rows": ["none"]}]}}
    return Config(**{**base, **sections}, objective=Objective(behaviour=behaviour, terms=terms))


def _stream(*answers: str | None) -> PromptStream:
    rows = [
        Row(id=f"q/{i}", domain="q", prompt="x", columns={} if a is None else {"answer": a})
        for i, a in enumerate(answers)
    ]
    return PromptStream(
        [(rows, 1.0)],
        lambda row: Prompt(row=row, ids=prompts(4)[0].ids),
        per_step=2,
        max_prompt_tokens=9,
        shuffle=False,
        seed=0,
        need_completion=False,
    )


class _Format:
    decode = staticmethod(str)

    class tokenizer:
        vocab_size = 300
        show = staticmethod(str)


def _engine() -> EmbeddedEngine:
    return EmbeddedEngine(causal(), seed=0, slots=4, path="auto")


def test_rows_need_answers_wherever_the_lot_may_give_them_to_the_data():
    for behaviour, needed, single in (
        (StudentWrites(), False, False),
        (DatasetWrites(), True, True),
        (HALF, True, False),
    ):
        assert needs_completions(_config(behaviour)) == needed
        assert one_answer(_config(behaviour)) == single


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (StudentWrites(), "student"),
        (TeacherWrites(scorer="big"), "teacher"),
        (TeacherMixed(scorer="big"), "teacher_mixed"),
        (Speculative(scorer="big"), "speculative"),
    ],
)
def test_every_behaviour_writes_and_says_so(behaviour, kind):
    asked = prompts(4, 6)
    scorer = scorer_for(causal(seed=3), asked, name="big")
    sampler = make_sampler(_config(behaviour), _engine(), {"big": scorer})
    seen = []
    sampler.progress = seen.append
    made = sampler.generate(asked, SamplingParams(max_tokens=3, samples_per_prompt=2), tag="train/0")
    assert {r.behaviour for r in made} == {kind} and len(made) == 4 and seen[-1] == 4
    assert bool(scorer.log) == (kind != "student")


def test_a_mixture_draws_with_the_seed_of_the_run():
    engine, asked = _engine(), prompts(*[4] * 30)
    first, again, other = (
        make_sampler(_config(HALF, run={"seed": seed}), engine, {}).lots(asked, tag="t") for seed in (1, 1, 2)
    )
    assert first == again != other and set(first) == {0, 1}


@pytest.mark.parametrize(
    "behaviour", [TeacherWrites(scorer="big"), TeacherMixed(scorer="big"), Speculative(scorer="big")]
)
def test_a_scorer_that_is_missing_or_far_away_is_refused(behaviour):
    with pytest.raises(ConfigError, match=f"{behaviour.kind} asks the scorer 'big'.*there are: small"):
        make_sampler(_config(behaviour), _engine(), {"small": object()})  # type: ignore[dict-item]

    class Remote:
        name, temperature = "big", 1.0

        def evidence(self, rollouts_N): ...

    with pytest.raises(ConfigError, match=f"{behaviour.kind} needs the scorer 'big' token by token"):
        make_sampler(_config(behaviour), _engine(), {"big": Remote()})  # type: ignore[dict-item]


def test_cached_answers_are_checked_before_anything_is_loaded(tmp_path):
    config = _config(Cached(run=str(tmp_path / "none")), run={"folder": str(tmp_path / "new")})
    with pytest.raises(DataError, match=r"objective\.behaviour: .*none does not exist"):
        check_writers(config, _stream("a"), _Format())  # type: ignore[arg-type]
    own = _config(Cached(run=str(tmp_path / "x" / ".." / "new")), run={"folder": str(tmp_path / "new")})
    with pytest.raises(ConfigError, match=r"run\.folder itself"):
        check_writers(own, _stream("a"), _Format())  # type: ignore[arg-type]
    check_writers(_config(StudentWrites()), _stream("a"), _Format())  # type: ignore[arg-type]


def test_T_6_cached_answers_of_a_cut_distribution_are_refused_for_drawn_tokens(tmp_path) -> None:
    """A tail that was cut off is not in the record, and recorded probabilities are those of what was left."""
    (tmp_path / "old").mkdir()
    sampling = {"temperature": 0.7, "top_p": 0.5, "top_k": 0}
    about = {"schema_version": 1, "config_hash": "0"}
    (tmp_path / "old" / "environment.json").write_text(json.dumps(about))
    (tmp_path / "old" / "config.json").write_text(json.dumps({"sampling": sampling}))
    drawn = {"name": "a", "support": "sampled", "importance": "ratio"}
    config = _config(Cached(run=str(tmp_path / "old")), terms=[drawn])
    with pytest.raises(ConfigError, match=r"drawn with temperature 0.7, top_p 0.5, and objective.terms.0 \(a\)"):
        check_writers(config, _stream("a"), _Format())  # type: ignore[arg-type]
    whole = _config(Cached(run=str(tmp_path / "old")), terms=[{"name": "a"}])
    with pytest.raises(DataError, match="rollouts of 0 steps"):  # what it says of an empty record: it got that far
        check_writers(whole, _stream("a"), _Format())  # type: ignore[arg-type]


def test_a_training_row_without_a_reference_is_named_before_anything_is_sampled():
    assert make_rewards(_config(StudentWrites()), _stream(None), _Format()) is None  # type: ignore[arg-type]
    config = _config(StudentWrites(), rewards=EXACT)
    assert make_rewards(config, _stream("1", "2"), _Format()) is not None  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"rewards\.grader: .*q/1"):
        make_rewards(config, _stream("1", None), _Format())  # type: ignore[arg-type]
