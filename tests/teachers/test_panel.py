"""Several scorers at once: each reads what it is asked about and nothing else, joined by rollout id."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opd.models.packing import pack
from opd.objectives.objective import Objective
from opd.teachers.panel import Panel
from opd.teachers.residence import OnDisk
from opd.types import ScorerRows, Want
from tests import rooms

ROUTED = {"name": "r", "target": {"kind": "routed", "routes": {"m": "one", "c": "two"}}}
BY_COLUMN = {"name": "r", "target": {"kind": "routed", "by": "kind", "routes": {"m": "one"}, "otherwise": "two"}}


@pytest.fixture(scope="module")
def parts():
    fmt = rooms.prompt_format()
    student = rooms.causal(seed=0)
    made = []
    for n, rollout in enumerate(rooms.rollouts(student, fmt)):
        row = dataclasses.replace(rollout.prompt.row, domain="mc"[n // 2 % 2], columns={"kind": "cm"[n // 2 % 2]})
        made.append(dataclasses.replace(rollout, prompt=dataclasses.replace(rollout.prompt, row=row)))
    models = {"one": rooms.causal("llama", seed=1), "two": rooms.causal(seed=2), "three": rooms.causal(seed=3)}
    return student, models, made, fmt


def panel_of(models, fmt) -> Panel:
    return Panel(rooms.teacher(model, fmt, name=name) for name, model in models.items())


def alone(model, rollout) -> torch.Tensor:
    """float64 [T]: log-probabilities of an answer's tokens, one sequence at a time."""
    ids = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]])
    with torch.no_grad():
        logits = model.module(ids).logits[0, len(rollout.prompt.ids) - 1 : -1, : model.vocab_size].double()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]


def drawn(rows: ScorerRows, batch) -> torch.Tensor:
    """float64 [R]: log-probabilities of the drawn tokens, whatever the resolution."""
    if rows.logprobs_T is not None:
        return rows.logprobs_T.double()
    token_T = batch.token_T if rows.index_T is None else batch.token_T[rows.index_T]
    logits = rows.hidden_TD @ rows.head.weight_VD[: rows.head.vocab_size].T
    return torch.log_softmax(logits.double(), -1).gather(1, token_T[:, None])[:, 0]


@pytest.mark.parametrize("resolution", ["sampled", "full"])
@pytest.mark.parametrize(("term", "first"), [(ROUTED, "m"), (BY_COLUMN, "c")])
def test_E_12_routing_decides_who_reads_which_answer(parts, resolution: str, term: dict, first: str) -> None:
    """`first`: the domain whose rows go to the scorer "one"."""
    _, models, made, fmt = parts
    objective = Objective(rooms.objective({**term, "support": {"kind": "full"} if resolution == "full" else "sampled"}))
    wants = objective.wants(made)
    assert {name: want.resolution for name, want in wants.items()} == {"one": resolution, "two": resolution}
    for rollout in made:
        assert (rollout.id in wants["one"].rollouts) == (rollout.domain == first)
        assert (rollout.id in wants["one"].rollouts) != (rollout.id in wants["two"].rollouts)
    batch = pack(made, device=torch.device("cpu"))
    evidence = panel_of(models, fmt).evidence(made)
    found = {rows.name: rows for rows in evidence.pull(batch, wants)}
    assert list(found) == ["one", "two"], "the third is not asked"
    for name, rows in found.items():
        theirs = [r for r in made if r.id in wants[name].rollouts]
        torch.testing.assert_close(
            drawn(rows, batch), torch.cat([alone(models[name], r) for r in theirs]), atol=1e-4, rtol=1e-4
        )
        assert rows.index_T.tolist() == [
            t for t, n in enumerate(batch.row_T.tolist()) if batch.rollouts[n].id in wants[name].rollouts
        ]
        assert evidence.lengths()[name] == [len(r.prompt.ids) + len(r.response_ids) for r in theirs]
    assert evidence.lengths().keys() == {"one", "two"}


