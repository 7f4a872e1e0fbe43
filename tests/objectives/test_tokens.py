"""Which tokens a term trains, rule by rule, and who is counted for what."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import TypeAdapter

from opd.config.objective import Term
from opd.objectives.tokens import needs_behaviour, reads, trained_mask
from opd.types import SamplingParams
from tests.objectives.answers import answer

TERM = TypeAdapter(Term)
KINDS = ("student", "dataset", "teacher", "teacher_mixed", "speculative", "cached")


def term(**fields):
    return TERM.validate_python({"name": "t", **fields})


def mask(spec, rollout, special=frozenset(), invalid=None) -> tuple[list[int], dict[str, int]]:
    kept, lost = trained_mask(spec, rollout, special_ids=special, invalid=invalid or {})
    return kept.astype(int).tolist(), lost


def test_answers_are_chosen_by_writer_and_domain() -> None:
    spec = term(written_by=["dataset", "teacher"], domains=["d"])
    assert [reads(spec, answer(behaviour=kind)) for kind in KINDS] == [kind in ("dataset", "teacher") for kind in KINDS]
    assert not reads(spec, answer(behaviour="dataset", domain="other"))


def test_O_18_cross_entropy_never_reads_the_students_own_samples() -> None:
    assert [reads(term(kind="data"), answer(behaviour=kind)) for kind in KINDS] == [kind != "student" for kind in KINDS]
    assert not reads(term(kind="data", written_by=["student"]), answer())


def test_tokens_of_the_environment_are_not_trained() -> None:
    assert mask(term(), answer(mask=np.array([1, 0, 1, 1], bool))) == ([1, 0, 1, 1], {"environment": 1})


def test_A_17_special_tokens_are_left_out_but_not_those_that_end_something() -> None:
    """Token 4 is special, 5 ends a turn by the sampling parameters, 6 ends the answer."""
    ends = answer(sampling=SamplingParams(max_tokens=9, stop_ids=(5,)))
    spec = term(tokens={"special": "mask"})
    assert mask(spec, ends, frozenset({4, 5, 6})) == ([1, 0, 1, 1], {"special": 1})
    cut = answer(sampling=None, finish_reason="length")
    assert mask(spec, cut, frozenset({4, 5, 6})) == ([1, 0, 0, 0], {"special": 3})
    assert mask(term(), cut, frozenset({4, 5, 6})) == ([1, 1, 1, 1], {})


def test_truncated_answers_are_left_out_whole_when_asked() -> None:
    cut = answer(finish_reason="length")
    assert mask(term(tokens={"truncated": "mask"}), cut) == ([0, 0, 0, 0], {"truncated": 4})
    assert mask(term(), cut) == ([1, 1, 1, 1], {})
    assert mask(term(tokens={"truncated": "mask"}), answer()) == ([1, 1, 1, 1], {})


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"skip_first": 2}, [0, 0, 0, 1, 1]),
        ({"first": 2}, [1, 0, 1, 0, 0]),
        ({"skip_first": 1, "first": 2}, [0, 0, 1, 1, 0]),
    ],
)
def test_places_are_counted_in_tokens_that_the_writer_chose(rule: dict, kept: list[int]) -> None:
    rollout = answer(length=5, mask=np.array([1, 0, 1, 1, 1], bool))
    assert mask(term(tokens=rule), rollout)[0] == kept


@pytest.mark.parametrize("spec", [{"kind": "outcome"}, {"shape": {"kind": "verifier_gated"}}], ids=str)
def test_O_21_an_answer_without_a_reward_is_masked_and_counted_never_taken_for_nought(spec: dict) -> None:
    assert mask(term(**spec), answer()) == ([0, 0, 0, 0], {"reward": 4})
    assert mask(term(**spec), answer(reward=0.0)) == ([1, 1, 1, 1], {})


def test_a_token_without_a_behaviour_logprob_leaves_the_terms_that_use_it() -> None:
    unknown = answer(behaviour_logprobs=np.array([-1, np.nan, -1, -np.inf], np.float32))
    using = [
        {"support": "sampled", "importance": "ratio"},
        {"support": "sampled", "advantage_under": "sampler"},
        {"support": {"kind": "union", "tail": "sampled_correction"}, "importance": "tis"},
        {"kind": "outcome", "importance": {"kind": "ppo", "against": "proximal"}},
    ]
    for fields in using:
        rollout = answer(behaviour_logprobs=unknown.behaviour_logprobs, reward=1.0)
        assert mask(term(**fields), rollout) == ([1, 0, 1, 0], {"behaviour": 2}), fields
    for fields in ({}, {"support": "sampled"}, {"support": {"kind": "union"}, "importance": "tis"}, {"kind": "data"}):
        assert not needs_behaviour(term(**fields)), fields


def test_X_01_a_token_that_a_scorer_could_not_judge_is_masked_under_the_scorers_name() -> None:
    bad = {"math": np.array([0, 1, 1, 0], bool), "code": np.array([0, 0, 1, 1], bool)}
    assert mask(term(), answer(), invalid=bad) == ([1, 0, 0, 0], {"code": 2, "math": 1})
