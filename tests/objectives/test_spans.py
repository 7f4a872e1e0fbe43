"""Runs of tokens that a term takes as one: which are trained, how they are numbered, and which slots say nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.errors import ConfigError
from opd.objectives.kernels.rows import TokenRows
from opd.objectives.kernels.tiled import tiled_look, tiled_loss
from opd.objectives.objective import Objective
from opd.objectives.spans import Sums, span_rows, whole_spans
from opd.types import Head, ScorerRows, Spans
from tests import rooms
from tests.objectives.answers import answer, batch
from tests.objectives.two_alphabets import WORDS, V, World

PIECES = st.lists(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=5), min_size=1, max_size=4)


def laid(pieces: list[list[tuple[int, bool]]]) -> list[np.ndarray]:
    """Spans of so many tokens for each answer, some of them unmapped."""
    found = []
    for sizes in pieces:
        span_T, number = [], 0
        for size, mapped in sizes:
            span_T += [number if mapped else -1] * size
            number += mapped
        found.append(np.array(span_T, dtype=np.int64))
    return found


@settings(max_examples=40, deadline=None)
@given(pieces=PIECES, seed=st.integers(0, 100))
def test_spans_are_trained_whole_and_never_cross_answers(pieces: list, seed: int) -> None:
    spans, rng = laid(pieces), np.random.default_rng(seed)
    kept = [rng.random(len(span_T)) < 0.7 for span_T in spans]
    whole = [whole_spans(kept_T, span_T) for kept_T, span_T in zip(kept, spans, strict=True)]
    for kept_T, whole_T, span_T in zip(kept, whole, spans, strict=True):
        for t, span in enumerate(span_T):
            assert whole_T[t] == (span >= 0 and kept_T[span_T == span].all())
    rows = span_rows(np.concatenate(whole), spans)
    marks = [(n, span) for n, span_T in enumerate(spans) for span in span_T]
    trained = [mark for mark, there in zip(marks, np.concatenate(whole), strict=True) if there]
    order = {mark: n for n, mark in enumerate(dict.fromkeys(trained))}
    wanted = [order[mark] if there else -1 for mark, there in zip(marks, np.concatenate(whole), strict=True)]
    assert rows.span_T.tolist() == wanted
    assert int(rows.last_T.sum()) == len(order)
    value_T = torch.from_numpy(rng.standard_normal(len(marks)))
    value_T[~torch.from_numpy(rows.span_T >= 0)] = torch.nan  # what is masked may be anything
    sums_S = Sums(rows, torch.device("cpu")).of(value_T)
    for n in range(len(order)):
        mine_T = torch.from_numpy(rows.span_T == n)
        torch.testing.assert_close(sums_S[n], value_T[mine_T].sum())
        assert rows.last_T[np.flatnonzero(rows.span_T == n)[-1]]


def test_a_scorer_is_asked_for_rows_as_the_terms_join_them() -> None:
    two = {"kind": "single", "scorer": "b"}
    asked = Objective(
        rooms.objective(
            {"name": "x", "alignment": "gold"}, {"name": "y", "alignment": "alm", "support": "sampled", "target": two}
        )
    ).wants([answer()])
    assert {name: (want.resolution, want.joined) for name, want in asked.items()} == {
        "teacher": ("full", "gold"),
        "b": ("sampled", "alm"),
    }
    assert Objective(rooms.objective({"name": "x"})).wants([answer()])["teacher"].joined == "strict"


@pytest.mark.parametrize("way", ["span", "gold", "alm"])
def test_terms_on_spans_look_at_batches_first(way: str) -> None:
    made = Objective(
        rooms.objective({"name": "x", "alignment": way, "support": "full" if way == "gold" else "sampled"})
    )
    assert made.looks == "batch" and not Objective(rooms.objective({"name": "x"})).looks_at_batches


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"alignment": "gold", "support": "sampled"}, "support full"),
        ({"alignment": "span"}, "support sampled"),
        ({"alignment": "alm", "support": {"kind": "union"}}, "support sampled"),
        ({"alignment": "alm", "support": "sampled", "target": {"kind": "delta"}}, "single or routed"),
        ({"alignment": "gold", "target": {"kind": "veto"}}, "single or routed"),
        ({"alignment": "span", "support": "sampled", "credit": {"discount": 0.5}}, "credit"),
        ({"alignment": "span", "support": "sampled", "credit": {"baseline": "exact"}}, "credit"),
        ({"alignment": "gold", "tokens": {"where": {"of": "student", "above": 1.0}}}, "one by one"),
        ({"alignment": "gold", "tokens": {"select": {"by": "entropy"}}}, "one by one"),
        ({"alignment": "span", "support": "sampled", "tokens": {"importance_of_prefix": 1.0}}, "one by one"),
        ({"alignment": "alm", "support": "sampled", "importance": "tis"}, "importance"),
        ({"alignment": "alm", "support": "sampled", "advantage_under": "sampler"}, "advantage_under"),
    ],
)
def test_slots_that_say_nothing_about_spans_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Objective(rooms.objective({"name": "x", **fields}))


def test_a_product_of_scorers_needs_one_cut() -> None:
    term = {
        "name": "x", "alignment": "span", "support": "sampled",
        "target": {"kind": "product", "weights": {"a": 0.5, "b": 0.5}},
    }  # fmt: skip
    same_T, objective = np.zeros(4, bool), Objective(rooms.objective(term))
    cuts = [np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])]
    one, other = (Spans(span_T=cut, span_U=cut, same_T=same_T) for cut in cuts)
    made = objective.plan(0, [answer()], {}, spans={"a": {"a": one}, "b": {"a": one}}).terms[0]
    assert made.kept["a"].all() and made.span is not None and made.span["a"].tolist() == [0, 0, 1, 1]
    with pytest.raises(ConfigError, match="one cut"):
        objective.plan(0, [answer()], {}, spans={"a": {"a": one}, "b": {"a": other}})


def gradient(objective: dict, world: World, spans: dict, *scorers: ScorerRows) -> Tensor:
    """Of the states, for a sum over tokens."""
    hidden_TD = world.hidden_TD.clone().requires_grad_()
    plan = Objective(rooms.objective({"name": "t", **objective})).plan(0, world.answers, {}, spans=spans)
    made = batch(world.answers)
    drawn_T = (world.hidden_TD @ world.weight_VD.T).log_softmax(-1).gather(1, made.token_T[:, None])[:, 0]
    tokens, head = TokenRows(made.token_T, drawn_T), Head(world.weight_VD, V)
    settings = {"student_temperature": 1.0, "chunk_tokens": 4}
    look = tiled_look(hidden_TD.detach(), head, tokens, plan.rows(made, dtype=torch.float64), scorers, **settings)
    rows = plan.rows(made, look, dtype=torch.float64)
    trained = sum(int(mask.sum()) for mask in plan.terms[0].kept.values())
    loss, _ = tiled_loss(hidden_TD, head, tokens, rows, scorers, **settings)
    (loss * trained).backward()
    assert hidden_TD.grad is not None
    return hidden_TD.grad


@pytest.mark.parametrize("way", ["span", "gold", "alm"])
def test_routed_terms_mix_scorers_of_both_sorts(way: str) -> None:
    """Every answer is trained by its own scorer alone: one with the student's tokenizer, one with another."""
    world = World(9, words=[(WORDS[n], WORDS[-n]) for n in range(1, 9)])
    world.answers = [replace(r, prompt=replace(r.prompt, row=replace(r.prompt.row, domain="fm"[n % 2])))
                     for n, r in enumerate(world.answers)]  # fmt: skip
    mine_T = torch.tensor([r.domain == "m" for r in world.answers for _ in r.mask])
    own = ScorerRows(
        "own", torch.ones(len(mine_T)).bool(), 1.0, hidden_TD=world.hidden_TD, head=Head(world.numbers(V, 5), V)
    )
    term = {"alignment": way, "support": "full" if way == "gold" else "sampled"}
    spans, rows = {"foreign": world.spans["teacher"]}, world.rows(way, name="foreign")
    routes = {"kind": "routed", "routes": {"m": "own", "f": "foreign"}}
    both = gradient({**term, "target": routes}, world, spans, rows, own)
    alone = [
        gradient({**term, "target": {"kind": "single", "scorer": name}}, world, cuts, scorer)
        for name, cuts, scorer in (("own", {}, own), ("foreign", spans, rows))
    ]
    torch.testing.assert_close(both, torch.where(mine_T[:, None], *alone), rtol=1e-9, atol=1e-12)
    assert both[mine_T].norm() > 0.01 and both[~mine_T].norm() > 0.01