def test_X_12_a_dropped_group_and_another_order_leave_everybody_with_their_own_scorer(parts) -> None:
    student, models, made, fmt = parts
    panel, spec = panel_of(models, fmt), rooms.objective(ROUTED)
    whole = {r.id: r for r in made}
    kept = [r for r in made[::-1] if r.prompt.id != made[0].prompt.id]
    wants = Objective(spec).wants(kept)
    for name, want in wants.items():
        assert want.rollouts and all(whole[key].domain == {"one": "m", "two": "c"}[name] for key in want.rollouts)
    grads = []
    for rollouts in (kept, kept[::-1]):
        learner = rooms.learner(student, spec, tokens_per_micro_batch=60)
        learner.gradients(rollouts, panel.evidence(rollouts))
        grads.append(rooms.gradient(student))
    assert rooms.distance(*grads) < 1e-5
    # the sum of what each domain gets from its own scorer alone, by its share of the tokens
    tokens = {d: sum(len(r.mask) for r in kept if r.domain == d) for d in "mc"}
    apart = []
    for domain, name in (("m", "one"), ("c", "two")):
        theirs = [r for r in kept if r.domain == domain]
        learner = rooms.learner(student, rooms.objective({"name": "r", "target": name}))
        learner.gradients(theirs, panel.evidence(theirs))
        apart.append(rooms.gradient(student) * tokens[domain] / sum(tokens.values()))
    assert rooms.distance(grads[0], apart[0] + apart[1]) < 1e-5


def test_X_11_every_scorer_of_the_panel_answers_a_probe(parts) -> None:
    _, models, made, fmt = parts
    panel = panel_of(models, fmt)
    batch = pack(made[:2], device=torch.device("cpu"))
    ids = frozenset(r.id for r in made[:2])
    wants = {name: Want("sampled", ids) for name in models}
    found = panel.evidence(made[:2]).pull(batch, wants)
    assert [rows.name for rows in found] == list(models) == list(panel.members)
    assert all(rows.index_T is None and rows.valid_T.all() for rows in found)
    with pytest.raises(AssertionError, match="one name"):
        Panel([rooms.teacher(models["one"], fmt, name="one"), rooms.teacher(models["two"], fmt, name="one")])


def test_weights_on_disk_come_for_a_step_and_say_the_same(parts, monkeypatch) -> None:
    _, models, made, fmt = parts
    loads: list[int] = []

    def load():
        loads.append(1)
        return rooms.causal("llama", seed=1)

    member = rooms.teacher(OnDisk(load), fmt, name="one")
    panel = Panel([member])
    batch = pack(made, device=torch.device("cpu"))
    wants = {"one": Want("sampled", frozenset(r.id for r in made))}
    stays = panel_of({"one": models["one"]}, fmt).evidence(made).pull(batch, wants)[0]
    for step in range(2):
        evidence = panel.evidence(made)
        assert member._residence._model is None
        for _ in range(2):
            assert torch.equal(evidence.pull(batch, wants)[0].logprobs_T, stays.logprobs_T)
        assert member._residence._model is not None and len(loads) == 2 + step
        evidence.release()
    assert panel.changed(["one"]) == {"one": False} and member._residence._model is None
    member._residence._load = lambda: rooms.causal("llama", seed=9)
    assert panel.changed(["one"]) == {"one": True}, "its files were replaced"


def test_the_student_as_its_own_teacher_moves_nothing_and_gets_no_gradient(parts) -> None:
    student, _, made, fmt = parts
    own, told = rooms.teacher(student, fmt, name="own"), rooms.teacher(student, rooms.told_more(), fmt, name="own")
    sizes = []
    for scorer in (own, told):
        for support in ({"kind": "full"}, "sampled"):
            learner = rooms.learner(student, rooms.objective({"name": "a", "target": "own", "support": support}))
            learner.gradients(made, scorer.evidence(made))
            sizes.append(rooms.gradient(student).norm().item())
    assert max(sizes[:2]) < 1e-5 * min(sizes[2:])
